"""How networks of a cascade are tuned: what is refused before anything slow, and who is trained on what."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finetuned import CALIBRATION, TRAINING, never_again, tuning_of

import exitcompiler
from exitcompiler import cascades
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.data import RowSplit
from exitcompiler.errors import CalibrationError, InputError, TrainingError
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted
from exitcompiler.networks import Network, read_networks
from exitcompiler.settings import Settings

OWN = tuning_of(train_data=TRAINING)
NAMES = ["small", "large"]


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4)).eval()


@functools.cache
def captured() -> tuple[Network, ...]:
    example = CALIBRATION[0][:8]
    return read_networks([linear(), linear()], example, names=NAMES, transforms=None, logits=None)


def cascade(finetune: Any, train: Any, **options: Any) -> Any:
    return exitcompiler.cascade(
        [linear(), linear()], CALIBRATION, names=NAMES, train_data=train, early_exits=True,
        finetune=finetune, backend="torch", threads=1, **options,
    )  # fmt: skip


MISTAKES: dict[str, tuple[Any, Any, type[Exception], str]] = {
    "a list that is too long": ([OWN] * 3, None, InputError, "3 entries for 2 networks"),
    "one for all with its own data": (OWN, TRAINING, InputError, "given twice"),
    "each with its own data": ([OWN, OWN], TRAINING, InputError, "given twice"),
    "one folder": ([tuning_of(checkpoint="a")] * 2, TRAINING, InputError, r"same .*a\n.*one FineTune"),
    "one folder by two names": (
        [tuning_of(checkpoint="a"), tuning_of(checkpoint=Path("b/../a"), epochs=2)],
        TRAINING,
        InputError,
        "several networks have the same checkpoint folder",
    ),
    "no such device": ([None, tuning_of(device="cuda:99")], TRAINING, TrainingError, "'cuda:99' cannot be"),
    "calibration data": (tuning_of(), CALIBRATION, CalibrationError, "the same data are given"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_told_before_networks_are_looked_at(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune, train, error, message = MISTAKES[case]
    monkeypatch.setattr(cascades, "read_networks", never_again("capture"))
    with pytest.raises(error, match=message):
        cascade(finetune, train)


def given_to_networks(
    monkeypatch: pytest.MonkeyPatch, finetune: Any, train: Any
) -> dict[str, tuple[Any, int]]:
    """Name -> how it would be tuned, and on how many rows."""
    seen: list[tuple[Any, int]] = []

    def recorded(program: Any, data: Any, sample: Any, engines: Any, settings: Any, reporter: Any) -> Fitted:
        seen.append((settings.finetune, len(data.source)))
        return Fitted(None, (), {}, 0)

    backend = SimpleNamespace(name="torch", precision="fp32", on_device=False)
    target = SimpleNamespace(engines=SimpleNamespace(backend=backend), settled=None)
    monkeypatch.setattr(cascades, "read_networks", lambda *given, **options: captured())
    monkeypatch.setattr(cascades, "choose_target", lambda *given, **options: target)
    monkeypatch.setattr(cascades, "fit_exits", recorded)
    monkeypatch.setattr(cascades, "cascade_program", never_again("what comes after"))
    with pytest.raises(AssertionError, match="what comes after"):
        cascade(finetune, train)
    return dict(zip(NAMES, seen, strict=True))


def test_training_data_of_the_call_is_for_those_that_have_none_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = TRAINING
    few = x[:150], y[:150]
    plain = tuning_of()
    assert given_to_networks(monkeypatch, [OWN, plain], few) == {"small": (OWN, 640), "large": (plain, 150)}
    assert given_to_networks(monkeypatch, [OWN, None], few) == {"small": (OWN, 640), "large": (None, 150)}
    assert given_to_networks(monkeypatch, OWN, None) == dict.fromkeys(NAMES, (OWN, 640))


def test_one_for_all_makes_a_checkpoint_folder_for_each_and_a_list_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def folders(finetune: Any) -> list[Path | None]:
        given = given_to_networks(monkeypatch, finetune, TRAINING)
        return [None if tuning is None else tuning.folder for tuning, _ in given.values()]

    one = tuning_of(checkpoint=tmp_path / "runs")
    assert folders(one) == [tmp_path / "runs" / "small", tmp_path / "runs" / "large"]
    assert folders([None, one]) == [None, tmp_path / "runs"]
    # A folder in another one's is another folder.
    assert folders([tuning_of(checkpoint=tmp_path), one]) == [tmp_path, tmp_path / "runs"]


def test_the_report_says_how_each_network_was_to_be_tuned() -> None:
    rows = np.arange(3)

    def said(tunings: dict[str, FineTune | None]) -> Any:
        split = RowSplit(rows, rows, rows)
        findings = CascadeFindings(captured(), frozenset({(0, 1)}), Settings(0.1), split)
        findings.asked_to_tune(tunings)
        return findings.report()["settings"]["finetune"]

    assert said({"small": OWN, "large": None}) == {"small": dict(OWN.as_dict()), "large": None}
    assert json.loads(json.dumps(said({"small": OWN, "large": OWN})))["large"]["batch_size"] == 64
    assert said(dict.fromkeys(NAMES)) is None
