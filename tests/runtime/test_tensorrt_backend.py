"""Blocks with TensorRT: built once, kept, shared, or taken from a folder; on a TensorRT of paper."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
from fake_tensorrt import FakeDriver, FakeTensorRt
from onnx_programs import artifact_of, chain, to_onnx

from exitcompiler.controlflow import engine_signature
from exitcompiler.errors import ArtifactError, BackendUnavailableError, InputError, LoweringError
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.runtime.manifest import Artifact
from exitcompiler.runtime.tensorrt_backend import TensorRtBackend
from exitcompiler.runtime.tensorrt_engine import TensorRtEngine
from exitcompiler.trtexec_export import export_trtexec

ARTIFACT: Artifact = artifact_of(chain())
POINT = ARTIFACT.manifest.operating_points[0]
FIRST, SECOND, THIRD = POINT.control_flow.blocks


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> FakeTensorRt:
    return install(monkeypatch)


def install(monkeypatch: pytest.MonkeyPatch, version: str = "10.16.1.11") -> FakeTensorRt:
    found = FakeTensorRt(version=version)
    monkeypatch.setitem(sys.modules, "tensorrt", found)
    return found


def blocks(module: FakeTensorRt, cache: Path | None, **options: Any) -> TensorRtBackend:
    driver: Any = FakeDriver(module.calls)
    driver.name = options.pop("device", driver.name)
    if "engines" not in options:
        options = {"buckets": (1, 2, 4), **options}
    return TensorRtBackend(driver=driver, cache=cache, flavour="tensorrt", **options)


def load(some: TensorRtBackend, block: Any = FIRST) -> TensorRtEngine:
    return some.load_device_block(ARTIFACT.files, POINT, block)


def test_every_block_is_built_for_every_bucket(module: FakeTensorRt) -> None:
    some = blocks(module, None)
    engines = [load(some, block) for block in POINT.control_flow.blocks]
    assert module.builds == 3
    assert [[str(p) for p in engine.profiles] for engine in engines] == [["1", "2", "4"]] * 3
    assert some.buckets == (1, 2, 4)
    assert blocks(module, None, buckets=None).buckets == (1, 2, 4, 8, 16, 32)
    assert load(blocks(module, None), FIRST).signature == engines[0].signature


def test_an_engine_that_is_in_use_is_shared_and_forgotten_when_it_is_not(module: FakeTensorRt) -> None:
    some = blocks(module, None)
    engine = load(some)
    assert load(some) is engine
    del engine
    load(some)
    assert module.builds == 2


def test_engines_are_kept_from_run_to_run(module: FakeTensorRt, tmp_path: Path) -> None:
    load(blocks(module, tmp_path))
    load(blocks(module, tmp_path))
    assert module.builds == 1


@pytest.mark.parametrize("change", ["version", "device", "buckets", "model"])
def test_what_is_kept_for_another_case_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    load(blocks(install(monkeypatch), tmp_path))
    other = install(monkeypatch, "10.16.1.12" if change == "version" else "10.16.1.11")
    some = blocks(
        other,
        tmp_path,
        device="another" if change == "device" else "NVIDIA Paper",
        buckets=(1, 2) if change == "buckets" else (1, 2, 4),
    )
    load(some, SECOND if change == "model" else FIRST)
    assert other.builds == 1


def test_a_damaged_engine_is_built_again_with_a_line_in_the_log(
    module: FakeTensorRt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(blocks(module, tmp_path))
    (path,) = tmp_path.glob("*.engine")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + b"!")
    load(blocks(module, tmp_path))
    assert module.builds == 2
    assert "its content has changed; it is made again" in caplog.text
    assert path.read_bytes() == whole


def test_a_kept_engine_that_tensorrt_no_longer_takes_is_built_again(
    module: FakeTensorRt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load(blocks(module, tmp_path))
    module.changes = {"aux_streams": 3}  # what is loaded differs from what was built
    with pytest.raises(ArtifactError, match=r"3 auxiliary streams.*\n.*backend='cuda'"):
        load(blocks(module, tmp_path))
    assert module.builds == 2
    assert "the kept engine is built again" in caplog.text


def test_timings_are_kept_for_other_blocks(module: FakeTensorRt, tmp_path: Path) -> None:
    some = blocks(module, tmp_path)
    load(some)
    load(some, SECOND)
    (path,) = tmp_path.glob("*.timings")
    assert path.read_bytes().endswith(b"\ntimed;timed;")


def test_without_a_cache_nothing_is_written(module: FakeTensorRt, tmp_path: Path) -> None:
    load(blocks(module, None))
    assert list(tmp_path.iterdir()) == []


def test_the_cache_is_the_users_unless_another_is_named(
    module: FakeTensorRt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    driver: Any = FakeDriver(module.calls)
    load(TensorRtBackend(driver=driver, flavour="tensorrt"))
    assert [path.suffix for path in sorted((tmp_path / "exitcompiler" / "tensorrt").iterdir())] != []


def test_a_build_that_fails_leaves_nothing(module: FakeTensorRt, tmp_path: Path) -> None:
    module.trouble.add("build")
    with pytest.raises(LoweringError, match=r"backend 'tensorrt', block 'first': .*no kernels"):
        load(blocks(module, tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_what_it_has_not_got_is_refused_at_once(module: FakeTensorRt) -> None:
    with pytest.raises(BackendUnavailableError, match="no precision 'int8'"):
        blocks(module, None, precision="int8")
    for buckets in ((), (0, 1), (2, 1), (1, 1)):
        with pytest.raises(InputError, match="buckets are"):
            blocks(module, None, buckets=buckets)


# ---------------------------------------------------------------- a folder that trtexec filled


@pytest.fixture
def folder(module: FakeTensorRt, tmp_path: Path) -> Path:
    """As build.sh leaves it, with engines for 1 and 4 rows."""
    folder = tmp_path / "engines"
    export_trtexec(ARTIFACT, folder, (1, 4))
    fill(folder, module)
    return folder


def fill(folder: Path, module: FakeTensorRt) -> None:
    cache = folder / "cache"
    some = blocks(module, cache, buckets=(1, 4))
    facts = json.loads((folder / "engines.json").read_text())
    for entry in facts["engines"]:
        load(some, POINT.control_flow.block(entry["block"]))
        (kept,) = cache.glob("*.engine")
        (folder / entry["plan"]).write_bytes(kept.read_bytes().partition(b"\n")[2])
        kept.unlink()
    (folder / "device.txt").write_text("NVIDIA Paper\n8.9\n")


def test_engines_of_a_folder_are_used_as_they_are(module: FakeTensorRt, folder: Path) -> None:
    module.builds = 0
    some = blocks(module, None, engines=folder)
    assert [len(load(some, block).profiles) for block in POINT.control_flow.blocks] == [2] * 3
    assert some.buckets == (1, 4)
    assert module.builds == 0


def test_a_folder_has_buckets_of_its_own_those_that_all_its_engines_are_for(
    module: FakeTensorRt, folder: Path
) -> None:
    with pytest.raises(InputError, match="has buckets of its own"):
        blocks(module, None, engines=folder, buckets=(1, 4))
    path = folder / "engines.json"
    facts = json.loads(path.read_text())
    for buckets, shared in (([4, 8], (4,)), ([2], ())):
        facts["engines"][1]["buckets"] = buckets
        path.write_text(json.dumps(facts))
        if shared:
            assert blocks(module, None, engines=folder).buckets == shared
        else:
            with pytest.raises(ArtifactError, match=r"no number of rows.*\n.*--format trtexec"):
                blocks(module, None, engines=folder)


@pytest.mark.parametrize("left", [None, "", "NVIDIA Paper\n"])
def test_engines_that_were_not_built_to_the_end_are_refused(
    module: FakeTensorRt, folder: Path, left: str | None
) -> None:
    """The script takes device.txt away first, and writes it when all is built."""
    path = folder / "device.txt"
    path.unlink() if left is None else path.write_text(left)
    with pytest.raises(ArtifactError, match=r"not been built to the end.*\n.*run .*build\.sh"):
        blocks(module, None, engines=folder)


def test_engines_for_arrays_on_the_host_are_built_in_spite_of_a_folder(
    module: FakeTensorRt, folder: Path
) -> None:
    before = module.builds
    blocks(module, None, engines=folder).load_block(ARTIFACT.files, POINT, FIRST, static_batch=1)
    assert module.builds == before + 1


def test_an_engine_that_is_not_built_yet_is_named_with_the_script(module: FakeTensorRt, folder: Path) -> None:
    next(folder.glob("00_*.plan")).unlink()
    with pytest.raises(ArtifactError, match=r"00_first-\w+\.plan has not been built\n.*build\.sh"):
        load(blocks(module, None, engines=folder))


def test_an_engine_of_another_compilation_is_not_used(module: FakeTensorRt, folder: Path) -> None:
    other = artifact_of(chain(seed=5))
    with pytest.raises(
        ArtifactError, match=r"from another one .*; the folder holds operating point 'p.*\n.*without engines="
    ):
        blocks(module, None, engines=folder).load_device_block(
            other.files,
            other.manifest.operating_points[0],
            other.manifest.operating_points[0].control_flow.entry,
        )


def test_an_engine_for_other_rows_is_refused(module: FakeTensorRt, folder: Path) -> None:
    path = folder / "engines.json"
    path.write_text(path.read_text().replace('"buckets": [\n        1,', '"buckets": [\n        2,'))
    with pytest.raises(
        ArtifactError, match=r"\.plan, .*profile 0 takes 1..1 rows of input 'x'.*\n.*build\.sh"
    ):
        load(blocks(module, None, engines=folder))


def test_engines_of_another_device_or_version_or_precision_are_refused(
    module: FakeTensorRt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(
        ArtifactError, match=r"built on NVIDIA Paper \(compute capability 8.9\), here is another"
    ):
        blocks(module, None, engines=folder, device="another")
    with pytest.raises(ArtifactError, match="for fp32, the program is to run at fp16"):
        blocks(module, None, engines=folder, precision="fp16")
    newer = install(monkeypatch, "11.4.0.106")
    with pytest.raises(ArtifactError, match=r"built by tensorrt 10\.16\.1\.11, here is tensorrt 11.4.0.106"):
        load(blocks(newer, None, engines=folder))


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"exitcompiler engines 1"', '"exitcompiler engines 9"', "expected one of"),
        ('"plan": "00_', '"plan": "../00_', "not the name of a file in the folder"),
        ('"onnx_sha256"', '"sha"', "onnx_sha256.* is missing"),
        ('"point"', '"dot"', "point.* is missing"),
        ('"engines": [', '"engines": [], "old": [', "lists no engines"),
        ("{", "", "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_refused(
    module: FakeTensorRt, folder: Path, old: str, new: str, says: str
) -> None:
    path = folder / "engines.json"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ArtifactError, match=says):
        blocks(module, None, engines=folder)


def test_another_folder_is_refused(module: FakeTensorRt, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot be read.*\n.*--format trtexec"):
        blocks(module, None, engines=tmp_path / "nowhere")


def test_engines_are_built_without_a_word_above_info(
    module: FakeTensorRt, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    load(blocks(module, tmp_path))
    assert {record.levelno for record in caplog.records} == {logging.INFO}


@pytest.mark.parametrize(
    ("static_batch", "profiles"),
    [
        (1, [(1, 1, 1)]),
        (3, [(4, 4, 4)]),
        (32, [(32, 32, 32)]),
        (40, [(8, 8, 8), (32, 32, 32)]),
        (None, [(1, 32, 32)]),
    ],
)
def test_for_arrays_on_the_host_only_what_will_run_is_built(
    module: FakeTensorRt, static_batch: int | None, profiles: list[tuple[int, int, int]]
) -> None:
    some = blocks(module, None)
    engine = some.load_block(ARTIFACT.files, POINT, FIRST, static_batch=static_batch)
    assert engine.signature == engine_signature(FIRST)
    (config,) = module.configs
    assert [tuple(shape[0] for shape in profile.shapes["x"]) for profile in config.profiles] == profiles


def test_a_whole_model_is_an_engine_too(module: FakeTensorRt) -> None:
    model = to_onnx(THIRD, chain().bodies[THIRD.name])
    engine = blocks(module, None).load(model, engine_signature(THIRD), static_batch=1)
    assert list(engine.signature.inputs) == list(THIRD.params)
    module.trouble.add("parse")
    with pytest.raises(LoweringError, match=r"backend 'tensorrt', the model: .*does not take the model"):
        blocks(module, None).load(model, engine_signature(THIRD))


def test_a_program_is_loaded_with_its_engines(
    module: FakeTensorRt, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver: Any = FakeDriver(module.calls)
    monkeypatch.setattr("exitcompiler.runtime.cuda_driver.Driver.open", lambda ordinal: driver)
    compiled = open_artifact(ARTIFACT, "tensorrt", engines=folder)
    assert compiled.backend.name == "tensorrt"
    assert isinstance(compiled.backend, TensorRtBackend)
    assert len(load(compiled.backend).profiles) == 2
    with pytest.raises(InputError, match="engines are for TensorRT"):
        open_artifact(ARTIFACT, "onnxruntime", engines=folder)
