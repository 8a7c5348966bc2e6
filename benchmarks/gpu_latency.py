"""Latency at batch 1 and throughput at batch 32, against what each would be if decisions cost nothing.

The ideal is measured on plain graphs of just what an answer needs (`prefixes.answer_block`): a score, an
earlier exit's head, an action are there for decisions only, and count as their cost. What is lost if they
come for free is told beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gpu_graphs import ChainGraph, DeviceProgramCall, HostBranching, device_executor
from gpu_lab import SEED, Contender, Lab, Times, device_times, in_turns, wall_times
from gpu_programs import Workload
from prefixes import answer_block, prefix_block

from exitcompiler.program import Program
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.planning import powers_of_two
from exitcompiler.statistics import mean_difference_interval, ratio_interval

__all__ = [
    "HOST",
    "PROGRAM",
    "WHOLE",
    "batch_figures",
    "compare_single_rows",
    "difference",
    "ideal_of_rows",
    "ideal_of_shares",
    "mixes",
    "ratio",
    "row_figures",
    "summary",
]

PROGRAM: Final = "program, one launch"
WHOLE: Final = "whole network, one CUDA graph"
HOST: Final = "a graph per block, host branches"
FIRST: Final = "first block alone, with its decision"
_ANSWER: Final = "just the answer of "
_PREFIX: Final = "with heads and scores, up to "
BATCH: Final = 32


def row_figures(lab: Lab, workload: Workload, program: Program, whole: Program) -> dict[str, Any]:
    """Single rows: the program against the ideal, the whole network, and a host that branches.

    Args:
        lab: Where.
        workload: Rows.
        program: With exits, at whatever precision.
        whole: The network without, at the same precision.
    """
    executor = device_executor(lab, program, 1)
    contenders: dict[str, Contender] = {PROGRAM: DeviceProgramCall(lab, executor, 1)}
    contenders |= _answers(lab, program, 1)
    contenders |= {_PREFIX + e: ChainGraph(lab, [prefix_block(program, e)], [1]) for e in program.exits}
    contenders[FIRST] = ChainGraph(lab, [program.entry], [1])
    contenders[WHOLE] = ChainGraph(lab, [whole.entry], [1])
    contenders[HOST] = HostBranching(lab, program)
    inputs, exits = _rows_in_random_order(executor, workload.x)
    found: dict[str, Any] = {"exits": list(program.exits), "exit_rates": _rates(exits, program)}
    for clock, time_one, which in (
        ("wall", wall_times, list(contenders)),
        ("device", device_times(lab), [name for name in contenders if name != HOST]),
    ):
        times = in_turns(lab, {name: contenders[name] for name in which}, inputs, time_one)
        found[clock] = _judge_rows(times, exits, program.exits)
    return found


def _judge_rows(times: Mapping[str, Times], exits: npt.NDArray[Any], names: Sequence[str]) -> dict[str, Any]:
    turns = len(times[PROGRAM])
    taken = np.resize(exits, turns)
    ideal_us, with_scores_us = (
        ideal_of_rows(taken, np.stack([times[kind + name] for name in names])) for kind in (_ANSWER, _PREFIX)
    )
    return {
        "turns": turns,
        "contenders": {name: summary(found) for name, found in times.items()},
        "ideal": summary(ideal_us),
        "over_ideal": ratio(times[PROGRAM], ideal_us),
        "over_ideal_with_scores": ratio(times[PROGRAM], with_scores_us),
        "against": {
            name: ratio(found, times[PROGRAM]) for name, found in times.items() if name in (WHOLE, HOST)
        },
        "leaving_first": _early(times, taken == 0, names[0]),
        "late_over_whole": _late(times, taken == len(names) - 1),
    }


def _early(times: Mapping[str, Times], early: npt.NDArray[Any], name: str) -> dict[str, Any] | None:
    """What rows pay that leave first: for all that they skip, and for that and the decision."""
    if not early.any():
        return None
    ours = times[PROGRAM][early]
    return {
        "rows": int(early.sum()),
        "program": summary(ours),
        "suffix_us": difference(ours, times[FIRST][early]),
        "suffix_and_decision_us": difference(ours, times[_ANSWER + name][early]),
    }


def _late(times: Mapping[str, Times], late: npt.NDArray[Any]) -> dict[str, float] | None:
    """What rows that go all the way pay, over the whole network: heads and decisions."""
    return ratio(times[PROGRAM][late], times[WHOLE][late]) if late.any() else None


def compare_single_rows(
    lab: Lab, workload: Workload, program: Program, others: Mapping[str, Contender]
) -> dict[str, Any]:
    """Single rows: the program and others in turns, wall clock.

    Args:
        lab: Where.
        workload: Rows.
        program: With exits.
        others: By name.
    """
    executor = device_executor(lab, program, 1)
    contenders = {PROGRAM: DeviceProgramCall(lab, executor, 1), **others}
    inputs, _ = _rows_in_random_order(executor, workload.x)
    times = in_turns(lab, contenders, inputs, wall_times)
    return {
        "turns": len(times[PROGRAM]),
        "contenders": {name: summary(found) for name, found in times.items()},
        "against": {name: ratio(times[name], times[PROGRAM]) for name in others},
    }


def batch_figures(lab: Lab, workload: Workload, program: Program, batch: int = BATCH) -> dict[str, Any]:
    """Batches of every mix from "all leave" to "none leave", on the wall clock.

    There are two ideals. By shares: the sum of exit rate x plain replay of just what that exit's answer
    needs, for the whole batch. By rows: one plain graph that runs every block, heads and scores too, on
    exactly as many rows as get there, already in place.

    Args:
        lab: Where.
        workload: Rows.
        program: With exits.
        batch: Rows of a launch.
    """
    executor = device_executor(lab, program, batch)
    _, exits = executor.run([workload.x], len(workload.x))
    ours = DeviceProgramCall(lab, executor, batch)
    answers = _answers(lab, program, batch)
    found: list[dict[str, Any]] = []
    for mix in mixes(batch, len(program.exits)):
        chosen = _batch_of(workload.x, np.asarray(exits), mix)
        if chosen is None:
            found.append({"rows_by_exit": list(mix), "missing": "no such rows among those that were made"})
            continue
        arriving = [sum(mix[index:]) for index in range(len(mix))]
        blocks = [(b, rows) for b, rows in zip(program.blocks, arriving, strict=True) if rows]
        with lab.part() as part:
            plain = ChainGraph(part, [b for b, _ in blocks], [rows for _, rows in blocks])
            times = in_turns(part, {PROGRAM: ours, **answers, "by rows": plain}, [chosen], wall_times)
        by_shares = ideal_of_shares(mix, np.stack([times[_ANSWER + name] for name in program.exits]))
        found.append(
            {
                "rows_by_exit": list(mix),
                "turns": len(times[PROGRAM]),
                "program": summary(times[PROGRAM]),
                "rows_per_second": float(1e6 * batch / times[PROGRAM].mean()),
                "ideal_by_shares": summary(by_shares),
                "ideal_by_rows": summary(times["by rows"]),
                "throughput_by_shares": ratio(by_shares, times[PROGRAM]),
                "throughput_by_rows": ratio(times["by rows"], times[PROGRAM]),
            }
        )
    return {"batch": batch, "buckets": list(powers_of_two(batch)), "mixes": found}


def _answers(lab: Lab, program: Program, rows: int) -> dict[str, Contender]:
    return {_ANSWER + name: ChainGraph(lab, [answer_block(program, name)], [rows]) for name in program.exits}


def _rows_in_random_order(
    executor: DeviceExecutor, x: npt.NDArray[np.float32]
) -> tuple[list[npt.NDArray[np.float32]], npt.NDArray[Any]]:
    """Single rows, and the exit that each takes on the device."""
    order = np.random.default_rng(SEED).permutation(len(x))
    inputs = [x[row : row + 1] for row in order]
    return inputs, np.array([executor.run([row], 1)[1][0] for row in inputs])


def _rates(exits: npt.NDArray[Any], program: Program) -> dict[str, float]:
    return {name: float((exits == index).mean()) for index, name in enumerate(program.exits)}


def _batch_of(
    x: npt.NDArray[np.float32], exits: npt.NDArray[Any], mix: Sequence[int]
) -> npt.NDArray[np.float32] | None:
    """Rows of which so many leave at each exit, shuffled; they are repeated where they are too few."""
    parts = []
    for index, count in enumerate(mix):
        here = np.flatnonzero(exits == index)
        if count and not len(here):
            return None
        parts.append(np.resize(here, count))
    rows = np.random.default_rng(SEED).permutation(np.concatenate(parts).astype(np.int64))
    return np.ascontiguousarray(x[rows])


def ideal_of_rows(exit_index: npt.NDArray[Any], prefix_us: Times) -> Times:
    """What single rows cost if a decision costs nothing: each the prefix of the exit that it takes.

    Args:
        exit_index: ``[turns]``: the exit of the row of each turn.
        prefix_us: ``[exits, turns]``: plain replay of what lies before each exit.
    """
    return np.asarray(prefix_us[exit_index, np.arange(prefix_us.shape[1])], np.float64)


def ideal_of_shares(rows_by_exit: Sequence[int], prefix_us: Times) -> Times:
    """What a batch costs by shares: the sum over exits of exit rate x plain replay of the prefix.

    Every prefix runs on the whole batch, so a device that a few rows do not fill cannot reach this: there
    a quarter of the rows takes more than a quarter of the time.

    Args:
        rows_by_exit: How many rows leave at each exit.
        prefix_us: ``[exits, turns]``.
    """
    shares = np.asarray(rows_by_exit, np.float64) / sum(rows_by_exit)
    return np.asarray(shares @ prefix_us, np.float64)


def mixes(batch: int, exits: int) -> list[tuple[int, ...]]:
    """Rows that leave at each exit, from "all at the first" to "none before the last".

    Args:
        batch: Rows in all.
        exits: How many, the end of the network among them.
    """

    def early(share: float) -> tuple[int, ...]:
        """A share leaves at the first exit, of the rest half at each exit but the last."""
        rows = [round(batch * share)]
        for _ in range(exits - 2):
            rows.append((batch - sum(rows)) // 2)
        return (*rows, batch - sum(rows))

    none = (*(0,) * (exits - 1), batch)
    one = (batch - 1, *(0,) * (exits - 2), 1)
    found = [early(1.0), one, early(0.75), early(0.5), early(0.25), early(0.0), none]
    return list(dict.fromkeys(found))


def summary(times_us: Times) -> dict[str, float]:
    """``mean_us``, ``median_us``, ``p99_us``."""
    return {
        "mean_us": float(times_us.mean()),
        "median_us": float(np.median(times_us)),
        "p99_us": float(np.percentile(times_us, 99)),
    }


def ratio(a: Times, b: Times) -> dict[str, float]:
    """Mean of one over mean of the other, with a 95 % interval (paired bootstrap), and that of medians."""
    return {**asdict(ratio_interval(a, b)), "median": float(np.median(a) / np.median(b))}


def difference(a: Times, b: Times) -> dict[str, float]:
    """Mean of one minus mean of the other, with a 95 % interval (paired bootstrap), and that of medians."""
    return {**asdict(mean_difference_interval(a, b)), "median": float(np.median(a) - np.median(b))}
