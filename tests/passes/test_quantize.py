"""quantize: integers between the blocks and in the products, the same answers to what 8 bits allow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from exitcompiler.capture import capture
from exitcompiler.cut_points import CutPoint
from exitcompiler.errors import PassError
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.quantize import Quantize, quantize
from exitcompiler.passes.split_block import split_block
from exitcompiler.printer import print_program
from exitcompiler.program import Program
from exitcompiler.quantized_body import BodyScales, Scale, fold_norms, quantize_body
from exitcompiler.verify import verify

torch.manual_seed(0)


class Net(nn.Module):
    """Two convolutions with a batch norm each, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.head = nn.Linear(4, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits."""
        h = torch.relu(self.norm(self.first(image)))
        return self.head(torch.relu(self.second(h) + h).mean(dim=(2, 3)))


def captured() -> Program:
    torch.manual_seed(1)
    net = Net()
    with torch.no_grad():
        net.norm.running_mean.uniform_(-0.5, 0.5)
        net.norm.running_var.uniform_(0.5, 2.0)
    return capture(net, torch.randn(4, 1, 6, 6)).program


WHOLE = captured()
IMAGES = torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(2))


def cut_behind_the_norm() -> tuple[Program, CutPoint]:
    cut = find_cut_points(WHOLE)[0]
    assert cut.name == "norm"
    return split_block(WHOLE, [cut]), cut


CHAIN, CUT = cut_behind_the_norm()
FIRST, SECOND = (block.name for block in CHAIN.blocks)


def scales_of(value: str = CUT.value, scale: float = 0.05) -> dict[str, BodyScales]:
    crossing = {value: Scale(scale, 128)}
    image = {"image": Scale(0.05, 128)}
    return {
        FIRST: BodyScales(image | crossing, frozenset({"getitem"})),
        SECOND: BodyScales(crossing | {"relu": Scale(scale, 0)}, frozenset({"conv2d_1"})),
    }


def run(program: Program, images: torch.Tensor) -> torch.Tensor:
    values = {"image": images}
    for block in program.blocks:
        values |= block.run(values)
    (logits,) = (values[name] for name in program.blocks[-1].terminator.values)  # type: ignore[union-attr]
    return logits


def test_what_crosses_is_an_integer_and_the_ends_stay_float() -> None:
    program = quantize(CHAIN, scales_of())
    verify(program)
    first, second = program.blocks
    assert {name: spec.dtype for name, spec in first.values.items()} == {
        "image": "float32", CUT.value: "uint8",
    }  # fmt: skip
    assert second.params[CUT.value].dtype == "uint8"
    assert {spec.dtype for spec in second.results.values()} == {"float32"}
    assert f"{CUT.value}: uint8[batch, 4, 6, 6]" in print_program(program)
    for block in program.blocks:  # float weights are gone, but for the classifier's
        weights = [n for n in block.body.graph.find_nodes(op="get_attr") if "weight" in str(n.target)]
        kinds = {n.target: getattr(block.body, str(n.target), None) for n in weights}
        assert any("int8" in str(name) for name in kinds)
    assert not first.body.graph.find_nodes(
        op="call_function", target=torch.ops.aten._native_batch_norm_legit_no_training.default
    )


def test_answers_are_near_and_the_program_given_is_left_alone() -> None:
    before = print_program(CHAIN)
    attributes = [{name for name, _ in block.body.named_parameters()} for block in CHAIN.blocks]
    exact = run(CHAIN, IMAGES)
    program = quantize(CHAIN, scales_of(scale=0.02))
    found = run(program, IMAGES)
    assert 0 < float((found - exact).abs().max()) < 0.1 * float(exact.abs().max())
    assert print_program(CHAIN) == before
    assert [{name for name, _ in block.body.named_parameters()} for block in CHAIN.blocks] == attributes
    verify(CHAIN)
    torch.testing.assert_close(run(CHAIN, IMAGES), exact, rtol=0, atol=0)


def test_finer_steps_are_nearer() -> None:
    exact = run(CHAIN, IMAGES)
    errors = [
        float((run(quantize(CHAIN, scales_of(scale=scale)), IMAGES) - exact).norm())
        for scale in (0.4, 0.1, 0.025)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 2 * errors[-1]


def test_cutting_changes_nothing() -> None:
    scales = scales_of()
    together = BodyScales(
        {**scales[FIRST].values, **scales[SECOND].values}, scales[FIRST].products | scales[SECOND].products
    )
    whole = quantize(WHOLE, {WHOLE.entry.name: together})
    torch.testing.assert_close(run(whole, IMAGES), run(quantize(CHAIN, scales), IMAGES), rtol=0, atol=0)


def test_without_scales_nothing_is_changed() -> None:
    assert quantize(CHAIN, {}) is CHAIN
    result = Quantize({FIRST: BodyScales(), SECOND: BodyScales()})(CHAIN)
    assert result.program is CHAIN
    assert not result.modified
    assert Quantize(scales_of())(CHAIN).modified


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {FIRST: s[FIRST]}, "is Scale.*binds .*which is float32"),
        (lambda s: {SECOND: s[SECOND]}, "is float32, and binds .*which is Scale"),
        (
            lambda s: (
                s | {SECOND: replace(s[SECOND], values=s[SECOND].values | {CUT.value: Scale(0.06, 128)})}
            ),
            "is Scale.*0.05",
        ),
        (
            lambda s: s | {SECOND: replace(s[SECOND], values=s[SECOND].values | {"nonsense": Scale(1.0, 0)})},
            r"no values \['nonsense'\]",
        ),
        (
            lambda s: s | {FIRST: replace(s[FIRST], products=frozenset({"getitem", "relu"}))},
            r"\['relu'\] are no products",
        ),
        (
            lambda s: s | {FIRST: replace(s[FIRST], values={CUT.value: Scale(0.05, 128)})},
            r"\['getitem'\] are no products.*of a quantised value",
        ),
    ],
    ids=["one side", "the other side", "two scales", "no such value", "no product", "a float input"],
)
def test_edges_have_to_agree(change: object, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        quantize(CHAIN, change(scales_of()))  # type: ignore[operator]
    assert FIRST in str(caught.value) or SECOND in str(caught.value)


def test_a_param_of_another_scale_than_its_edge_is_not_well_formed() -> None:
    program = quantize(CHAIN, scales_of())
    broken = program.with_blocks({SECOND: CHAIN.block(SECOND)})
    with pytest.raises(Exception, match="uint8"):
        verify(broken)


@given(
    scale=st.floats(1e-4, 2.0),
    zero_point=st.integers(0, 255),
    values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=20),
)
def test_a_pair_is_within_half_a_step_of_what_is_in_range(
    scale: float, zero_point: int, values: list[float]
) -> None:
    body = fold_norms(WHOLE.entry.body)
    quantized = quantize_body(body, BodyScales({"image": Scale(scale, zero_point)}), ())
    (pair,) = quantized.graph.find_nodes(
        op="call_function", target=torch.ops.quantized_decomposed.dequantize_per_tensor.default
    )
    (first,) = pair.all_input_nodes
    x = torch.tensor(values)
    integers = first.target(x, *first.args[1:])  # type: ignore[operator]
    back = pair.target(integers, *pair.args[1:])  # type: ignore[operator]
    low, high = (0 - zero_point) * scale, (255 - zero_point) * scale
    clipped = x.double().clamp(low, high)
    assert float((back.double() - clipped).abs().max()) <= scale * (0.5 + 1e-3) + 1e-4 * scale


@given(st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=9, max_size=9), min_size=4, max_size=4))
def test_weights_are_within_half_a_step_channel_by_channel(channels: list[list[float]]) -> None:
    body = fold_norms(WHOLE.entry.body)
    node = next(n for n in body.graph.nodes if n.name == "getitem")
    weight = torch.tensor(channels).reshape(4, 1, 3, 3)
    setattr(body, str(node.args[1].target), weight)
    quantized = quantize_body(body, BodyScales({"image": Scale(0.05, 128)}, frozenset({"getitem"})), ())
    (integers, scale, *_) = (
        getattr(quantized, f"getitem_weight_{what}") for what in ("int8", "scale", "zero_point")
    )
    assert integers.dtype is torch.int8
    error = (integers.double() * scale.double().reshape(4, 1, 1, 1) - weight.double()).abs()
    assert (error.amax(dim=(1, 2, 3)) <= 0.5001 * scale.double()).all()
    largest = weight.abs().amax(dim=(1, 2, 3))
    assert (integers.abs().amax(dim=(1, 2, 3))[largest > 1e-4] == 127).all()
