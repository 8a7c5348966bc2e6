"""Gates judged on cached scores: learned ones against all baselines, and over random re-splits."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any, Final, TypeAlias, TypeVar
from unittest import mock

import numpy as np
from cifar import Split
from cifar10_setup import SEED, Array, Effort, Job

from exitcompiler.baselines import (
    Baseline,
    ExitSet,
    best_on,
    exit_sets,
    patience,
    per_exit_thresholds,
    random_routing,
    shared_threshold,
    soft_oracle,
)
from exitcompiler.candidates import Candidates
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.errors import InputError
from exitcompiler.evaluation import Evaluation, evaluate
from exitcompiler.frontier import Frontier, sweep
from exitcompiler.policies import Policy
from exitcompiler.progress import reporting
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import score_rows
from exitcompiler.selection import fit_within
from exitcompiler.statistics import area_difference_interval, mean_time_over_drops

__all__ = [
    "LIMITS",
    "THRESHOLDS",
    "WIDEST",
    "area_us",
    "at_limit",
    "compare_gates",
    "halves",
    "in_processes",
    "learned_points",
    "point_figures",
    "resplit_all",
    "rows_of",
    "score_all",
    "spread",
]

LIMITS: Final = tuple(round(0.0025 * step, 4) for step in range(1, 13))
"""Drops that a user may allow: every family picks one point for each, on the learning rows."""

WIDEST: Final = 0.03
THRESHOLDS: Final = ("max_probability", "entropy", "per_exit")
"""The families that are thresholds on confidences; the best of them is what learned gates have to beat."""

Curve: TypeAlias = Sequence[tuple[Baseline, Evaluation]]
Task = TypeVar("Task")
Outcome = TypeVar("Outcome")


def score_all(candidates: Candidates, engines: Engines, split: Split) -> tuple[ScoreTable, ScoreTable]:
    """Every head's scores and the backbone's, by the engines that run.

    Returns:
        The scores on all test rows, and on the final ones alone.
    """
    import torch

    x, y = np.concatenate([split.x, split.final_x]), np.concatenate([split.y, split.final_y])
    rows = Rows({next(iter(candidates.program.inputs)): torch.from_numpy(x)}, y)
    with reporting(False) as reporter, reporter.step("scoring", len(x)) as step:
        table = score_rows(candidates, engines, rows, step)
    return table, table.take(np.arange(len(split.x), table.rows))


def compare_gates(
    frontier: Frontier, learn: ScoreTable, judge: ScoreTable, costs: CostModel
) -> dict[str, Any]:
    """All families, chosen on the learning rows at the same limits and judged on the final rows.

    The area under a frontier is the mean, over allowed drops from 0 to 3 points, of the least time of
    the family's points whose drop on the final rows is within them; the interval is a paired
    bootstrap over final rows.

    Args:
        frontier: Learned on ``learn``.
        learn: Scores on the learning rows.
        judge: Scores on the final rows.
        costs: Measured times.
    """
    points: dict[str, list[Evaluation]] = {"learned": learned_points(frontier, LIMITS, judge, costs)}
    for name, candidates in _families(learn, costs).items():
        curve = best_on(list(candidates), learn, costs)
        points[name] = [at_limit(curve, limit, judge, costs) for limit in LIMITS]
    figures: dict[str, Any] = {
        "limits": LIMITS,
        "recipe": str(frontier.recipe),
        "learning_rows": learn.rows,
        "judged_rows": judge.rows,
        "whole_us": costs.whole_us,
        "families": {
            name: {**point_figures(evaluations, costs), "area_us": area_us(evaluations, costs)}
            for name, evaluations in points.items()
        },
        "oracle": _oracle(learn, judge, costs),
    }
    areas = {name: figures["families"][name]["area_us"] for name in THRESHOLDS}
    best = min(areas, key=lambda name: areas[name])
    figures["best_threshold"] = best
    figures["area_differences_us"] = {
        name: asdict(
            area_difference_interval(
                rows_of(points["learned"]), rows_of(points[name]), 0.0, WIDEST, plain_us=costs.whole_us
            )
        )
        for name in points
        if name != "learned"
    }
    return figures


def _families(learn: ScoreTable, costs: CostModel) -> dict[str, Iterable[Baseline]]:
    sets: Sequence[ExitSet] = exit_sets(learn)
    trade_offs_us = np.geomspace(0.5, 100.0, 28) * costs.whole_us
    return {
        "max_probability": shared_threshold(learn, sets, "max_probability"),
        "entropy": shared_threshold(learn, sets, "entropy"),
        "per_exit": per_exit_thresholds(learn, costs, trade_offs_us),
        "patience": patience(sets),
        "random": random_routing(sets, [0.05 * step for step in range(21)], SEED),
    }


def learned_points(
    frontier: Frontier, limits: Sequence[float], judge: ScoreTable, costs: CostModel
) -> list[Evaluation]:
    """Learned for each allowed drop, judged on other rows."""
    found = []
    for limit in limits:
        try:
            policy = frontier.fit(max_accuracy_drop=limit).policy
        except InputError:  # nothing keeps the limit but the plain network
            policy = Policy.plain(judge.topology)
        found.append(evaluate(policy, judge, costs))
    return found


def at_limit(curve: Curve, limit: float, judge: ScoreTable, costs: CostModel) -> Evaluation:
    """The fastest that keeps the limit on the rows it was chosen on, judged on others."""
    within = [pair for pair in curve if pair[1].accuracy_drop <= limit]
    if not within:
        return evaluate(Policy.plain(judge.topology), judge, costs)
    return min(within, key=lambda pair: pair[1].mean_us)[0].evaluate(judge, costs)


def rows_of(points: Sequence[Evaluation]) -> tuple[list[Array], list[Array]]:
    """Per point the drops and the times, row by row."""
    drops = [point.backbone_correct.astype(np.float64) - point.correct for point in points]
    return drops, [point.time_us for point in points]


def point_figures(points: Sequence[Evaluation], costs: CostModel) -> dict[str, list[float]]:
    """What a family came to at each limit."""
    return {
        "accuracy": [point.accuracy for point in points],
        "drop": [point.accuracy_drop for point in points],
        "mean_us": [point.mean_us for point in points],
        "speedup": [costs.whole_us / point.mean_us for point in points],
    }


def area_us(points: Sequence[Evaluation], costs: CostModel) -> float:
    """The area under a family's frontier: see ``compare_gates``."""
    drops, times_us = [point.accuracy_drop for point in points], [point.mean_us for point in points]
    return mean_time_over_drops(drops, times_us, 0.0, WIDEST, plain_us=costs.whole_us)


def _oracle(learn: ScoreTable, judge: ScoreTable, costs: CostModel) -> dict[str, float]:
    """The soft oracle with the exits that serve it best on the learning rows."""
    exits = min(exit_sets(learn), key=lambda chosen: soft_oracle(learn, costs, chosen).mean_us)
    judged = soft_oracle(judge, costs, exits)
    return {
        "accuracy": judged.accuracy,
        "drop": judged.accuracy_drop,
        "mean_us": judged.mean_us,
        "speedup": costs.whole_us / judged.mean_us,
    }


def resplit_all(job: Job, table: ScoreTable, costs: CostModel, jobs: int) -> dict[str, Any]:
    """Learn on a random half of the test rows, judge on the other half; many times.

    Heads never saw a test row. Times are the measured costs of segments and heads.

    Args:
        job: How many re-splits, how fine a sweep.
        table: Scores on all test rows.
        costs: Measured times.
        jobs: Processes.
    """
    seeds = range(job.effort.resplits)
    tasks = [(table, costs, seed, job.effort) for seed in seeds]
    results = in_processes(_resplit, tasks, jobs)
    return {
        "resplits": len(results),
        "limit": job.effort.max_drop,
        "rows": table.rows // 2,
        **spread(results),
    }


def in_processes(function: Callable[[Task], Outcome], tasks: Iterable[Task], jobs: int) -> list[Outcome]:
    """The outcomes of all tasks, in their order; the processes share the processors, one thread each."""
    spawn = multiprocessing.get_context("spawn")
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}), ProcessPoolExecutor(jobs, spawn) as pool:
        return list(pool.map(function, tasks))


def spread(results: Sequence[Mapping[str, Mapping[str, float]]]) -> dict[str, dict[str, Any]]:
    """Mean, standard deviation and range of drops and speed-ups over re-splits, by name."""
    figures = {}
    for name in results[0]:
        drops = np.array([result[name]["drop"] for result in results])
        speedups = np.array([result[name]["speedup"] for result in results])
        figures[name] = {
            "drop_mean": drops.mean(),
            "drop_sd": drops.std(ddof=1),
            "drop_range": [drops.min(), drops.max()],
            "speedup_mean": speedups.mean(),
            "speedup_sd": speedups.std(ddof=1),
            "speedup_range": [speedups.min(), speedups.max()],
            "drops": drops,
            "speedups": speedups,
        }
    return figures


def halves(table: ScoreTable, seed: int) -> tuple[ScoreTable, ScoreTable]:
    """A random half of the rows, to learn on, and the other, to judge on."""
    order = np.random.default_rng(1000 + seed).permutation(table.rows)
    half = table.rows // 2
    return table.take(np.sort(order[:half])), table.take(np.sort(order[half:]))


def _resplit(task: tuple[ScoreTable, CostModel, int, Effort]) -> dict[str, dict[str, float]]:
    table, costs, seed, effort = task
    learn, judge = halves(table, seed)
    frontier = sweep(learn, costs, steps=effort.sweep_steps, seed=seed)
    point = fit_within(frontier, effort.max_drop)  # as the compiler does
    curve = best_on(shared_threshold(learn, exit_sets(learn), "max_probability"), learn, costs)
    found = {
        "learned": evaluate(point.policy, judge, costs),
        "max_probability": at_limit(curve, effort.max_drop, judge, costs),
    }
    return {
        name: {"drop": result.accuracy_drop, "speedup": costs.whole_us / result.mean_us}
        for name, result in found.items()
    }
