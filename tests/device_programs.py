"""A small network with two exits, at any precision: needs torch and nothing else, as on a GPU machine."""

from __future__ import annotations

import functools

import torch
from trained import CLASSES, SmallResNet, stripes

from exitcompiler.capture import capture
from exitcompiler.controlflow import ControlFlow, LinearGate
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.naming import LINEAR, head_exit, value_name
from exitcompiler.passes.cast_precision import cast_precision
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.insert_exits import insert_exits
from exitcompiler.passes.set_gates import BranchSetting, set_gates
from exitcompiler.passes.split_block import split_block
from exitcompiler.program import BlockInterface, Program, successors
from exitcompiler.verify import verify

__all__ = ["images", "interfaces", "network_with_exits"]


def images(rows: int, seed: int = 0) -> torch.Tensor:
    """``float32 [rows, 1, 16, 16]``."""
    return torch.from_numpy(stripes(rows, seed)[0])


@functools.cache
def network_with_exits(precision: str = "fp32") -> Program:
    """Random weights; about half of the rows that come to an exit leave there."""
    torch.manual_seed(0)
    program = capture(SmallResNet(8, 3).eval(), {"image": images(2)}).program
    cuts = find_cut_points(program)[:2]
    chain = split_block(program, cuts)
    heads = {}
    for cut in cuts:
        block = next(block.name for block in chain.blocks if cut.value in block.results)
        module = LinearHead(cut.spec, CLASSES).eval()
        torch.nn.init.normal_(module.linear.weight, std=3.0)
        heads[block] = lower_head((cut.name, LINEAR), module, cut.value, cut.spec, CLASSES)
    chain = insert_exits(chain, {block: [head] for block, head in heads.items()})
    with torch.no_grad():
        values = {"image": images(101, seed=1)}
        for block in chain.blocks:  # values keep their names
            values |= block.run(values)
    settings, here = {}, torch.ones(101, dtype=torch.bool)
    for (name, _), cut in zip(heads.items(), cuts, strict=True):
        confidence = value_name(cut.name, LINEAR, "confidence")
        threshold = float(values[confidence][here, 0].median())
        here &= values[confidence][:, 0] <= threshold
        gate = LinearGate((confidence,), ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (-threshold, 0.0))
        (onward,) = (way.target for way in successors(chain.block(name).terminator)[1:])
        settings[name] = BranchSetting(gate, (head_exit(cut.name, LINEAR), onward), cut.name)
    typed = cast_precision(set_gates(chain, settings), precision)
    verify(typed)
    return typed


def interfaces(program: Program) -> ControlFlow:
    """A program without its bodies."""
    blocks = tuple(BlockInterface(b.name, b.params, b.results, b.terminator) for b in program.blocks)
    return ControlFlow(program.inputs, program.outputs, blocks)
