"""Writes the cascade's figures as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade_targets import cascade_targets
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

__all__ = ["cascade_section"]

SHOWN = (0.0, 0.006, 0.0105, 0.0195)
"""Limits that the table of families shows."""


def cascade_section(figures: Mapping[str, Any], picture: str) -> str:
    """The whole section.

    Args:
        figures: Of all stages.
        picture: Where the picture lies, relative to the page.
    """
    names = "/".join(str(depth) for depth in figures["effort"]["networks"])
    parts = [
        f"## A cascade of ResNet-{names} on CIFAR-10",
        _environment(figures),
        "\n".join(target_lines(cascade_targets(figures))),
        _final(figures),
        f"![Accuracy over mean latency]({picture})",
        "Shipped points and networks alone were timed; all lines are modelled from measured block times, "
        "scaled to the reference network's, and join the points of a family that none of it beats on the "
        "final rows.",
        *("\n".join(contender_lines(figures, b) + contender_notes(figures, b)) for b in figures["table"]),
        _families(figures["families"]),
        _domination(figures["domination"]),
        _use(figures["use"]),
        _resplits(figures),
        _ideal(figures["ideal"]),
        _compile_times(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _environment(figures: Mapping[str, Any]) -> str:
    effort = figures["effort"]
    rows = (
        f"Policies are learned on {effort['calibration_rows']:,} test images (rows from 0 on; "
        f"{figures['families']['learning_rows']:,} of them to learn, the rest to certify), heads of exits "
        f"inside on {effort['train_images']:,} augmented training images."
    )
    return (
        f"{surroundings_text(figures, rows)} Accuracy drop and speed-up are against ResNet-56 alone. The "
        f"cascade was compiled for a drop of at most {100 * effort['cascade_drop']:.1f} points; the point "
        "that is not lower at all is another one of the same artifact: `select(max_accuracy_drop=0.0)`."
    )


def _final(figures: Mapping[str, Any]) -> str:
    lines = [
        "### The final figures",
        "",
        "Program and ResNet-56 alone taking turns on "
        f"{figures['effort']['headline_rows']:,} final rows, ONNX Runtime; each line is a measurement of its "
        "own.",
        "",
    ]
    finals = {
        f"{name}, {point}": final
        for point, found in figures["final"].items()
        for name, final in found["programs"].items()
    }
    lines += final_lines(finals, "ResNet-56")
    for point, found in figures["final"].items():
        pair = found["pair"]
        lines += [
            "",
            f"With exits inside against without, in turns, {point}: {ratio(pair['speedup'])}, accuracy "
            f"higher by {points(pair['accuracy_gain'])}.",
        ]
    for name in figures["final"][next(iter(figures["final"]))]["programs"]:
        refused = figures[f"compile {name}"]["refused"]
        lines += ["", f"The compiler refused the {name}: {refused}."] if refused else []
    return "\n".join(lines)


def _families(found: Mapping[str, Any]) -> str:
    limits = found["limits"]
    shown = [limits.index(limit) for limit in SHOWN]
    lines = [
        "### Learned policy against baselines and sub-topologies, on the same scores and measured times",
        "",
        f"Every family picks, on {found['learning_rows']:,} learning rows, its fastest point for each of "
        f"{len(limits)} limits (drops of {100 * limits[0]:.2f} to {100 * limits[-1]:.0f} points) and is "
        f"judged on the {found['judged_rows']:,} final rows. Myopic: a threshold on the max probability at "
        "every network of any chain, chosen together. Uniform: chance, in any chain. Sub-topologies are "
        "learned as the whole is, by the recipe that it came out with, at fewer trade-offs. Soft oracle: "
        "goes the shortest way to the first network that is right together with all later ones, by their own "
        "answers; the learned cascade may also answer with several together, and so get past it. Area: mean "
        f"least time over allowed drops of 0 to 3 points, less is better. Learned as: {found['recipe']}.",
        "",
        "| | "
        + " | ".join(f"limit {100 * limits[i]:.2f}: drop, speed-up" for i in shown)
        + " | area, us | learned minus this, us |",
        "|---" * (len(shown) + 3) + "|",
    ]
    for name, family in found["families"].items():
        alone = len(family["drop"]) == 1
        cells = [
            f"{100 * family['drop'][0 if alone else i]:.2f}, {family['speedup'][0 if alone else i]:.2f}x"
            for i in (shown[:1] if alone else shown)
        ]
        cells += [""] * (len(shown) - len(cells))
        difference = "" if name == "learned" else interval(family["learned_minus_this_us"], 1)
        title = f"{name} alone" if alone else name
        lines.append(f"| {title} | {' | '.join(cells)} | {family['area_us']:.1f} | {difference} |")
    return "\n".join(lines)


def _domination(found: Mapping[str, Any]) -> str:
    accuracies = found["accuracies"]
    lines = [
        "### Is anything static or smaller faster at the same accuracy?",
        "",
        f"At {len(accuracies)} accuracies from {100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f} %: "
        "the least time of a family's points that are at least as accurate on the final rows (ResNet-56 "
        "alone where there is none), against the learned cascade's. An interval is of one accuracy and "
        "one family; among so many, some exclude 0 by chance. ResNet-56 int8 stands at the table's ratio.",
        "",
        "| | accuracies where it is faster | with an interval that excludes 0 | ahead most, or least behind: "
        "accuracy, us ahead |",
        "|---|---|---|---|",
    ]
    for name, other in found["families"].items():
        lines.append(
            f"| {name} | {other['faster']} | {other['surely_faster']} "
            f"| {100 * other['at']:.1f} %, {interval(other['gain_us'], 1)} |"
        )
    return "\n".join(lines)


def _use(use: Mapping[str, Any]) -> str:
    lines = [
        "### What the networks are used for",
        "",
        "On the final rows, at the fastest shipped point, the one asked for, and the most accurate.",
        "",
        "| | point | network | rows that run it | rows it answers | share of time |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in use["points"].items():
        for point in found:
            title = f"{point['point']}{' (asked for)' if point['chosen'] else ''}"
            for network in point["networks"]:
                cells = [network[f"share_of_{what}"] for what in ("rows_run", "rows_answered", "time")]
                shares = " | ".join(f"{100 * share:.1f} %" for share in cells)
                lines.append(f"| {name} | {title} | {network['name']} | {shares} |")
    lines += ["", "Which networks are right on the same rows:", "", "| right | share |", "|---|---|"]
    lines += [
        f"| {', '.join(p['right']) or 'none'} | {100 * p['share']:.2f} % |"
        for p in use["overlap"]["patterns"]
    ]
    return "\n".join(lines)


def _resplits(figures: Mapping[str, Any]) -> str:
    found = {name.removeprefix("resplits "): v for name, v in figures.items() if name.startswith("resplits ")}
    first = next(iter(found.values()))
    titles = {"asked": f"at most {100 * first['limit']:.1f} points", "not_lower": "not lower at all"}
    rows = {f"{n}, {titles[key]}": v["limits"][key] for n, v in found.items() for key in titles}
    ways = [
        f"{n}: {v['resplits']} re-splits, {v['recipes'][0]}, {v['steps']} trade-offs"
        for n, v in found.items()
    ]
    return "\n".join([*resplit_lines(first, rows), "", f"{'; '.join(ways)}."])


def _ideal(ideal: Mapping[str, Any]) -> str:
    routes = ", ".join(f"{100 * share:.1f} % {route}" for route, share in ideal["routes"].items())
    members = ", ".join(f"{name} {time_ms:.3f}" for name, time_ms in ideal["member_ms"].items())
    return "\n\n".join(
        [
            "### What dispatch costs",
            "Ideal: sum over routes of route rate x sum of the members' own latencies, each member a whole "
            "network in one engine run on bound buffers, without heads, gates and dispatch; the cascade, "
            "without exits inside, is called as a user calls it. All take turns, batch 1.",
            f"Cascade {ideal['program_ms']:.3f} ms, ideal {ideal['ideal_ms']:.3f} ms: "
            f"{interval(ideal['latency_ratio'], 3)}. Routes: {routes}. Members, ms: {members}. "
            f"{100 * ideal['exit_as_scored']:.2f} % of {ideal['calls']:,} rows leave where the scores say.",
        ]
    )


def _compile_times(figures: Mapping[str, Any]) -> str:
    prefix = "compile "
    stages = {name.removeprefix(prefix): v for name, v in figures.items() if name.startswith(prefix)}
    return "\n".join(["### Where compile time goes", "", *step_lines(stages)])
