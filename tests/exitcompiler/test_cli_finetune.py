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
    x, y = stripes(320, seed=2)
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path


def call(
    command: tuple[str, ...], *arguments: object, train: str | None = "data.npz", before: str = ""
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
        (("--finetune", "--lr", 0), "data.npz", "lr=0.0 is not a positive number"),
        (("--finetune", "--epochs", 0), "data.npz", "--epochs"),
        (("--finetune", "--mixup", 1.5), "data.npz", "--mixup"),
        (("--finetune", "--checkpoint", "data.npz"), "data.npz", "--checkpoint"),
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
    monkeypatch.setattr("exitcompiler.compiler.cast_candidates", _stopping("training was over"))
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
