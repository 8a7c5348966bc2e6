"""Saving: all or nothing."""

from __future__ import annotations

import errno
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import artifact_of, chain, plain, random_rows

from exitcompiler import artifact as saving
from exitcompiler.artifact import require_replaceable, save_artifact
from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.artifact_files import previous_path, read_artifact
from exitcompiler.runtime.loading import load, open_artifact
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact, block_path

OLD = artifact_of(plain(1))
NEW = artifact_of(plain(2))


def same(a: Artifact, b: Artifact) -> bool:
    """Equal but for the list of files, which saving fills in."""
    return (a.files, a.report) == (b.files, b.report) and replace(a.manifest, files={}) == replace(
        b.manifest, files={}
    )


@pytest.mark.parametrize("name", ["m.exit", "m.zip", "deep/er/m"])
def test_it_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    for content in (OLD, artifact_of(chain(2), plain(2)), NEW):
        save_artifact(content, path)
        assert same(read_artifact(path), content)
        assert os.listdir(path.parent) == [path.name]
    assert path.is_file() == name.endswith(".zip")


def test_a_zip_by_request_and_one_form_over_the_other(tmp_path: Path) -> None:
    path = tmp_path / "m"
    for content, as_zip in ((OLD, True), (NEW, False), (OLD, True), (NEW, True)):
        save_artifact(content, path, as_zip=as_zip)
        assert path.is_file() == as_zip
        assert same(read_artifact(path), content)
        assert os.listdir(tmp_path) == ["m"]


def test_equal_artifacts_make_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.zip", "b.zip"):
        save_artifact(OLD, tmp_path / name)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_only_what_is_used_is_written(tmp_path: Path) -> None:
    extra = Artifact(OLD.manifest, {**OLD.files, block_path("0" * 64 + ".onnx"): b"unused"})
    save_artifact(extra, tmp_path / "m")
    assert read_artifact(tmp_path / "m").files == OLD.files


def with_torch(artifact: Artifact) -> Artifact:
    files = dict(artifact.files)
    points = []
    for point in artifact.manifest.operating_points:
        stems = {block: file.removesuffix(".onnx") for block, file in point.files.items()}
        for stem in stems.values():
            files[f"torch/{stem}.json"] = b"{}"
            files[f"torch/{stem}.safetensors"] = b"weights"
        points.append(replace(point, torch_files=stems))
    return Artifact(replace(artifact.manifest, operating_points=tuple(points)), files)


def test_torch_graphs_are_written_on_request(tmp_path: Path) -> None:
    content = with_torch(OLD)
    save_artifact(content, tmp_path / "with", torch=True)
    assert read_artifact(tmp_path / "with").files == content.files
    save_artifact(content, tmp_path / "without")
    assert read_artifact(tmp_path / "without").files == OLD.files
    with pytest.raises(ArtifactError, match="holds no torch graphs"):
        save_artifact(OLD, tmp_path / "none", torch=True)
    assert not (tmp_path / "none").exists()


def test_torch_graphs_are_made_when_they_are_asked_for(tmp_path: Path) -> None:
    calls: list[Artifact] = []

    def add(artifact: Artifact) -> Artifact:
        calls.append(artifact)
        return with_torch(artifact)

    content = replace(OLD, add_torch_graphs=add)
    save_artifact(content, tmp_path / "without")
    assert calls == []
    save_artifact(content, tmp_path / "with", torch=True)
    assert calls == [content]
    assert read_artifact(tmp_path / "with").files == with_torch(OLD).files
    save_artifact(replace(with_torch(OLD), add_torch_graphs=add), tmp_path / "with", torch=True)
    assert len(calls) == 1


def test_places_that_can_be_saved_to(tmp_path: Path) -> None:
    require_replaceable(tmp_path / "new")
    save_artifact(OLD, tmp_path / "old")
    require_replaceable(tmp_path / "old")
    with pytest.raises(ArtifactError, match="there already"):
        require_replaceable(tmp_path / "old", overwrite=False)


def test_what_is_not_ours_is_not_replaced(tmp_path: Path) -> None:
    folder, file = tmp_path / "photos", tmp_path / "notes.txt"
    folder.mkdir()
    (folder / "cat.jpg").write_bytes(b"meow")
    file.write_text("hello")
    for path in (folder, file):
        for attempt in (lambda p: save_artifact(OLD, p), require_replaceable):
            with pytest.raises(ArtifactError, match="not an artifact, so it is not replaced"):
                attempt(path)
    assert (folder / "cat.jpg").read_bytes() == b"meow"
    assert file.read_text() == "hello"
    (tmp_path / "empty").mkdir()
    save_artifact(OLD, tmp_path / "empty")
    with pytest.raises(ArtifactError, match="there already"):
        save_artifact(NEW, tmp_path / "empty", overwrite=False)
    assert same(read_artifact(tmp_path / "empty"), OLD)


def test_a_report_that_is_not_json(tmp_path: Path) -> None:
    for value in (float("nan"), {1, 2}):
        with pytest.raises(ArtifactError, match="not plain JSON"):
            save_artifact(Artifact(OLD.manifest, OLD.files, {"x": value}), tmp_path / "m")  # type: ignore[dict-item]
    assert os.listdir(tmp_path) == []


def test_the_parent_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ArtifactError, match="cannot be saved"):
        save_artifact(OLD, tmp_path / "file" / "m")


class _Steps:
    """Counts the steps a save takes on the file system, and breaks one of them."""

    def __init__(self, broken: int) -> None:
        self.count = 0
        self.broken = broken

    def step(self) -> None:
        self.count += 1
        if self.count == self.broken:
            raise OSError(errno.ENOSPC, "No space left on device")

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            self.step()
            return function(*args, **named)

        return call

    def open(self, *args: Any) -> Any:
        self.step()
        stream = open(*args)  # noqa: SIM115
        if isinstance(stream, io.BufferedWriter):
            return _Stream(stream, self)
        return stream


class _Stream:
    def __init__(self, stream: io.BufferedWriter, steps: _Steps) -> None:
        self._stream = stream
        self._steps = steps

    def write(self, content: bytes) -> int:
        self._stream.write(content[: len(content) // 2])
        self._steps.step()
        return len(content) // 2 + self._stream.write(content[len(content) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()


@contextmanager
def broken_step(number: int) -> Iterator[_Steps]:
    steps = _Steps(number)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(saving, "open", steps.open, raising=False)
        for name in ("fsync", "mkdir", "rename", "replace"):
            patch.setattr(os, name, steps.wrap(getattr(os, name)))
        yield steps


def _saving_error(artifact: Artifact, path: Path) -> ArtifactError | None:
    try:
        save_artifact(artifact, path)
    except ArtifactError as error:
        return error
    return None


@pytest.mark.parametrize("name", ["m.exit", "m.zip"])
@pytest.mark.parametrize("before", [None, OLD])
def test_a_disk_that_gets_full_at_any_step(tmp_path: Path, name: str, before: Artifact | None) -> None:
    path = tmp_path / name
    failures = 0
    for number in range(1, 200):
        if before is not None:
            save_artifact(before, path)
        elif path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        with broken_step(number) as steps:
            error = _saving_error(NEW, path)
        expected = before if error else NEW
        if error:
            failures += 1
            assert "No space left on device" in error.what
            assert "untouched" in str(error.remedy)
        assert os.listdir(tmp_path) == ([] if expected is None else [name])
        assert expected is None or same(read_artifact(path), expected)
        if steps.count < number:
            break
    assert failures >= 5


KILL = """
    import errno, os, sys
    import exitcompiler.artifact as saving
    from pathlib import Path
    from test_artifact import NEW, OLD, _Steps, same, previous_path, read_artifact, save_artifact

    class Killing(_Steps):
        def step(self):
            self.count += 1
            if self.count == self.broken:
                os._exit(9)

    def child(path, number):
        steps = Killing(number)
        saving.open = steps.open
        for name in ("fsync", "mkdir", "rename", "replace", "unlink", "rmdir"):
            setattr(os, name, steps.wrap(getattr(os, name)))
        save_artifact(NEW, path)
        os._exit(0)

    path = Path(sys.argv[1])
    kills = olds = between = 0
    for number in range(1, 500):
        save_artifact(OLD, path)
        assert os.listdir(path.parent) == [path.name], os.listdir(path.parent)
        process = os.fork()
        if process == 0:
            child(path, number)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        between += not path.exists()
        found = read_artifact(path)
        assert same(found, OLD) or same(found, NEW), number
        olds += same(found, OLD)
        if status == 0:
            break
        assert status == 9, status
        kills += 1
    assert same(found, NEW)
    print(kills, olds, between)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
@pytest.mark.parametrize("name", ["m.exit", "m.zip"])
def test_a_kill_at_any_step(tmp_path: Path, name: str) -> None:
    # In a process of its own, as forking one with threads is unsafe.
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(KILL), str(tmp_path / name)],
        check=True,
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])},
    )
    kills, olds, between = map(int, done.stdout.split())
    assert kills >= 5
    assert olds >= 5
    assert between == (name == "m.exit"), "killed between the two renames, the old one is found"


def test_the_next_save_finishes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "m.exit"
    save_artifact(OLD, path)
    os.rename(path, previous_path(path))
    (tmp_path / ".m.exit.saving-dead").mkdir()
    assert same(read_artifact(path), OLD)
    with pytest.raises(ArtifactError, match="there already"):
        save_artifact(NEW, path, overwrite=False)
    assert same(read_artifact(path), OLD)
    save_artifact(NEW, path)
    assert same(read_artifact(path), NEW)
    assert os.listdir(tmp_path) == ["m.exit"]


needs_onnxruntime = pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="runs it")


@needs_onnxruntime
def test_saving_another_operating_point_makes_its_one_file_model(tmp_path: Path) -> None:
    from exitcompiler.passes.assemble_onnx import assemble_onnx

    base = artifact_of(chain(3), plain(3))
    point = base.manifest.operating_points[0]
    one_file = assemble_onnx(
        point.control_flow, {name: base.files[block_path(file)] for name, file in point.files.items()}
    )
    model = open_artifact(artifact_of(chain(3), plain(3), one_file=one_file))
    model.select(name="point1").save(tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert (loaded.operating_point.name, loaded.manifest.one_file) == ("point1", 1)
    x = random_rows(5)
    np.testing.assert_array_equal(loaded(x), model.plain(x))

    import onnxruntime

    session = onnxruntime.InferenceSession((tmp_path / "m" / MODEL_FILE).read_bytes())
    np.testing.assert_array_equal(session.run(None, {"x": x})[0], model.plain(x))
    model.save(tmp_path / "m.zip")
    assert MODEL_FILE in zipfile.ZipFile(tmp_path / "m.zip").namelist()
