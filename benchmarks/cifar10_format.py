"""How figures are written in docs/benchmarks.md, for all benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

__all__ = [
    "ENGINES",
    "contender_lines",
    "contender_notes",
    "final_lines",
    "interval",
    "points",
    "ratio",
    "resplit_lines",
    "step_lines",
    "surroundings_text",
    "update_page",
    "with_section",
]

logger = logging.getLogger("cifar10")

ENGINES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
DOMINATED: Final = '"Dominated": a network without exits is both faster in the mean and at least as accurate.'


def with_section(text: str, name: str, body: str) -> str:
    """A page with what stands between two markers replaced, or put at its end.

    Args:
        text: The page.
        name: Of the markers ``<!-- name -->`` and ``<!-- /name -->``.
        body: What shall stand between them.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{start}\n{body.strip()}\n{end}"
    if start in text and end in text:
        before, rest = text.split(start, 1)
        return before + block + rest.split(end, 1)[1]
    return f"{text.rstrip()}\n\n{block}\n".lstrip()


def update_page(page: Path, name: str, body: str) -> None:
    """Write a section into a page, which is made where there is none."""
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    page.write_text(with_section(text, name, body))
    logger.info("wrote %s", page)


def surroundings_text(figures: Mapping[str, Any], rows_text: str) -> str:
    """When, on what machine and on which rows everything was measured.

    Args:
        figures: Of all stages.
        rows_text: What was learned on which rows, as sentences.
    """
    env = figures["environment"]
    versions = ", ".join(
        f"{name} {env[name]}" for name in ("torch", "onnxruntime", "openvino", "numpy") if name in env
    )
    return (
        f"Measured on {env['date']} on {env['processor']} ({env['cpus']} CPUs), {env['system']}, "
        f"Python {env['python']}, {versions}. Engines use 1 thread and batch 1 unless said otherwise. "
        f"{rows_text} Every figure below is from the {figures['effort']['final_rows']:,} test images from "
        "row 5000 on, except the random re-splits. Intervals are 95 %, paired bootstrap."
    )


def contender_lines(figures: Mapping[str, Any], backend: str) -> list[str]:
    """The table of contenders of one backend.

    Args:
        figures: Of all stages.
        backend: Its rows are ``figures["table"][backend]``.
    """
    rows = figures["table"][backend]
    lines = [
        f"### {ENGINES[backend]}",
        "",
        f"All on the same {figures['effort']['timed_rows']:,} images, taking turns in one run; accuracy on "
        "all final rows; ratios against the plain ResNet-56 of this table.",
        "",
        "| | engine | top-1 % | drop, points | mean ms | median ms | speed-up (mean) | (median) | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        marks = ["**the point asked for**"] if row["chosen"] else []
        marks += [f"dominated by {', '.join(row['dominated_by'])}"] if row["dominated_by"] else []
        lines.append(
            f"| {row['name']} | {row['engine']} | {100 * row['accuracy']:.2f} | {points(row['drop'], '')} "
            f"| {row['mean_ms']:.3f} | {row['median_ms']:.3f} | {ratio(row['speedup'])} "
            f"| {row['median_speedup']:.2f}x | {'; '.join(marks)} |"
        )
    return lines


def contender_notes(figures: Mapping[str, Any], backend: str) -> list[str]:
    """What stands below a table of contenders."""
    lines = ["", DOMINATED]
    if backend != "openvino" and any(row["kind"] == "bf16" for row in figures["table"][backend]):
        lines = ["", "bf16 is OpenVINO's: ONNX Runtime has none on a CPU.", *lines]
    return lines


def final_lines(finals: Mapping[str, Mapping[str, Any]], against: str) -> list[str]:
    """A table of final figures, a row a name.

    Args:
        finals: Name -> of ``final_figure``.
        against: What the programs took turns with.
    """
    lines = [
        f"| | operating point | speed-up | top-1 % | drop, points | mean ms | {against} | rows leave |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, final in finals.items():
        rates = final["exit_rates"].items()
        left = ", ".join(f"{100 * rate:.0f} % at {exit_name}" for exit_name, rate in rates)
        lines.append(
            f"| {name} | {final['point']} | **{ratio(final['speedup'])}** "
            f"| {100 * final['accuracy']:.2f} | {points(final['drop'], '')} "
            f"| {final['program_ms']['mean']:.3f} | {final['plain_ms']['mean']:.3f} | {left} |"
        )
    return lines


def resplit_lines(resplits: Mapping[str, Any], spread: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What random re-splits came to, a row a name.

    Args:
        resplits: How many, and of how many rows.
        spread: Name -> means, standard deviations and ranges.
    """
    lines = [
        f"### {resplits['resplits']} random re-splits of the test rows",
        "",
        f"Gates learned on {resplits['rows']:,} random rows, judged on the others; heads saw none of them; "
        "times are measured block times, and gates are learned once, without the rounds of building and "
        "relearning.",
        "",
        "| | drop, points: mean ± sd (range) | speed-up: mean ± sd (range) |",
        "|---|---|---|",
    ]
    for name, found in spread.items():
        drops, speedups = found["drop_range"], found["speedup_range"]
        lines.append(
            f"| {name} | {100 * found['drop_mean']:.2f} ± {100 * found['drop_sd']:.2f} "
            f"({100 * drops[0]:.2f} to {100 * drops[1]:.2f}) | {found['speedup_mean']:.2f} "
            f"± {found['speedup_sd']:.2f} ({speedups[0]:.2f} to {speedups[1]:.2f}) |"
        )
    return lines


def step_lines(stages: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A table of seconds by step of compilation.

    Args:
        stages: Title of a column -> figures of a compilation.
    """
    names: Sequence[str] = tuple(
        dict.fromkeys(name for stage in stages.values() for name in stage["steps_seconds"])
    )
    lines = [f"| seconds | {' | '.join(stages)} |", "|---" * (len(stages) + 1) + "|"]
    for name in names:
        cells = [stage["steps_seconds"].get(name) for stage in stages.values()]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1f}" for c in cells) + " |")
    return [
        *lines,
        "| in all | " + " | ".join(f"{stage['seconds']:.1f}" for stage in stages.values()) + " |",
    ]


def ratio(figure: Mapping[str, float]) -> str:
    """A speed-up with its interval."""
    return f"{figure['value']:.2f}x ({figure['lower']:.2f} to {figure['upper']:.2f})"


def points(figure: Mapping[str, float], unit: str = " points") -> str:
    """A share in percentage points, with its interval."""
    value, lower, upper = (f"{100 * figure[key]:.2f}" for key in ("value", "lower", "upper"))
    return f"{value}{unit} ({lower} to {upper})"


def interval(figure: Mapping[str, float], digits: int) -> str:
    """A figure with its interval."""
    value, lower, upper = (f"{figure[key]:.{digits}f}" for key in ("value", "lower", "upper"))
    return f"{value} ({lower} to {upper})"
