"""compile() with fine-tuning: what is made of a tuned network, and what it is told against."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from finetuned import (
    CALIBRATION,
    FRESH,
    HARMFUL,
    TRAINING,
    answers,
    kept,
    network,
    never_again,
    quick,
    tuned_answers,
    tuning_of,
)
from trained import SmallResNet

import exitcompiler
from exitcompiler import fitting
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.errors import InputError, TrainingError
from exitcompiler.finetuning import loop
from exitcompiler.finetuning.options import FineTune
from exitcompiler.interpreter import interpret
from exitcompiler.settings import Settings
from exitcompiler.statistics import clopper_pearson_upper, mean_difference_interval

X, Y = CALIBRATION
BACKBONE = "backbone"


def compiled(
    options: FineTune,
    drop: float,
    *,
    model: torch.nn.Module | None = None,
    data: Any = CALIBRATION,
    train: Any = TRAINING,
    max_exits: int = 2,
) -> Details:
    """On torch, whose answers are the original's to the last bit."""
    settings = Settings(drop, backend="torch", threads=1, max_exits=max_exits, finetune=options)
    with quick():
        return compile_in_detail(model or network(), data, train, settings)


@functools.cache
def gentle() -> Details:
    """Tuned as one should, on data of its own."""
    return compiled(tuning_of(train_data=TRAINING), 0.1, train=None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the checkpoint of ``harmed``."""
    return tmp_path_factory.mktemp("harmed")


@pytest.fixture(scope="module")
def model() -> SmallResNet:
    """A copy of the network, as it may be found after it was trained."""
    copied = SmallResNet(width=8, blocks=3)
    copied.load_state_dict(network().state_dict())
    copied.train().stem.weight.requires_grad_(False)
    return copied


@pytest.fixture(scope="module")
def harmed(folder: Path, model: SmallResNet) -> Details:
    """Tuned until it has forgotten much, under a limit that allows nearly everything."""
    return compiled(tuning_of(checkpoint=folder, **HARMFUL), 0.6, model=model)


def by_hand(details: Details, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the original is right, and where the end of the tuned network is."""
    (fitted,) = details.fitted
    after = tuned_answers(fitted, X[rows])[BACKBONE].argmax(axis=1) == Y[rows]
    return answers(network(), X[rows]).argmax(axis=1) == Y[rows], after


def test_the_model_is_not_changed(harmed: Details, model: SmallResNet) -> None:
    assert harmed.compiled.artifact.report["finetune"]["moved"]["value"] != 0.0
    before = network().state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not model.stem.weight.requires_grad
    assert model.head.weight.requires_grad
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_report_is_complete(harmed: Details) -> None:
    report = harmed.compiled.artifact.report
    assert json.loads(json.dumps(report)) == report
    entry, (fitted,) = report["finetune"], harmed.fitted
    assert entry.keys() == {
        "epochs", "rows", "seconds", "resumed_at", "history", "options", "tuned_accuracy",
        "original_accuracy", "moved", "judged_on", "search", "device", "precision",
    }  # fmt: skip
    assert (entry["device"], entry["precision"]) == ("cpu", "float32")
    assert fitted.tuned is not None
    assert (entry["epochs"], entry["rows"], entry["resumed_at"]) == (1, len(TRAINING[1]), 0)
    assert report["rows"] == {"fit": 640, "learn": 480, "certify": 120}
    assert entry["seconds"] > 0.0
    assert len(entry["history"][0]) == len(fitted.tuned.heads) + 1
    assert np.isfinite(entry["history"]).all()
    options = dict(tuning_of(**HARMFUL).as_dict())
    assert entry["options"] == options == report["settings"]["finetune"]
    tried = entry["search"]["tried"]
    chosen = [place["name"] for place in report["exits"] if place["name"] in tried[0]["exits"]]
    assert chosen == tried[0]["exits"] == [name for name, _ in fitted.tuned.heads]
    assert entry["search"]["sets"] == 6


def test_how_far_the_network_moved_is_what_one_counts_by_hand(harmed: Details) -> None:
    entry = harmed.compiled.artifact.report["finetune"]
    before, after = by_hand(harmed, harmed.split.learn)
    assert entry["judged_on"] == len(before) == 480
    assert entry["original_accuracy"] == before.mean()
    assert entry["tuned_accuracy"] == after.mean()
    assert before.mean() - after.mean() > 0.05  # else the tests below would show nothing
    moved = mean_difference_interval(after.astype(float), before.astype(float))
    assert entry["moved"] == {"value": moved.value, "lower": moved.lower, "upper": moved.upper}
    assert moved.value == pytest.approx(after.mean() - before.mean())
    assert moved.upper < 0.0


def test_the_drops_of_all_points_count_from_the_original(harmed: Details) -> None:
    before, after = by_hand(harmed, harmed.split.learn)
    assert harmed.selection is not None
    points = harmed.selection.frontier.points
    to_the_end = 0
    for point in points:
        estimate = point.estimate
        np.testing.assert_array_equal(estimate.backbone_correct, before)
        if point.policy.is_plain:
            assert point.accuracy_drop == 0.0
            continue
        assert estimate.accuracy_drop == pytest.approx(before.mean() - estimate.correct.mean())
        ends = estimate.exit_index == len(estimate.exit_rates) - 1
        np.testing.assert_array_equal(estimate.correct[ends], after[ends])
        to_the_end += int(ends.sum())
    assert sum(point.policy.is_plain for point in points) == 1
    assert to_the_end > 0
    for entry in harmed.compiled.artifact.report["frontier"]:
        assert entry["accuracy"] + entry["accuracy_drop"] == pytest.approx(before.mean())
    for shipped in harmed.compiled.operating_points:
        if shipped.name != "plain":
            drop = shipped.estimate.accuracy_drop
            assert shipped.estimate.accuracy == pytest.approx(before.mean() - drop)


def test_the_certificate_counts_from_the_original(harmed: Details) -> None:
    rows = harmed.split.certify
    original = answers(network(), X[rows])
    np.testing.assert_array_equal(harmed.compiled.plain(X[rows]), original)
    before = original.argmax(axis=1) == Y[rows]
    right = harmed.compiled(X[rows]).argmax(axis=1) == Y[rows]
    certificate = harmed.compiled.artifact.report["certificate"]
    assert certificate["rows"] == 120
    assert certificate["errors"] == (before & ~right).sum() > 0
    assert certificate["bound"] == clopper_pearson_upper(certificate["errors"], 120, 0.95)
    assert certificate["backbone_accuracy"] == before.mean()
    assert certificate["accuracy_drop"]["value"] == pytest.approx(before.mean() - right.mean())


@pytest.fixture(scope="module")
def refused(harmed: Details, folder: Path) -> Details:
    """From the same checkpoint, with a limit that nothing keeps; and nothing is searched or trained again."""
    before = kept(folder)
    with (
        mock.patch.object(fitting, "search_exits", never_again("the search for exits")),
        mock.patch.object(loop._Run, "_step", never_again("a step")),
    ):
        found = compiled(tuning_of(checkpoint=folder, **HARMFUL), 0.01, max_exits=3)
    assert kept(folder) == before
    return found


def test_where_nothing_keeps_the_limit_the_original_comes_back(refused: Details) -> None:
    found = refused.compiled
    assert found.exits == (BACKBONE,)
    assert "tuning alone cost the network" in found.artifact.report["refused"]
    assert "no exits were added" in found.explain()
    np.testing.assert_array_equal(found(FRESH[0]), answers(network(), FRESH[0]))
    before, _ = by_hand(refused, refused.split.certify)
    (point,) = found.operating_points
    assert (point.estimate.accuracy, point.estimate.accuracy_drop) == (before.mean(), 0.0)


def test_the_original_makes_no_errors_that_it_does_not_make(refused: Details) -> None:
    (entry,) = [e for e in refused.compiled.artifact.report["frontier"] if e["name"] == "plain"]
    before, _ = by_hand(refused, refused.split.learn)
    assert (entry["accuracy"], entry["accuracy_drop"]) == (pytest.approx(before.mean()), 0.0)
    assert entry["excess_error"] == 0.0
    assert entry["chosen"]


def test_a_training_that_is_complete_is_not_made_again(harmed: Details, refused: Details) -> None:
    entry, first = (details.compiled.artifact.report["finetune"] for details in (refused, harmed))
    assert entry["resumed_at"] == 1
    different = {"seconds", "resumed_at"}
    assert {k: v for k, v in entry.items() if k not in different} == {
        k: v for k, v in first.items() if k not in different
    }
    (one,), (other,) = harmed.fitted, refused.fitted
    assert [p.cut.name for p in one.places if p.chosen] == [p.cut.name for p in other.places if p.chosen]
    assert all("checkpoint" in place.reason for place in other.places)
    for name, expected in tuned_answers(one, FRESH[0]).items():
        np.testing.assert_array_equal(tuned_answers(other, FRESH[0])[name], expected)


def test_exits_are_those_of_the_checkpoint_even_if_more_are_asked_for(
    harmed: Details, refused: Details
) -> None:
    assert harmed.candidates is not None
    assert refused.candidates is not None
    assert refused.candidates.exits == harmed.candidates.exits
    assert len(refused.candidates.exits) < 3


class Wrapped(torch.nn.Module):
    """The same network at another path, so that its places have other names."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        logits = self.inner(image)
        assert isinstance(logits, torch.Tensor)
        return logits


@pytest.mark.usefixtures("harmed")
def test_the_checkpoint_of_a_network_with_other_places_is_refused(folder: Path) -> None:
    before = kept(folder)
    options = tuning_of(checkpoint=folder, **HARMFUL)
    with quick(), pytest.raises(TrainingError, match=r"exits at \['blocks\..*has no such places") as caught:
        exitcompiler.compile(
            Wrapped(), CALIBRATION, train_data=TRAINING, finetune=options, backend="torch", threads=1
        )
    assert str(folder) in str(caught.value)
    assert "another checkpoint folder" in str(caught.value)
    assert kept(folder) == before


@pytest.mark.parametrize(
    ("own", "train", "message"),
    [(None, None, "fine-tuning needs training data"), (TRAINING, TRAINING, "given twice")],
    ids=["none", "twice"],
)
def test_too_little_or_too_much_training_data_is_refused_at_once(
    own: Any, train: Any, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in ("preparation.capture", "compiler.choose_target", "compiler.fit_exits"):
        monkeypatch.setattr(f"exitcompiler.{step}", never_again(step))
    with pytest.raises(InputError, match=message):
        exitcompiler.compile(
            network(), CALIBRATION, train_data=train, finetune=tuning_of(train_data=own), backend="torch",
            threads=1,
        )  # fmt: skip


def test_tuning_may_have_training_data_of_its_own() -> None:
    details = gentle()
    (fitted,), report = details.fitted, details.compiled.artifact.report
    assert fitted.rows == report["finetune"]["rows"] == report["rows"]["fit"] == 640
    before, after = by_hand(details, details.split.learn)
    assert after.mean() > before.mean() - 0.1


def test_without_labels_the_original_is_the_target() -> None:
    details = compiled(tuning_of(**HARMFUL), 0.6, data=X, train=TRAINING[0])
    (fitted,), report = details.fitted, details.compiled.artifact.report
    rows = details.split.learn
    original = answers(network(), X[rows]).argmax(axis=1)
    agrees = tuned_answers(fitted, X[rows])[BACKBONE].argmax(axis=1) == original
    assert details.table is not None
    np.testing.assert_array_equal(details.table.targets, original)
    entry = report["finetune"]
    assert (entry["original_accuracy"], entry["tuned_accuracy"]) == (1.0, agrees.mean())
    assert agrees.mean() < 0.95
    rows = details.split.certify
    agrees = details.compiled(X[rows]).argmax(axis=1) == answers(network(), X[rows]).argmax(axis=1)
    assert report["certificate"]["accuracy"] == agrees.mean()
    assert report["certificate"]["backbone_accuracy"] == 1.0


def test_the_program_is_the_tuned_network_with_its_exits(tmp_path: Path) -> None:
    """Saved, and loaded where there is no torch."""
    details, (x, _) = gentle(), FRESH
    assert details.selection is not None
    assert details.compiled.exits != (BACKBONE,)
    details.compiled.save(tmp_path / "tuned.exit")
    np.save(tmp_path / "x.npy", x)
    script = """
        import sys
        sys.modules["torch"] = None
        import numpy, exitcompiler
        model = exitcompiler.load(sys.argv[1], backend="onnxruntime", threads=1)
        x = numpy.load(sys.argv[2])
        found = model.run(x)
        assert "Fine-tuning" in model.explain()
        numpy.savez(sys.argv[3], outputs=found.outputs, exits=found.exit_index, plain=model.plain(x))
    """
    paths = [str(tmp_path / name) for name in ("tuned.exit", "x.npy", "found.npz")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *paths], check=True, timeout=300)
    found = np.load(tmp_path / "found.npz")
    oracle = interpret(details.selection.chosen.program, {"image": torch.from_numpy(x)})
    assert (found["exits"] == oracle.exit_index).mean() >= 0.97  # scores on the edge of a threshold
    assert len(set(found["exits"].tolist())) > 1
    expected = tuned_answers(details.fitted[0], x)
    for index, name in enumerate(details.compiled.exits):
        here = found["exits"] == index
        np.testing.assert_allclose(found["outputs"][here], expected[name][here], atol=1e-4)
    original = answers(network(), x)
    np.testing.assert_allclose(found["plain"], original, atol=1e-4)
    assert np.abs(expected[BACKBONE] - original).max() > 0.05  # tuned it is another network


def test_explain_and_the_page_tell_of_the_tuning(tmp_path: Path) -> None:
    found = gentle().compiled
    text = " ".join(found.explain().split())
    entry = found.artifact.report["finetune"]
    moved = f"moved by {100 * entry['moved']['value']:+.2f} points"
    assert "Fine-tuning Network and exits were trained together for 1 pass over 640 rows" in text
    assert moved in text
    assert "Exits were chosen among 6 sets" in text
    found.report(tmp_path / "page.html")
    page = " ".join((tmp_path / "page.html").read_text(encoding="utf-8").split())
    assert "<h2>Fine-tuning</h2>" in page
    assert moved in page.replace("&#43;", "+")
    assert ", ".join(entry["search"]["tried"][0]["exits"]) in page
