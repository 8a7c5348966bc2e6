"""Heads: their shapes and costs, their training, their graphs; probes and places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import captured
from torch import nn
from trained import stripes, trained_network

from exitcompiler.capture import capture
from exitcompiler.controlflow import ValueSpec
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Rows, TrainingData
from exitcompiler.errors import CalibrationError
from exitcompiler.flops import count_flops
from exitcompiler.heads import (
    Confidence,
    ConvHead,
    LinearHead,
    TokenHead,
    deep_head,
    head_flops,
    lower_head,
    pool,
)
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.placement import PROBE_WIDTH, _Ridge, choose_places, probe
from exitcompiler.progress import reporting
from exitcompiler.scores import softmax_confidence
from exitcompiler.training import FeatureStream, HeadRecipe, train_heads

SPECS = {
    "map": ValueSpec(("batch", 6, 20, 20), "float32"),
    "small map": ValueSpec(("batch", 12, 4, 4), "float32"),
    "channels last": ValueSpec(("batch", 14, 14, 8), "float32"),
    "tokens": ValueSpec(("batch", 9, 16), "float32"),
    "vector": ValueSpec(("batch", 16), "float32"),
}


def _sample(spec: ValueSpec, rows: int = 3) -> torch.Tensor:
    return torch.randn(
        rows, *(int(size) for size in spec.shape[1:]), generator=torch.Generator().manual_seed(0)
    )


@pytest.mark.parametrize("name", SPECS)
def test_both_heads_answer_for_every_kind_of_value(name: str) -> None:
    spec = SPECS[name]
    for head in (LinearHead(spec, 5), deep_head(spec, 5, budget_flops=5e5)):
        assert head.eval()(_sample(spec)).shape == (3, 5)
        assert head_flops(head, spec) > 0


def test_the_kind_of_deep_head_follows_the_value() -> None:
    kinds = {name: type(deep_head(spec, 5, budget_flops=5e5)) for name, spec in SPECS.items()}
    assert kinds == {
        "map": ConvHead, "small map": ConvHead, "channels last": ConvHead,
        "tokens": TokenHead, "vector": TokenHead,
    }  # fmt: skip


def test_a_deep_head_keeps_its_budget_and_uses_it() -> None:
    spec = ValueSpec(("batch", 16, 32, 32), "float32")
    for budget in (2e6, 2e7, 1e8):
        assert 0.5 * budget < head_flops(deep_head(spec, 10, budget_flops=budget), spec) <= budget


def test_pooling_keeps_the_class_token_apart() -> None:
    tokens = torch.zeros(2, 5, 3)
    tokens[:, 0] = 5.0
    assert pool(tokens)[0].tolist() == [1.0, 1.0, 1.0, 5.0, 5.0, 5.0]


def test_confidence_in_the_graph_is_the_one_that_gates_learn_on() -> None:
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) * 4
    _, features = Confidence(nn.Identity())(logits)
    np.testing.assert_allclose(features.numpy(), softmax_confidence(logits.numpy()), atol=2e-6)


def test_a_lowered_head_computes_what_the_module_does() -> None:
    spec = SPECS["map"]
    module = ConvHead(spec, 4, width=8, residuals=1).eval()
    head = lower_head(("layer1.0", "deep"), module, "h", spec, 4)
    x = _sample(spec, 5)
    logits, confidence = head.body(x)
    assert list(head.results) == ["layer1_0_deep_logits", "layer1_0_deep_confidence"]
    torch.testing.assert_close(logits, module(x))
    assert confidence.shape == (5, 3)
    assert count_flops(head.body) == head_flops(module, spec)


def _setup() -> tuple[FeatureStream, list[CutPoint], str, TrainingData]:
    program = capture(trained_network(), stripes(8, seed=1)[0]).program
    cuts = list(find_cut_points(program))
    logits = next(iter(program.entry.results))
    x, y = stripes(600, seed=3)
    data = TrainingData(Rows({"image": torch.from_numpy(x)}, y), ("image",))
    return FeatureStream.of(program, [*(cut.value for cut in cuts), logits]), cuts, logits, data


def test_training_lowers_the_loss_and_leaves_the_backbone_alone() -> None:
    stream, cuts, logits, data = _setup()
    before = {name: value.clone() for name, value in stream.body.state_dict().items()}
    torch.manual_seed(0)
    cut = cuts[3]
    heads = {
        (cut.name, "linear"): LinearHead(cut.spec, 4),
        (cut.name, "deep"): deep_head(cut.spec, 4, budget_flops=1e6),
    }
    with reporting(False) as reporter, reporter.step("training") as step:
        train_heads(
            stream, heads, dict.fromkeys(heads, cut.value), data, epochs=12, batches=5,
            recipe=HeadRecipe(), seed=0, step=step,
        )  # fmt: skip
    x, y = stripes(400, seed=9)
    values = stream({"image": torch.from_numpy(x)})
    for head in heads.values():
        accuracy = (head(values[cut.value].float()).argmax(1).numpy() == y).mean()
        assert accuracy > 0.6
    assert all(torch.equal(before[name], value) for name, value in stream.body.state_dict().items())
    assert logits in values


def test_training_stops_at_a_loss_that_is_not_finite() -> None:
    stream, cuts, _, data = _setup()
    head = LinearHead(cuts[0].spec, 4)
    nn.init.constant_(head.linear.weight, float("inf"))
    with (
        reporting(False) as reporter,
        reporter.step("training") as step,
        pytest.raises(CalibrationError, match="loss"),
    ):
        train_heads(
            stream, {("a", "linear"): head}, {("a", "linear"): cuts[0].value}, data, epochs=1, batches=5,
            recipe=HeadRecipe(), seed=0, step=step,
        )  # fmt: skip


def test_epochs_follow_the_budget_of_rows() -> None:
    recipe = HeadRecipe(row_budget=1000)
    assert [recipe.epochs_for(rows) for rows in (10, 100, 100_000)] == [16, 10, 2]
    assert HeadRecipe(epochs=7).epochs_for(10) == 7


def test_probes_know_more_the_deeper_they_stand() -> None:
    stream, cuts, logits, data = _setup()
    with reporting(False) as reporter, reporter.step("probing") as step:
        accuracies = probe(stream, cuts, data, 4, seed=0, step=step, target=logits, rows=600)
    assert len(accuracies) == len(cuts)
    assert accuracies[-1] > 0.5


def _probe(data: TrainingData, rows: int) -> list[float]:
    stream, cuts, logits, _ = _setup()
    with reporting(False) as reporter, reporter.step("probing") as step:
        return probe(stream, cuts, data, 4, seed=0, step=step, target=logits, rows=rows)


def test_probes_on_sorted_rows_are_judged_on_classes_that_they_were_fitted_on() -> None:
    x, y = stripes(640, seed=3)
    order = np.argsort(y, kind="stable")
    loader = [(x[part], y[part]) for part in np.split(order, 40)]
    assert _probe(TrainingData(loader, ("image",)), 640)[-1] > 0.5


def test_a_loader_that_has_nothing_in_its_second_pass_is_refused() -> None:
    with pytest.raises(CalibrationError, match="too few rows came"):
        _probe(TrainingData([], ("image",)), 600)


def test_values_that_are_not_finite_are_refused_with_the_name_of_the_cut() -> None:
    stream, cuts, logits, data = _setup()

    class Broken(FeatureStream):
        def __call__(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            values = super().__call__(inputs)
            return {**values, cuts[2].value: values[cuts[2].value] * float("inf")}

    broken = Broken(stream.body, stream.values, stream.reduced)
    with (
        reporting(False) as reporter,
        reporter.step("p") as step,
        pytest.raises(CalibrationError, match=f"cut '{cuts[2].name}'"),
    ):
        probe(broken, cuts, data, 4, seed=0, step=step, target=logits, rows=200)


def test_a_probe_on_wide_values_keeps_little_and_still_knows() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(1200) % 3
    features = torch.randn(1200, 5000, generator=generator)
    for label in range(3):  # each class has features of its own
        features[labels == label, 500 * label : 500 * (label + 1)] += 1.0
    ridge = _Ridge("wide", 3, seed=0)
    ridge.add(features[:900], labels[:900])
    ridge.hold_out(features[900:], labels[900:])
    assert ridge._gram is not None
    assert len(ridge._gram) == PROBE_WIDTH + 1
    assert ridge.accuracy() > 0.5


@pytest.mark.parametrize(
    ("chance", "accuracy", "knows"),
    [(0.9, 0.905, False), (0.9, 0.93, True), (0.1, 0.11, False), (0.1, 0.13, True), (0.001, 0.01, True)],
)
def test_what_a_probe_has_to_know_follows_chance(chance: float, accuracy: float, knows: bool) -> None:
    spec = SPECS["vector"]
    cuts = [CutPoint("a", "a", ("a",), spec, 0.5)]
    (place,) = choose_places(cuts, [0.5], [accuracy], count=1, chance=chance)
    assert place.chosen is knows


def test_the_head_of_tokens_shrinks_to_its_budget() -> None:
    for spec in (SPECS["tokens"], ValueSpec(("batch", 2000), "float32")):
        widest = head_flops(TokenHead(spec, 5), spec)
        assert head_flops(deep_head(spec, 5, budget_flops=widest), spec) == widest
        assert head_flops(deep_head(spec, 5, budget_flops=widest / 3), spec) <= widest / 3
        assert head_flops(deep_head(spec, 5, budget_flops=1), spec) == head_flops(
            TokenHead(spec, 5, width=16), spec
        )


def test_places_are_spread_over_time_and_every_cut_gets_a_reason() -> None:
    cuts = list(find_cut_points(captured("resnet").program))
    spec = cuts[0].spec
    many = [CutPoint(f"layer.{i}", f"v{i}", (f"v{i}",), spec, i / 20) for i in range(20)]
    shares = [i / 20 for i in range(20)]
    accuracies = [0.1] * 4 + [0.3 + i / 50 for i in range(16)]
    places = choose_places(many, shares, accuracies, count=4, chance=0.1)
    chosen = [place for place in places if place.chosen]
    assert len(chosen) == 4
    assert all(place.reason for place in places)
    assert not any(place.chosen for place in places if place.time_share < 0.04 or place.probe_accuracy < 0.12)
    assert not any(place.chosen for place in places if place.time_share > 0.82)
