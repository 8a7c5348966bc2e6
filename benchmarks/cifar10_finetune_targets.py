"""What the fine-tuning benchmark has to reach, next to what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cifar10_finetune_latency import GIVEN, SERIES
from cifar10_format import interval, ratio
from cifar10_targets import Target, verdict

__all__ = ["ahead_text", "finetune_targets", "frontier_target", "speedup_target", "training_target"]

HOURS: Final = 2.0
LIMIT: Final = 0.01


def finetune_targets(figures: Mapping[str, Any]) -> list[Target]:
    """All lines, from the figures of all stages."""
    within = f"drop of at most {100 * LIMIT:.1f} points against"
    small, large = ("ResNet-20 tuned with exits", "ResNet-56 tuned with exits")
    return [
        training_target(figures["ResNet-56 tuned"]["training"]["56"], "ResNet-56 with its exits"),
        training_target(figures["ResNet-20 tuned"]["training"]["20"], "ResNet-20 with its exits"),
        speedup_target(figures, "ResNet-56 tuned", f"{large}, net {within} the original", (1.7, 2.5)),
        speedup_target(figures, "ResNet-56 tuned, limit 0", f"{large}, without any drop", (1.3, 1.8)),
        frontier_target(figures["frontiers"]["series"].get("ResNet-56 tuned")),
        speedup_target(figures, "ResNet-20 tuned", f"{small}, net {within} the original", (1.4, 2.0)),
        speedup_target(
            figures,
            "cascade tuned",
            f"cascade of both, tuned, with exits, {within} ResNet-56",
            (2.6, 4.0),
        ),
    ]


def training_target(training: Mapping[str, Any], what: str) -> Target:
    """Whether training was as short as the targets ask for.

    Args:
        training: Of a ``TrainingClock``.
        what: What was trained.
    """
    hours = training["wall_s"] / 3600
    what, must = f"training of {what}, 2 CPU cores", f"<= {HOURS:.0f} h"
    if not training["calls"]:
        return Target(what, must, "", "not timed: the training was there", "reported")
    threads = "/".join(sorted({str(call["threads"]) for call in training["calls"]}))
    text = f"{hours:.2f} h ({training['cpu_s'] / 3600:.2f} h of CPU time, {threads} threads)"
    return Target(what, must, "", text, verdict(hours, HOURS, None, at_least=False))


def speedup_target(figures: Mapping[str, Any], name: str, what: str, bars: tuple[float, float]) -> Target:
    """The point that was made for a limit; it counts where it keeps it in the mean over re-splits.

    Args:
        figures: Of all stages.
        name: Of the program.
        what: The figure, in words.
        bars: The lower and the higher one.
    """
    final = figures["final"][name]
    lossless = name.endswith(", limit 0")
    limit, key = (0.0, "not_lower") if lossless else (figures[name]["resplits"].get("limit", LIMIT), "asked")
    resplits = figures[name.removesuffix(", limit 0")]["resplits"]
    text = (
        f"{ratio(final['speedup'])} at a drop of {100 * final['drop']['value']:.2f} points on the final rows"
    )
    outcome = "miss"
    if resplits:
        drop = resplits["limits"][key]["drop_mean"]
        text += f", {100 * drop:.2f} in the mean over re-splits"
        if drop <= limit:
            outcome = verdict(final["speedup"]["value"], *bars, at_least=True)
    kept = [
        row
        for row in figures["table"]["onnxruntime"]
        if row["series"] in _together(name) and _drop(row, final["reference"]) <= limit
    ]
    if kept:
        best = max(kept, key=lambda row: float(_speedup(row, final["reference"])["value"]))
        text += (
            f"; of the shipped points that keep it on the final rows the fastest is {best['name']}: "
            f"{ratio(_speedup(best, final['reference']))} at {100 * _drop(best, final['reference']):.2f}"
        )
    must, aim = (f"{bar}x" for bar in bars)
    return Target(f"{what}: speed-up", must, aim, text, outcome)


def _together(name: str) -> tuple[str, ...]:
    """The programs of the same networks."""
    return next(programs for programs in SERIES.values() if name in programs)


def _against(row: Mapping[str, Any], reference: str) -> Mapping[str, Any]:
    """A row's own figures, or, where it is measured against another network, those."""
    beside = row.get("beside")
    return beside if beside is not None and beside["name"] == reference else row


def _drop(row: Mapping[str, Any], reference: str) -> float:
    return float(_against(row, reference)["drop"]["value"])


def _speedup(row: Mapping[str, Any], reference: str) -> Mapping[str, float]:
    found: Mapping[str, float] = _against(row, reference)["speedup"]
    return found


def frontier_target(found: Mapping[str, Any] | None) -> Target:
    """Where the frontier of ResNet-56 with its exits is ahead of that of the networks as they were given."""
    what = "its frontier against the static networks', 91.7 to 93.4 %"
    bars = ("reported, whole range", "above everywhere")
    if found is None:
        return Target(what, *bars, "there is none: the compiler refused", "reported")
    against = found["families"][GIVEN]
    everywhere = not against["faster"] and not against["as_fast"]
    texts = [f"{ahead_text(found, name)} the {name}" for name in found["families"]]
    return Target(what, *bars, "; ".join(texts), "aim" if everywhere else "reported")


def ahead_text(found: Mapping[str, Any], name: str) -> str:
    """At how many accuracies a frontier is ahead of a family of networks, and where least so."""
    against = found["families"][name]
    gains = against["gains_us"]
    count = len(found["accuracies"])
    ahead = count - against["faster"] - against["as_fast"]
    surely = sum(upper < 0.0 for upper in gains["upper"])
    lead = {key: -against["gain_us"][other] for key, other in _TURNED.items()}
    where = f"{100 * against['at']:.1f} %"
    lead_us = f"{interval(lead, 0)} us"
    if ahead == count:
        return f"ahead everywhere ({surely} of {count} beyond chance), least at {where} by {lead_us}, of"
    said = f"ahead at {ahead} of {count} accuracies ({surely} beyond chance)"
    return f"{said}, furthest behind at {where}: {lead_us}, of"


_TURNED: Final = {"value": "value", "lower": "upper", "upper": "lower"}
