"""channels-last-edges: feature maps in int8 cross blocks channels last, and no answer changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from programs import aten, build_body

from exitcompiler.controlflow import Branch, Edge, Jump, LinearGate, Return, Terminator, ValueSpec
from exitcompiler.interpreter import interpret
from exitcompiler.passes.channels_last_edges import ChannelsLastEdges, channels_last_edges
from exitcompiler.passes.eliminate_dead_code import eliminate_dead_code
from exitcompiler.passes.merge_blocks import merge_blocks
from exitcompiler.passes.pipeline import Pipeline
from exitcompiler.program import Block, Program
from exitcompiler.quantized_body import DEQUANTIZE
from exitcompiler.verify import verify

IMAGE = ValueSpec(("batch", 2, 3, 4), "float32")
MAP = ValueSpec(("batch", 2, 3, 4), "uint8")
LAST = ValueSpec(("batch", 3, 4, 2), "uint8")
LOGITS = ValueSpec(("batch", 4), "float32")
X = torch.arange(6 * 24, dtype=torch.float32).reshape(6, 2, 3, 4)
CONVERT = torch.ops.prims.convert_element_type.default

WEIGHT = torch.arange(4.0).reshape(2, 2, 1, 1) / 8

STEM = [("h", CONVERT, ("x", torch.uint8))]


def convolved(value: str) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """A residual block on an integer map: ``f`` is what comes out, in float32."""
    return [
        (f"{value}_float", DEQUANTIZE, (value, 0.5, 3, 0, 255, torch.uint8)),
        ("c", aten.conv2d.default, (f"{value}_float", "weight")),
        ("f", aten.add.Tensor, ("c", f"{value}_float")),
    ]


TWICE = [*convolved("h"), ("twice", CONVERT, ("f", torch.uint8))]


def block(
    name: str,
    params: Mapping[str, ValueSpec],
    operations: Sequence[tuple[str, Any, tuple[Any, ...]]],
    results: Mapping[str, ValueSpec],
    end: Terminator,
) -> Block:
    constants = {"weight": WEIGHT} if any("weight" in arguments for _, _, arguments in operations) else {}
    body = build_body(params, operations, list(results), constants)
    return Block(name, dict(params), dict(results), end, body)


def answer(name: str, value: str) -> Block:
    """Answers with one row of pixels of one channel: in another order of dimensions it would be others."""
    operations = [
        *convolved(value),
        ("channel", aten.select.int, ("f", 1, 1)),
        ("y", aten.select.int, ("channel", 1, 2)),
    ]
    return block(name, {value: MAP}, operations, {"y": LOGITS}, Return(("y",), name))


def program_of(*blocks: Block, inputs: ValueSpec = IMAGE) -> Program:
    return Program({"x": inputs}, {"y": LOGITS}, blocks)


def chain() -> Program:
    """Three blocks; the one in the middle reads the feature map and hands on another."""
    return program_of(
        block("stem", {"x": IMAGE}, STEM, {"h": MAP}, Jump(Edge("middle", ("h",)))),
        block("middle", {"h": MAP}, TWICE, {"twice": MAP}, Jump(Edge("rest", ("twice",)))),
        answer("rest", "k"),
    )


def diamond() -> Program:
    """A block that only hands on, or none, and a join that takes the map from either."""
    gate_of = [
        *STEM,
        ("a", aten.select.int, ("x", 1, 0)),
        ("score", aten.select.int, ("a", 1, 0)),
    ]
    gate = LinearGate(("score",), ((1.0, 0.0, 0.0, 0.0), (0.0,) * 4), (-70.0, 0.0))
    ways = (Edge("layer", ("h",)), Edge("join", ("h",)))
    return program_of(
        block("stem", {"x": IMAGE}, gate_of, {"h": MAP, "score": LOGITS}, Branch(gate, ways)),
        block("layer", {"p": MAP}, [], {}, Jump(Edge("join", ("p",)))),
        answer("join", "k"),
    )


def assert_same_answers(before: Program, after: Program, x: torch.Tensor = X) -> None:
    verify(after)
    old, new = interpret(before, {"x": x}), interpret(after, {"x": x})
    assert torch.equal(old.outputs["y"], new.outputs["y"])


@pytest.mark.parametrize("make", [chain, diamond])
def test_every_map_crosses_channels_last_with_the_same_answers(make: Any) -> None:
    program = make()
    changed = channels_last_edges(program)
    assert_same_answers(program, changed)
    assert program.entry.params == changed.entry.params
    assert [spec for later in changed.blocks[1:] for spec in later.params.values()] == [LAST] * 2
    clean = eliminate_dead_code(changed)
    assert_same_answers(program, clean)
    assert not any(spec == MAP for found in clean.blocks for spec in found.results.values())


@pytest.mark.parametrize("make", [chain, diamond])
def test_a_second_time_it_changes_nothing(make: Any) -> None:
    result = Pipeline((ChannelsLastEdges(),))(make())
    assert result.modified
    assert not ChannelsLastEdges()(result.program).modified


def test_a_map_that_is_only_handed_on_is_not_transposed() -> None:
    layer = eliminate_dead_code(channels_last_edges(diamond())).block("layer")
    assert not [node for node in layer.body.graph.nodes if node.op == "call_function"]
    assert layer.terminator == Jump(Edge("join", ("p_last",)))


def test_blocks_that_merge_again_compute_what_they_did() -> None:
    program = chain()
    merged = merge_blocks(channels_last_edges(program))
    assert len(merged.blocks) == 1
    assert_same_answers(program, merged)


def test_an_input_of_the_program_stays_as_it_is_wherever_it_goes() -> None:
    """Every network of a cascade takes the image under its own name."""
    program = program_of(
        block("stem", {"x": MAP}, [], {}, Jump(Edge("layer", ("x",)))),
        block("layer", {"x": MAP}, [], {}, Jump(Edge("rest", ("x",)))),
        answer("rest", "x"),
        inputs=MAP,
    )
    assert channels_last_edges(program) is program


def test_a_join_of_an_input_and_a_map_stays_and_what_leads_there_too() -> None:
    gate_of = [("f", CONVERT, ("x", torch.float32)), ("a", aten.select.int, ("f", 1, 0)),
               ("score", aten.select.int, ("a", 1, 0)), ("h", aten.add.Tensor, ("x", "x"))]  # fmt: skip
    gate = LinearGate(("score",), ((1.0, 0.0, 0.0, 0.0), (0.0,) * 4), (-70.0, 0.0))
    ways = (Edge("layer", ("h",)), Edge("join", ("x",)))
    program = program_of(
        block("stem", {"x": MAP}, gate_of, {"h": MAP, "score": LOGITS}, Branch(gate, ways)),
        block("layer", {"p": MAP}, [], {}, Jump(Edge("join", ("p",)))),
        answer("join", "k"),
        inputs=MAP,
    )
    assert channels_last_edges(program) is program


def test_a_map_that_a_row_leaves_with_stays() -> None:
    body = block("rest", {"k": MAP}, convolved("k"), {"f": IMAGE}, Return(("k",), "rest"))
    program = Program(
        {"x": IMAGE},
        {"y": MAP},
        (block("stem", {"x": IMAGE}, STEM, {"h": MAP}, Jump(Edge("rest", ("h",)))), body),
    )
    verify(program)
    assert channels_last_edges(program) is program


def test_a_map_that_no_convolution_reads_stays() -> None:
    operations = [("f", DEQUANTIZE, ("k", 0.5, 3, 0, 255, torch.uint8)), ("c", aten.select.int, ("f", 1, 1)),
                  ("y", aten.select.int, ("c", 1, 2))]  # fmt: skip
    program = program_of(
        block("stem", {"x": IMAGE}, STEM, {"h": MAP}, Jump(Edge("rest", ("h",)))),
        block("rest", {"k": MAP}, operations, {"y": LOGITS}, Return(("y",), "rest")),
    )
    assert channels_last_edges(program) is program


def test_names_that_are_taken_are_left_alone() -> None:
    operations = [*STEM, ("h_last", CONVERT, ("x", torch.uint8))]
    program = program_of(
        block("stem", {"x": IMAGE}, operations, {"h": MAP, "h_last": MAP}, Jump(Edge("rest", ("h",)))),
        answer("rest", "k"),
    )
    changed = channels_last_edges(program)
    assert changed.entry.results == {"h": MAP, "h_last": MAP, "h_last_2": LAST}
    assert_same_answers(program, changed)


@pytest.mark.parametrize("spec", [IMAGE, ValueSpec(("batch", 4), "uint8")])
def test_what_is_no_feature_map_in_int8_stays(spec: ValueSpec) -> None:
    program = Program(
        {"x": spec},
        {"y": spec},
        (
            block(
                "stem",
                {"x": spec},
                [("h", aten.neg.default, ("x",))],
                {"h": spec},
                Jump(Edge("rest", ("h",))),
            ),
            block(
                "rest", {"k": spec}, [("y", aten.neg.default, ("k",))], {"y": spec}, Return(("y",), "rest")
            ),
        ),
    )
    assert channels_last_edges(program) is program
