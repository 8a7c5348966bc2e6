"""What the benchmark has to reach, next to what it measured."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from cifar10_format import interval

__all__ = ["AREA_BARS", "Target", "area_target", "target_lines", "targets", "verdict"]

AREA_BARS: Final = ("95 % interval not wholly below 0", "wholly above")
_OUTCOMES: Final = {
    "aim": "aim reached",
    "must": "must reached",
    "miss": "**missed**",
    "reported": "reported",
}


@dataclass(frozen=True)
class Target:
    """A line of the table of targets.

    Args:
        what: The figure.
        must: As text.
        aim: As text.
        measured: As text.
        outcome: "aim", "must", "miss", or, where nothing has to be reached, "reported".
    """

    what: str
    must: str
    aim: str
    measured: str
    outcome: str


def verdict(value: float, must: float, aim: float | None, *, at_least: bool) -> str:
    """Which bar a figure clears: "aim", "must" or "miss".

    Args:
        value: Measured.
        must: The lower bar.
        aim: The higher bar; None: there is none.
        at_least: Larger is better.
    """
    sign = 1.0 if at_least else -1.0
    if aim is not None and sign * value >= sign * aim:
        return "aim"
    return "must" if sign * value >= sign * must else "miss"


def target_lines(found: Iterable[Target]) -> list[str]:
    """The table of targets, line by line."""
    lines = ["### Targets", "", "| | must | aim | measured | |", "|---|---|---|---|---|"]
    return lines + [
        f"| {t.what} | {t.must} | {t.aim} | {t.measured} | {_OUTCOMES[t.outcome]} |" for t in found
    ]


def targets(figures: Mapping[str, Any]) -> list[Target]:
    """All lines, from the figures of all stages."""
    return [
        _speedup(figures),
        _latency(figures["ideal"]["1"]),
        *(_throughput(figures["ideal"][batch]) for batch in ("32", "64")),
        _area(figures["gates"]),
        _start(figures["start"]),
        _parity(figures["parity"]),
        _agreement(figures["agreement"]),
        _compile("without training images", figures["compile without training images"], 120.0, 60.0),
        _compile("with 30,000 training images", figures["compile with training images"], 720.0, 300.0),
    ]


def _speedup(figures: Mapping[str, Any]) -> Target:
    final, resplits = figures["final"]["onnxruntime"], figures["resplits"]
    drop = resplits["learned"]["drop_mean"] if resplits else float("nan")
    speedup = final["speedup"]["value"]
    outcome = verdict(speedup, 1.35, 1.7, at_least=True) if drop <= 0.01 else "miss"
    measured = (
        f"{speedup:.2f}x ({final['speedup']['lower']:.2f} to {final['speedup']['upper']:.2f}), "
        f"mean drop over re-splits {100 * drop:.2f} points"
    )
    what = (
        "speed-up over the whole ResNet-56, batch 1, fp32, ONNX Runtime, at a net drop of at most 1.0 point"
    )
    return Target(what, "1.35x", "1.7x", measured, outcome)


def _latency(ideal: Mapping[str, Any]) -> Target:
    ratio = ideal["latency_ratio"]
    outcome = verdict(ratio["value"], 1.10, 1.03, at_least=False)
    return Target("mean latency / ideal, batch 1", "<= 1.10", "<= 1.03", interval(ratio, 3), outcome)


def _throughput(ideal: Mapping[str, Any]) -> Target:
    ratio = ideal["throughput_ratio"]
    outcome = verdict(ratio["value"], 0.90, 0.95, at_least=True)
    what = f"throughput / ideal, batch {ideal['batch']}"
    return Target(what, ">= 0.90", ">= 0.95", interval(ratio, 3), outcome)


def _area(gates: Mapping[str, Any]) -> Target:
    best = gates.get("best_threshold")
    what = "area under the frontier, best threshold baseline minus learned gates"
    if best is None:
        return Target(what, *AREA_BARS, "no exits", "miss")
    return area_target(what, gates["area_differences_us"][best], best.replace("_", " "))


def area_target(what: str, difference: Mapping[str, float], baseline: str) -> Target:
    """A line about areas under frontiers.

    Args:
        what: The figure: the baseline's area minus ours.
        difference: Ours minus the baseline's, in microseconds.
        baseline: Its name.
    """
    value, lower, upper = (0.0 - difference[key] for key in ("value", "upper", "lower"))
    outcome = "aim" if lower > 0 else ("must" if upper >= 0 else "miss")
    text = f"{value:.1f} us ({lower:.1f} to {upper:.1f}) against {baseline}"
    return Target(what, *AREA_BARS, text, outcome)


def _start(start: Mapping[str, Any]) -> Target:
    outcome = verdict(start["seconds"], float("inf"), 1.0, at_least=False)
    return Target("load + first answer without torch", "works", "< 1 s", f"{start['seconds']:.2f} s", outcome)


def _parity(parity: Mapping[str, Any]) -> Target:
    outcome = verdict(parity["max_abs"], 1e-4, None, at_least=False)
    what = "forced to each exit, against torch, max abs"
    return Target(what, "<= 1e-4", "", f"{parity['max_abs']:.1e}", outcome)


def _agreement(agreement: Mapping[str, Any]) -> Target:
    outcome = verdict(agreement["same_exit"], 0.999, 1.0, at_least=True)
    text = f"{100 * agreement['same_exit']:.2f} % of {agreement['rows']}"
    return Target("exit index at batch 64 as at batch 1", ">= 99.9 %", "all", text, outcome)


def _compile(which: str, figures: Mapping[str, Any], must: float, aim: float) -> Target:
    outcome = verdict(figures["seconds"], must, aim, at_least=False)
    bars = (f"<= {must / 60:.0f} min", f"<= {aim:.0f} s" if aim <= 60 else f"<= {aim / 60:.0f} min")
    return Target(f"compile, 5,000 calibration rows, {which}", *bars, f"{figures['seconds']:.0f} s", outcome)
