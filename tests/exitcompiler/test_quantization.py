"""A network in int8: calibrated as a whole, cut like any other, run by engines as torch runs it."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from models import ZOO, captured
from torch import nn
from trained import stripes, trained_network

from exitcompiler import float_layers
from exitcompiler.candidates import Candidates, build_program, chain_candidates
from exitcompiler.capture import capture
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.data import Rows
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.errors import CalibrationError, LoweringError, PassError
from exitcompiler.fitting import distinct_cuts
from exitcompiler.float_layers import COUNTS, rank_products, require_accuracy, settle
from exitcompiler.heads import LinearHead, deep_head, lower_head
from exitcompiler.interpreter import interpret
from exitcompiler.naming import DEEP, LINEAR
from exitcompiler.networks import read_networks
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import split_block
from exitcompiler.policies import Policy
from exitcompiler.program import Program
from exitcompiler.quantization import FEWEST_ROWS, Quantizer, evenly_spaced
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.scoring import float_logits, plain_logits
from exitcompiler.verify import verify

for package in ("onnxruntime", "openvino"):
    pytest.importorskip(package)

BACKENDS = ("onnxruntime", "openvino")
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("bert", "densenet", "windows", "mlp")]


def rows_of(count: int, seed: int) -> Rows:
    x, y = stripes(count, seed)
    return Rows({"image": torch.from_numpy(x)}, y)


CALIBRATION = rows_of(200, seed=11)
FRESH = rows_of(100, seed=12)


@functools.cache
def network() -> Program:
    return capture(trained_network(), CALIBRATION.inputs["image"][:4].numpy()).program


@functools.cache
def quantizer() -> Quantizer:
    return Quantizer(CALIBRATION)


@functools.cache
def candidates() -> Candidates:
    """The network cut at two places, with two heads at each that are not trained."""
    program = network()
    cuts = [cut for cut in distinct_cuts(find_cut_points(program)) if cut.name in ("blocks.2", "blocks.5")]
    torch.manual_seed(3)
    heads = {}
    for cut in cuts:
        for kind, head in (
            (LINEAR, LinearHead(cut.spec, 4)),
            (DEEP, deep_head(cut.spec, 4, budget_flops=2e5)),
        ):
            key = cut.name, kind
            heads[key] = lower_head(key, head.eval(), cut.value, cut.spec, 4)
    return chain_candidates(program, cuts, heads)


def test_the_network_computes_on_integers_and_answers_nearly_the_same() -> None:
    program = quantizer().program(network())
    verify(program)
    assert program is quantizer().program(network())
    exact, found = float_logits(network(), FRESH), float_logits(program, FRESH)
    assert 0 < np.abs(found - exact).max() < 0.15 * np.abs(exact).max()
    assert (found.argmax(axis=1) == exact.argmax(axis=1)).mean() >= 0.93
    weights = [
        value.dtype
        for name, value in program.entry.body.named_buffers()
        if name.endswith(("_weight_int8", "weight"))
    ]
    # Nine convolutions on integers; the classifier in float32, as all that makes logits.
    assert weights.count(torch.int8) == 9
    assert {str(spec) for spec in program.outputs.values()} == {"float32[batch, 4]"}


def test_a_chain_is_the_whole_to_the_last_bit_and_hands_on_integers() -> None:
    program = network()
    cuts = distinct_cuts(find_cut_points(program))
    chain = quantizer().program(split_block(program, cuts))
    verify(chain)
    values = dict(FRESH.inputs)
    for block in chain.blocks:
        values |= block.run(values)
    whole = quantizer().program(program).entry.run(FRESH.inputs)
    for name, logits in whole.items():
        torch.testing.assert_close(values[name], logits, rtol=0, atol=0)
    crossing = [spec.dtype for block in chain.blocks[1:] for spec in block.params.values()]
    assert crossing.count("uint8") >= 7
    inside = [spec.dtype for block in chain.blocks[1:-1] for spec in block.params.values()]
    assert set(inside) == {"uint8"}


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_engines_answer_as_torch_does_everywhere(backend: str) -> None:
    typed = quantizer().candidates(candidates())
    verify(typed.program)
    for block in typed.program.blocks[1:]:
        assert {spec.dtype for spec in block.params.values()} == {"uint8"}
    engines = Engines(create_backend(backend, precision="int8", threads=1), Lowerer(), quantizer())
    blocks = [*typed.program.blocks, *(typed.head_block(key) for key in typed.heads)]
    loaded = engines.load(blocks)
    values = dict(FRESH.inputs)
    for block in blocks:
        expected = block.run(values)
        inputs = [values[name].numpy() for name in block.params] + gate_parameters(block)
        found = dict(zip(loaded[block.name].signature.outputs, loaded[block.name].run(inputs), strict=True))
        for name in expected.keys() & found.keys():
            array, wanted = found[name], expected[name].numpy()
            if array.dtype == np.uint8:
                # A sum between two steps may fall to either; sums of a few more steps differ with it.
                apart = np.abs(array.astype(np.int64) - wanted.astype(np.int64))
                assert apart.max() <= 3
                assert (apart > 1).mean() < 0.01
            else:
                np.testing.assert_allclose(array, wanted, atol=0.1 * max(1.0, np.abs(wanted).max()))
        values |= expected


def test_the_program_of_a_policy_is_that_of_the_whole() -> None:
    typed = quantizer().candidates(candidates())
    plain = build_program(typed, Policy.plain(typed.topology))
    few = FRESH.take(slice(0, 8))
    whole = interpret(quantizer().program(network()), few.inputs)
    found = interpret(plain, few.inputs)
    for name, logits in whole.outputs.items():
        torch.testing.assert_close(found.outputs[name], logits, rtol=0, atol=0)


def test_what_is_kept_in_float_has_float_weights() -> None:
    ranked = rank_products(network(), quantizer().program(network()), FRESH)
    assert len(ranked) == len(set(ranked)) == 9
    kept = quantizer().keeping(ranked[:2]).program(network())
    names = {name for name, _ in kept.entry.body.named_buffers()}
    assert sum(name.endswith("_weight_int8") for name in names) == 7
    assert not any(name.startswith(f"{product}_weight_int8") for product in ranked[:2] for name in names)


def engines_of() -> Engines:
    return Engines(create_backend("onnxruntime", precision="int8", threads=1), Lowerer(), quantizer())


def test_a_network_that_bears_it_keeps_nothing_in_float() -> None:
    original = float_logits(network(), FRESH)
    ticks = []
    settled = settle(network(), engines_of(), FRESH, original, 0.05, lambda: ticks.append(1))
    assert len(ticks) == len(settled.trials) == 1
    assert settled.trial.kept_float == ()
    whole = settled.engines.typed(network())
    np.testing.assert_array_equal(settled.logits, plain_logits(whole, settled.engines, FRESH))
    require_accuracy(settled, 0.05)


def test_a_network_that_does_not_is_tried_with_more_and_more_in_float(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the quantised network answers at random, whatever is left in float32."""
    rng = np.random.default_rng(0)
    monkeypatch.setattr(
        float_layers, "plain_logits", lambda *given: rng.normal(size=(len(FRESH), 4)).astype(np.float32)
    )
    original = float_logits(network(), FRESH)
    settled = settle(network(), engines_of(), FRESH, original, 0.01)
    assert [len(trial.kept_float) for trial in settled.trials] == [count for count in COUNTS if count <= 9]
    for fewer, more in zip(settled.trials, settled.trials[1:], strict=False):
        assert more.kept_float[: len(fewer.kept_float)] == fewer.kept_float
    assert settled.trial.drop.value == min(trial.drop.value for trial in settled.trials)
    with pytest.raises(CalibrationError, match=r"int8 costs this network \d+\.\d+ points") as caught:
        require_accuracy(settled, 0.01)
    for word in ("bf16", "fp32", "1.00 are allowed", "0, 1, 2, 4, 8"):
        assert word in str(caught.value)


def test_the_most_sensitive_product_is_found() -> None:
    """One convolution whose input has one value far out of the range of all others."""
    torch.manual_seed(0)

    class Spiked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(1 if i == 0 else 4, 4, 3, padding=1) for i in range(4))
            self.head = nn.Linear(4, 3)
            with torch.no_grad():
                self.convs[2].weight[0] *= 1e-4
                self.convs[1].bias[0] += 300.0  # a channel that takes all of the range, and is not needed
                self.convs[2].weight[:, 0] = 0.0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            for conv in self.convs:
                image = torch.relu(conv(image))
            logits = self.head(image.mean(dim=(2, 3)))
            assert isinstance(logits, torch.Tensor)
            return logits

    images = torch.randn(128, 1, 8, 8)
    program = capture(Spiked(), images[:4].numpy()).program
    rows = Rows({"image": images}, None)
    found = rank_products(program, Quantizer(rows).program(program), rows)
    weight_of = {n.name: str(n.args[1]) for n in program.entry.body.graph.nodes if n.name in found}
    assert weight_of[found[0]] == "convs_2_weight"


def test_rows_are_taken_from_all_over() -> None:
    """Rows may come sorted by class: ranges of the first ones would be those of a few classes."""
    images = torch.cat([torch.randn(600, 1, 16, 16), 50.0 + torch.randn(600, 1, 16, 16)])
    sorted_rows = Rows({"image": images}, None)
    assert len(evenly_spaced(sorted_rows, 512)) == 512
    assert evenly_spaced(CALIBRATION, 512) is CALIBRATION
    body = Quantizer(sorted_rows).program(network()).entry.body
    first = next(n for n in body.graph.nodes if "quantize_per_tensor" in str(n.target))
    _, scale, zero_point, *_ = first.args
    assert (255 - zero_point) * scale > 45.0


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "depthwise", *SLOW])
def test_other_families_are_quantised_where_it_serves(name: str) -> None:
    program = captured(name).program
    rows = Rows(dict(zip(program.inputs, ZOO[name].inputs(120, 1).values(), strict=True)), None)
    quantizer = Quantizer(rows)
    quantized = quantizer.program(program)
    verify(quantized)
    exact, found = float_logits(program, rows), float_logits(quantized, rows)
    assert np.abs(found - exact).max() < 0.1 * np.abs(exact).max()
    for backend in BACKENDS:
        engines = Engines(create_backend(backend, precision="int8", threads=1), Lowerer(), quantizer)
        by_engine = plain_logits(quantized, engines, rows)
        np.testing.assert_allclose(by_engine, found, atol=0.1 * max(1.0, np.abs(found).max()))
    chain = quantizer.program(split_block(program, distinct_cuts(find_cut_points(program))))
    verify(chain)
    # Products of two activations are no integers: nothing but what goes into a weight is.
    for node in quantized.entry.body.graph.nodes:
        if str(node.target).startswith(("aten.matmul", "aten.bmm", "aten.scaled_dot")):
            sources = [source.target for source in node.all_input_nodes]
            assert torch.ops.quantized_decomposed.dequantize_per_tensor.default not in sources


def test_linear_layers_of_a_transformer_can_be_kept_in_float() -> None:
    program = captured("vit").program
    quantizer = Quantizer(
        Rows(dict(zip(program.inputs, ZOO["vit"].inputs(120, 1).values(), strict=True)), None)
    )
    names = {name for name, _ in quantizer.program(program).entry.body.named_buffers()}
    linear = sorted(name for name in names if name.startswith("linear") and name.endswith("_weight_int8"))
    product = linear[0].removesuffix("_weight_int8")
    kept = {name for name, _ in quantizer.keeping([product]).program(program).entry.body.named_buffers()}
    assert linear[0] not in kept
    assert linear[1] in kept


def test_a_network_with_nothing_to_quantise_is_refused() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.head(torch.tanh(x))
            assert isinstance(logits, torch.Tensor)
            return logits

    x = torch.randn(120, 8)
    with pytest.raises(LoweringError, match=r"besides the last, that could be quantised\n.*'fp32'"):
        Quantizer(Rows({"x": x}, None)).program(capture(Last(), x[:4].numpy()).program)


def test_a_channel_of_nearly_no_weight_keeps_its_bias() -> None:
    class Offset(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3)
            self.head = nn.Linear(2, 3)
            with torch.no_grad():
                self.conv.weight[0] = 1e-12
                self.conv.bias.copy_(torch.tensor([4000.0, 0.5]))  # type: ignore[union-attr]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = self.head(torch.relu(self.conv(x)).mean(dim=(2, 3)))
            assert isinstance(logits, torch.Tensor)
            return logits

    x = torch.randn(120, 1, 6, 6)
    program = capture(Offset(), x[:4].numpy()).program
    rows = Rows({"x": x}, None)
    found = float_logits(Quantizer(rows).program(program), rows)
    np.testing.assert_allclose(found, float_logits(program, rows), rtol=0.02, atol=0.1)


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(CalibrationError, match=f"{FEWEST_ROWS} are needed") as caught:
        Quantizer(rows_of(FEWEST_ROWS - 1, seed=1))
    assert "bf16" in str(caught.value)
    assert "fp32" in str(caught.value)


def test_what_the_quantiser_refuses_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("onnxruntime.quantization.quantize_static", refuse)
    with pytest.raises(LoweringError, match=r"quantiser does not take the network: no such thing") as caught:
        Quantizer(CALIBRATION).program(network())
    assert "fp32" in str(caught.value)


def test_only_one_network_at_a_time() -> None:
    networks = read_networks(
        [trained_network()] * 2, CALIBRATION.inputs["image"][:4].numpy(), names=["a", "b"]
    )
    both = cascade_program([Member(network) for network in networks], frozenset({(0, 1)}))
    with pytest.raises(PassError, match="only a network of its own"):
        quantizer().candidates(both)
