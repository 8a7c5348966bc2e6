"""Wall-clock measurements of cascades: against the reference network, each other, and the ideal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any, Final

import numpy as np
from cifar10_contenders import answers
from cifar10_latency import WARMUP, bound_call, final_figure, in_turns
from cifar10_setup import SEED, Array, Job

from exitcompiler.candidates import Candidates
from exitcompiler.compiler import Details
from exitcompiler.controlflow import Return
from exitcompiler.costs import CostModel
from exitcompiler.naming import OWN, value_name
from exitcompiler.policies import Policy
from exitcompiler.program import Block
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.timing import measure_interleaved
from exitcompiler.scores import ScoreTable
from exitcompiler.statistics import mean_difference_interval, ratio_interval

__all__ = ["ASKED", "NOT_LOWER", "against_members", "final_figures", "networks_run", "running_policy"]

ASKED: Final = "the point asked for"
NOT_LOWER: Final = "not lower at all"


def final_figures(job: Job, programs: Mapping[str, CompiledModel]) -> dict[str, Any]:
    """Two points of each program against the reference network alone, and the programs against each other.

    Args:
        job: Final rows.
        programs: Two compiled cascades, by name: without exits inside, and with.
    """
    points = {
        ASKED: dict(programs),
        NOT_LOWER: {name: program.select(max_accuracy_drop=0.0) for name, program in programs.items()},
    }
    found: dict[str, Any] = {}
    for point, models in points.items():
        against = {name: final_figure(job, model) for name, model in models.items()}
        found[point] = {"programs": against, "pair": _pair(job, *models.values())}
    return found


def _pair(job: Job, without: CompiledModel, within: CompiledModel) -> dict[str, Any]:
    """Two programs in turns: how much faster the second is, and how much more accurate."""
    times_us = in_turns(job, {"without": without, "with": within})
    right = [answers(model, job.split.final_x)[0] == job.split.final_y for model in (within, without)]
    gained = mean_difference_interval(*(r.astype(np.float64) for r in right))
    return {
        "speedup": asdict(ratio_interval(times_us["without"], times_us["with"], seed=SEED)),
        "accuracy_gain": asdict(gained),
    }


def against_members(job: Job, details: Details, judge: ScoreTable) -> dict[str, Any]:
    """The cascade's mean time over the sum of route rate x sum of its members' own latencies.

    A member is a whole network in an engine of its own, run on buffers bound once: no head, no gate,
    no dispatch. All take turns; the route of a call is that of the very row that it answers.

    Args:
        job: Final rows.
        details: Of a cascade without exits inside.
        judge: Scores on the final rows, which tell the routes.
    """
    assert details.candidates is not None
    assert details.costs is not None
    program, policy = details.compiled, running_policy(details)
    rows = np.random.default_rng(SEED + 1).permutation(judge.rows)[: job.effort.timed_rows]
    inputs = [(job.split.final_x[row : row + 1],) for row in rows]
    names = [network[-1] for network in policy.topology.networks]
    calls: dict[str, Callable[..., object]] = {"program": program}
    calls |= {n: bound_call(_member(details.candidates, n), details.engines, 1) for n in names}
    times_us = measure_interleaved(calls, inputs, repeats=len(rows), warmup=WARMUP, seed=SEED)
    run = networks_run(policy, judge, details.costs)[rows]
    ideal_us = (run * np.stack([times_us[name] for name in names], axis=1)).sum(axis=1)
    answered = [policy.topology.places[place] for place in policy.walk(judge)[1][rows]]
    left = [program.exits[int(program.run(*row).exit_index[0])] for row in inputs]
    return {
        "calls": len(rows),
        "routes": _routes(run, names),
        "exit_as_scored": float(np.mean([a == b for a, b in zip(answered, left, strict=True)])),
        "member_ms": {name: float(times_us[name].mean()) / 1e3 for name in names},
        "program_ms": float(times_us["program"].mean()) / 1e3,
        "ideal_ms": float(ideal_us.mean()) / 1e3,
        "latency_ratio": asdict(ratio_interval(times_us["program"], ideal_us, seed=SEED)),
    }


def running_policy(details: Details) -> Policy:
    """What the compiled program does: the chosen policy, or the reference network where it was refused."""
    assert details.candidates is not None
    if details.selection is None or details.compiled.artifact.report.get("refused"):
        return Policy.plain(details.candidates.topology)
    return details.selection.chosen.point.policy


def networks_run(policy: Policy, table: ScoreTable, costs: CostModel) -> Array:
    """Which networks each row runs, ``bool[rows, networks]``; those only passed over are not."""
    passed, _ = policy.walk(table)
    ran = passed & (costs.times_us(policy.topology, policy.steps) > 0.0)
    numbers = np.array(policy.topology.network_of)
    return np.stack([ran[:, numbers == n].any(axis=1) for n in range(len(policy.topology.networks))], axis=1)


def _routes(run: Array, names: list[str]) -> dict[str, float]:
    routes, counts = np.unique(run, axis=0, return_counts=True)
    return {
        " > ".join(name for name, ran in zip(names, route, strict=True) if ran): float(count / len(run))
        for route, count in zip(routes, counts, strict=True)
    }


def _member(candidates: Candidates, name: str) -> Block:
    """A whole network as a block that only answers."""
    block = candidates.program.block(candidates.block_of[name])
    return replace(block, terminator=Return((value_name(name, OWN, "logits"),), name))
