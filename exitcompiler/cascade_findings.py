"""Collects what is found out about a cascade, and puts it together as the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np

from exitcompiler.cascade_baselines import Part, learned_on, myopic, network_alone, oracle, parts, uniform
from exitcompiler.costs import CostModel
from exitcompiler.data import RowSplit
from exitcompiler.evaluation import Evaluation, evaluate, undominated
from exitcompiler.findings import Findings, place_entry
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted
from exitcompiler.float_layers import Settled
from exitcompiler.flops import count_flops
from exitcompiler.frontier import trade_offs
from exitcompiler.naming import OWN
from exitcompiler.networks import Network
from exitcompiler.packaging import point_name
from exitcompiler.policies import Leave, LinearRule, Policy
from exitcompiler.quantization_findings import settled_entry, settled_sentence
from exitcompiler.scores import BoolArray, ScoreTable
from exitcompiler.selection import Built, Selection
from exitcompiler.settings import Settings
from exitcompiler.topology import Topology
from exitcompiler.tuning_findings import tuning_entry

__all__ = ["CascadeFindings", "network_shares", "overlap"]

STEPS: Final = 8
"""Trade-offs at which sub-topologies are learned for the report."""

THRESHOLD_STEPS: Final = 24


class CascadeFindings(Findings):
    """What is known of a cascade so far; the report at the end.

    Args:
        networks: In topological order, the reference last.
        edges: Pairs (network, later network), by position.
        settings: What was asked for.
        split: How the calibration rows were divided.
    """

    def __init__(
        self,
        networks: Sequence[Network],
        edges: frozenset[tuple[int, int]],
        settings: Settings,
        split: RowSplit,
    ) -> None:
        super().__init__(f"cascade of {len(networks)} networks", networks[-1].program, settings, split)
        names = [network.name for network in networks]
        bodies = [network.program.entry.body for network in networks]
        sizes = [sum(p.numel() for p in body.parameters()) for body in bodies]
        flops = [count_flops(body) for body in bodies]
        self._report["model"] |= {"parameters": sum(sizes), "flops": sum(flops)}
        self._report["exits"] = []
        self._report["cascade"] = {
            "reference": names[-1],
            "networks": [
                {"name": name, "parameters": size, "flops": count, "kept": name == names[-1], "reason": ""}
                for name, size, count in zip(names, sizes, flops, strict=True)
            ],
            "edges": [[names[a], names[b]] for a, b in sorted(edges)],
        }

    def asked_to_tune(self, tunings: Mapping[str, FineTune | None]) -> None:
        """How each network was to be tuned, by name; the report has None where none was."""
        if any(tunings.values()):
            self._report["settings"]["finetune"] = {
                name: None if tuning is None else dict(tuning.as_dict()) for name, tuning in tunings.items()
            }

    def quantized_network(self, name: str, settled: Settled) -> None:
        """How a network, not the reference, was quantised."""
        entry = settled_entry(settled)
        self._report.setdefault("quantized_networks", {})[name] = entry
        self._notes.append(f"{name} in int8: {settled_sentence(settled)}")

    def fitted_network(self, name: str, fitted: Fitted) -> None:
        """Where a network could have exits, and which of these places got heads."""
        self._head_flops |= {(f"{name}/{at}", kind): count for (at, kind), count in fitted.head_flops.items()}
        self._notes += [f"{name}: {remark}" for remark in fitted.remarks]
        if fitted.rows:
            self._report["rows"]["fit"] = fitted.rows
        places = [place_entry(place) for place in fitted.places]
        self._report["exits"] += [
            {**entry, "name": f"{name}/{entry['name']}", "network": name} for entry in places
        ]

    def tuned_network(self, name: str, fitted: Fitted, after: BoolArray, before: BoolArray) -> None:
        """What fine-tuning did to a network; the other arguments are ``tuning_entry``'s."""
        for entry in self._report["cascade"]["networks"]:
            if entry["name"] == name:
                entry["finetune"] = tuning_entry(fitted, after, before)

    def selected(self, selection: Selection, table: ScoreTable, costs: CostModel) -> None:
        """What the gates came out as, for the whole and for parts of it."""
        ends = [network[-1] for network in table.topology.networks]
        self._report["exits"] += [
            {"name": name, "network": name, "depth": None, "end": True, "kept": False, "head": OWN}
            for name in ends
        ]
        super().selected(selection, table, costs)
        cascade = self._report["cascade"]
        chosen = selection.chosen.point.policy
        for entry, sites in zip(cascade["networks"], table.topology.networks, strict=True):
            name = entry["name"]
            alone = network_alone(table, costs, name)
            kept = any(site in chosen.kept for site in sites)
            entry |= {
                "accuracy": alone.accuracy,
                "latency_ms": self._ms(alone.mean_us),
                "kept": kept,
                "reason": _reason(name, kept, ends),
            }
        cascade["used_edges"] = _used_edges(selection.chosen)
        cascade["budgets"] = self._budgets(selection, table, costs)
        cascade["overlap"] = overlap(table, ends)
        if chosen.is_plain:
            return
        learn, judge = self._halves(table)
        cascade["frontiers"] = self._frontiers(selection, learn, judge, costs)

    def _exits(self, chosen: Built, table: ScoreTable, costs: CostModel) -> None:
        super()._exits(chosen, table, costs)
        for entry in self._report["exits"]:
            if entry.get("end"):
                entry["reason"] = _end_reason(chosen.point.policy.kept.get(entry["name"]))

    def report(self) -> dict[str, Any]:
        """The report; where the reference alone is the result, of that."""
        report = super().report()
        if not report["refused"]:
            return report
        cascade = report["cascade"]
        networks = [
            {**entry, "kept": entry["name"] == cascade["reference"], "reason": ""}
            for entry in cascade["networks"]
        ]
        ends = {"kept": False, "exit_rate": 0.0, "reason": "not in the result"}
        return {
            **report,
            "exits": [{**entry, **ends} for entry in report["exits"]],
            "cascade": {**cascade, "networks": networks, "used_edges": [], "budgets": []},
        }

    def _budgets(self, selection: Selection, table: ScoreTable, costs: CostModel) -> list[dict[str, Any]]:
        """The shares of networks at up to three shipped points, from the most frugal to the most accurate."""
        built = [b for b in (selection.chosen, *selection.shipped) if not b.point.policy.is_plain]
        built.sort(key=lambda b: b.mean_us)
        chosen = built.index(selection.chosen) if selection.chosen in built else 0
        middle = chosen if 0 < chosen < len(built) - 1 else len(built) // 2
        return [
            {
                "point": point_name(b.point.accuracy_drop),
                "mean_latency_ms": self._ms(b.mean_us),
                "accuracy_drop": float(b.point.accuracy_drop),
                "networks": network_shares(b.point.policy, table, costs),
            }
            for b in (built[place] for place in sorted({0, middle, len(built) - 1} & set(range(len(built)))))
        ]

    def _frontiers(
        self, selection: Selection, learn: ScoreTable, judge: ScoreTable, costs: CostModel
    ) -> dict[str, list[dict[str, float]]]:
        """Learned policies of every sub-topology, on one half of the learning rows, judged on the other."""
        trade_offs_us = trade_offs(learn.topology, costs, STEPS)
        found = {}
        for part in parts(learn.topology, chains=False, inner=True):
            policies = learned_on(part, learn, costs, selection.frontier.recipe, trade_offs_us)
            found[" > ".join(part.names)] = self._judged([(part, p) for p in policies], learn, judge, costs)
        return found

    def _baselines(self, table: ScoreTable, costs: CostModel) -> dict[str, list[dict[str, float]]]:
        """Each baseline chosen on one half of the learning rows and judged on the other."""
        learn, judge = self._halves(table)
        thresholds = myopic(learn, costs, trade_offs(table.topology, costs, THRESHOLD_STEPS))
        curves = {
            "uniform": uniform(learn, costs, judge, self._settings.seed),
            "networks": [network_alone(judge, costs, sites[-1]) for sites in table.topology.networks],
            "oracle": oracle(judge, costs),
        }
        return {
            "myopic": self._judged(thresholds, learn, judge, costs, own=True),
            **{name: [self._baseline_point(r) for r in results] for name, results in curves.items()},
        }

    def _judged(
        self,
        policies: Sequence[tuple[Part, Policy]],
        learn: ScoreTable,
        judge: ScoreTable,
        costs: CostModel,
        *,
        own: bool = False,
    ) -> list[dict[str, float]]:
        """Of the policies those that nothing beats on the rows they were learned on, judged on other rows."""

        def on(table: ScoreTable, part: Part, policy: Policy) -> Evaluation:
            times = costs.restrict(table.topology, part.topology)
            return evaluate(policy, part.table(table, own=own), times)

        learned = [(on(learn, part, policy), part, policy) for part, policy in policies]
        kept = undominated(learned, lambda entry: entry[0])
        return [self._baseline_point(on(judge, part, policy)) for _, part, policy in kept]


def network_shares(policy: Policy, table: ScoreTable, costs: CostModel) -> list[dict[str, Any]]:
    """How a policy uses the networks: rows run, rows answered, and time.

    Args:
        policy: Over all places.
        table: Rows.
        costs: Measured times.

    Returns:
        Per network ``name``, ``share_of_rows_run``, ``share_of_rows_answered`` and ``share_of_time``.
    """
    result, topology = evaluate(policy, table, costs), policy.topology
    times = costs.times_us(topology, policy.steps)
    spent = {
        name: (rate, float(time) * rate)
        for (name, rate), time in zip(result.pass_rates.items(), times, strict=True)
        if time > 0.0
    }
    return [
        {
            "name": sites[-1],
            "share_of_rows_run": max((spent[site][0] for site in sites if site in spent), default=0.0),
            "share_of_rows_answered": sum(result.exit_rates[site] for site in sites),
            "share_of_time": sum(spent[site][1] for site in sites if site in spent) / result.mean_us,
        }
        for sites in topology.networks
    ]


def overlap(table: ScoreTable, networks: Sequence[str]) -> dict[str, Any]:
    """Which networks are right on the same rows.

    Args:
        table: The rows.
        networks: Names, whose own answers count.

    Returns:
        ``networks``; ``patterns``: for each set of networks the share of rows where exactly these are
        right, by falling share; ``only_right[i][j]``: the share where i is right and j is wrong.
    """
    right = np.stack([table.correct((name, OWN)) for name in networks], axis=1)
    patterns, counts = np.unique(right, axis=0, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {
        "networks": list(networks),
        "patterns": [
            {
                "right": [name for name, ok in zip(networks, patterns[i], strict=True) if ok],
                "share": float(counts[i] / len(right)),
            }
            for i in order
        ],
        "only_right": [[float((a & ~b).mean()) for b in right.T] for a in right.T],
    }


def _end_reason(decision: Leave | LinearRule | None) -> str:
    match decision:
        case None:
            return "no row is answered here"
        case LinearRule(actions=actions) if not any(isinstance(action, Leave) for action in actions):
            return "sends every row on"
        case LinearRule():
            return "answers what it is sure of"
        case Leave():
            return "answers all that come"


def _reason(name: str, kept: bool, ends: Sequence[str]) -> str:
    if not kept:
        return "every gate came out as never to go there, or always past it"
    if name == ends[-1]:
        return "the reference: answers what is left"
    return "what it answers saves more than it costs"


def _used_edges(built: Built) -> list[list[str]]:
    """The edges between networks that the program has."""
    policy = built.point.policy
    topology: Topology = policy.topology
    number = dict(zip(topology.sites, topology.network_of, strict=False))
    used = set()
    for site in policy.kept:
        for target in policy.targets(site):
            while target is not None and topology.sites[target] not in policy.kept:
                (target,) = policy.targets(topology.sites[target])
            if target is not None and topology.network_of[target] != number[site]:
                used.add((number[site], topology.network_of[target]))
    return [[topology.networks[a][-1], topology.networks[b][-1]] for a, b in sorted(used)]
