"""Gates judged on cached scores: learned ones against all baselines, and over random re-splits."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from typing import Any, Final, TypeAlias
from unittest import mock

import numpy as np
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
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.errors import InputError
from exitcompiler.frontier import Frontier, sweep
from exitcompiler.policies import CostModel, Evaluation, Policy, evaluate
from exitcompiler.progress import reporting
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import score_rows
from exitcompiler.selection import AIM
from exitcompiler.statistics import area_difference_interval, mean_time_over_drops

__all__ = ["LIMITS", "THRESHOLDS", "compare_gates", "resplit_all", "score_all"]

LIMITS: Final = tuple(round(0.0025 * step, 4) for step in range(1, 13))
"""Drops that a user may allow: every family picks one point for each, on the learning rows."""

WIDEST: Final = 0.03
THRESHOLDS: Final = ("max_probability", "entropy", "per_exit")
"""The families that are thresholds on confidences; the best of them is what learned gates have to beat."""

Curve: TypeAlias = Sequence[tuple[Baseline, Evaluation]]


def score_all(candidates: Candidates, engines: Engines, x: Array, y: Array) -> ScoreTable:
    """Every head's scores and the backbone's on all rows, by the engines that run."""
    import torch

    rows = Rows({next(iter(candidates.chain.inputs)): torch.from_numpy(x)}, y)
    with reporting(False) as reporter, reporter.step("scoring", len(x)) as step:
        return score_rows(candidates, engines, rows, step)


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
    points: dict[str, list[Evaluation]] = {"learned": _learned(frontier, judge, costs)}
    for name, candidates in _families(learn, costs).items():
        curve = best_on(list(candidates), learn, costs)
        points[name] = [_at_limit(curve, limit, judge, costs) for limit in LIMITS]
    figures: dict[str, Any] = {
        "limits": LIMITS,
        "recipe": str(frontier.recipe),
        "learning_rows": learn.rows,
        "judged_rows": judge.rows,
        "whole_us": costs.whole_us,
        "families": {name: _curve_figures(evaluations, costs) for name, evaluations in points.items()},
        "oracle": _oracle(learn, judge, costs),
    }
    areas = {name: figures["families"][name]["area_us"] for name in THRESHOLDS}
    best = min(areas, key=lambda name: areas[name])
    figures["best_threshold"] = best
    figures["area_differences_us"] = {
        name: asdict(
            area_difference_interval(
                _rows_of(points["learned"]), _rows_of(points[name]), 0.0, WIDEST, plain_us=costs.whole_us
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


def _learned(frontier: Frontier, judge: ScoreTable, costs: CostModel) -> list[Evaluation]:
    found = []
    for limit in LIMITS:
        try:
            policy = frontier.fit(max_accuracy_drop=limit).policy
        except InputError:  # nothing keeps the limit but the plain network
            policy = Policy.plain(judge.exits)
        found.append(evaluate(policy, judge, costs))
    return found


def _at_limit(curve: Curve, limit: float, judge: ScoreTable, costs: CostModel) -> Evaluation:
    """The fastest that keeps the limit on the rows it was chosen on, judged on others."""
    within = [pair for pair in curve if pair[1].accuracy_drop <= limit]
    if not within:
        return evaluate(Policy.plain(judge.exits), judge, costs)
    return min(within, key=lambda pair: pair[1].mean_us)[0].evaluate(judge, costs)


def _rows_of(points: Sequence[Evaluation]) -> tuple[list[Array], list[Array]]:
    """Per point the drops and the times, row by row."""
    drops = [point.backbone_correct.astype(np.float64) - point.correct for point in points]
    return drops, [point.time_us for point in points]


def _curve_figures(points: Sequence[Evaluation], costs: CostModel) -> dict[str, Any]:
    drops = [point.accuracy_drop for point in points]
    times_us = [point.mean_us for point in points]
    return {
        "accuracy": [point.accuracy for point in points],
        "drop": drops,
        "mean_us": times_us,
        "speedup": [costs.whole_us / time_us for time_us in times_us],
        "area_us": mean_time_over_drops(drops, times_us, 0.0, WIDEST, plain_us=costs.whole_us),
    }


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
    spawn = multiprocessing.get_context("spawn")
    # The processes share the processors: one thread each.
    with mock.patch.dict(os.environ, {"OMP_NUM_THREADS": "1"}), ProcessPoolExecutor(jobs, spawn) as pool:
        results = list(pool.map(_resplit, tasks))
    figures: dict[str, Any] = {
        "resplits": len(results),
        "limit": job.effort.max_drop,
        "rows": table.rows // 2,
    }
    for name in ("learned", "max_probability"):
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


def _resplit(task: tuple[ScoreTable, CostModel, int, Effort]) -> dict[str, dict[str, float]]:
    table, costs, seed, effort = task
    order = np.random.default_rng(1000 + seed).permutation(table.rows)
    half = table.rows // 2
    learn, judge = table.take(np.sort(order[:half])), table.take(np.sort(order[half:]))
    frontier = sweep(learn, costs, steps=effort.sweep_steps, seed=seed)
    point = frontier.fit(max_accuracy_drop=AIM * effort.max_drop)  # as the compiler does
    curve = best_on(shared_threshold(learn, exit_sets(learn), "max_probability"), learn, costs)
    found = {
        "learned": evaluate(point.policy, judge, costs),
        "max_probability": _at_limit(curve, effort.max_drop, judge, costs),
    }
    return {
        name: {"drop": result.accuracy_drop, "speedup": costs.whole_us / result.mean_us}
        for name, result in found.items()
    }
