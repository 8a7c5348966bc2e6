"""Writes the figures as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifar10_format import (
    ENGINES,
    contender_lines,
    contender_notes,
    interval,
    points,
    ratio,
    resplit_lines,
    step_lines,
    surroundings_text,
)
from cifar10_frontiers import LIMITS
from cifar10_targets import target_lines, targets

__all__ = ["section"]


def section(figures: Mapping[str, Any], picture: str) -> str:
    """The whole section.

    Args:
        figures: Of all stages.
        picture: Where the frontier's picture lies, relative to the page.
    """
    parts = [
        "## ResNet-56 on CIFAR-10",
        _environment(figures),
        "\n".join(target_lines(targets(figures))),
        _final(figures),
        f"![Accuracy over mean latency]({picture})",
        "",
        "The shipped points and the static networks were timed; the thresholds and the oracle are modelled "
        "from block times, scaled to the whole network's: whether learned gates are ahead of thresholds is "
        "told by the table of gates below, where both are modelled, and not by this picture.",
        _table(figures, "onnxruntime"),
        _table(figures, "openvino"),
        _gates(figures["gates"]),
        _resplits(figures["resplits"]),
        _ideal(figures["ideal"]),
        _compile_times(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _environment(figures: Mapping[str, Any]) -> str:
    effort = figures["effort"]
    return surroundings_text(
        figures,
        f"Heads are fitted on {effort['train_images']:,} augmented training images, gates learned on "
        f"{effort['calibration_rows']:,} test images (rows from 0 on).",
    )


def _final(figures: Mapping[str, Any]) -> str:
    lines = ["### The final figure"]
    refused = figures["compile with training images"]["refused"]
    if refused:
        lines.append(f"The compiler refused: {refused}. What follows is the plain network.")
    for backend, final in figures["final"].items():
        rates = ", ".join(f"{100 * rate:.0f} % at {name}" for name, rate in final["exit_rates"].items())
        lines.append(
            f"{ENGINES[backend]}: **{ratio(final['speedup'])}** on {final['timed_rows']:,} final rows, "
            f"program and plain network taking turns (mean {final['program_ms']['mean']:.3f} against "
            f"{final['plain_ms']['mean']:.3f} ms, median {final['program_ms']['median']:.3f} against "
            f"{final['plain_ms']['median']:.3f} ms), at {100 * final['accuracy']:.2f} % against "
            f"{100 * final['backbone_accuracy']:.2f} %: a drop of {points(final['drop'])}. "
            f"Rows leave: {rates}."
        )
    return "\n\n".join(lines)


def _table(figures: Mapping[str, Any], backend: str) -> str:
    lines = contender_lines(figures, backend)
    if backend == "onnxruntime":
        lines += _earlyon(figures["earlyon"])
    return "\n".join(lines + contender_notes(figures, backend))


def _earlyon(figures: Mapping[str, Any]) -> list[str]:
    name = "| ResNet-56 with earlyon 0.3.0 | eager torch fp32"
    if not figures["measured"]:
        return [f"{name} | | | | | | | not measured: {figures['reason']} |"]
    enabled = sum(figures["enabled"])
    note = (
        f"ratio and drop against eager torch in its own process; {enabled} of {len(figures['exits'])} exits "
        "enabled by its calibration"
    )
    return [
        f"{name} | {100 * figures['accuracy']:.2f} | {100 * figures['drop']:.2f} | {figures['mean_ms']:.3f} "
        f"| {figures['median_ms']:.3f} | {ratio(figures['speedup'])} | {figures['median_speedup']:.2f}x "
        f"| {note} |"
    ]


def _gates(gates: Mapping[str, Any]) -> str:
    if not gates:
        return ""
    shown = [index for index, limit in enumerate(LIMITS) if limit in (0.005, 0.01, 0.02)]
    lines = [
        "### Gates against baselines, on the same scores and measured block times",
        "",
        f"Every family picks, on {gates['learning_rows']:,} learning rows, its fastest point for each of "
        f"{len(LIMITS)} limits (drops of {100 * LIMITS[0]:.2f} to {100 * LIMITS[-1]:.0f} points) and is "
        f"judged on the {gates['judged_rows']:,} final rows. Thresholds, patience and chance may use any "
        "subset of the exits. Area: mean least time over allowed drops of 0 to 3 points, less is better; the "
        "best threshold baseline is the one with the least area on the final rows themselves. "
        f"Learned as: {gates['recipe']}.",
        "",
        "| | "
        + " | ".join(f"limit {100 * LIMITS[i]:.1f}: drop, speed-up" for i in shown)
        + " | area, us | learned minus this, us |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for name, family in gates["families"].items():
        cells = [f"{100 * family['drop'][i]:.2f}, {family['speedup'][i]:.2f}x" for i in shown]
        difference = gates["area_differences_us"].get(name)
        last = "" if difference is None else interval(difference, 1)
        best = " (best threshold baseline)" if name == gates["best_threshold"] else ""
        title = f"{name.replace('_', ' ')}{best}"
        lines.append(f"| {title} | {' | '.join(cells)} | {family['area_us']:.1f} | {last} |")
    oracle = gates["oracle"]
    reached = f"drop {100 * oracle['drop']:.2f}, {oracle['speedup']:.2f}x"
    lines.append(f"| soft oracle (the bound) | {' | '.join([reached] + [''] * (len(shown) - 1))} | | |")
    return "\n".join(lines)


def _resplits(resplits: Mapping[str, Any]) -> str:
    if not resplits:
        return ""
    limit = f"limit {100 * resplits['limit']:.1f} points"
    names = ("learned", "max_probability")
    rows = {f"{name.replace('_', ' ')}, {limit}": resplits[name] for name in names}
    return "\n".join(resplit_lines(resplits, rows))


def _ideal(ideal: Mapping[str, Any]) -> str:
    lines = [
        "### What dispatch costs",
        "",
        "Ideal: sum over exits of exit rate x time of one engine that holds everything up to that exit, "
        "heads included, run on bound buffers; the program is called as a user calls it.",
        "",
        "| batch | program ms per call | ideal ms per call | program / ideal | rows per second |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {f['batch']} | {f['program_ms']:.3f} | {f['ideal_ms']:.3f} | {interval(f['latency_ratio'], 3)} "
        f"| {f['rows_per_second']:,.0f} |"
        for f in ideal.values()
    ]
    return "\n".join(lines)


def _compile_times(figures: Mapping[str, Any]) -> str:
    stages = {
        "heads on calibration rows": figures["compile without training images"],
        "heads on training images": figures["compile with training images"],
    }
    lines = ["### Where compile time goes", "", *step_lines(stages)]
    start = figures["start"]
    lines += [
        "",
        f"Load and first answer in a fresh process without torch: {start['seconds']:.2f} s from the first "
        f"import, {start['process_seconds']:.2f} s with the start of Python (median of {start['starts']}).",
    ]
    return "\n".join(lines)
