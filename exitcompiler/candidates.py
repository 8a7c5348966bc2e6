"""The candidate sites before anything is learned: every segment and every head as a block of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from exitcompiler.controlflow import Branch, LinearGate, Return, ValueSpec
from exitcompiler.cut_points import CutPoint
from exitcompiler.naming import BACKBONE, head_exit, value_name
from exitcompiler.passes.base import Pass
from exitcompiler.passes.cast_precision import cast_head, cast_precision
from exitcompiler.passes.channels_last_edges import ChannelsLastEdges
from exitcompiler.passes.eliminate_dead_code import EliminateDeadCode
from exitcompiler.passes.insert_exits import InsertExits
from exitcompiler.passes.merge_blocks import MergeBlocks
from exitcompiler.passes.narrow_gates import NarrowGates
from exitcompiler.passes.pipeline import Observer, Pipeline
from exitcompiler.passes.prune_constant_gates import PruneConstantGates
from exitcompiler.passes.select_ways import SelectWays
from exitcompiler.passes.set_gates import BranchSetting, SetGates
from exitcompiler.passes.split_block import split_block
from exitcompiler.policies import Leave, LinearRule, Policy, gate_of
from exitcompiler.program import Block, ExitHead, Program
from exitcompiler.scores import FEATURES, HeadKey
from exitcompiler.topology import Topology

__all__ = ["Candidates", "build_program", "cast_candidates", "chain_candidates"]


@dataclass(frozen=True)
class Candidates:
    """One or several networks cut at their candidate exits, and the heads that could answer there.

    Args:
        program: One block per place, nothing decided yet: every branch takes a constant way.
        topology: The places.
        block_of: Place -> name of its block.
        heads: (site, kind) -> head; one without an answer only makes features for gates.
        needs: (site, kind) -> other sites whose scores a head reads; heads that read none are left out.
    """

    program: Program
    topology: Topology
    block_of: Mapping[str, str]
    heads: Mapping[HeadKey, ExitHead]
    needs: Mapping[HeadKey, tuple[str, ...]] = field(default_factory=dict)

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the sites, in order."""
        return self.topology.sites

    def head_block(self, key: HeadKey) -> Block:
        """A head alone, with a gate, as a block that can be lowered and timed."""
        head = self.heads[key]
        specs: dict[str, ValueSpec] = {}
        for block in self.program.blocks:
            specs |= block.values
        reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
        gate = LinearGate(
            (value_name(*key, "confidence"),), ((0.0,) * FEATURES, (0.0,) * FEATURES), (0.0, 0.0)
        )
        handed_out = head.answer or tuple(head.results)
        ways = (Return(handed_out, head.exit), Return(handed_out, f"{head.exit}/on"))
        return Block(
            name=head_exit(*key),
            params={name: specs[name] for name in reads},
            results=head.results,
            terminator=Branch(gate, ways),
            body=head.body,
        )


def chain_candidates(
    program: Program, cuts: Sequence[CutPoint], heads: Mapping[HeadKey, ExitHead]
) -> Candidates:
    """One network cut in a chain, and heads at the cuts.

    Args:
        program: The captured network, one block.
        cuts: Of this program, in order, with different names; at least one.
        heads: (cut, kind) -> head.
    """
    chain = split_block(program, cuts)
    made_by = {value: block.name for block in chain.blocks for value in block.results}
    blocks = {cut.name: made_by[cut.value] for cut in cuts} | {BACKBONE: chain.blocks[-1].name}
    return Candidates(chain, Topology.chain([cut.name for cut in cuts]), blocks, heads)


def cast_candidates(candidates: Candidates, precision: str) -> Candidates:
    """The same in another precision: what gates read and what is answered stay float32.

    Args:
        candidates: In float32.
        precision: As for the cast-precision pass; ``"fp32"`` changes nothing.

    Raises:
        PassError: An operator does not run in this precision.
    """
    if precision == "fp32":
        return candidates
    answers = {name for head in candidates.heads.values() for name in head.answer}
    program = cast_precision(candidates.program, precision, answers)
    specs = {name: spec for block in program.blocks for name, spec in block.values.items()}
    heads = {key: cast_head(head, specs, precision, answers) for key, head in candidates.heads.items()}
    return replace(candidates, program=program, heads=heads)


def build_program(
    candidates: Candidates,
    policy: Policy,
    *,
    channels_last: bool = False,
    observers: tuple[Observer, ...] = (),
) -> Program:
    """The program of a policy: ways selected, exits inserted, gates set, and what is not needed gone.

    Args:
        candidates: What there is to choose from.
        policy: Over the same topology.
        channels_last: The backend's `Backend.channels_last`.
        observers: Watch every pass.

    Raises:
        PassError: The policy does not fit the candidates.
    """
    final = [candidates.block_of[site] for site, d in policy.kept.items() if isinstance(d, Leave)]
    passes: tuple[Pass, ...] = (
        SelectWays(_ways(candidates, policy)),
        InsertExits(_heads(candidates, policy), final),
        SetGates(_settings(candidates, policy)),
        PruneConstantGates(),
        NarrowGates(),
        EliminateDeadCode(),
        MergeBlocks(),
    )
    if channels_last:
        passes = (*passes, ChannelsLastEdges(), EliminateDeadCode())
    return Pipeline(passes, observers=observers)(candidates.program).program


def _ways(candidates: Candidates, policy: Policy) -> dict[str, list[str]]:
    """Block -> the blocks that rows go on to from there, where they go on."""
    found = {}
    for site in policy.live:
        ways = [_block(candidates, target) for target in policy.targets(site) if target is not None]
        if ways:
            found[candidates.block_of[site]] = ways
    return found


def _heads(candidates: Candidates, policy: Policy) -> dict[str, list[ExitHead]]:
    """Block -> the heads that answer there, or whose features some gate reads."""
    rules = [decision for decision in policy.kept.values() if isinstance(decision, LinearRule)]
    needed = {(site, d.head) for site, d in policy.kept.items()} | {key for r in rules for key in r.reads}
    found: dict[str, list[ExitHead]] = {}
    for key, head in candidates.heads.items():
        if key in needed:
            found.setdefault(candidates.block_of[key[0]], []).append(head)
    return found


def _settings(candidates: Candidates, policy: Policy) -> dict[str, BranchSetting]:
    names = {key: value_name(*key, "confidence") for key in candidates.heads}
    found = {}
    for site, decision in policy.kept.items():
        targets = policy.targets(site)
        ways = tuple(
            head_exit(site, decision.head) if target is None else _block(candidates, target)
            for target in targets
        )
        exit_name = site if None in targets else None
        found[candidates.block_of[site]] = BranchSetting(gate_of(decision, names), ways, exit_name)
    return found


def _block(candidates: Candidates, place: int) -> str:
    return candidates.block_of[candidates.topology.places[place]]
