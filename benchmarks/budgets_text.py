"""What came of all runs, counted, and as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Final

import numpy as np
from budgets_runs import UNCHANGED
from scipy.stats import binomtest

__all__ = ["Target", "named_right", "section", "targets_of"]

_LIMIT_S: Final = 60.0
_NAMES: Final[Mapping[str, tuple[str, ...]]] = {
    UNCHANGED: (),
    "slower": ("kernels",),
    "slower block": ("kernels",),
    "exit mix": ("exit mix",),
}
_TITLES: Final = {
    UNCHANGED: "unchanged",
    "slower": "slower kernels, all blocks",
    "slower block": "slower kernels, one block",
    "exit mix": "worse exit mix, same kernels",
}
_CONDITIONS: Final = {
    "idle": "idle",
    "busy": "other cores busy",
    "busy now": "other cores busy, but not while the baseline was measured",
}
_FORMS: Final = {"single": "one engine of `model.onnx` for a row", "blocks": "an engine per block"}
_Record = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """Something that has to happen, or not to happen, in a share of the runs.

    Args:
        what: In words.
        count: How often it did.
        runs: Of how many.
        share: At least, or at most, in how many of them.
        at_least: Which of the two.
    """

    what: str
    count: int
    runs: int
    share: float
    at_least: bool

    @property
    def holds(self) -> bool:
        """Whether it did so often enough, or seldom enough."""
        part = self.count / self.runs
        return part >= self.share if self.at_least else part <= self.share

    def __str__(self) -> str:
        bound = f"{'at least' if self.at_least else 'at most'} {100 * self.share:.0f} %"
        ends = binomtest(self.count, self.runs).proportion_ci(0.95, "exact")
        interval = f"{100 * ends.low:.0f} to {100 * ends.high:.0f} %"
        outcome = "" if self.holds else " **missed**"
        return f"{self.what}: {self.count} of {self.runs} ({interval}; {bound}){outcome}"


def named_right(kind: str, record: _Record, block: str | None = None) -> bool:
    """Whether a check told why latency changed.

    Args:
        kind: Of the program.
        record: Of a run.
        block: The only block that got slower: it has to be the one that the report says grew most.
    """
    causes = record["report"]["causes"]
    if tuple(causes["named"]) != _NAMES[kind]:
        return False
    return block is None or max(causes["blocks"], key=lambda b: b["time"]["value"])["name"] == block


def targets_of(kind: str, records: Sequence[_Record], block: str | None = None) -> list[Target]:
    """What has to hold for the runs of one kind under one condition."""
    runs = len(records)
    verdicts = [record["report"]["verdict"] for record in records]
    named = sum(named_right(kind, record, block) for record in records)
    slow = Target("within 60 s", sum(r["seconds"] <= _LIMIT_S for r in records), runs, 1.0, True)
    if kind == UNCHANGED:
        return [
            Target("PASS", verdicts.count("PASS"), runs, 0.9, True),
            Target("FAIL", verdicts.count("FAIL"), runs, 0.02, False),
            slow,
        ]
    what = "named" if block is None else "named, with the block"
    return [
        Target("FAIL", verdicts.count("FAIL"), runs, 0.95, True),
        Target(what, named, runs, 0.95, True),
        slow,
    ]


def section(figures: Mapping[str, Any], records: Sequence[_Record]) -> str:
    """The whole section.

    Args:
        figures: ``date``, ``rows``, ``baselines``, ``forms``: form -> kind -> the fields of
            `budgets_calibrate.Made`.
        records: Of all runs, with ``form`` added.
    """
    first = records[0]["report"]["figures"]
    parts = [
        "## Budgets: `exitcompiler check`",
        _introduction(figures, first),
    ]
    for form, made in figures["forms"].items():
        parts.append(f"### Demo program, {_FORMS[form]}")
        parts.append(_made_lines(made))
        parts.append("\n".join(_table(made, [r for r in records if r["form"] == form])))
    return "\n\n".join(parts)


def _remarks(kind: str, records: Sequence[_Record]) -> list[str]:
    """What is promised to nobody, and still worth knowing."""
    if kind != UNCHANGED:
        return []
    named = sum(bool(record["report"]["causes"]["named"]) for record in records)
    return [f"a cause named all the same: {named} of {len(records)}"]


def _introduction(figures: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    env = first["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    return (
        'The limit is `latency.mean.max_increase = "10 %"`, against a baseline of the unchanged program. '
        "Every run is the command, in a process of its own; runs of all programs come in random order, and "
        f"take turns with {figures['baselines']} baselines for each condition. Measured on {figures['date']} "
        f"on {env['cpu']} ({env['cores']} cores), {env['system']}, {env['backend']}, {env['threads']} "
        f"thread{'s' if env['threads'] > 1 else ''}, {versions}, on {first['rows']:,} rows. Busy: a process "
        "that spins for every other core. Found: the increase, mean and standard deviation over runs. "
        "Brackets: the 95 % interval of the share (Clopper and Pearson), and what it has to be."
    )


def _made_lines(made: Mapping[str, Any]) -> str:
    """How slow the programs really are."""
    lines = ["What the changed programs really are, next to the unchanged one in the same process:", ""]
    for kind, one in made.items():
        ratios = np.array(one["ratios"])
        block = f" (`{one['block']}`)" if one["block"] else ""
        alike = 100 * one["same_classes"]
        lines.append(
            f"- {_TITLES[kind]}{block}: mean latency {ratios.mean():.3f} ± {ratios.std():.3f} x (mean and "
            f"standard deviation over {len(ratios)} processes); {_rates(one)}; {alike:.1f} % of the rows "
            "answered alike."
        )
    return "\n".join(lines)


def _rates(one: Mapping[str, Any]) -> str:
    before, now = one["exits"], one["other_exits"]
    if before == now:
        return "every exit taken as often"
    rows = sum(before.values())
    return "rows that leave: " + ", ".join(
        f"{100 * before[name] / rows:.0f} -> {100 * now[name] / rows:.0f} % at `{name}`" for name in before
    )


def _table(made: Mapping[str, Any], records: Sequence[_Record]) -> list[str]:
    lines = [
        "| machine | program | found | PASS | FAIL | INCONCLUSIVE | what has to hold | seconds: median, most "
        "|",
        "|---|---|---|---|---|---|---|---|",
    ]
    for condition, kind in product(_CONDITIONS, _TITLES):
        here = [r for r in records if (r["condition"], r["kind"]) == (condition, kind)]
        if not here:
            continue
        block = made[kind]["block"] if kind in made else None
        verdicts = Counter(r["report"]["verdict"] for r in here)
        seconds = np.array([r["seconds"] for r in here])
        found = [r["report"]["limits"][0]["found"]["value"] for r in here]
        cells = [
            _CONDITIONS[condition],
            _TITLES[kind],
            f"{100 * np.mean(found):+.1f} ± {100 * np.std(found):.1f} %",
            *(str(verdicts[name]) for name in ("PASS", "FAIL", "INCONCLUSIVE")),
            "<br>".join([*map(str, targets_of(kind, here, block)), *_remarks(kind, here)]),
            f"{np.median(seconds):.1f}, {seconds.max():.1f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
