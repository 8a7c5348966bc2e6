"""Networks as one program: its text, its names, and what hand-written policies make of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
from committee_scores import joint_logits
from models import CLASSES, depthwise, images, resnet, vit
from torch import Tensor, fx, nn

from exitcompiler import committee
from exitcompiler.candidates import Candidates
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.controlflow import (
    BlockInterface,
    ConstantGate,
    Edge,
    Jump,
    LinearGate,
    Return,
    ValueSpec,
    successors,
)
from exitcompiler.errors import InputError
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.interpreter import interpret
from exitcompiler.naming import LINEAR, OWN, agreement_with, head_exit, together_with, value_name
from exitcompiler.networks import Network, read_networks
from exitcompiler.passes.eliminate_dead_code import EliminateDeadCode
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.insert_exits import InsertExits
from exitcompiler.passes.lower_to_onnx import lower_blocks
from exitcompiler.passes.merge_blocks import MergeBlocks
from exitcompiler.passes.pipeline import Pipeline
from exitcompiler.passes.prune_constant_gates import PruneConstantGates
from exitcompiler.passes.select_ways import SelectWays
from exitcompiler.passes.set_gates import BranchSetting, SetGates
from exitcompiler.passes.split_block import split_block
from exitcompiler.program import Program
from exitcompiler.runtime.backends import Engine, create_backend
from exitcompiler.runtime.rows import BatchExecutor
from exitcompiler.verify import verify

NAMES = ("small", "mid", "large")
EVERY = frozenset({(0, 1), (0, 2), (1, 2)})
ROWS = images(12)["x"]


@cache
def networks() -> tuple[Network, ...]:
    return read_networks([resnet(0), depthwise(1), vit(2)], images(3)["x"], names=NAMES)


@cache
def answers(name: str) -> Tensor:
    models: dict[str, nn.Module] = {"small": resnet(0), "mid": depthwise(1), "large": vit(2)}
    with torch.no_grad():
        logits: Tensor = models[name].eval()(ROWS)
    return logits


@cache
def plain() -> Candidates:
    return cascade_program([Member(network) for network in networks()], EVERY)


@cache
def with_exit() -> Candidates:
    """The small network has an exit half-way, with an untrained head."""
    first, *others = networks()
    cut = next(cut for cut in find_cut_points(first.program) if cut.name == "layer2.0")
    chain = split_block(first.program, [cut])
    torch.manual_seed(0)
    head = lower_head((cut.name, LINEAR), LinearHead(cut.spec, CLASSES).eval(), cut.value, cut.spec, CLASSES)
    member = Member(first, chain, {cut.name: chain.entry.name}, {(cut.name, LINEAR): head})
    return cascade_program([member, *(Member(network) for network in others)], EVERY)


# The confidences of untrained networks hardly differ, hence the large weights.
def gate(reads: Sequence[str], *rows: Sequence[float], bias: Sequence[float]) -> LinearGate:
    weight = tuple(tuple(map(float, row)) for row in rows)
    return LinearGate(tuple(reads), weight, tuple(map(float, bias)))


def build(
    candidates: Candidates,
    ways: Mapping[str, Sequence[str]],
    heads: Sequence[tuple[str, str]],
    settings: Mapping[str, BranchSetting],
    final: Sequence[str] = (),
) -> Program:
    """What a policy is turned into."""
    at: dict[str, list[tuple[str, str]]] = {}
    for key in heads:
        at.setdefault(candidates.block_of[key[0]], []).append(key)
    passes = (
        SelectWays(ways),
        InsertExits({block: [candidates.heads[key] for key in keys] for block, keys in at.items()}, final),
        SetGates(settings),
        PruneConstantGates(),
        EliminateDeadCode(),
        MergeBlocks(),
    )
    program = Pipeline(passes)(candidates.program).program
    verify(program)
    return program


def test_the_text_of_a_cascade() -> None:
    lines = [
        line for line in str(plain().program).splitlines() if "conv" not in line and "linear" not in line
    ]
    x, y = "x: float32[batch, 3, 16, 16]", "float32[batch, 5]"
    assert lines == [
        f"program ({x}) -> (logits: {y})",
        f"small({x}) -> (small_own_logits: {y}):",
        "    branch always 0:",
        "        mid(x)",
        "        large(x)",
        '        return "small/plain" (small_own_logits)',
        f"mid({x}) -> (mid_own_logits: {y}):",
        "    branch always 0:",
        "        large(x)",
        '        return "mid/plain" (mid_own_logits)',
        f"large({x}) -> (large_own_logits: {y}):",
        '    return "large/plain" (large_own_logits)',
    ]


def test_ways_are_those_of_the_topology() -> None:
    candidates = with_exit()
    program, topology = candidates.program, candidates.topology
    assert topology.sites == ("small/layer2.0", "small", "mid", "large") == tuple(candidates.block_of)
    assert list(candidates.block_of.values()) == ["small_to_layer2_0", "small", "mid", "large"]
    for place, site in enumerate(topology.sites):
        ways = successors(program.block(candidates.block_of[site]).terminator)
        targets = [way.target for way in ways if isinstance(way, Edge)]
        firsts = [candidates.block_of[topology.sites[way]] for way in topology.ways[place]]
        assert targets == firsts
    assert all("x" in block.params for block in program.blocks)


def test_heads_stand_at_every_site() -> None:
    kinds = {site: [k for s, k in with_exit().heads if s == site] for site in with_exit().topology.sites}
    assert kinds == {
        "small/layer2.0": [LINEAR],
        "small": [OWN],
        "mid": [OWN, together_with(["small"]), agreement_with("small")],
        "large": [OWN, *(together_with(names) for names in (["small"], ["mid"], ["small", "mid"])),
                  agreement_with("small"), agreement_with("mid")],
    }  # fmt: skip
    assert with_exit().needs == {
        (site, kind): tuple(kind.split(" ")[-1].split("+"))
        for site, kind in with_exit().heads
        if kind not in (OWN, LINEAR)
    }
    head = with_exit().heads["small/layer2.0", LINEAR]
    assert head.exit == "small/layer2.0/linear"
    assert list(head.results) == ["small_layer2_0_linear_logits", "small_layer2_0_linear_confidence"]


def test_every_kind_of_head_is_traced_once_for_each_program(monkeypatch: pytest.MonkeyPatch) -> None:
    traced: list[int] = []
    trace_body = committee.trace_body

    def counting(
        module: nn.Module, params: Mapping[str, ValueSpec], results: Sequence[str]
    ) -> fx.GraphModule:
        traced.append(len(params))
        return trace_body(module, params, results)

    monkeypatch.setattr(committee, "trace_body", counting)
    for _ in range(2):  # nothing is kept from one program to the next
        traced.clear()
        cascade_program([Member(network) for network in networks()], EVERY)
        assert sorted(traced) == [1, 2, 2, 3]  # own, with one, agreement, with two


def test_with_many_networks_each_and_all_answer_together() -> None:
    program = networks()[0].program
    members = [Member(Network(name, program, networks()[0].structure)) for name in "abcde"]
    edges = frozenset({(0, 1), (0, 2), (1, 3), (2, 3), (3, 4)})
    heads = cascade_program(members, edges).heads
    joint = [kind for site, kind in heads if site == "e" and kind.startswith("with")]
    assert joint == ["with a", "with b", "with c", "with d", "with a+b+c+d"]
    assert "with b" not in [kind for site, kind in heads if site == "c"]  # no way from b to c


def test_parameters_are_shared() -> None:
    def pointers(program: Program) -> set[int]:
        return {value.data_ptr() for block in program.blocks for value in block.body.state_dict().values()}

    assert pointers(with_exit().program) == set.union(*(pointers(network.program) for network in networks()))


def test_names_that_would_make_the_same_value() -> None:
    program, structure = networks()[0].program, networks()[0].structure
    members = [Member(Network(name, program, structure)) for name in ("a", "b", "a_b", "c")]
    with pytest.raises(InputError, match="c_with_a_b_logits"):
        cascade_program(members, frozenset({(0, 1), (1, 2), (2, 3)}))


def test_answer_or_go_to_the_last() -> None:
    """Small answers, or sends the row on to large; mid is gone."""
    reads = value_name("small", OWN, "confidence")
    decide = gate([reads], (1000, 0, 0), (0, 0, 0), bias=(-239, 0))
    program = build(
        plain(),
        {"small": ["large"]},
        [("small", OWN), ("large", OWN)],
        {"small": BranchSetting(decide, ("small/own", "large"), "small"),
         "large": BranchSetting(ConstantGate(0, 1), ("large/own",), "large")},
    )  # fmt: skip
    lines = [line for line in str(program).splitlines() if "conv" not in line and "linear" not in line]
    x, y = "x: float32[batch, 3, 16, 16]", "float32[batch, 5]"
    assert lines == [
        f"program ({x}) -> (logits: {y})",
        f"small({x}) -> (small_own_logits: {y}, small_own_confidence: float32[batch, 3]):",
        "    branch [small_own_confidence] . [[1000, 0, 0], [0, 0, 0]] + [-239, 0]:",
        '        return "small" (small_own_logits)',
        "        large(x)",
        f"large({x}) -> (large_own_logits: {y}):",
        '    return "large" (large_own_logits)',
    ]
    small = answers("small")
    leaves = small.softmax(1).amax(1) >= 0.239
    assert 0 < int(leaves.sum()) < len(ROWS)
    found = interpret(program, {"x": ROWS})
    assert found.exit_index.tolist() == [0 if leave else 1 for leave in leaves]
    expect(found.outputs["logits"], torch.where(leaves[:, None], small, answers("large")))


def expect(found: Tensor, expected: Tensor) -> None:
    # Batch 1 against a batch of 12: convolutions add up in another order.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def three_ways() -> Program:
    """Small answers, or goes to mid or to large; mid reads what small said, large answers with all it can."""
    first = value_name("small", OWN, "confidence")
    agreement = value_name("mid", agreement_with("small"), "confidence")
    return build(
        plain(),
        {},
        [("small", OWN), ("mid", agreement_with("small")), ("mid", together_with(["small"])),
         ("large", together_with(["small"]))],
        {"small": BranchSetting(gate([first], (10000, 0, 0), (0, 0, 0), (0, 1000, 0), bias=(-2390, 0, -31)),
                                ("small/own", "mid", "large"), "small"),
         "mid": BranchSetting(gate([agreement, first], (0, 0, 10000, 1, 0, 0), [0] * 6, bias=(-1983, 0)),
                              ("mid/with small", "large"), "mid"),
         "large": BranchSetting(ConstantGate(0, 1), ("large/with small",), "large")},
    )  # fmt: skip


def test_three_ways_and_answers_of_two() -> None:
    program = three_ways()
    assert program.exits == ("small", "mid", "large")
    assert list(program.block("mid").params) == ["x", "small_own_logits", "small_own_confidence"]
    found = interpret(program, {"x": ROWS})
    assert set(found.path) == {("small",), ("small", "mid"), ("small", "mid", "large"), ("small", "large")}
    small, mid, large = (answers(name).numpy() for name in NAMES)
    choices = np.stack([small, joint_logits([mid, small]), joint_logits([large, small])])
    expect(found.outputs["logits"], torch.from_numpy(choices[found.exit_index, np.arange(len(ROWS))]))


def test_the_engines_do_the_same() -> None:
    program = three_ways()
    models = lower_blocks(program.blocks)
    backend = create_backend("onnxruntime", threads=1)

    def engines(block: BlockInterface, static_batch: int | None) -> Engine:
        from exitcompiler.controlflow import engine_signature

        return backend.load(models[block.name], engine_signature(block), static_batch=static_batch)

    outputs, exit_index = BatchExecutor(program, engines).run([ROWS.numpy()], len(ROWS))
    expected = interpret(program, {"x": ROWS})
    assert exit_index.tolist() == expected.exit_index.tolist()
    expect(torch.from_numpy(outputs[0]), expected.outputs["logits"])


def test_who_never_answers_and_never_decides_is_gone() -> None:
    program = build(
        plain(),
        {"small": ["mid"]},
        [("mid", OWN)],
        {},
        final=["mid"],
    )
    assert [block.name for block in program.blocks] == ["mid"]
    assert program.entry.terminator == Return(("mid_own_logits",), "mid/own")
    assert list(program.entry.results) == ["mid_own_logits"]
    expect(interpret(program, {"x": ROWS}).outputs["logits"], answers("mid"))


def test_an_exit_inside_a_network_goes_to_another_one() -> None:
    """The exit of small answers or jumps to mid: the rest of small is never run."""
    site = "small/layer2.0"
    reads = value_name(site, LINEAR, "confidence")
    decide = gate([reads], (0, 0, 0), (0, 0, 1000), bias=(0, -972.5))
    program = build(
        with_exit(),
        {"small_to_layer2_0": ["mid"], "mid": ["large"]},
        [(site, LINEAR), ("mid", OWN)],
        {"small_to_layer2_0": BranchSetting(decide, (head_exit(site, LINEAR), "mid"), site)},
        final=["mid"],
    )
    assert [block.name for block in program.blocks] == ["small_to_layer2_0", "mid"]
    assert program.exits == (site, "mid/own")
    found = interpret(program, {"x": ROWS})
    assert set(found.exit_index.tolist()) == {0, 1}
    later = torch.from_numpy(found.exit_index == 1)
    expect(found.outputs["logits"][later], answers("mid")[later])


def test_an_exit_inside_a_network_goes_on_in_it_and_then_elsewhere() -> None:
    site = "small/layer2.0"
    reads = value_name(site, LINEAR, "confidence")
    decide = gate([reads], (0, 0, 0), (0, 0, 1000), bias=(0, -972.5))
    program = build(
        with_exit(),
        {"small_to_layer2_0": ["small"], "small": ["large"]},
        [(site, LINEAR), ("small", OWN), ("large", OWN)],
        {"small_to_layer2_0": BranchSetting(decide, (head_exit(site, LINEAR), "small"), site),
         "small": BranchSetting(decide, ("small/own", "large"), "small"),
         "large": BranchSetting(ConstantGate(0, 1), ("large/own",), "large")},
    )  # fmt: skip
    assert program.block("small").params.keys() >= {"x", reads}
    found = interpret(program, {"x": ROWS})
    later = torch.from_numpy(found.exit_index == 2)
    assert bool(later.any())
    expect(found.outputs["logits"][later], answers("large")[later])


def test_without_a_decision_the_last_network_is_left() -> None:
    program = Pipeline((PruneConstantGates(), EliminateDeadCode(), MergeBlocks()))(plain().program).program
    assert [block.name for block in program.blocks] == ["large"]
    assert not isinstance(program.entry.terminator, Jump)
    expect(interpret(program, {"x": ROWS}).outputs["logits"], answers("large"))
