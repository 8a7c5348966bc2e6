"""Checkpoints: whole or absent, and refused where they cannot be trusted."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from exitcompiler.errors import TrainingError
from exitcompiler.finetuning import checkpoints
from exitcompiler.finetuning.checkpoints import (
    FILE,
    Checkpoint,
    read_checkpoint,
    read_notes,
    require_writable_folder,
    write_checkpoint,
)


def _checkpoint(epoch: int = 2) -> Checkpoint:
    return Checkpoint(
        run="a run", epoch=epoch, batches=3, steps=17, history=[[0.1, 1 / 3], [0.25, 1e-300]],
        sums=[1.5, 2.5],
        numbers={"schedules": [{"last_epoch": 3, "rates": [0.1, 1e-7]}], "groups.0": [{"eps": 1e-8}]},
        notes={"exits": ["a", "b"]},
        tensors={
            "network.weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).t(),
            "network.count": torch.tensor(7),
            "half": torch.ones(2, dtype=torch.bfloat16),
            "rng.order": torch.Generator().manual_seed(3).get_state(),
        },
    )  # fmt: skip


def _left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_written_is_read(tmp_path: Path) -> None:
    folder, written = tmp_path / "new" / "folder", _checkpoint()
    assert read_checkpoint(tmp_path, "a run") is None
    assert read_notes(tmp_path) is None
    write_checkpoint(folder, _checkpoint(epoch=1))
    write_checkpoint(folder, written)
    found = read_checkpoint(folder, "a run")
    assert found is not None
    assert list(found.tensors) == sorted(written.tensors)
    for path, tensor in written.tensors.items():
        assert found.tensors[path].dtype == tensor.dtype
        assert torch.equal(found.tensors[path], tensor)
    assert replace(found, tensors={}) == replace(written, tensors={})
    assert read_notes(folder) == {"exits": ["a", "b"]}
    assert _left(folder) == [FILE]


def test_tensors_that_share_memory_are_kept(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    write_checkpoint(tmp_path, replace(_checkpoint(), tensors={"a": shared, "b": shared, "c": shared[2:4]}))
    found = read_checkpoint(tmp_path, "a run")
    assert found is not None
    assert {path: tensor.tolist() for path, tensor in found.tensors.items()} == {
        "a": shared.tolist(), "b": shared.tolist(), "c": [2.0, 3.0],
    }  # fmt: skip


@pytest.mark.parametrize("failing", ["save_file", "os.replace", "os.fsync"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_last_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    write_checkpoint(tmp_path, _checkpoint())

    def fail(*arguments: Any, **options: Any) -> None:
        if failing == "save_file":
            Path(arguments[1]).write_bytes(b"half of it")
        raise error

    monkeypatch.setattr(f"{checkpoints.__name__}.{failing}", fail)
    expected = TrainingError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected) as raised:
        write_checkpoint(tmp_path, _checkpoint(epoch=3))
    monkeypatch.undo()
    if isinstance(raised.value, TrainingError):
        assert "No space left" in str(raised.value)
        assert raised.value.where == str(tmp_path)
    assert _left(tmp_path) == [FILE]
    found = read_checkpoint(tmp_path, "a run")
    assert found is not None
    assert found.epoch == 2


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(TrainingError, match="cannot be written"):
            write_checkpoint(place, _checkpoint())
        with pytest.raises(TrainingError, match="cannot be written"):
            require_writable_folder(place)


def test_a_folder_is_made_beforehand_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _checkpoint())
    for folder in (tmp_path / "new" / "folder", tmp_path):
        require_writable_folder(folder)
    assert _left(tmp_path) == ["new", FILE]
    assert _left(tmp_path / "new" / "folder") == []


def test_what_a_killed_process_left_is_removed_and_what_another_one_writes_is_not(tmp_path: Path) -> None:
    stale, young = (tmp_path / f".{FILE}.{name}.part" for name in ("stale", "young"))
    for part in (stale, young):
        part.write_bytes(b"half of it")
    two_days_ago = time.time() - 48 * 3600
    os.utime(stale, (two_days_ago, two_days_ago))
    write_checkpoint(tmp_path, _checkpoint())
    assert _left(tmp_path) == [young.name, FILE]
    assert read_checkpoint(tmp_path, "a run") is not None


def test_two_processes_that_write_at_once_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner, within = save_file, []

    def interrupted(tensors: Any, path: Path, metadata: Any) -> None:
        inner(tensors, path, metadata=metadata)
        if not within:  # the other one comes in between
            within.append(path)
            write_checkpoint(tmp_path, _checkpoint(epoch=1))
            within.append(path.read_bytes())

    monkeypatch.setattr(checkpoints, "save_file", interrupted)
    write_checkpoint(tmp_path, _checkpoint())
    assert (tmp_path / FILE).read_bytes() == within[1]
    assert _left(tmp_path) == [FILE]


def _truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def _cut_in_its_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _pickled(path: Path) -> None:
    path.write_bytes(pickle.dumps({"run": "a run"}))


def _torch_saved(path: Path) -> None:
    torch.save({"run": "a run"}, path)


def _with(facts: str | None) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        metadata = {"schema": "1"} if facts is None else {"schema": "1", "facts": facts}
        save_file({"a": torch.zeros(1)}, path, metadata=metadata)

    return write


def _with_fact(**changed: object) -> Callable[[Path], None]:
    """A file that is whole, and says something that cannot be."""
    return _with(json.dumps({**_facts_of(_checkpoint()), **changed}))


def _facts_of(checkpoint: Checkpoint) -> dict[str, Any]:
    return {name: value for name, value in vars(checkpoint).items() if name != "tensors"}


def test_the_facts_that_damages_start_from_are_sound(tmp_path: Path) -> None:
    _with_fact()(tmp_path / FILE)
    assert read_checkpoint(tmp_path, "a run") is not None


DAMAGES = {
    "truncated": _truncated, "cut in its header": _cut_in_its_header, "empty": _empty, "pickled": _pickled,
    "torch.save": _torch_saved, "no facts": _with(None), "facts are no JSON": _with("{run"),
    "facts are a list": _with("[1]"), "facts are missing": _with('{"run": "a run"}'),
    "its passes are no number": _with_fact(epoch="2"), "passes below 0": _with_fact(epoch=-1),
    "a pass without losses": _with_fact(epoch=3), "batches are no number": _with_fact(batches=True),
    "losses of another number of exits": _with_fact(sums=[1.0]), "no losses": _with_fact(history=[[1], "a"]),
    "a loss is not finite": _with_fact(sums=[1.0, float("nan")]), "notes are a list": _with_fact(notes=[]),
    "numbers are none": _with_fact(numbers=None), "steps are a float": _with_fact(steps=1.5),
    "facts are unknown": _with(json.dumps({**vars(_checkpoint()), "tensors": None, "more": 1})),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=list(DAMAGES))
def test_a_damaged_one_is_refused_and_named(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write_checkpoint(tmp_path, _checkpoint())
    damage(tmp_path / FILE)
    with pytest.raises(TrainingError, match="cannot be read") as refused:
        read_checkpoint(tmp_path, "a run")
    assert refused.value.where == str(tmp_path / FILE)
    assert refused.value.remedy is not None
    assert "remove it" in refused.value.remedy


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "sprung",)

    for write in (lambda path: path.write_bytes(pickle.dumps(Trap())), lambda path: torch.save(Trap(), path)):
        write(tmp_path / FILE)
        for read in (read_notes, lambda folder: read_checkpoint(folder, "a run")):
            with pytest.raises(TrainingError):
                read(tmp_path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("metadata", [None, {"schema": "2", "facts": "{}"}])
def test_another_schema_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / FILE, metadata=metadata)
    for read in (read_notes, lambda folder: read_checkpoint(folder, "a run")):
        with pytest.raises(TrainingError, match=r"schema .*, this version reads 1"):
            read(tmp_path)


def test_one_of_another_training_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, _checkpoint())
    with pytest.raises(TrainingError, match="of another training") as refused:
        read_checkpoint(tmp_path, "another run")
    assert refused.value.remedy is not None
    assert "another checkpoint folder" in refused.value.remedy
