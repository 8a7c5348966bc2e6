"""Writes the figures as a section of docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from cifar10_frontiers import LIMITS
from cifar10_targets import targets

__all__ = ["section", "with_section"]

_ENGINES: Final = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
_OUTCOMES: Final = {"aim": "aim reached", "must": "must reached", "miss": "**missed**"}


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


def section(figures: Mapping[str, Any], picture: str) -> str:
    """The whole section.

    Args:
        figures: Of all stages.
        picture: Where the frontier's picture lies, relative to the page.
    """
    parts = [
        "## ResNet-56 on CIFAR-10",
        _environment(figures),
        _targets(figures),
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
    env, effort = figures["environment"], figures["effort"]
    versions = ", ".join(
        f"{name} {env[name]}" for name in ("torch", "onnxruntime", "openvino", "numpy") if name in env
    )
    return (
        f"Measured on {env['date']} on {env['processor']} ({env['cpus']} CPUs), {env['system']}, "
        f"Python {env['python']}, {versions}. Engines use 1 thread and batch 1 unless said otherwise. Heads "
        f"are fitted on {effort['train_images']:,} augmented training images, gates learned on "
        f"{effort['calibration_rows']:,} test images (rows from 0 on), and every figure below is from the "
        f"{effort['final_rows']:,} test images from row 5000 on, except the random re-splits. "
        "Intervals are 95 %, paired bootstrap."
    )


def _targets(figures: Mapping[str, Any]) -> str:
    lines = ["### Targets", "", "| | must | aim | measured | |", "|---|---|---|---|---|"]
    lines += [
        f"| {t.what} | {t.must} | {t.aim} | {t.measured} | {_OUTCOMES[t.outcome]} |" for t in targets(figures)
    ]
    return "\n".join(lines)


def _final(figures: Mapping[str, Any]) -> str:
    lines = ["### The final figure"]
    refused = figures["compile with training images"]["refused"]
    if refused:
        lines.append(f"The compiler refused: {refused}. What follows is the plain network.")
    for backend, final in figures["final"].items():
        rates = ", ".join(f"{100 * rate:.0f} % at {name}" for name, rate in final["exit_rates"].items())
        lines.append(
            f"{_ENGINES[backend]}: **{_ratio(final['speedup'])}** on {final['timed_rows']:,} final rows, "
            f"program and plain network taking turns (mean {final['program_ms']['mean']:.3f} against "
            f"{final['plain_ms']['mean']:.3f} ms, median {final['program_ms']['median']:.3f} against "
            f"{final['plain_ms']['median']:.3f} ms), at {100 * final['accuracy']:.2f} % against "
            f"{100 * final['backbone_accuracy']:.2f} %: a drop of {_points(final['drop'])}. "
            f"Rows leave: {rates}."
        )
    return "\n\n".join(lines)


def _table(figures: Mapping[str, Any], backend: str) -> str:
    rows = figures["table"][backend]
    lines = [
        f"### {_ENGINES[backend]}",
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
            f"| {row['name']} | {row['engine']} | {100 * row['accuracy']:.2f} | {_points(row['drop'], '')} "
            f"| {row['mean_ms']:.3f} | {row['median_ms']:.3f} | {_ratio(row['speedup'])} "
            f"| {row['median_speedup']:.2f}x | {'; '.join(marks)} |"
        )
    if backend == "onnxruntime":
        lines += _earlyon(figures["earlyon"])
    if any(row["kind"] == "bf16" for row in rows) and backend != "openvino":
        lines += ["", "bf16 is OpenVINO's: ONNX Runtime has none on a CPU."]
    lines += ["", '"Dominated": a network without exits is both faster in the mean and at least as accurate.']
    return "\n".join(lines)


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
        f"| {figures['median_ms']:.3f} | {_ratio(figures['speedup'])} | {figures['median_speedup']:.2f}x "
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
        last = "" if difference is None else _interval(difference, 1)
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
    lines = [
        f"### {resplits['resplits']} random re-splits of the test rows",
        "",
        f"Gates learned on {resplits['rows']:,} random rows for a drop of at most "
        f"{100 * resplits['limit']:.1f} point, judged on the others; heads saw none of them; times "
        "are measured block times, and gates are learned once, without the rounds of building and "
        "relearning.",
        "",
        "| | drop, points: mean ± sd (range) | speed-up: mean ± sd (range) |",
        "|---|---|---|",
    ]
    for name in ("learned", "max_probability"):
        f = resplits[name]
        drops, speedups = f["drop_range"], f["speedup_range"]
        lines.append(
            f"| {name.replace('_', ' ')} | {100 * f['drop_mean']:.2f} ± {100 * f['drop_sd']:.2f} "
            f"({100 * drops[0]:.2f} to {100 * drops[1]:.2f}) "
            f"| {f['speedup_mean']:.2f} ± {f['speedup_sd']:.2f} ({speedups[0]:.2f} to {speedups[1]:.2f}) |"
        )
    return "\n".join(lines)


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
        f"| {f['batch']} | {f['program_ms']:.3f} | {f['ideal_ms']:.3f} | {_interval(f['latency_ratio'], 3)} "
        f"| {f['rows_per_second']:,.0f} |"
        for f in ideal.values()
    ]
    return "\n".join(lines)


def _compile_times(figures: Mapping[str, Any]) -> str:
    ways = ("compile without training images", "compile with training images")
    names: Sequence[str] = tuple(
        dict.fromkeys(name for way in ways for name in figures[way]["steps_seconds"])
    )
    lines = [
        "### Where compile time goes",
        "",
        "| seconds | heads on calibration rows | heads on training images |",
        "|---|---|---|",
    ]
    for name in names:
        cells = [figures[way]["steps_seconds"].get(name) for way in ways]
        lines.append(f"| {name} | " + " | ".join("" if c is None else f"{c:.1f}" for c in cells) + " |")
    lines.append("| in all | " + " | ".join(f"{figures[way]['seconds']:.1f}" for way in ways) + " |")
    start = figures["start"]
    lines += [
        "",
        f"Load and first answer in a fresh process without torch: {start['seconds']:.2f} s from the first "
        f"import, {start['process_seconds']:.2f} s with the start of Python (median of {start['starts']}).",
    ]
    return "\n".join(lines)


def _ratio(figure: Mapping[str, float]) -> str:
    return f"{figure['value']:.2f}x ({figure['lower']:.2f} to {figure['upper']:.2f})"


def _points(figure: Mapping[str, float], unit: str = " points") -> str:
    value, lower, upper = (f"{100 * figure[key]:.2f}" for key in ("value", "lower", "upper"))
    return f"{value}{unit} ({lower} to {upper})"


def _interval(figure: Mapping[str, float], digits: int) -> str:
    value, lower, upper = (f"{figure[key]:.{digits}f}" for key in ("value", "lower", "upper"))
    return f"{value} ({lower} to {upper})"
