"""Fine-tuning from the command line: what is passed on, what is refused, and Ctrl-C."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from trained import stripes
from typer.testing import CliRunner

import exitcompiler
from exitcompiler.cli import app
from exitcompiler.finetuning import loop
from exitcompiler.finetuning.checkpoints import FILE
from exitcompiler.finetuning.options import FineTune

COMPILE = ("compile", "tuned_factories:model")
CASCADE = ("cascade", "tuned_factories:model", "tuned_factories:model")
FACTORIES = """
from joint_samples import small_network


def model():
    return small_network()
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with networks and rows."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tuned_factories.py").write_text(FACTORIES)
    for name, rows, seed in (("data.npz", 320, 2), ("train.npz", 320, 3)):
        x, y = stripes(rows, seed=seed)
        np.savez(tmp_path / name, x=x, y=y)
    return tmp_path


def call(
    command: tuple[str, ...], *arguments: object, train: str | None = "train.npz", before: str = ""
) -> Any:
    given = (*command, "--calib", "data.npz", "-o", "out.exit", *arguments)
    data = () if train is None else ("--train", train)
    return CliRunner().invoke(app, [str(part) for part in (*before.split(), *given, *data)])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What ``compile`` and ``cascade`` are called with."""
    options: dict[str, Any] = {}

    class Compiled:
        artifact = type("A", (), {"report": {}})

        def save(self, path: Path) -> None: ...

        def explain(self) -> str:
            return "because"

    def fake(models: object, calib: object, **given: Any) -> Compiled:
        options.update(given)
        return Compiled()

    monkeypatch.setitem(vars(exitcompiler), "compile", fake)
    monkeypatch.setitem(vars(exitcompiler), "cascade", fake)
    return options


@pytest.mark.parametrize("command", [COMPILE, (*CASCADE, "--early-exits")], ids=["compile", "cascade"])
def test_what_is_asked_for_is_passed_on(command: tuple[str, ...], seen: dict[str, Any]) -> None:
    assert call(command).exit_code == 0
    assert seen["finetune"] is None
    assert call(command, "--finetune").exit_code == 0
    assert seen["finetune"] == FineTune()
    result = call(
        command, "--finetune", "--epochs", 3, "--train-batch-size", 64, "--accumulate", 2, "--lr", 0.01,
        "--mixup", 0.5, "--freeze-batchnorm", "--checkpoint", "kept", "--device", "cpu", "--batch-size", 8,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    assert seen["finetune"] == FineTune(
        epochs=3, batch_size=64, accumulate=2, lr=0.01, mixup=0.5, freeze_batchnorm=True,
        checkpoint=Path("kept"), device="cpu",
    )  # fmt: skip
    assert seen["batch_size"] == 8
    assert seen["train_data"] is not None
    assert call(command, "--finetune", "--train-batchnorm").exit_code == 0
    assert seen["finetune"] == FineTune(freeze_batchnorm=False)


RARE = {
    "adamw_lr": 2e-3, "head_lr": 0.1, "head_adamw_lr": 5e-3, "weight_decay": 0.0, "label_smoothing": 0.1,
    "teacher": 0.25, "self_distillation": 0.75, "temperature": 3.0, "focus": 0.5, "last_weight": 2.0,
    "checkpoint_minutes": 1.5, "mixed_precision": False, "epochs": 3,
}  # fmt: skip


@pytest.mark.parametrize("command", [COMPILE, (*CASCADE, "--early-exits")], ids=["compile", "cascade"])
def test_whatever_has_no_option_of_its_own_is_set_by_its_name(
    command: tuple[str, ...], seen: dict[str, Any]
) -> None:
    given = [part for name, value in RARE.items() for part in ("--tune", f"{name}={str(value).lower()}")]
    result = call(command, "--finetune", "--lr", 0.02, *given)
    assert result.exit_code == 0, result.stderr
    assert seen["finetune"] == FineTune(lr=0.02, **RARE)
    # Of the same types too: checkpoints are told apart by how options are written down.
    assert json.dumps(seen["finetune"].as_dict()) == json.dumps(FineTune(lr=0.02, **RARE).as_dict())
    for said, meant in (("True", True), ("on", True), ("no", False)):
        assert call(command, "--finetune", "--tune", f"freeze_batchnorm = {said}").exit_code == 0
        assert seen["finetune"] == FineTune(freeze_batchnorm=meant)


@pytest.mark.parametrize("command", [COMPILE, (*CASCADE, "--early-exits")], ids=["compile", "cascade"])
@pytest.mark.parametrize(
    ("arguments", "train", "message"),
    [
        (("--finetune",), None, "--finetune needs --train"),
        (("--epochs", 3), "data.npz", "--epochs goes with --finetune"),
        (("--train-batch-size", 8), "data.npz", "--train-batch-size goes with"),
        (("--accumulate", 2), "data.npz", "--accumulate goes with"),
        (("--lr", 0.1), "data.npz", "--lr goes with"),
        (("--freeze-batchnorm",), "data.npz", "--freeze-batchnorm/--train-batchnorm goes with"),
        (("--train-batchnorm",), "data.npz", "--freeze-batchnorm/--train-batchnorm goes with"),
        (("--mixup", 0), "data.npz", "--mixup goes with"),
        (("--checkpoint", "kept"), "data.npz", "--checkpoint goes with"),
        (("--device", "cpu"), "data.npz", "--device goes with"),
        (("--finetune", "--lr", 0), "train.npz", "lr=0.0 is not a positive number"),
        (("--tune", "teacher=0.5"), "data.npz", "--tune goes with --finetune"),
        (("--finetune",), "data.npz", "--train and --calib are the same"),
        (("--finetune",), "./data.npz", "--train and --calib are the same"),
        (("--finetune", "--tune", "teacher"), "train.npz", "give NAME=VALUE"),
        (("--finetune", "--tune", "pupil=1"), "train.npz", "one of epochs, batch_size"),
        (("--finetune", "--tune", "train_data=1"), "train.npz", "one of epochs, batch_size"),
        (("--finetune", "--tune", "teacher=much"), "train.npz", "teacher is a number"),
        (("--finetune", "--tune", "epochs=1.5"), "train.npz", "epochs is a whole number"),
        (("--finetune", "--tune", "mixed_precision=2"), "train.npz", "mixed_precision is true or false"),
        (("--finetune", "--tune", "teacher=1.5"), "train.npz", "teacher=1.5 is not in 0..1"),
        (("--finetune", "--tune", "lr=1", "--lr", 1), "train.npz", "lr is given twice"),
        (("--finetune", "--tune", "focus=1", "--tune", "focus=0"), "train.npz", "focus is given twice"),
        (("--finetune", "--device", "tpu"), "train.npz", "device='tpu' is not 'auto', 'cpu', 'cuda'"),
        (("--finetune", "--epochs", 0), "train.npz", "--epochs"),
        (("--finetune", "--mixup", 1.5), "train.npz", "--mixup"),
        (("--finetune", "--checkpoint", "data.npz"), "train.npz", "--checkpoint"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    arguments: tuple[object, ...],
    train: str | None,
    message: str,
) -> None:
    def never(*given: object, **options: object) -> None:
        raise AssertionError("something was loaded first")

    monkeypatch.setattr("exitcompiler.data_sources.load_model", never)
    monkeypatch.setattr("exitcompiler.data_sources.load_data", never)
    result = call(command, *arguments, train=train)
    assert result.exit_code == 2
    assert message in _unboxed(result.stderr)


def test_a_cascade_without_exits_has_nothing_to_tune() -> None:
    result = call(CASCADE, "--finetune")
    assert result.exit_code == 2
    assert "--finetune goes with --early-exits" in _unboxed(result.stderr)


def _unboxed(text: str) -> str:
    """What is said in a box of rich, on one line."""
    return " ".join(text.replace("│", " ").split())


def _stopping(*notes: str) -> Callable[..., None]:
    def stop(*given: object, **options: object) -> None:
        interruption = KeyboardInterrupt()
        for note in notes:
            interruption.add_note(note)
        raise interruption

    return stop


@pytest.mark.parametrize("notes", [(), ("the last checkpoint is in [kept]: run the same again",)], ids=len)
def test_ctrl_c_is_one_message_with_how_to_go_on_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, notes: tuple[str, ...]
) -> None:
    monkeypatch.setitem(vars(exitcompiler), "compile", _stopping(*notes))
    result = call(COMPILE)
    assert result.exit_code == 130
    assert result.stderr == "".join(f"{line}\n" for line in ("stopped", *(f"  -> {note}" for note in notes)))
    assert result.stdout == ""


def test_a_training_that_was_stopped_goes_on_with_the_same_command(
    monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    """For real, but for what comes after training: that is stopped too."""
    arguments = ("--finetune", "--epochs", 2, "--train-batch-size", 64, "--checkpoint", "kept",
                 "--device", "cpu", "--threads", 1, "--backend", "torch")  # fmt: skip
    taken = []

    def step(run: Any) -> None:
        taken.append(run.position.epoch)
        if len(taken) == 7:
            raise KeyboardInterrupt
        original(run)

    original = loop._Run._step
    monkeypatch.setattr(loop._Run, "_step", step)
    monkeypatch.setattr("exitcompiler.compiler.references_of", _stopping("training was over"))
    result = call(COMPILE, *arguments)
    assert result.exit_code == 130
    assert "the last checkpoint is in kept: run the same again" in result.stderr
    assert "Traceback" not in result.stderr
    assert _passes(folder) == 1
    assert "training was over" in call(COMPILE, *arguments).stderr
    assert taken == [0] * 5 + [1] * 2 + [1] * 5  # the second pass was begun anew
    assert _passes(folder) == 2


def _passes(folder: Path) -> int:
    """How many are complete, by the checkpoint."""
    with safe_open(folder / "kept" / FILE, framework="numpy") as file:
        return int(json.loads(file.metadata()["facts"])["epoch"])
