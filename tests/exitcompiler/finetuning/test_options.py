"""``FineTune``: what it refuses, and what tells two trainings apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import exitcompiler
from exitcompiler.errors import InputError
from exitcompiler.finetuning.options import FineTune


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
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_by_name(name: str, values: tuple[Any, ...]) -> None:
    for value in values:
        with pytest.raises(InputError, match=f"{name}={value!r}") as refused:
            FineTune(**{name: value})
        assert refused.value.where == "FineTune"


def test_the_ends_of_ranges_are_allowed() -> None:
    shares = ("teacher", "self_distillation", "focus", "label_smoothing", "mixup")
    for value in (0, 1, 0.0, 1.0):
        FineTune(**dict.fromkeys(shares, value))
    FineTune(weight_decay=0, last_weight=0.0, checkpoint_minutes=0, epochs=1, accumulate=1, batch_size=2)


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
