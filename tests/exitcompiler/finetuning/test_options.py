"""``FineTune``: what it refuses, and what tells two trainings apart."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import exitcompiler
from exitcompiler.errors import InputError
from exitcompiler.finetuning.options import FineTune, require_finetune
from exitcompiler.settings import Settings

NUMBERS = (
    "lr", "adamw_lr", "head_lr", "head_adamw_lr", "temperature", "teacher", "self_distillation", "focus",
    "label_smoothing", "mixup", "weight_decay", "last_weight", "checkpoint_minutes",
)  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -1, 2.0, True, "3", None)) for name in ("epochs", "batch_size", "accumulate")),
        ("batch_size", (1,)),
        *(
            (name, (0.0, -0.1, float("nan"), float("inf")))
            for name in ("lr", "adamw_lr", "head_lr", "head_adamw_lr", "temperature")
        ),
        *(
            (name, (-0.01, 1.01, float("nan")))
            for name in ("teacher", "self_distillation", "focus", "label_smoothing", "mixup")
        ),
        *(
            (name, (-1e-9, float("nan")))
            for name in ("weight_decay", "last_weight", "checkpoint_minutes")
        ),
        *((name, (float("inf"),)) for name in ("weight_decay", "last_weight")),
        *((name, ("0.1", None, True, 1j)) for name in NUMBERS),
        *((name, ("no", 1, None)) for name in ("freeze_batchnorm", "mixed_precision")),
        ("checkpoint", (3, "", True)),
        ("device", (None, "tpu", "meta", "mps", "cuda:", "cuda:x", "cuda:-1", "CPU", 0)),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    default = next(field.default for field in dataclasses.fields(FineTune) if field.name == name)
    for value in values:
        with pytest.raises(InputError, match=re.escape(f"{name}={value!r} is not ")) as refused:
            FineTune(**{name: value})
        assert refused.value.where == "FineTune"
        assert repr(default) in (refused.value.remedy or "")


def test_numbers_of_numpy_are_taken_as_python_s_own() -> None:
    given: dict[str, Any] = {
        "epochs": np.int64(3), "batch_size": np.uint8(64), "lr": np.float64(0.125),
        "head_lr": np.float32(0.5), "teacher": np.int32(1),
    }  # fmt: skip
    options = FineTune(**given)
    plain = FineTune(epochs=3, batch_size=64, lr=0.125, head_lr=0.5, teacher=1.0)
    assert options == plain
    assert json.dumps(options.as_dict()) == json.dumps(plain.as_dict())


def test_numbers_are_written_down_as_they_were_given() -> None:
    """By that checkpoints are told apart: those of trainings that are under way have to be found again."""
    assert json.dumps(FineTune(lr=1, teacher=0, weight_decay=0.0, epochs=7).as_dict()) == json.dumps(
        {
            "epochs": 7, "batch_size": 128, "accumulate": 1, "lr": 1, "adamw_lr": 0.001, "head_lr": 0.05,
            "head_adamw_lr": 0.004, "weight_decay": 0.0, "freeze_batchnorm": True, "label_smoothing": 0.0,
            "teacher": 0, "self_distillation": 0.5, "temperature": 2.0, "mixup": 0.0, "focus": 0.0,
            "last_weight": 1.0, "mixed_precision": True,
        }
    )  # fmt: skip


@pytest.mark.parametrize("given", [True, False, FineTune, {"epochs": 3}, "yes", [FineTune()]], ids=repr)
def test_what_is_no_fine_tune_is_refused_where_it_is_taken(given: Any) -> None:
    takers: list[Callable[[], object]] = [
        lambda: require_finetune(given),
        lambda: Settings(finetune=given),
        lambda: exitcompiler.compile(torch.nn.Flatten(), None, finetune=given),
    ]
    if not isinstance(given, list):
        models = [torch.nn.Flatten()] * 2
        for asked in (given, [None, given]):
            takers.append(
                lambda asked=asked: exitcompiler.cascade(models, None, early_exits=True, finetune=asked)
            )
    for take in takers:
        with pytest.raises(InputError, match="is no FineTune") as refused:
            take()
        assert "exitcompiler.FineTune()" in (refused.value.remedy or "")


def test_the_ends_of_ranges_are_allowed() -> None:
    shares = ("teacher", "self_distillation", "focus", "label_smoothing", "mixup")
    for value in (0, 1, 0.0, 1.0):
        FineTune(**dict.fromkeys(shares, value))
    FineTune(weight_decay=0, last_weight=0.0, checkpoint_minutes=0, epochs=1, accumulate=1, batch_size=2)
    FineTune(checkpoint_minutes=float("inf"))
    for device in ("auto", "cpu", "cuda", "cuda:0", "cuda:11"):
        assert FineTune(device=device).device == device


def test_it_is_public() -> None:
    assert exitcompiler.FineTune is FineTune


def test_what_decides_the_outcome_tells_trainings_apart_and_where_it_runs_does_not(tmp_path: Path) -> None:
    said = FineTune(lr=0.01).as_dict()
    elsewhere = FineTune(
        lr=0.01, checkpoint=tmp_path, checkpoint_minutes=9.0, device="cpu", train_data=[1, 2]
    )
    assert elsewhere.as_dict() == said
    assert elsewhere.folder == tmp_path
    assert FineTune(checkpoint="there").folder == Path("there")
    assert FineTune().folder is None
    changed = [
        FineTune(lr=0.02), FineTune(lr=0.01, epochs=3), FineTune(lr=0.01, accumulate=2),
        FineTune(lr=0.01, freeze_batchnorm=not said["freeze_batchnorm"]),
        FineTune(lr=0.01, mixed_precision=not said["mixed_precision"]),
    ]  # fmt: skip
    assert all(other.as_dict() != said for other in changed)
