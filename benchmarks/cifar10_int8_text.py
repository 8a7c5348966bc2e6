"""Writes the figures of int8 as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

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
from cifar10_targets import Target, target_lines, verdict

__all__ = ["INT8_TOOL", "int8_section", "int8_targets"]

INT8_TOOL: Final = "ResNet-56 int8, by ONNX Runtime's tool alone"
CASCADE: Final = "cascade, int8"
OPENVINO: Final = "cascade on OpenVINO, int8"
TUNED: Final = "ResNet-56 tuned, int8"
AUTO: Final = "ResNet-56 tuned, auto"
BOTH: Final = "ResNet-56 in two precisions"
FOUR: Final = "cascade of four, int8"
FROZEN: Final = "ResNet-56 frozen, int8"
PROGRAMS: Final = (CASCADE, TUNED, OPENVINO, BOTH, FOUR, FROZEN)
IN_BOTH: Final = ("ResNet-56 frozen", "ResNet-56 tuned", "cascade", "cascade of four")
"""Programs of the other sections, which are compiled in float32 and in int8."""


def int8_targets(figures: Mapping[str, Any]) -> list[Target]:
    """What has to be reached, next to what was."""
    found = []
    bars = {
        (CASCADE, "against_int8"): (
            "cascade ResNet-20 + ResNet-56 in int8, to plain int8 ResNet-56",
            1.7,
            2.5,
        ),
        (CASCADE, "against_fp32"): ("the same, to plain fp32 ResNet-56", 4.0, 6.0),
        (OPENVINO, "against_int8"): ("the cascade on OpenVINO, to plain int8 ResNet-56 there", 1.7, 2.5),
        (TUNED, "against_int8"): ("tuned ResNet-56 with exits in int8, to plain int8 ResNet-56", 1.6, 2.5),
    }
    for (name, against), (what, must, aim) in bars.items():
        if name not in figures:
            found.append(Target(what, f"{must}x", f"{aim}x", "not measured", "miss"))
            continue
        final = figures[name][against]
        drop = figures[name]["against_fp32"]["drop"]
        outcome = verdict(final["speedup"]["value"], must, aim, at_least=True)
        measured = f"{ratio(final['speedup'])} at {points(drop)} below fp32"
        if "resplits" in figures[name]:
            spread = figures[name]["resplits"]["limits"]["asked"]
            measured += f"; {100 * spread['drop_mean']:.2f} points in the mean over re-splits"
        found.append(Target(what, f"{must}x", f"{aim}x", measured, outcome))
    for name in PROGRAMS:
        if "ideal" in figures.get(name, {}) and name != BOTH:
            figure = figures[name]["ideal"]["latency_ratio"]
            outcome = verdict(figure["value"], 1.12, 1.05, at_least=False)
            found.append(
                Target(f"mean latency / ideal, {name}", "<= 1.12", "<= 1.05", interval(figure, 3), outcome)
            )
    if "decisions" in figures.get(TUNED, {}):
        found.append(
            Target(
                "exit decisions int8 against fp32 at the same thresholds", "reported", "",
                f"{100 * figures[TUNED]['decisions']['same_exit']:.2f} % of rows leave at the same exit",
                "reported",
            )
        )  # fmt: skip
    return found


def int8_section(figures: Mapping[str, Any]) -> str:
    """The whole section."""
    programs = {name: figures[name] for name in PROGRAMS if name in figures}
    exact = [f"{name}, fp32" for name in IN_BOTH]
    compiled = {name: figures[name] for name in (*programs, AUTO, *exact) if name in figures}
    parts = [
        "## int8 on CIFAR-10: a cascade, and a tuned network with exits",
        _environment(figures),
        "\n".join(target_lines(int8_targets(figures))),
        "### Against plain int8, and against fp32",
        "Program and plain network taking turns, on the same backend. Drops in the first table are against "
        "ResNet-56 in int8, in the second against ResNet-56 in float32, which limits count from.",
        "\n".join(final_lines({n: f["against_int8"] for n, f in programs.items()}, "int8 ResNet-56 ms")),
        "\n".join(final_lines({n: f["against_fp32"] for n, f in programs.items()}, "fp32 ResNet-56 ms")),
        _in_both(figures),
        _points(figures["points"]),
        "In the tables of all, points of one program share engines, which so stay in the caches, and look a "
        "little faster than in the pairs above.",
        *(
            "\n".join(contender_lines(figures, backend) + contender_notes(figures, backend))
            for backend in ("onnxruntime", "openvino")
        ),
        _quantization(figures),
        _decisions(figures),
        _auto(figures),
        _resplits(programs),
        "### Compiling\n\n" + "\n".join(step_lines(compiled)),
    ]
    return "\n\n".join(part for part in parts if part)


def _environment(figures: Mapping[str, Any]) -> str:
    effort = figures["effort"]
    rows = (
        f"Networks are quantised, and gates learned, on {effort['calibration_rows']:,} test images (rows "
        "from 0 on; ranges are those of 512 of them)"
        + (f", the tuned network trained on {effort['train_images']:,}." if TUNED in figures else ".")
    )
    return surroundings_text(figures, rows)


def _in_both(figures: Mapping[str, Any]) -> str:
    """The int8 column of the other sections, on one machine."""
    rows = []
    for name in IN_BOTH:
        exact, int8 = (figures.get(f"{name}, {precision}") for precision in ("fp32", "int8"))
        if exact is None or int8 is None:
            continue
        there, here = exact["against_fp32"], int8["against_fp32"]
        rows.append(
            f"| {name} | {ratio(there['speedup'])} | {points(there['drop'], '')} "
            f"| {ratio(int8['against_int8']['speedup'])} | {ratio(here['speedup'])} "
            f"| {points(here['drop'], '')} |"
        )
    if not rows:
        return ""
    lines = [
        "### The programs of the sections above, in fp32 and in int8",
        "",
        "All compiled here, for one point of drop, each in turns with the ResNet-56 it is compared with; "
        "drops are against fp32.",
        "",
        "| | **in fp32:** to fp32 ResNet-56 | drop, points | **in int8:** to int8 ResNet-56 "
        "| to fp32 ResNet-56 | drop, points |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join(lines + rows)


def _points(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [
        "### Every shipped point",
        "",
        "Two at a time, as above; drops are against fp32.",
        "",
        "| | top-1 % | drop, points | to int8 ResNet-56 | to fp32 ResNet-56 |",
        "|---|---|---|---|---|",
    ]
    for name, shipped in found.items():
        for point, pair in shipped.items():
            exact = pair["against_fp32"]
            lines.append(
                f"| {name}, {point} | {100 * exact['accuracy']:.2f} | {points(exact['drop'], '')} "
                f"| {ratio(pair['against_int8']['speedup'])} | {ratio(exact['speedup'])} |"
            )
    return "\n".join(lines)


def _quantization(figures: Mapping[str, Any]) -> str:
    lines = [
        "### What quantisation itself costs",
        "",
        "Without exits, on the rows that gates are learned on, against float32; and which layers had to stay "
        "in float32 besides the last.",
        "",
        "| | drop, points | left in float32 |",
        "|---|---|---|",
    ]
    entries = {
        "ResNet-56": figures[CASCADE]["quantization"],
        **(figures[CASCADE]["quantized_networks"] or {}),
    }
    for name, entry in entries.items():
        kept = ", ".join(entry["kept_float"]) or "none"
        lines.append(f"| {name} | {points(entry['accuracy_drop'], '')} | {kept} |")
    return "\n".join(lines)


def _decisions(figures: Mapping[str, Any]) -> str:
    found = figures.get(TUNED, {}).get("decisions")
    if found is None:
        return ""
    lines = [
        "### The same thresholds on scores of int8 and of fp32",
        "",
        f"Tuned ResNet-56, its gates as they were learned on int8 scores, on {found['rows']:,} final rows: "
        f"{100 * found['same_exit']:.2f} % leave at the same exit, {100 * found['leave_earlier']:.2f} % "
        f"earlier in int8, {100 * found['leave_later']:.2f} % later. Accuracy on all of them:",
        "",
        "| head | fp32 % | int8 % |",
        "|---|---|---|",
    ]
    for name, (exact, int8) in {**found["heads"], "the end": found["end"]}.items():
        lines.append(f"| {name} | {100 * exact:.2f} | {100 * int8:.2f} |")
    return "\n".join(lines)


def _auto(figures: Mapping[str, Any]) -> str:
    if AUTO not in figures:
        return ""
    lines = [
        '### `precision="auto"`',
        "",
        "What it compared for the tuned ResNet-56, in turns, with estimates of the drop on the rows that "
        "gates are learned on:",
        "",
        "| | drop, points | mean ms | chosen |",
        "|---|---|---|---|",
    ]
    for row in figures[AUTO]["precisions"] or []:
        if "refused" in row:
            lines.append(f"| {row['name']} | {row['refused']} | | |")
            continue
        chosen = "yes" if row["chosen"] else ("" if row["kept"] else "over the limit")
        lines.append(
            f"| {row['name']} | {100 * row['accuracy_drop']:.2f} | {row['mean_latency_ms']:.3f} | {chosen} |"
        )
    final = figures[AUTO]["against_fp32"]
    lines += [
        "",
        f"On the final rows: {ratio(final['speedup'])} to fp32 at a drop of {points(final['drop'])}.",
    ]
    return "\n".join(lines)


def _resplits(programs: Mapping[str, Mapping[str, Any]]) -> str:
    judged = {name: found["resplits"] for name, found in programs.items() if "resplits" in found}
    if not judged:
        return ""
    spread = {
        f"{name}, {limit}": found["limits"][key]
        for name, found in judged.items()
        for key, limit in (("asked", "limit asked for"), ("not_lower", "no drop"))
    }
    text = "\n".join(resplit_lines(next(iter(judged.values())), spread))
    return f"{text}\n\nDrops are against fp32; speed-ups are against the plain network in int8."
