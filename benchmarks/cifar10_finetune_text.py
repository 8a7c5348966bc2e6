"""Writes the figures of fine-tuned exits as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cifar10_finetune_latency import GIVEN, GIVEN_AND_TUNED
from cifar10_finetune_targets import ahead_text, finetune_targets
from cifar10_format import (
    contender_lines,
    contender_notes,
    final_lines,
    interval,
    points,
    ratio,
    resplit_lines,
    step_lines,
    surroundings_text,
)
from cifar10_targets import target_lines

__all__ = ["finetune_section"]

BACKEND = "onnxruntime"


def finetune_section(figures: Mapping[str, Any], picture: str) -> str:
    """The whole section.

    Args:
        figures: Of all stages.
        picture: Where the picture lies, relative to the page.
    """
    parts = [
        "## ResNet-20 and ResNet-56 on CIFAR-10, fine-tuned with exits",
        _environment(figures),
        "\n".join(target_lines(finetune_targets(figures))),
        _training(figures),
        _final(figures),
        f"![Accuracy over mean latency]({picture})",
        "Every point was timed, all in turns. Lines join the points of a program, and the networks as they "
        "were given, that are a trade; what lies on a line between two networks can be had by sending a "
        "share of the rows to either.",
        "\n".join(contender_lines(figures, BACKEND) + contender_notes(figures, BACKEND)),
        _beside(figures),
        _frontiers(figures["frontiers"]),
        _resplits(figures),
        _compile_times(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _programs(figures: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Compiled programs by name, in the order that they were compiled in."""
    return {name: figures[name] for name in figures["final"]}


def _environment(figures: Mapping[str, Any]) -> str:
    effort = figures["effort"]
    rows = (
        f"Networks are tuned with their exits on {effort['train_images']:,} augmented training images, gates "
        f"learned on {effort['calibration_rows']:,} test images (rows from 0 on)."
    )
    return (
        f"{surroundings_text(figures, rows)} Accuracy drops are against the networks as they were given, not "
        'against the tuned ones. "No exits" is the last exit alone of a tuned network, in one engine of its '
        'own: a rival without exits, as the smaller networks are. "Limit 0": compiled for a drop of 0 '
        f"instead of {100 * effort['max_drop']:.1f} points, from the same training. "
        '"Frozen" is the program of the first section of this page, compiled anew.'
    )


def _training(figures: Mapping[str, Any]) -> str:
    lines = [
        "### Training",
        "",
        "Wall clock and CPU time from the first training batch that is drawn, to choose exits by, to "
        "the last, summed over calls where training was stopped and went on. Exits: those that were trained; "
        "gates keep some of them. Moved: accuracy of the tuned network's own end minus the original's, on "
        "the rows that gates are learned on.",
        "",
        "| | epochs | exits | minutes | CPU minutes | threads | calls | moved, points |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for depth in (20, 56):
        name = f"ResNet-{depth} tuned"
        found = figures[name]
        training, tuned = found["training"][str(depth)], found["finetune"]
        calls = training["calls"]
        threads = ", ".join(sorted({str(call["threads"]) for call in calls}))
        lines.append(
            f"| ResNet-{depth} | {tuned.get('epochs', '')} | {', '.join(found['places'][str(depth)])} "
            f"| {training['wall_s'] / 60:.1f} | {training['cpu_s'] / 60:.1f} | {threads} | {len(calls)} "
            f"| {points(tuned['moved'], '') if 'moved' in tuned else ''} |"
        )
    for depth in (20, 56):
        lines += _tuning(f"ResNet-{depth}", figures[f"ResNet-{depth} tuned"]["finetune"])
    return "\n".join(lines)


def _tuning(name: str, tuned: Mapping[str, Any]) -> list[str]:
    """How exits were chosen, the options, and the last losses.

    Args:
        name: Of the network.
        tuned: The entry of the program's report; empty where nothing was tuned.
    """
    if not tuned:
        return []
    texts = []
    if tuned["search"] and tuned["search"]["tried"]:
        search = tuned["search"]
        best = search["tried"][0]
        texts.append(
            f"of {search['sets']} sets of exits {', '.join(best['exits'])} was expected to be the fastest, "
            f"{best['speedup']:.2f}x before tuning; {search['seconds'] / 60:.1f} of the minutes are for that"
        )
    texts.append("options of `FineTune`: " + ", ".join(f"{k} {v}" for k, v in tuned["options"].items()))
    last = ", ".join(f"{loss:.3f}" for loss in tuned["history"][-1])
    texts.append(f"losses in the last pass, head by head, the network's end last: {last}")
    return [line for text in texts for line in ("", f"{name}, {text}.")]


def _final(figures: Mapping[str, Any]) -> str:
    lines = [
        "### The final figures",
        "",
        "The point that was asked for and the network that it is compared with, as it was given, taking "
        f"turns on {figures['effort']['headline_rows']:,} final rows; each line is a measurement of its own.",
        "",
    ]
    finals = {f"{name}, against {final['reference']}": final for name, final in figures["final"].items()}
    lines += final_lines(finals, "the other one")
    for name, found in _programs(figures).items():
        lines += ["", f"The compiler refused {name}: {found['refused']}."] if found["refused"] else []
    return "\n".join(lines)


def _beside(figures: Mapping[str, Any]) -> str:
    """What is measured against ResNet-20 as well."""
    rows = [row for row in figures["table"][BACKEND] if row.get("beside")]
    if not rows:
        return ""
    name = rows[0]["beside"]["name"]
    lines = [
        f"The same measurement, against {name} as it was given:",
        "",
        "| | top-1 % | drop, points | speed-up |",
    ]
    lines.append("|---|---|---|---|")
    lines += [
        f"| {row['name']} | {100 * row['accuracy']:.2f} | {points(row['beside']['drop'], '')} "
        f"| {ratio(row['beside']['speedup'])} |"
        for row in rows
    ]
    return "\n".join(lines)


def _frontiers(found: Mapping[str, Any]) -> str:
    series = found["series"]
    if not series:
        return ""
    first = next(iter(series.values()))
    accuracies = first["accuracies"]
    lines = [
        "### Frontiers",
        "",
        f"The least mean time, us, at an accuracy of at least so much on the final rows, from "
        f"{100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f} %. Everything answers every final row "
        "once, all taking turns. A share of the rows may go to either of two points of a family, at random; "
        "ResNet-56 as it was given belongs to every family. In brackets: how much faster than the networks "
        "as they were given, us, with its interval; each is of one accuracy and one family.",
        "",
        f"| top-1 % | {GIVEN} | {GIVEN_AND_TUNED} | {' | '.join(series)} |",
        "|---" * (3 + len(series)) + "|",
    ]
    networks = first["families"]
    for place, accuracy in enumerate(accuracies):
        cells = [f"{networks[name]['least_us'][place]:.0f}" for name in (GIVEN, GIVEN_AND_TUNED)]
        for ours in series.values():
            gains = ours["families"][GIVEN]["gains_us"]
            lead = {
                "value": -gains["value"][place],
                "lower": -gains["upper"][place],
                "upper": -gains["lower"][place],
            }
            cells.append(f"{ours['ours_us'][place]:.0f} [{interval(lead, 0)}]")
        lines.append(f"| {100 * accuracy:.1f} | {' | '.join(cells)} |")
    lines += [
        "",
        *(
            f"- {name}: {ahead_text(ours, other)} the {other}."
            for name, ours in series.items()
            for other in networks
        ),
    ]
    return "\n".join(lines)


def _resplits(figures: Mapping[str, Any]) -> str:
    found = {name: made["resplits"] for name, made in _programs(figures).items() if made["resplits"]}
    if not found:
        return ""
    first = next(iter(found.values()))
    titles = {"asked": f"limit {100 * first['limit']:.1f} points", "not_lower": "limit 0"}
    rows = {f"{name}, {titles[key]}": f["limits"][key] for name, f in found.items() for key in titles}
    ways = [
        f"{name}: {f['resplits']} re-splits, {f['steps']} trade-offs, {_recipes(f['recipes'])}"
        for name, f in found.items()
    ]
    said = (
        "Tuned networks saw no test row either. Where a drop of 0 cannot be kept the network stays as given."
    )
    return "\n".join([*resplit_lines(first, rows), "", f"{said} {'; '.join(ways)}."])


def _recipes(recipes: list[str]) -> str:
    return recipes[0] if len(recipes) == 1 else f"{len(recipes)} recipes to choose from"


def _compile_times(figures: Mapping[str, Any]) -> str:
    return "\n".join(["### Where compile time goes", "", *step_lines(_programs(figures))])
