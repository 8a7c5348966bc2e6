"""Cut points: where they are, what has to cross there, what they are called."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import ZOO, captured, images, tokens, vectors
from torch import Tensor, nn
from torch.nn import functional

from exitcompiler.capture import capture
from exitcompiler.cut_points import find_candidates
from exitcompiler.errors import PassError
from exitcompiler.passes.find_cut_points import CutPoint, find_cut_points
from exitcompiler.passes.split_block import split_block


def _names(cuts: tuple[CutPoint, ...]) -> list[str]:
    return [cut.name for cut in cuts]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet", ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]),
        ("densenet", ["block1", "block2", "block3"]),
        ("depthwise", ["features.1", "features.2", "features.3", "features.4"]),
        ("vit", ["layers.0", "layers.1", "layers.2", "layers.3"]),
        ("bert", ["embeddings", "layers.0", "layers.1", "layers.2", "layers.3"]),
        ("windows", ["layers.0", "layers.1", "layers.2"]),
        ("mlp", ["1", "3", "5"]),
    ],
)
def test_building_blocks_end_at_cut_points(name: str, expected: list[str]) -> None:
    program = captured(name).program
    cuts = find_cut_points(program)
    assert _names(cuts) == expected
    shares = [cut.flops_share for cut in cuts]
    assert shares == sorted(shares)
    assert all(0 <= share < 1 for share in shares)
    assert all(cut.spec.batch_axis == 0 and cut.live[0] == cut.value for cut in cuts)


def test_the_mask_crosses_as_it_came_in() -> None:
    cuts = find_cut_points(captured("bert").program)
    assert [cut.live[1:] for cut in cuts] == [("attention_mask",)] * 4 + [()]


def test_positions_and_class_tokens_do_not_cross() -> None:
    assert all(len(c.live) == 1 for c in find_candidates(captured("vit").program.entry.body))


def test_windows_in_the_batch_are_no_place_to_cut() -> None:
    for candidate in find_candidates(captured("windows").program.entry.body):
        assert candidate.spec.shape[0] == "batch"
        assert candidate.node.meta["val"].shape[0].node.expr.is_Symbol


def test_too_much_to_hand_over_is_left_out() -> None:
    program = captured("resnet").program
    cuts = find_cut_points(program, max_live_bytes=8 * 8 * 8 * 4)
    assert _names(cuts) == ["layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    assert find_cut_points(program, max_live_bytes=0) == ()


class Straight(nn.Module):
    """Operators written straight into ``forward``: there is no module to name a place after."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(12, 12) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = functional.relu(x @ weight)
        return x


def test_without_modules_all_dominators_count() -> None:
    program = capture(Straight(), vectors(1)).program
    cuts = find_cut_points(program)
    assert _names(cuts) == ["relu", "relu_1", "relu_2"]
    assert [round(cut.flops_share, 2) for cut in cuts] == [0.25, 0.5, 0.75]


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.fc(x)
        return answer


def test_a_single_layer_has_no_cut_points() -> None:
    assert find_cut_points(capture(Single(), vectors(1)).program) == ()


class HeavySide(nn.Module):
    """The side branch is as expensive as the main one: its result crosses, it is not computed again."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(4))
        self.side = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 4))
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        side = self.side(context)
        for layer in self.main:
            x = functional.relu(layer(x))
        answer: Tensor = self.head(torch.cat([x, side], 1))
        return answer


def test_expensive_side_values_cross_themselves() -> None:
    inputs = {"x": vectors(2)["x"], "context": vectors(2, seed=1)["x"]}
    program = capture(HeavySide(), inputs).program
    cuts = find_cut_points(program)
    assert _names(cuts)[:4] == ["main.0", "main.1", "main.2", "main.3"]
    assert all(cut.live[1:] == ("linear_1",) for cut in cuts[:4])


class FoldedSide(nn.Module):
    """The side value has two entries per row, and computing it again is not cheap: no cut while it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 12)) for _ in range(3))
        self.side = nn.Linear(6, 6)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        side = self.side(context.view(-1, 6))
        for layer in self.main:
            x = layer(x)
        answer: Tensor = self.head(x + side.view(-1, 12))
        return answer


def test_side_values_without_rows_forbid_a_cut() -> None:
    inputs = {"x": vectors(2)["x"], "context": vectors(2, seed=1)["x"]}
    program = capture(FoldedSide(), inputs).program
    values = {node.name: node for node in program.entry.body.graph.nodes}
    for candidate in find_candidates(program.entry.body):
        for value in candidate.live:
            assert values[value].meta["val"].shape[0].node.expr.is_Symbol
    # The folded value itself is never handed over.
    assert all("linear" not in cut.live for cut in find_cut_points(program))


def test_only_programs_of_one_block_are_searched() -> None:
    program = captured("mlp").program
    split = split_block(program, find_cut_points(program)[:1])
    with pytest.raises(PassError, match="one block"):
        find_cut_points(split)
    with pytest.raises(PassError, match="one block"):
        find_cut_points(replace(program, blocks=()))


class ResizedMask(nn.Module):
    """Zeros made like a feature map are no side value: they are made again."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.convs[0](x)
        zeros, ones = torch.zeros_like(y), y.new_ones(y.shape[0], 1, 1, 1)
        for conv in self.convs[1:]:
            y = functional.relu(conv(y)) + zeros + ones
        return torch.mean(y, (2, 3))


def test_tensors_used_for_their_shape_alone_do_not_cross() -> None:
    cuts = find_cut_points(capture(ResizedMask(), images(1)).program)
    assert len(cuts) == 3
    assert all(len(cut.live) == 1 for cut in cuts)


def test_the_main_input_need_not_come_first() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = ZOO["bert"].build(0)

        def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Tensor:
            answer = self.bert(input_ids, attention_mask)["logits"]
            assert isinstance(answer, Tensor)
            return answer

    cuts = find_cut_points(capture(Swapped(), tokens(2)).program)
    assert _names(cuts) == ["bert.embeddings"] + [f"bert.layers.{i}" for i in range(4)]


class _Exchange(nn.Module):
    """A layer of two streams; each reads the other."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(12, 12), nn.Tanh())
        self.right = nn.Sequential(nn.Linear(12, 12), nn.Tanh())

    def forward(self, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
        return left + self.left(right), right + self.right(left)


class _TwoStreams(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Exchange() for _ in range(5))
        self.classifier = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        left, right = x.sin(), x.cos()
        for layer in self.layers:
            left, right = layer(left, right)
        logits: Tensor = self.classifier(left * right)
        return logits


def test_streams_that_never_meet_in_one_value_are_cut_where_modules_end() -> None:
    torch.manual_seed(0)
    program = capture(_TwoStreams().eval(), vectors(4)).program
    assert len(find_candidates(program.entry.body)) < 3
    cuts = find_cut_points(program)
    assert {f"layers.{index}" for index in range(4)} <= set(_names(cuts))
    assert all(2 <= len(cut.live) <= 4 for cut in cuts if cut.flops_share < 0.9)
    chain = split_block(program, cuts)
    assert all(list(block.params) != list(program.inputs) for block in chain.blocks[1:])  # nothing again
    inputs = vectors(6)
    (expected,) = program.entry.run(inputs).values()
    values = inputs
    for block in chain.blocks:
        values = {**values, **block.run(values)}
    torch.testing.assert_close(next(reversed(values.values())), expected, rtol=0, atol=0)
