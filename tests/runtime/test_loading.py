"""Loading artifacts: good ones without torch, bad ones with a clear error."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import artifact_of, cascade, chain, plain, random_rows

from exitcompiler.artifact import save_artifact
from exitcompiler.errors import ArtifactError, BackendUnavailableError, InputError
from exitcompiler.runtime import backends, loading
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.loading import load
from exitcompiler.runtime.manifest_json import _digest

pytest.importorskip("onnxruntime")


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "model.exit"
    save_artifact(artifact_of(chain(3), cascade(3), plain(3)), path)
    return path


def zipped(folder: Path, compression: int = zipfile.ZIP_STORED) -> Path:
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w", compression) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
    return path


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest as an attacker would: with a right digest."""
    file = folder / "manifest.json"
    document = json.loads(file.read_bytes())
    edit(document)
    document.pop("digest")
    document["digest"] = _digest(document)
    file.write_text(json.dumps(document))


def some_block(folder: Path) -> Path:
    return min((folder / "blocks").iterdir())


@pytest.mark.parametrize("form", ["folder", "stored zip", "deflated zip"])
def test_what_was_saved_is_loaded(saved: Path, form: str) -> None:
    if form != "folder":
        saved = zipped(saved, zipfile.ZIP_DEFLATED if "deflated" in form else zipfile.ZIP_STORED)
    model = load(saved)
    x = random_rows(7)
    np.testing.assert_array_equal(model(x), np.stack([chain(3).answer_row(row)[0] for row in x]))
    assert model.artifact.report == {"model": {"name": "test"}}
    assert model.notes == ()


def test_loading_and_running_needs_no_torch(saved: Path) -> None:
    script = """
        import sys
        sys.modules["torch"] = None
        sys.modules["onnx"] = None
        import numpy, exitcompiler
        for backend in sys.argv[2:]:
            model = exitcompiler.load(sys.argv[1], backend=backend)
            model(numpy.zeros((1, 4), "float32"))
            model.run(numpy.zeros((3, 4), "float32"))
            model.plain(numpy.zeros((3, 4), "float32"))
            model.explain()
            model.save(sys.argv[1] + ".copy")
        imported = {name.split(".")[0] for name, module in sys.modules.items() if module is not None}
        assert not imported & {"torch", "onnx", "pandas"}, imported
    """
    without = {"torch", *backends.DEVICE_BACKENDS}
    installed = [name for name in backends.available_backends() if name not in without]
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(saved), *installed], check=True, timeout=60
    )


def test_what_is_in_float32_is_not_loaded_as_int8(saved: Path) -> None:
    with pytest.raises(InputError, match=r"typed for fp32: they do not run at int8\n.*precision='int8'"):
        load(saved, precision="int8")


def truncate(folder: Path) -> None:
    file = some_block(folder)
    file.write_bytes(file.read_bytes()[:-1])


def change_byte(folder: Path) -> None:
    file = some_block(folder)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def lengthen(folder: Path) -> None:
    some_block(folder).write_bytes(some_block(folder).read_bytes() + b"x")


def remove_block(folder: Path) -> None:
    some_block(folder).unlink()


def truncate_manifest(folder: Path) -> None:
    file = folder / "manifest.json"
    file.write_bytes(file.read_bytes()[:-20])


def change_gate(folder: Path) -> None:
    file = folder / "manifest.json"
    text = file.read_text()
    file.write_text(text.replace('"accuracy": 0.9', '"accuracy": 0.8', 1))


def newer_schema(folder: Path) -> None:
    edit_manifest(folder, lambda d: d.update(schema_version=3))


def add_pickle(folder: Path) -> None:
    (folder / "weights.pkl").write_bytes(pickle.dumps([1]))


def add_torch_save(folder: Path) -> None:
    (folder / "blocks" / "weights.pt").write_bytes(b"PK\x03\x04")


def list_pickle(folder: Path) -> None:
    edit_manifest(folder, lambda d: d["files"].update({"a.pkl": {"sha256": "0" * 64, "size_bytes": 1}}))


def disguise_pickle(folder: Path) -> None:
    content = pickle.dumps([1])
    digest = hashlib.sha256(content).hexdigest()
    (folder / f"blocks/{digest}.onnx").write_bytes(content)
    entry = {"sha256": digest, "size_bytes": len(content)}
    edit_manifest(folder, lambda d: d["files"].update({f"blocks/{digest}.onnx": entry}))


def list_path_outside(folder: Path) -> None:
    edit_manifest(folder, lambda d: d["files"].update({"../secret": {"sha256": "0" * 64, "size_bytes": 1}}))


def list_absolute_path(folder: Path) -> None:
    edit_manifest(folder, lambda d: d["files"].update({"/etc/hosts": {"sha256": "0" * 64, "size_bytes": 1}}))


def block_outside(folder: Path) -> None:
    edit_manifest(folder, lambda d: d["operating_points"][0]["files"].update(first="../../secret.onnx"))


def link_file(folder: Path) -> None:
    file = some_block(folder)
    moved = folder.parent / "elsewhere.onnx"
    shutil.move(file, moved)
    file.symlink_to(moved)


def link_folder(folder: Path) -> None:
    shutil.move(folder / "blocks", folder.parent / "elsewhere")
    (folder / "blocks").symlink_to(folder.parent / "elsewhere")


def add_unknown(folder: Path) -> None:
    (folder / "notes.txt").write_text("hello")


def add_folder(folder: Path) -> None:
    (folder / "more").mkdir()


def unlisted_block(folder: Path) -> None:
    (folder / f"blocks/{'0' * 64}.onnx").write_bytes(b"\x08")


def unlist_block(folder: Path) -> None:
    name = f"blocks/{some_block(folder).name}"
    some_block(folder).unlink()
    edit_manifest(folder, lambda d: d["files"].pop(name))


def swap_names(folder: Path) -> None:
    first, second, *_ = sorted((folder / "blocks").iterdir())
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)

    def edit(document: dict[str, Any]) -> None:
        files = document["files"]
        a, b = f"blocks/{first.name}", f"blocks/{second.name}"
        files[a], files[b] = files[b], files[a]

    edit_manifest(folder, edit)


def no_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def report_not_object(folder: Path) -> None:
    content = b"[]"
    (folder / "report.json").write_bytes(content)
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": 2}
    edit_manifest(folder, lambda d: d["files"].update({"report.json": entry}))


@pytest.mark.parametrize("as_zip", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "truncated: the manifest says"),
        (change_byte, "changed: its SHA-256"),
        (lengthen, "too long"),
        (remove_block, "the file is missing"),
        (truncate_manifest, "not valid JSON"),
        (change_gate, "changed after it was written"),
        (newer_schema, "schema version 3"),
        (add_pickle, r"weights.pkl: a pickle"),
        (add_torch_save, r"weights.pt: a pickle"),
        (list_pickle, r"a.pkl: a pickle"),
        (disguise_pickle, "a pickle in disguise"),
        (list_path_outside, r"\.\./secret: the name leads out"),
        (list_absolute_path, "/etc/hosts: the name leads out"),
        (block_outside, "leads out"),
        (add_unknown, r"notes.txt: not a file that an artifact holds"),
        (unlisted_block, "the manifest does not list it"),
        (unlist_block, "an operating point needs it"),
        (swap_names, "named by its SHA-256"),
        (no_manifest, r"manifest.json: the file is missing"),
        (report_not_object, "expected an object"),
    ],
)
def test_a_bad_artifact(saved: Path, damage: Callable[[Path], None], message: str, as_zip: bool) -> None:
    damage(saved)
    path = zipped(saved) if as_zip else saved
    with pytest.raises(ArtifactError, match=message) as caught:
        load(path)
    assert str(path) in str(caught.value)
    assert caught.value.remedy


@pytest.mark.parametrize("damage", [link_file, link_folder])
def test_links_are_not_followed(saved: Path, damage: Callable[[Path], None]) -> None:
    damage(saved)
    with pytest.raises(ArtifactError, match="a link"):
        load(saved)


def test_an_unknown_folder(saved: Path) -> None:
    add_folder(saved)
    with pytest.raises(ArtifactError, match="more: not a file"):
        load(saved)


def bomb(archive: zipfile.ZipFile) -> None:
    archive.writestr("report.json", b"0" * 2**22, zipfile.ZIP_DEFLATED)


def link_entry(archive: zipfile.ZipFile) -> None:
    entry = zipfile.ZipInfo("model.onnx")
    entry.external_attr = 0o120777 << 16
    archive.writestr(entry, "/etc/hosts")


def climb(archive: zipfile.ZipFile) -> None:
    archive.writestr("../../evil.onnx", b"x")


@pytest.mark.filterwarnings("ignore:Duplicate name")
def twice(archive: zipfile.ZipFile) -> None:
    archive.writestr("manifest.json", b"{}")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize(
    ("add", "message"),
    [
        (bomb, "unpack to"),
        (link_entry, "a link"),
        (climb, "leads out"),
        (twice, "there twice|missing"),
    ],
)
def test_a_bad_zip(saved: Path, add: Callable[[zipfile.ZipFile], None], message: str) -> None:
    if add is bomb:
        (saved / "report.json").unlink()
    path = zipped(saved)
    with zipfile.ZipFile(path, "a") as archive:
        add(archive)
    with pytest.raises(ArtifactError, match=message):
        load(path)


def test_a_truncated_zip(saved: Path) -> None:
    path = zipped(saved)
    whole = path.read_bytes()
    for share in (0.0, 0.3, 0.7, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ArtifactError, match=r"complete zip file|cannot be read"):
            load(path)


def test_every_changed_byte_of_a_zip_is_noticed_or_harmless(saved: Path) -> None:
    path = zipped(saved)
    whole = path.read_bytes()
    expected = read_artifact(path)
    rng = np.random.default_rng(0)
    for position in rng.integers(0, len(whole), 150):
        changed = bytearray(whole)
        changed[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(changed)
        try:
            found = read_artifact(path)
        except ArtifactError:
            continue
        assert found == expected


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="there is nothing here"):
        load(tmp_path / "missing.exit")
    (tmp_path / "text.exit").write_text("hello")
    with pytest.raises(ArtifactError, match="neither a folder nor a complete zip"):
        load(tmp_path / "text.exit")


def test_relative_paths(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert load(saved.name).exits == load(os.path.join(".", saved.name, "")).exits
    monkeypatch.chdir(saved)
    assert load(".").exits == ("exit1", "exit2", "backbone")


def test_another_backend_only_under_auto(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(backends, "is_installed", lambda package: package != "onnxruntime")
    model = load(saved)
    assert model.backend.name == "openvino"
    assert model.notes == (
        "compiled and measured for onnxruntime, running on openvino: onnxruntime is not installed",
    )
    assert "running on openvino" in caplog.text
    with pytest.raises(BackendUnavailableError, match="pip install onnxruntime"):
        load(saved, backend="onnxruntime")


def test_no_backend_at_all(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_installed", lambda package: package == "torch")
    with pytest.raises(BackendUnavailableError, match=r"holds no torch graphs\n.*pip install onnxruntime"):
        load(saved)


def test_a_program_for_a_cpu_asks_for_no_gpu(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked() -> bool:
        raise AssertionError("CUDA would be initialised, and processes forked later could not use it")

    monkeypatch.setattr(backends, "_has_gpu", asked)
    monkeypatch.setattr(backends, "is_installed", lambda package: package != "onnxruntime")
    assert load(saved).backend.name == "openvino"


def test_options(saved: Path) -> None:
    assert load(saved).backend.threads == 1
    assert load(saved, threads=2).backend.threads == 2
    with pytest.raises(InputError, match="unknown backend"):
        load(saved, backend="cpu")
    with pytest.raises(BackendUnavailableError, match="no precision"):
        load(saved, backend="onnxruntime", precision="bf16")
    with pytest.raises(ArtifactError, match="no torch graph of block"):
        load(saved, backend="torch")(random_rows(1))


def test_a_precision_it_was_not_learned_at_is_said(saved: Path) -> None:
    artifact = read_artifact(saved)
    learned = replace(artifact, manifest=replace(artifact.manifest, precision="bf16"))
    model = loading.open_artifact(learned, precision="fp32")
    assert model.notes == ("the gates were learned at bf16, running at fp32",)
