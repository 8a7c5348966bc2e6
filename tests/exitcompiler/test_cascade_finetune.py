"""cascade() with fine-tuning: which network is tuned how, and what all is told against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from finetuned import (
    CALIBRATION,
    HARMFUL,
    TRAINING,
    answers,
    kept,
    network,
    never_again,
    quick,
    smaller_network,
    tuned_answers,
    tuning_of,
)

import exitcompiler
from exitcompiler.cascades import CascadeOptions, cascade_in_detail
from exitcompiler.compiler import Details
from exitcompiler.errors import InputError
from exitcompiler.finetuning import loop
from exitcompiler.finetuning.checkpoints import FILE
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted
from exitcompiler.naming import OWN
from exitcompiler.settings import Settings
from exitcompiler.statistics import mean_difference_interval
from exitcompiler.training import HeadRecipe

X, Y = CALIBRATION
ORIGINALS = {"small": smaller_network, "large": network}


def compiled(names: Sequence[str], finetune: Any, *, train: Any = TRAINING, **options: Any) -> Details:
    settings = Settings(0.6, backend="torch", threads=1, max_exits=1, recipe=HeadRecipe(epochs=1))
    models = [ORIGINALS[name]() for name in names]
    asked = CascadeOptions(names=names, early_exits=True, finetune=finetune, **options)
    with quick():
        return cascade_in_detail(models, CALIBRATION, train, settings, asked)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoints of ``harmed``."""
    return tmp_path_factory.mktemp("harmed")


@pytest.fixture(scope="module")
def harmed(folder: Path) -> Details:
    """Both tuned by one setting, until they have forgotten much."""
    before = [{k: v.clone() for k, v in model().state_dict().items()} for model in ORIGINALS.values()]
    found = compiled(["small", "large"], tuning_of(checkpoint=folder, **HARMFUL))
    for model, state in zip(ORIGINALS.values(), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model().state_dict().items())
    return found


def networks(details: Details) -> dict[str, dict[str, Any]]:
    """What the report says of each."""
    return {entry["name"]: entry for entry in details.compiled.artifact.report["cascade"]["networks"]}


def right(name: str, rows: np.ndarray, fitted: Fitted | None = None) -> np.ndarray:
    """By hand: where a network is right, as it was given or after it was tuned."""
    logits = (
        answers(ORIGINALS[name](), X[rows]) if fitted is None else tuned_answers(fitted, X[rows])["backbone"]
    )
    return np.asarray(logits.argmax(axis=1) == Y[rows])


def test_each_network_has_a_checkpoint_of_its_own(harmed: Details, folder: Path) -> None:
    assert kept(folder).keys() == {f"small/{FILE}", f"large/{FILE}"}
    for fitted, name in zip(harmed.fitted, ("small", "large"), strict=True):
        assert fitted.tuned is not None
        assert fitted.tuned.options.folder == folder / name


def test_the_report_tells_of_each_network_how_far_it_moved(harmed: Details) -> None:
    rows, found = harmed.split.learn, networks(harmed)
    for fitted, name in zip(harmed.fitted, ("small", "large"), strict=True):
        entry, after, before = found[name]["finetune"], right(name, rows, fitted), right(name, rows)
        assert (entry["original_accuracy"], entry["tuned_accuracy"]) == (before.mean(), after.mean())
        moved = mean_difference_interval(after.astype(float), before.astype(float))
        assert entry["moved"] == {"value": moved.value, "lower": moved.lower, "upper": moved.upper}
        assert (entry["judged_on"], entry["rows"], entry["epochs"]) == (len(rows), len(TRAINING[1]), 1)
        assert found[name]["accuracy"] == after.mean()  # as it is in the cascade, without exits
        assert before.mean() - after.mean() > 0.05
    assert "finetune" not in harmed.compiled.artifact.report
    text = harmed.compiled.explain()
    assert text.index("Fine-tuning of small\n") < text.index("Fine-tuning of large\n")


def test_the_drops_of_all_points_count_from_the_original_reference(harmed: Details) -> None:
    rows = harmed.split.learn
    before, after = right("large", rows), right("large", rows, harmed.fitted[1])
    assert harmed.table is not None
    assert harmed.selection is not None
    assert harmed.table.original_logits is not None
    np.testing.assert_allclose(harmed.table.original_logits, answers(network(), X[rows]), atol=1e-5)
    np.testing.assert_array_equal(harmed.table.correct(("large", OWN)), after)
    points = harmed.selection.frontier.points
    assert len(points) > 1
    for point in points:
        np.testing.assert_array_equal(point.estimate.backbone_correct, before)
        if not point.policy.is_plain:
            assert point.estimate.accuracy_drop == pytest.approx(
                before.mean() - point.estimate.correct.mean()
            )
    assert [point.accuracy_drop for point in points if point.policy.is_plain] == [0.0]
    report = harmed.compiled.artifact.report
    *_, reference = report["baselines"]["networks"]  # on half of the rows
    assert reference["accuracy_drop"] > (before.mean() - after.mean()) / 2
    for entry in report["frontier"]:
        assert entry["accuracy"] + entry["accuracy_drop"] == pytest.approx(before.mean())


def test_the_certificate_counts_from_the_original_reference(harmed: Details) -> None:
    rows = harmed.split.certify
    before = right("large", rows)
    np.testing.assert_array_equal(harmed.compiled.plain(X[rows]), answers(network(), X[rows]))
    now = harmed.compiled(X[rows]).argmax(axis=1) == Y[rows]
    certificate = harmed.compiled.artifact.report["certificate"]
    assert certificate["errors"] == (before & ~now).sum() > 0
    assert certificate["backbone_accuracy"] == before.mean()
    assert certificate["accuracy_drop"]["value"] == pytest.approx(before.mean() - now.mean())


@pytest.fixture(scope="module")
def one_tuned(harmed: Details, folder: Path) -> Details:
    """Only the small one, on data of its own, from its checkpoint; and it is given last, but comes first.

    The large one's heads are trained on calibration rows.
    """
    tuning = tuning_of(checkpoint=folder / "small", train_data=TRAINING, **HARMFUL)
    with mock.patch.object(loop._Run, "_step", never_again("a step")):
        return compiled(["large", "small"], [None, tuning], train=None, edges=[("small", "large")])


@pytest.mark.slow
def test_of_a_list_each_network_gets_what_stands_at_its_place(one_tuned: Details, harmed: Details) -> None:
    small, large = one_tuned.fitted
    assert small.tuned is not None
    assert small.tuned.resumed_at == 1
    assert large.tuned is None
    assert (small.rows, large.rows) == (len(TRAINING[1]), len(one_tuned.split.fit))
    assert one_tuned.split.fit.size > 0
    expected = tuned_answers(harmed.fitted[0], X[:50])
    for name, logits in tuned_answers(small, X[:50]).items():
        np.testing.assert_array_equal(logits, expected[name])
    found = networks(one_tuned)
    assert found["small"]["finetune"]["resumed_at"] == 1
    assert "finetune" not in found["large"]


@pytest.mark.slow
def test_where_the_reference_is_not_tuned_it_is_the_network_itself(one_tuned: Details) -> None:
    rows = one_tuned.split.learn
    assert one_tuned.table is not None
    assert one_tuned.table.original_logits is None
    np.testing.assert_allclose(one_tuned.table.backbone_logits, answers(network(), X[rows]), atol=1e-5)
    assert networks(one_tuned)["large"]["accuracy"] == right("large", rows).mean()
    entry = networks(one_tuned)["small"]["finetune"]
    after = right("small", rows, one_tuned.fitted[0])
    assert (entry["tuned_accuracy"], entry["original_accuracy"]) == (
        after.mean(),
        right("small", rows).mean(),
    )


def linear() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(256, 4)).eval()


def test_a_list_is_in_the_order_in_which_networks_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """And data of a network's own is for that one alone; what is not tuned then has calibration rows."""
    seen: dict[str, tuple[FineTune | None, int]] = {}

    def recorded(program: Any, data: Any, *given: Any) -> Fitted:
        settings = given[2]
        seen[program.exits[0]] = (settings.finetune, len(data.source))
        return Fitted(None, (), {}, 0)

    monkeypatch.setattr("exitcompiler.cascades.fit_exits", recorded)
    monkeypatch.setattr("exitcompiler.cascades.cascade_program", never_again("what comes after"))
    tuning = tuning_of(train_data=TRAINING)
    options: dict[str, Any] = {"names": ["last", "first"], "edges": [("first", "last")]}
    with quick(), pytest.raises(AssertionError, match="what comes after"):
        exitcompiler.cascade(
            [linear(), linear()], CALIBRATION, finetune=[None, tuning], early_exits=True, backend="torch",
            threads=1, **options,
        )  # fmt: skip
    assert list(seen) == ["first", "last"]
    assert seen == {"first": (tuning, len(TRAINING[1])), "last": (None, 240)}


OWN_DATA = tuning_of(train_data=TRAINING)
MISTAKES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "too few": ([tuning_of()], {}, "finetune has 1 entries for 2 networks"),
    "no exits": (tuning_of(), {"early_exits": False}, "are for exits"),
    "no exits for any": ([tuning_of(), None], {"early_exits": False}, "are for exits"),
    "data twice": ([OWN_DATA] * 2, {}, "training data are given twice"),
    "no data for one": ([OWN_DATA, tuning_of()], {"train_data": None}, "fine-tuning needs training data"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named_at_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finetune, changes, message = MISTAKES[case]
    for step in ("read_networks", "choose_target", "fit_exits"):
        monkeypatch.setattr(f"exitcompiler.cascades.{step}", never_again(step))
    model = linear()
    options = {"train_data": TRAINING, "early_exits": True, "backend": "torch", "threads": 1} | changes
    assert isinstance(finetune, FineTune | list)
    with pytest.raises(InputError, match=message):
        exitcompiler.cascade([model, model], CALIBRATION, finetune=finetune, **options)
