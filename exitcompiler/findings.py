"""Collects what the compiler finds out, and puts it together as the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from exitcompiler.baselines import (
    Baseline,
    ExitSet,
    best_on,
    exit_sets,
    patience,
    random_routing,
    shared_threshold,
    soft_oracle,
)
from exitcompiler.costs import CostModel
from exitcompiler.data import RowSplit
from exitcompiler.fitting import Fitted
from exitcompiler.flops import count_flops
from exitcompiler.packaging import PLAIN, environment, point_name
from exitcompiler.placement import Place
from exitcompiler.policies import Leave, LinearRule
from exitcompiler.program import Program
from exitcompiler.quantization_findings import quantization_entry
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import BoolArray, HeadKey, ScoreTable
from exitcompiler.selection import Built, Selection
from exitcompiler.settings import Settings
from exitcompiler.statistics import reliability_bins
from exitcompiler.targets import Target
from exitcompiler.tuning_findings import tuning_entry

__all__ = ["Findings", "place_entry"]


class Findings:
    """What is known so far; the report at the end.

    Args:
        name: Of the model.
        program: The captured backbone.
        settings: What was asked for.
        split: How the calibration rows were divided.
    """

    def __init__(self, name: str, program: Program, settings: Settings, split: RowSplit) -> None:
        parameters = sum(p.numel() for p in program.entry.body.parameters())
        self._settings = settings
        self._report: dict[str, Any] = {
            "model": {"name": name, "parameters": parameters, "flops": count_flops(program.entry.body)},
            "environment": environment(),
            "settings": settings.as_dict(),
            "rows": {"fit": len(split.fit), "learn": len(split.learn), "certify": len(split.certify)},
            "refused": None,
        }
        self._notes: list[str] = []
        self._head_flops: dict[HeadKey, int] = {}
        self.parity: float | None = None
        self.seconds: Mapping[str, float] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return tuple(self._notes)

    def note(self, text: str) -> None:
        """Add a sentence for the user."""
        self._notes.append(text)

    def refuse(self, reason: str) -> None:
        """Say why the plain engine is the result."""
        lost = -(self._report.get("finetune") or {}).get("moved", {}).get("value", 0.0)
        limit = self._settings.drop_limit
        if limit is not None and lost > limit:
            reason += (
                f"; tuning alone cost the network {100 * lost:.2f} points, {100 * limit:.2f} are allowed: "
                "try a lower lr, frozen batch norms, or more passes"
            )
        self._report["refused"] = reason

    def chose_target(self, target: Target) -> None:
        """Which backend runs, how long the plain model takes on each that could, and how it is quantised."""
        if self._settings.backend == "auto":
            listed = ", ".join(f"{key} {time / 1000:.3f} ms" for key, time in target.times_us.items())
            name = target.engines.backend.name
            self.note(f"backend 'auto' chose {name}: the plain model takes {listed} a row")
        if target.settled is not None:
            self._report["quantization"] = quantization_entry(target)

    def delivered(self, precision: str, target: Target) -> None:
        """What the result computes in, and what the plain engine does that it was compared with."""
        self._report["precision"] = precision
        if "quantization" in self._report:
            self._report["quantization"]["plain"] = target.plain_precision
        drop = (self._report.get("certificate") or {}).get("accuracy_drop", {})
        limit = self._settings.drop_limit
        if self._report["refused"] and limit is not None and drop.get("value", 0.0) > limit:
            self.note(
                f"without exits, {precision} drops {100 * drop['value']:.2f} points on rows that nothing was "
                f"chosen on, {100 * limit:.2f} are allowed"
            )

    def compared_precisions(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """What there was in each precision.

        Args:
            rows: ``name``, ``accuracy_drop``, ``mean_latency_ms``, ``kept`` (whether it keeps the limit) and
                ``chosen``; or ``name`` and ``refused``, the reason.
        """
        self._report["precisions"] = [dict(row) for row in rows]

    def fitted(self, fitted: Fitted) -> None:
        """Where exits could stand, and which of these places got heads."""
        self._head_flops |= fitted.head_flops
        self._notes += fitted.remarks
        if fitted.rows:
            self._report["rows"]["fit"] = fitted.rows
        self._report["exits"] = [place_entry(place) for place in fitted.places]

    def tuned(self, fitted: Fitted, after: BoolArray, before: BoolArray) -> None:
        """What fine-tuning did to the network; the arguments are ``tuning_entry``'s."""
        self._report["finetune"] = tuning_entry(fitted, after, before)

    def selected(self, selection: Selection, table: ScoreTable, costs: CostModel) -> None:
        """What the gates came out as."""
        chosen = selection.chosen
        self._frontier(selection, costs)
        self._report["rounds"] = [
            {"exits": list(r.exits), "kept": list(r.kept), "mean_latency_ms": self._ms(r.mean_us)}
            for r in selection.rounds
        ]
        self._report["baselines"] = self._baselines(table, costs)
        self._exits(chosen, table, costs)
        self._report["reliability"] = {
            name: _reliability(table, name, decision.head)
            for name, decision in chosen.point.policy.kept.items()
        }
        self.note(f"gates were learned as: {selection.frontier.recipe}")

    def measured(self, latency: Mapping[str, Any], execution: str, compiled: CompiledModel) -> None:
        """How fast the program is next to the plain engine."""
        self._report["latency"] = {
            **latency,
            "point": compiled.operating_point.name,
            "execution": "device" if compiled.backend.on_device else execution,
            "backend": compiled.backend.name,
            "threads": compiled.backend.threads,
        }

    def certified(self, certificate: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
        """What the certify rows say."""
        self._report["certificate"] = dict(certificate)
        for entry in self._report.get("exits", []):
            name = entry["name"]
            if name in seen["exit_rates"]:
                entry["exit_rate"] = seen["exit_rates"][name]
                entry["exit_accuracy"] = seen["exit_accuracy"][name]

    def report(self) -> dict[str, Any]:
        """The report: plain data that JSON can hold."""
        seconds = {step: round(time, 2) for step, time in self.seconds.items()}
        report = {**self._report, "seconds": seconds, "notes": list(self._notes)}
        if self.parity is not None:
            report["parity"] = {"max_relative_difference": self.parity}
            report["notes"].append(
                f"outputs agree with {_compared_with(report)} to {self.parity:.1g} "
                "(relative, every exit in turn)"
            )
        if report["refused"]:
            for entry in report.get("exits", []):
                entry["kept"] = False
            for entry in report.get("frontier", []):
                entry["chosen"] = entry["shipped"] = entry["name"] == PLAIN
        return report

    def _ms(self, time_us: float) -> float:
        return float(time_us) * self._settings.batch_size / 1000.0

    def _frontier(self, selection: Selection, costs: CostModel) -> None:
        shipped = (selection.chosen, *selection.shipped)
        made_of: dict[int, Built] = {id(built.point): built for built in shipped}
        points = [built.point for built in shipped if not built.point.policy.is_plain]
        points += [
            point
            for point in selection.frontier.points
            if all(abs(point.accuracy_drop - p.accuracy_drop) >= 5e-4 for p in points)
        ]
        entries = []
        for point in points:
            made = made_of.get(id(point))
            mean_us = point.mean_us if made is None else made.mean_us
            is_plain = point.policy.is_plain
            entries.append(
                {
                    "name": PLAIN if is_plain else point_name(point.accuracy_drop),
                    "accuracy": float(point.estimate.backbone_accuracy - point.accuracy_drop),
                    "accuracy_drop": float(point.accuracy_drop),
                    "excess_error": float(point.estimate.excess_error),
                    "mean_latency_ms": self._ms(mean_us),
                    "speedup": float(costs.whole_us / mean_us),
                    "exit_rates": {k: float(v) for k, v in point.estimate.exit_rates.items()},
                    "shipped": is_plain or made is not None,
                    "chosen": made is selection.chosen,
                }
            )
        self._report["frontier"] = sorted(entries, key=lambda entry: entry["accuracy_drop"])

    def _exits(self, chosen: Built, table: ScoreTable, costs: CostModel) -> None:
        kept = chosen.point.policy.kept
        for entry in self._report.get("exits", []):
            name = entry["name"]
            if name not in table.exits:
                continue
            decision = kept.get(name)
            kinds = [kind for kind in table.kinds(name) if not table.needs((name, kind))]
            head = kinds[-1] if decision is None else decision.head
            rate = float(chosen.point.estimate.exit_rates.get(name, 0.0))
            entry.update(
                {
                    "kept": decision is not None,
                    "head": head,
                    "head_accuracy": float(table.correct((name, head)).mean()),
                    "head_flops": self._head_flops.get((name, head)),
                    "prefix_ms": self._ms(costs.reach_us(table.topology, name)),
                    "head_ms": self._ms(costs.head_us[name, head]),
                    "exit_rate": rate if decision is not None else 0.0,
                    "reason": _kept_reason(decision)
                    if decision is not None
                    else "the gate came out as 'always go on': what could leave here does not pay for the "
                    "head on all that pass",
                    "gate": _gate_text(decision),
                }
            )

    def _baselines(self, table: ScoreTable, costs: CostModel) -> dict[str, list[dict[str, float]]]:
        """Each baseline chosen on one half of the learning rows and judged on the other."""
        learn, judge = self._halves(table)
        sets: Sequence[ExitSet] = exit_sets(table)
        families: dict[str, Iterable[Baseline]] = {
            "max_probability": shared_threshold(learn, sets, "max_probability", steps=24),
            "entropy": shared_threshold(learn, sets, "entropy", steps=24),
            "patience": patience(sets),
            "random": random_routing(sets, [0.1 * i for i in range(11)], self._settings.seed),
        }
        curves = {
            name: [
                self._baseline_point(baseline.evaluate(judge, costs))
                for baseline, _ in best_on(list(family), learn, costs)
            ]
            for name, family in families.items()
        }
        curves["oracle"] = [self._baseline_point(soft_oracle(judge, costs, exits)) for exits in sets]
        return curves

    def _halves(self, table: ScoreTable) -> tuple[ScoreTable, ScoreTable]:
        """Rows for baselines to be chosen on, and rows to judge them on."""
        order = np.random.default_rng(self._settings.seed).permutation(table.rows)
        return table.take(np.sort(order[::2])), table.take(np.sort(order[1::2]))

    def _baseline_point(self, evaluation: Any) -> dict[str, float]:
        return {
            "accuracy_drop": float(evaluation.accuracy_drop),
            "mean_latency_ms": self._ms(evaluation.mean_us),
        }


def _compared_with(report: Mapping[str, Any]) -> str:
    return "torch's, on the same int8 graph," if report.get("precision") == "int8" else "torch's float32"


def place_entry(place: Place) -> dict[str, Any]:
    """What the report says of a place before gates are learned."""
    return {
        "name": place.cut.name,
        "depth": place.time_share,
        "kept": False,
        "head": None,
        "reason": place.reason,
        "probe_accuracy": place.probe_accuracy,
    }


def _kept_reason(decision: Leave | LinearRule) -> str:
    if isinstance(decision, Leave):
        return "the gate always leaves: the network ends here"
    return "what its rows save pays for the head"


def _gate_text(decision: Leave | LinearRule | None) -> str:
    match decision:
        case None:
            return "always go on"
        case Leave():
            return "always leave"
        case LinearRule(reads=reads, weight=weight):
            used = sum(1 for column in zip(*weight, strict=True) if any(column))
            return f"linear on {used} feature{'s' if used != 1 else ''} of {len(reads)} head" + (
                "s" if len(reads) != 1 else ""
            )


def _reliability(table: ScoreTable, name: str, head: str) -> dict[str, list[float]]:
    scores = table.heads[name, head]
    bins = reliability_bins(scores.confidence[:, 0], table.correct((name, head)), bins=12)
    return {
        "confidence": [b.confidence for b in bins],
        "accuracy": [b.accuracy for b in bins],
        "count": [b.count for b in bins],
    }
