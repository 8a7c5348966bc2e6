"""Measures what blocks cost on the target: same backend, precision, threads and batch size as will run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exitcompiler.candidates import Candidates, build_program
from exitcompiler.controlflow import Edge, successors
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.naming import OWN
from exitcompiler.policies import GoOn, Policy, leave_above
from exitcompiler.program import Block, Program
from exitcompiler.runtime.backends import Array, Engine
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.runtime.timing import OwnClock, measure_interleaved
from exitcompiler.scores import FEATURES
from exitcompiler.scoring import run_block

__all__ = ["block_times_us", "measure_costs", "programs_times_us"]

REPEATS = 150
LIMIT_S = 20.0


def measure_costs(
    candidates: Candidates,
    wholes: Sequence[Program],
    engines: Engines,
    rows: Rows,
    batch_size: int,
) -> CostModel:
    """The cost of every segment and every head, per row.

    A head is timed on its own, with its gate. What a call costs beyond its arithmetic is told from the
    difference between the segments of a network one after another and the whole of it in one engine; where
    no network has segments, from that between a head on its own and the same head at the end of its network.

    Args:
        candidates: Sites and heads.
        wholes: The untouched networks, each one block, in the order of the topology; the last one is what
            all is compared with.
        engines: Make and keep the engines.
        rows: At least ``batch_size`` real rows.
        batch_size: How many rows a call has.
    """
    topology = candidates.topology
    heads = {key: candidates.head_block(key) for key in candidates.heads}
    segments = [candidates.program.block(candidates.block_of[place]) for place in topology.places]
    seams = len(segments) - len(wholes)
    programs = [[*segments, *heads.values()], *([whole.entry] for whole in wholes)]
    if not seams:
        programs.append([_with_own_head(candidates)])
    times, *alone = programs_times_us(programs, engines, rows, batch_size)
    segment_times, head_times = times[: len(segments)], times[len(segments) :]
    whole_times = [time for (time,) in alone[: len(wholes)]]
    if seams:
        call_us = max(0.0, sum(segment_times) - sum(whole_times)) / seams
    else:
        own = head_times[list(heads).index((topology.sites[0], OWN))]
        call_us = max(0.0, own - max(0.0, alone[-1][0] - whole_times[0]))
    # A kept exit keeps its seam; a pruned one's segments merge and the seam is gone.
    later = [topology.follows[place] is not None for place in range(len(segments))]
    return CostModel(
        segment_us=tuple(
            max(0.0, t - call_us * inner) for t, inner in zip(segment_times, later, strict=True)
        ),
        head_us={key: max(0.0, t - call_us) for key, t in zip(heads, head_times, strict=True)},
        gate_us=call_us if seams else 0.0,
        plain_us=whole_times[-1],
    )


def _with_own_head(candidates: Candidates) -> Block:
    """The first network of a cascade with its own head and a gate, in one block."""
    site = candidates.exits[0]
    policy = Policy.plain(candidates.topology)
    onward = policy.decisions[0]
    assert isinstance(onward, GoOn)
    rule = leave_above(OWN, ((site, OWN),), (0.0,) * FEATURES, 0.0, onward)
    decisions = (rule, *policy.decisions[1:])
    return build_program(candidates, Policy(candidates.topology, decisions)).entry


def block_times_us(
    blocks: Sequence[Block], engines: Engines, rows: Rows, batch_size: int, repeats: int = REPEATS
) -> list[float]:
    """The median time of each block per row, all of them taking turns on real values.

    Args:
        blocks: In an order in which each one's params are model inputs or were made before.
        engines: Make and keep the engines.
        rows: Real rows; the first ``batch_size`` are used.
        batch_size: How many rows a call has.
        repeats: Timed turns.
    """
    (times,) = programs_times_us([blocks], engines, rows, batch_size, repeats)
    return times


def programs_times_us(
    programs: Sequence[Sequence[Block]],
    engines: Engines,
    rows: Rows,
    batch_size: int,
    repeats: int = REPEATS,
) -> list[list[float]]:
    """Like ``block_times_us``, for the blocks of several programs in one measurement.

    Args:
        programs: The blocks of each; names mean something within a program only.
        engines: Make and keep the engines.
        rows: Real rows; the first ``batch_size`` are used.
        batch_size: How many rows a call has.
        repeats: Timed turns.
    """
    inputs = rows.take(slice(0, batch_size)).inputs
    clocks: dict[str, OwnClock] = {}
    for index, blocks in enumerate(programs):
        assert len({block.name for block in blocks}) == len(blocks)
        loaded = engines.load(blocks, batch_size)
        values: dict[str, Array] = {name: tensor.numpy() for name, tensor in inputs.items()}
        for number, block in enumerate(blocks):
            _bind_params(block, blocks, values)
            engine = loaded.get(block.name)
            clocks[f"{index}:{number}"] = _clock(block, engine, values)
            values.update(run_block(block, engine, values))
    samples = measure_interleaved(
        clocks, [()], repeats=repeats, warmup=max(5, repeats // 10), limit_s=LIMIT_S, minimum=10
    )
    return [
        [float(np.median(samples[f"{index}:{number}"])) / batch_size for number in range(len(blocks))]
        for index, blocks in enumerate(programs)
    ]


def _bind_params(block: Block, blocks: Sequence[Block], values: dict[str, Array]) -> None:
    """Give params the values that some edge binds them to, where the names differ."""
    for other in blocks:
        for way in successors(other.terminator):
            if isinstance(way, Edge) and way.target == block.name:
                for param, value in zip(block.params, way.values, strict=True):
                    if param not in values and value in values:
                        values[param] = values[value]


def _clock(block: Block, engine: Engine | None, values: Mapping[str, Array]) -> OwnClock:
    if engine is None:
        return OwnClock(lambda: 0.0)
    sources = [values[name] for name in block.params] + gate_parameters(block)
    return OwnClock(engine.stopwatch([np.ascontiguousarray(source) for source in sources]))
