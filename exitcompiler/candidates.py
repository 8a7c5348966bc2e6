"""The candidate exits before anything is learned: every segment and every head as a block of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from exitcompiler.controlflow import Branch, LinearGate, Return
from exitcompiler.naming import BACKBONE, head_exit, value_name
from exitcompiler.passes.eliminate_dead_code import EliminateDeadCode
from exitcompiler.passes.insert_exits import InsertExits
from exitcompiler.passes.merge_blocks import MergeBlocks
from exitcompiler.passes.pipeline import Observer, Pipeline
from exitcompiler.passes.prune_constant_gates import PruneConstantGates
from exitcompiler.passes.set_gates import ExitSetting, SetGates
from exitcompiler.policies import Leave, Policy, gate_of
from exitcompiler.program import Block, ExitHead, Program
from exitcompiler.scores import FEATURES, HeadKey

__all__ = ["Candidates", "build_program"]


@dataclass(frozen=True)
class Candidates:
    """A backbone cut at its candidate exits, and the heads that could answer there.

    Args:
        chain: One block per segment; the block that ends at an exit is ``block_of[exit]``.
        exits: Exit names, in order.
        block_of: Exit name -> name of the block at whose end it stands.
        heads: (exit, kind) -> head, in the order of exits.
    """

    chain: Program
    exits: tuple[str, ...]
    block_of: Mapping[str, str]
    heads: Mapping[HeadKey, ExitHead]

    def head_block(self, key: HeadKey) -> Block:
        """A head alone, with a gate, as a block that can be lowered and timed."""
        head = self.heads[key]
        segment = self.chain.block(self.block_of[key[0]])
        reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
        gate = LinearGate(
            (value_name(*key, "confidence"),), ((0.0,) * FEATURES, (0.0,) * FEATURES), (0.0, 0.0)
        )
        ways = (Return(head.answer, head.exit), Return(head.answer, f"{head.exit}/on"))
        return Block(
            name=head_exit(*key),
            params={name: segment.values[name] for name in reads},
            results=head.results,
            terminator=Branch(gate, ways),
            body=head.body,
        )


def build_program(candidates: Candidates, policy: Policy, *, observers: tuple[Observer, ...] = ()) -> Program:
    """The program of a policy: exits inserted, gates set, constants pruned, dead code gone, blocks merged.

    Args:
        candidates: What there is to choose from.
        policy: Over the same exits.
        observers: Watch every pass.

    Raises:
        PassError: The policy does not fit the candidates.
    """
    kept = policy.kept
    heads = {
        candidates.block_of[exit_name]: [candidates.heads[exit_name, decision.head]]
        for exit_name, decision in kept.items()
    }
    names = {key: value_name(*key, "confidence") for key in candidates.heads}
    settings = {
        exit_name: ExitSetting(gate_of(decision, names), keep=head_exit(exit_name, decision.head))
        for exit_name, decision in kept.items()
    }
    passes = (
        InsertExits(heads),
        SetGates(settings),
        PruneConstantGates(),
        EliminateDeadCode(),
        MergeBlocks(),
    )
    program = Pipeline(passes, observers=observers)(candidates.chain).program
    assert program.exits[-1] == BACKBONE or any(isinstance(d, Leave) for d in kept.values())
    return program
