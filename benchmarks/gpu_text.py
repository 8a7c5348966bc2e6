"""Writes the figures of the GPU check as a section of docs/verified-on.md."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from gpu_targets import MODELS, interval, one_line

__all__ = ["page_key", "section", "title"]

_Figures = Mapping[str, Any]

_OUTCOMES: Final = {"reached": "reached", "missed": "**missed**", "reported": ""}
_PROGRAM: Final = "program, one launch"
_NAMED: Final = ("numpy", "cuda-bindings", "triton", "tensorrt", "tensorrt_rtx")


def title(found: _Figures) -> str:
    """Device, driver and versions: what makes two runs comparable."""
    env = found["steps"]["environment"]["figures"]
    driver = env["as_found"].get("driver_version", f"of CUDA {env['driver_cuda']}")
    named = [
        f"{name} {env['versions'][name]}" for name in ("tensorrt", "tensorrt_rtx") if name in env["versions"]
    ]
    return ", ".join((env["device"], f"driver {driver}", f"torch {env['versions']['torch']}", *named))


def page_key(found: _Figures) -> str:
    """The name of the section's markers: runs on the same device, driver and versions replace one another."""
    return f"gpu: {re.sub(r'[^0-9A-Za-z.+]+', '-', title(found)).strip('-')}"


def section(found: _Figures) -> str:
    """The whole section."""
    steps = found["steps"]
    parts = [
        _surroundings(found),
        _targets(found["targets"]),
        _rows(steps),
        _others(steps),
        _batches(steps),
        _nodes(steps),
        _parity(steps),
        _calls(steps),
        _memory(steps),
        _failures(steps),
    ]
    return "\n\n".join("\n".join(part) for part in parts if part)


def _surroundings(found: _Figures) -> list[str]:
    env = found["steps"]["environment"]["figures"]
    versions = ", ".join(f"{name} {env['versions'][name]}" for name in _NAMED if name in env["versions"])
    asked = ", ".join(
        f"{name} {value}" for name, value in env["as_found"].items() if name != "driver_version"
    )
    tf32 = ", ".join(f"{name}: {'on' if on else 'off'}" for name, on in env["tf32"].items())
    return [
        f"## {title(found)}",
        "",
        f"Measured on {env['date']}: compute capability {env['compute_capability']}, "
        f"{env['memory_bytes'] / 2**30:.0f} GiB, driver for CUDA {env['driver_cuda']}, torch built for CUDA "
        f"{env['torch_cuda']}, cuDNN {env['cudnn']}, {versions}; Python {env['python']}, {env['system']}, "
        f"{env['cpus']} CPUs. As found, before: {asked}. TF32 as PyTorch has it: {tf32}. Random weights and "
        "images; intervals are 95 %, paired bootstrap. What is compared takes turns, row by row.",
    ]


def _targets(targets: Sequence[Mapping[str, str]]) -> list[str]:
    lines = ["### Targets", "", "| | must | measured | |", "|---|---|---|---|"]
    return lines + [
        f"| {t['what']} | {t['must']} | {t['measured']} | {_OUTCOMES[t['outcome']]} |" for t in targets
    ]


def _rows(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for model, precision, figures in _found(steps, "rows"):
        rates = ", ".join(f"{100 * rate:.0f} % at {exit}" for exit, rate in figures["exit_rates"].items())
        lines += [
            f"### {MODELS[model]}, {precision}: single rows",
            "",
            f"Rows leave: {rates}. Wall clock from the launch to a result that the host knows of, "
            f"{figures['wall']['turns']} turns; device: between two events, queued beforehand. Ideal: each "
            "row the plain replay of just what its answer needs, without scores and heads on the way.",
            "",
            "| | mean us | median us | p99 us | device mean us | over the program (wall) |",
            "|---|---|---|---|---|---|",
            *_contender_lines(figures),
            "",
        ]
        late = figures["wall"]["late_over_whole"]
        if late is not None:
            lines += [f"Rows that go all the way take {interval(late)} of the whole network's time.", ""]
    return lines[:-1]


def _contender_lines(figures: _Figures) -> Iterator[str]:
    wall, device = figures["wall"], figures["device"]
    for name, times in {"ideal": wall["ideal"], **wall["contenders"]}.items():
        on_device = {"ideal": device["ideal"], **device["contenders"]}.get(name)
        against = wall["against"].get(name)
        over = "" if against is None else f"{interval(against, 2)}x"
        over = f"{interval(wall['over_ideal'])} of the ideal" if name == _PROGRAM else over
        mean = "" if on_device is None else f"{on_device['mean_us']:.1f}"
        yield f"| {name} | {_times(times)} | {mean} | {over} |"


def _others(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for kind in ("torch", "cond", "tensorrt"):
        for name, step in steps.items():
            if not name.startswith(f"{kind} "):
                continue
            model = MODELS[name.split()[1]]
            figures = step["figures"]
            if "absent" in figures:
                lines.append(f"| {model} | {kind}: {figures['absent']} | | | | |")
            for part in ("eager", "compiled", "cond", "tensorrt"):
                if part in figures:
                    lines += _turn_lines(model, figures[part])
            if not step["ok"]:
                lines.append(f"| {model} | {kind}: did not come to its end, see below | | | | |")
    head = ["### Single rows against other ways, wall clock", ""]
    head += ["Every comparison is one of its own, in which the program was measured again.", ""]
    head += ["| | | mean us | median us | p99 us | over the program |", "|---|---|---|---|---|---|"]
    return [*head, *lines] if lines else []


def _turn_lines(model: str, figures: _Figures) -> Iterator[str]:
    for name, times in figures["contenders"].items():
        against = figures["against"].get(name)
        over = "" if against is None else f"{interval(against, 2)}x"
        yield f"| {model} | {name} | {_times(times)} | {over} |"


def _batches(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for model, _, figures in _found(steps, "batches"):
        lines += [
            f"### {MODELS[model]}, fp32: batches of {figures['batch']}",
            "",
            "Ideal by shares: sum of exit rate x plain replay, for the whole batch, of just what that exit's "
            "answer needs. By rows: one plain graph that runs every block, heads and scores too, on exactly "
            "the rows that get there.",
            "",
            "| rows by exit | program us | rows per second | by shares: ideal / program | by rows |",
            "|---|---|---|---|---|",
        ]
        for mix in figures["mixes"]:
            rows = " + ".join(map(str, mix["rows_by_exit"]))
            if "missing" in mix:
                lines.append(f"| {rows} | {mix['missing']} | | | |")
                continue
            lines.append(
                f"| {rows} | {mix['program']['mean_us']:.1f} | {mix['rows_per_second']:,.0f} "
                f"| {interval(mix['throughput_by_shares'])} | {interval(mix['throughput_by_rows'])} |"
            )
        lines.append("")
    return lines[:-1]


def _nodes(steps: _Figures) -> list[str]:
    parts = steps.get("nodes", {}).get("figures", {})
    if "flat" not in parts:
        return []
    figures = parts["flat"]
    both = [parts[name] for name in ("flat", "nested") if name in parts]
    counts = [str(count) for count in figures["counts"]]
    lines = [
        "### Conditional nodes",
        "",
        "Device time of chains of our smallest kernel with so many conditional nodes, above as many kernels "
        f"without; a kernel more in a plain chain: {figures['us_per_kernel']:.2f} us, a launch of one: "
        f"{figures['us_of_a_launch']:.2f} us.",
        "",
        f"| | us per node | {' | '.join(f'{count} nodes' for count in counts)} |",
        "|---" * (2 + len(counts)) + "|",
    ]
    for kind, cost in (entry for part in both for entry in part["kinds"].items()):
        above = cost.get("above_us", cost["chain_us"])
        cells = (f"{above[count]:.2f}" if count in above else "" for count in counts)
        lines.append(f"| {kind} | {cost['us_per_node']:.3f} | {' | '.join(cells)} |")
    refused = [f"{name}: {reason}" for part in both for name, reason in part["refused"].items()]
    return lines + (["", f"Could not be built: {'; '.join(refused)}"] if refused else [])


def _parity(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for name, step in steps.items():
        if not name.startswith("parity "):
            continue
        for precision, by_rows in step["figures"].items():
            for rows, entry in by_rows.items():
                relative = "not finite" if entry["relative"] is None else f"{entry['relative']:.1e}"
                lines.append(
                    f"| {MODELS[name.split()[1]]} | {precision} | {rows} | {relative} "
                    f"| {100 * entry['same_exit']:.1f} | {100 * entry['same_class']:.1f} | {entry['rows']} |"
                )
    head = [
        "### Answers and decisions against the oracle (float32, CPU, row by row)",
        "",
        "Gates are those of float32, not learned again. fp32 is without TF32, tf32 as PyTorch has it.",
        "",
        "| | precision | batch | difference / largest logit | same exit, % | same class, % | of rows |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def _calls(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for model, _, figures in _found(steps, "calls", "calls"):
        for rows, entry in figures.items():
            calls = ", ".join(f"{call} {count}" for call, count in entry["calls"].items())
            lines.append(f"| {MODELS[model]} | {rows} | {entry['launches']} | {calls} |")
    head = ["### What a call with tensors on the device asks of the driver", ""]
    head += ["| | rows | calls | of the driver |", "|---|---|---|---|"]
    return [*head, *lines] if lines else []


def _memory(steps: _Figures) -> list[str]:
    lines: list[str] = []
    for model, _, figures in _found(steps, "calls", "memory"):
        for rows, entry in figures.items():
            sizes = (entry[key] / 2**20 for key in ("values_bytes", "torch_bytes", "device_bytes"))
            nodes = ", ".join(f"{sort} {count}" for sort, count in entry["nodes"].items())
            cells = " | ".join(f"{size:.1f}" for size in sizes)
            lines.append(f"| {MODELS[model]} | {rows} | {cells} | {entry['seconds']:.1f} | {nodes} |")
    head = [
        "### Memory of all engines, and the time to build",
        "",
        "| | rows | values, MiB | PyTorch's (weights, work), MiB | of the device in all, MiB | s | nodes |",
        "|---|---|---|---|---|---|---|",
    ]
    return [*head, *lines] if lines else []


def _failures(steps: _Figures) -> list[str]:
    lines = [f"- {name}: {one_line(step['reason'])}" for name, step in steps.items() if step["reason"]]
    bad = steps.get("tests", {}).get("figures", {}).get("bad", [])
    lines += [f"- test {test['name']}: {one_line(test['why'])}" for test in bad]
    return ["### What did not work", "", *lines] if lines else []


def _found(steps: _Figures, kind: str, part: str | None = None) -> Iterator[tuple[str, str, _Figures]]:
    """Model, precision and figures of the steps of a kind that got that far."""
    for name, step in steps.items():
        words = name.split()
        if words[0] == kind and (part or kind) in step["figures"]:
            yield words[1], words[2] if len(words) > 2 else "fp32", step["figures"][part or kind]


def _times(times: Mapping[str, float]) -> str:
    return " | ".join(f"{times[key]:.1f}" for key in ("mean_us", "median_us", "p99_us"))
