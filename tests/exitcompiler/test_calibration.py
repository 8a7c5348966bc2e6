"""Calibration rows that a network is tuned on as well are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finetuned import never_again
from torch import nn
from trained import stripes

import exitcompiler
from exitcompiler.calibration import SHARED_AT_MOST, require_unseen
from exitcompiler.data import Rows, TrainingData
from exitcompiler.errors import CalibrationError, InputError, TrainingError
from exitcompiler.finetuning.options import FineTune

ROWS = 400
CALIBRATION = stripes(ROWS, seed=2)


def rows(seed: int, count: int = ROWS, dtype: torch.dtype = torch.float32) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 3, 20, 20, generator=generator).to(dtype)
    return Rows({"x": values, "code": torch.arange(count) % 3}, np.arange(count) % 2)


def joined(*parts: Rows) -> Rows:
    names = parts[0].inputs
    inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in names}
    return Rows(inputs, None)


def check(calibration: Rows, training: Any) -> None:
    require_unseen(calibration, TrainingData(training, ("x", "code")))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_rows_that_come_back_in_another_order_are_found(dtype: torch.dtype) -> None:
    calibration = rows(1, dtype=dtype)
    again = calibration.take(np.arange(ROWS)[::-3].copy())
    with pytest.raises(CalibrationError, match=rf"{len(again)} of {ROWS} rows are training rows") as refused:
        check(calibration, joined(rows(2, dtype=dtype), again))
    assert refused.value.where == "calib_data"
    assert "as a loader" in str(refused.value.remedy)


def test_other_rows_are_accepted() -> None:
    check(rows(1), rows(2, 2 * ROWS))


def test_rows_differ_if_one_value_of_one_input_does() -> None:
    calibration = rows(1)
    for name, at in (
        ("x", (slice(None), 0, 0, 0)),
        ("x", (slice(None), 1, 10, 10)),
        ("code", (slice(None),)),
    ):
        changed = {key: value.clone() for key, value in calibration.inputs.items()}
        changed[name][at] += 1
        check(calibration, Rows(changed, calibration.labels))


def test_a_few_that_data_sets_hold_twice_are_accepted(caplog: pytest.LogCaptureFixture) -> None:
    calibration, few = rows(1), round(SHARED_AT_MOST * ROWS)
    check(calibration, joined(rows(2), calibration.take(slice(0, few))))
    assert f"{few} of {ROWS} calibration rows are training rows too" in caplog.text
    with pytest.raises(CalibrationError, match=f"{few + 1} of {ROWS}"):
        check(calibration, joined(rows(2), calibration.take(slice(0, few + 1))))


def test_a_loader_is_taken_at_its_word() -> None:
    calibration = rows(1)
    check(calibration, [(calibration.inputs, calibration.labels)])


class Loader:
    """Gives the calibration rows, for whatever it is used."""

    def __iter__(self) -> Any:
        for start in range(0, ROWS, 100):
            yield tuple(part[start : start + 100] for part in CALIBRATION)


def flat() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 4)).eval()


def compiled(calibration: Any, training: Any, **options: Any) -> None:
    exitcompiler.compile(
        flat(), calibration, train_data=training, finetune=FineTune(**options), backend="torch", threads=1
    )


def cascaded(calibration: Any, training: Any, **options: Any) -> None:
    exitcompiler.cascade(
        [flat(), flat()], calibration, train_data=training, early_exits=True, backend="torch", threads=1,
        finetune=[None, FineTune(**options)],
    )  # fmt: skip


@pytest.fixture
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("compiler", "cascades"):
        for step in ("choose_target", "fit_exits"):
            monkeypatch.setattr(f"exitcompiler.{module}.{step}", never_again(step))


@pytest.mark.usefixtures("nothing_slow")
@pytest.mark.parametrize("make", [compiled, cascaded])
def test_mistakes_that_would_show_late_are_told_before_anything_slow(
    make: Callable[..., None], tmp_path: Path
) -> None:
    loader, fresh = Loader(), stripes(ROWS, seed=3)
    for calibration, training in ((CALIBRATION, tuple(CALIBRATION)), (loader, loader)):
        with pytest.raises(CalibrationError, match="fresh"):
            make(calibration, training)
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainingError, match="cannot be written"):
        make(CALIBRATION, fresh, checkpoint=tmp_path / "file" / "below")


class Tokens(nn.Module):
    """Reads whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.out = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.out(self.words(ids).mean(1))
        assert isinstance(logits, torch.Tensor)
        return logits


@pytest.mark.usefixtures("nothing_slow")
def test_tokens_that_cannot_be_mixed_are_told_before_anything_slow() -> None:
    ids, labels = np.arange(5 * ROWS).reshape(ROWS, 5) % 9, np.arange(ROWS) % 3
    options = FineTune(mixup=0.5, train_data=[(ids, labels)])
    with pytest.raises(InputError, match=r"\['ids'\] cannot be mixed"):
        exitcompiler.compile(Tokens().eval(), (ids, labels), finetune=options, backend="torch", threads=1)
