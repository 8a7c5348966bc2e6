"""What is written for trtexec: models, what their engines have to be, a script (run with a stand-in)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from onnx_programs import artifact_of, cascade, chain

from exitcompiler.controlflow import BlockInterface, ValueSpec, engine_signature
from exitcompiler.errors import ArtifactError, InputError, LoweringError
from exitcompiler.runtime.manifest import Artifact, OperatingPoint, block_path
from exitcompiler.runtime.tensorrt_folder import read_engine_folder
from exitcompiler.trtexec_export import export_trtexec

STAND_IN = """\
#!{python}
import json, os, sys
print("&&&& RUNNING TensorRT.trtexec [TensorRT v{version}] [b26] # trtexec", *sys.argv[1:])
if "--help" in sys.argv:
    print("=== Build Options ===", "  --stronglyTyped  Strongly typed network.", "  --noTF32  No TF32")
    sys.exit(0)
options = dict(a.partition("=")[::2] for a in sys.argv[1:] if a.startswith("--save"))
if not {nameless!r}:
    print("[I] Selected Device: NVIDIA Paper")
    print("[I] Compute Capability: 8.9")
with open("asked.jsonl", "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
if {fails!r} and {fails!r} in options["--saveEngine"]:
    open(options["--saveEngine"], "w").write("half")
    print("[E] Error[10]: no implementation for node conv.0")
    sys.exit(1)
if not {silent!r}:
    open(options["--saveEngine"], "w").write("plan of " + sys.argv[1])
"""


@pytest.fixture
def artifact() -> Artifact:
    return artifact_of(chain())


def selected(artifact: Artifact) -> OperatingPoint:
    return artifact.manifest.operating_points[artifact.manifest.selected]


def stand_in(
    folder: Path, version: str = "101600", fails: str = "", silent: bool = False, nameless: bool = False
) -> Path:
    path = folder / f"trtexec {version}"
    path.write_text(
        STAND_IN.format(python=sys.executable, version=version, fails=fails, silent=silent, nameless=nameless)
    )
    path.chmod(0o755)
    return path


def run(folder: Path, *arguments: object, cwd: Path = Path("/")) -> subprocess.CompletedProcess[str]:
    command = [str(folder / "build.sh"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=60)


def asked(folder: Path) -> list[list[str]]:
    return [json.loads(line) for line in (folder / "asked.jsonl").read_text().splitlines()]


def test_the_folder_holds_the_models_and_says_what_each_engine_has_to_be(
    artifact: Artifact, tmp_path: Path
) -> None:
    export_trtexec(artifact, tmp_path / "out", (1, 4))
    point = selected(artifact)
    facts = json.loads((tmp_path / "out" / "engines.json").read_text())
    assert facts["precision"] == "fp32"
    assert [engine["block"] for engine in facts["engines"]] == ["first", "second", "third"]
    for engine in facts["engines"]:
        content = (tmp_path / "out" / engine["onnx"]).read_bytes()
        assert content == artifact.files[block_path(point.files[engine["block"]])]
        assert engine["onnx_sha256"] == hashlib.sha256(content).hexdigest()
        assert engine["buckets"] == [1, 4]
        signature = engine_signature(point.control_flow.block(engine["block"]))
        for key, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
            found = {n: ValueSpec(tuple(s["shape"]), s["dtype"]) for n, s in engine[key].items()}
            assert found == specs
    read = read_engine_folder(tmp_path / "out")
    assert [planned.plan for planned in read.engines.values()] == [e["plan"] for e in facts["engines"]]
    assert read.device is None
    assert (read.point, read.precision, read.buckets) == (point.name, "fp32", (1, 4))
    readme = (tmp_path / "out" / "README.md").read_text()
    assert "1, 4 rows" in readme
    assert f"operating point {point.name}." in readme


@pytest.mark.parametrize(("version", "asks"), [("100100", True), ("101600", True), ("110400", False)])
def test_the_script_builds_every_engine_with_the_flags_of_the_version(
    artifact: Artifact, tmp_path: Path, version: str, asks: bool
) -> None:
    folder = tmp_path / "a folder"
    export_trtexec(artifact, folder, (1, 4))
    done = run(folder, stand_in(tmp_path, version), "--verbose", "--memPoolSize=workspace:1 024")
    assert done.returncode == 0, done.stderr
    calls = asked(folder)
    plans = [e["plan"] for e in json.loads((folder / "engines.json").read_text())["engines"]]
    assert len(calls) == len(plans) == 3
    assert all((folder / plan).read_text().startswith("plan of --onnx=") for plan in plans)
    for call in calls:
        assert ("--stronglyTyped" in call) == asks
        assert {"--skipInference", "--maxAuxStreams=0", "--noTF32"} < set(call)
        assert call[-2:] == ["--verbose", "--memPoolSize=workspace:1 024"]
        assert not any(flag.startswith(("--fp16", "--bf16", "--best")) for flag in call)
    first = calls[0]
    start = first.index("--profile=0")
    shapes = [[f"--{which}Shapes=x:{rows}x4" for which in ("min", "opt", "max")] for rows in (1, 4)]
    assert first[start : start + 8] == ["--profile=0", *shapes[0], "--profile=1", *shapes[1]]
    assert list(folder.glob("*.new")) == []
    assert read_engine_folder(folder).device == ("NVIDIA Paper", "8.9")


def test_values_without_rows_get_no_shapes_and_several_with_rows_stand_together(tmp_path: Path) -> None:
    export_trtexec(artifact_of(cascade()), tmp_path, (8,))
    (big,) = (
        line for line in (tmp_path / "build.sh").read_text().splitlines() if line.startswith("build 03_big")
    )
    assert "--optShapes=h2:8x7,x4:8x4" in big
    (small,) = (line for line in (tmp_path / "build.sh").read_text().splitlines() if "build 00_small" in line)
    assert "gate_weight" not in small


def test_an_engine_that_fails_is_named_and_leaves_what_was_there(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_trtexec(artifact, folder)
    assert run(folder, stand_in(tmp_path)).returncode == 0
    before = {path.name: path.read_text() for path in folder.glob("*.plan")}
    done = run(folder, stand_in(tmp_path, fails="01_second"))
    assert done.returncode == 1
    assert "01_second" in done.stderr
    assert "no implementation for node conv.0" in done.stderr
    assert {path.name: path.read_text() for path in folder.glob("*.plan")} == before
    assert list(folder.glob("*.new")) == []
    assert not (folder / "device.txt").exists()


def test_a_trtexec_that_names_no_device_leaves_no_folder_that_can_be_used(
    artifact: Artifact, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    export_trtexec(artifact, folder)
    assert run(folder, stand_in(tmp_path)).returncode == 0
    done = run(folder, stand_in(tmp_path, nameless=True))
    assert done.returncode == 1
    assert "to device.txt, a line each, as nvidia-smi --query-gpu=name,compute_cap" in done.stderr
    assert read_engine_folder(folder).device is None


def test_the_program_may_be_named_from_where_one_is(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_trtexec(artifact, folder)
    program = stand_in(tmp_path)
    assert run(folder, f"./{program.name}", cwd=tmp_path).returncode == 0
    assert run(folder, f"{tmp_path.name}/{program.name}", cwd=tmp_path.parent).returncode == 0
    assert f"there is no {tmp_path}/nowhere/trtexec" in run(folder, "nowhere/trtexec", cwd=tmp_path).stderr


def test_success_without_an_engine_is_none(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_trtexec(artifact, folder)
    assert run(folder, stand_in(tmp_path, silent=True)).returncode == 1
    assert list(folder.glob("*.plan")) == []


@pytest.mark.parametrize("version", ["8601", "99999"])
def test_a_tensorrt_that_is_too_old_is_refused(artifact: Artifact, tmp_path: Path, version: str) -> None:
    export_trtexec(artifact, tmp_path / "out")
    done = run(tmp_path / "out", stand_in(tmp_path, version))
    assert done.returncode == 1
    assert "before 10" in done.stderr


def test_a_program_that_is_missing_or_another_one_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    export_trtexec(artifact, folder)
    assert "there is no /nowhere/trtexec" in run(folder, "/nowhere/trtexec").stderr
    assert "does not say which TensorRT" in run(folder, "true").stderr
    assert list(folder.glob("*.plan")) == []


def renamed(artifact: Artifact, name: str) -> Artifact:
    """The artifact with its last block called something else."""
    point = selected(artifact)
    *blocks, last = point.control_flow.blocks
    flow = dataclasses.replace(
        point.control_flow, blocks=(*blocks, BlockInterface(name, last.params, last.results, last.terminator))
    )
    files = {name if block == last.name else block: file for block, file in point.files.items()}
    point = dataclasses.replace(point, control_flow=flow, files=files)
    return dataclasses.replace(
        artifact, manifest=dataclasses.replace(artifact.manifest, operating_points=(point,))
    )


@pytest.mark.parametrize(
    "name",
    ["$(touch pwned)", "a; touch pwned #", "'\"`touch pwned`", "../../pwned", "-rf", "é ü\n", "@BUILDS@"],
)
def test_names_of_blocks_cannot_make_the_script_do_anything_else(
    artifact: Artifact, tmp_path: Path, name: str
) -> None:
    folder = tmp_path / "out"
    export_trtexec(renamed(artifact, name), folder, (1,))
    done = run(folder, stand_in(tmp_path))
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "trtexec 101600"]
    assert not list(folder.glob("pwned*"))
    assert len(list(folder.glob("02_*.plan"))) == 1
    assert [engine.block for engine in read_engine_folder(folder).engines.values()][-1] == name


@pytest.mark.parametrize("name", ["a,b", "a:b", "a b", "a'b", "$(x)"])
def test_a_name_that_trtexec_would_take_apart_is_refused(
    artifact: Artifact, tmp_path: Path, name: str
) -> None:
    point = selected(artifact)
    first, *others = point.control_flow.blocks
    changed = BlockInterface(first.name, {name: first.params["x"]}, first.results, first.terminator)
    flow = dataclasses.replace(point.control_flow, blocks=(changed, *others))
    point = dataclasses.replace(point, control_flow=flow)
    manifest = dataclasses.replace(artifact.manifest, operating_points=(point,))
    with pytest.raises(LoweringError, match="block 'first': trtexec takes no input called"):
        export_trtexec(dataclasses.replace(artifact, manifest=manifest), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_engines_of_an_older_compilation_are_not_taken_for_the_new_ones(tmp_path: Path) -> None:
    export_trtexec(artifact_of(chain()), tmp_path)
    for plan in (e["plan"] for e in json.loads((tmp_path / "engines.json").read_text())["engines"]):
        (tmp_path / plan).write_text("old")
    newer = artifact_of(chain(seed=3))
    export_trtexec(newer, tmp_path)
    file = selected(newer).files["first"]
    with pytest.raises(ArtifactError, match="has not been built"):
        read_engine_folder(tmp_path).plan(file.removesuffix(".onnx"), "block 'first'")


@pytest.mark.parametrize("buckets", [(), (0,), (4, 1), (1, 1)])
def test_buckets_that_make_no_sense_are_refused(
    artifact: Artifact, tmp_path: Path, buckets: tuple[int, ...]
) -> None:
    with pytest.raises(InputError, match="buckets are"):
        export_trtexec(artifact, tmp_path, buckets)


def test_a_place_where_nothing_can_be_written_is_named(artifact: Artifact, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be made"):
        export_trtexec(artifact, tmp_path / "file" / "out")
