"""What the GPU check has to reach, next to what it measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

__all__ = ["MISSED", "MODELS", "REACHED", "REPORTED", "interval", "judge", "one_line"]

REACHED: Final = "reached"
MISSED: Final = "missed"
REPORTED: Final = "reported"

MODELS: Final = {"resnet56": "ResNet-56, 32x32", "resnet50": "ResNet-50, 224x224"}

_LATENCY: Final = 1.05
_SUFFIX_US: Final = 3.0
_THROUGHPUT: Final = 0.9
_PARITY: Final = 1e-4

_Figures = Mapping[str, Any]


def judge(found: _Figures) -> list[dict[str, str]]:
    """All lines for the steps that were to run, and one for every step that did not come to its end.

    Args:
        found: As `gpu.run_all` gives it.

    Returns:
        Each with ``what``, ``must``, ``measured`` and ``outcome``; what could not be measured is missed.
    """
    lines = []
    for step, what, must, measure in _lines():
        if step not in found["steps"]:
            continue
        outcome = found["steps"][step]
        try:
            reached, measured = measure(outcome["figures"])
        except (KeyError, TypeError, ValueError):
            reached, measured = False, f"not measured: {outcome['reason'] or 'figures are incomplete'}"
        if step == "tests" and not outcome["ok"]:
            reached, measured = False, f"{measured}; {outcome['reason']}" if outcome["reason"] else measured
        verdict = REPORTED if reached is None else REACHED if reached else MISSED
        lines.append({"what": what, "must": must, "measured": one_line(measured), "outcome": verdict})
    for name, step in found["steps"].items():
        if not step["ok"] and name != "tests":
            told = one_line(step["reason"] or "")
            lines.append({"what": f"step: {name}", "must": "works", "measured": told, "outcome": MISSED})
    return lines


_Measure = Callable[[_Figures], tuple[bool | None, str]]


def _lines() -> Iterator[tuple[str, str, str, _Measure]]:
    yield "tests", "tests that need a GPU", "all pass", _tests
    for model, title in MODELS.items():
        rows = f"rows {model} fp32"
        yield rows, f"{title}: mean latency / ideal, batch 1", f"<= {_LATENCY}", _latency
        yield rows, f"{title}: what is skipped after the first exit costs", f"< {_SUFFIX_US:.0f} us", _suffix
        yield rows, f"{title}: p99 - median of rows that leave first", "reported", _jitter
        batches, calls, parity = f"batches {model}", f"calls {model}", f"parity {model}"
        yield batches, f"{title}: throughput / ideal by shares, batch 32", f">= {_THROUGHPUT}", _by_shares
        yield batches, f"{title}: throughput / ideal by rows, batch 32", "reported", _by_rows
        yield calls, f"{title}: allocations between launch and result", "0", _allocations
        yield calls, f"{title}: waits of the host between launch and result", "0", _waits
        yield parity, f"{title}: float32 against the oracle", f"<= {_PARITY:g}, all exits the same", _parity


def _tests(figures: _Figures) -> tuple[bool, str]:
    bad, skipped = len(figures["bad"]), len(figures["skipped"])
    told = f"{figures['passed']} of {figures['tests']} pass, {bad} fail, {skipped} skipped"
    return bad == 0 and figures["passed"] > 0, told


def _latency(figures: _Figures) -> tuple[bool, str]:
    wall, device = figures["rows"]["wall"]["over_ideal"], figures["rows"]["device"]["over_ideal"]
    free = interval(figures["rows"]["wall"]["over_ideal_with_scores"])
    told = f"{interval(wall)}; on the device alone {interval(device)}; if heads and scores were free {free}"
    return wall["value"] <= _LATENCY, told


def _suffix(figures: _Figures) -> tuple[bool, str]:
    early = figures["rows"]["device"]["leaving_first"]
    suffix, decision = early["suffix_us"], early["suffix_and_decision_us"]
    told = f"{interval(suffix, 2)} us; with the decision itself {interval(decision, 2)} us"
    return suffix["value"] < _SUFFIX_US, told


def _jitter(figures: _Figures) -> tuple[None, str]:
    wall = figures["rows"]["wall"]
    ours, host = wall["leaving_first"]["program"], wall["contenders"]["a graph per block, host branches"]
    spread = ours["p99_us"] - ours["median_us"]
    return None, f"{spread:.1f} us (p99 of all rows where the host branches: {host['p99_us']:.1f} us)"


def _mixed(figures: _Figures) -> _Figures:
    """The mix that the gates were set for: half of the rows leave first."""
    batch = figures["batches"]["batch"]
    return next(
        mix
        for mix in figures["batches"]["mixes"]
        if mix["rows_by_exit"][0] == batch // 2 and mix["rows_by_exit"][1] == batch // 4
    )


def _by_shares(figures: _Figures) -> tuple[bool, str]:
    mixed = _mixed(figures)["throughput_by_shares"]
    return mixed["value"] >= _THROUGHPUT, interval(mixed)


def _by_rows(figures: _Figures) -> tuple[None, str]:
    return None, interval(_mixed(figures)["throughput_by_rows"])


def _allocations(figures: _Figures) -> tuple[bool, str]:
    counts = [entry["allocate"] for entry in (*figures["launches"].values(), *figures["calls"].values())]
    counts += [e.get("device_allocations", 0) + e.get("segments", 0) for e in figures["calls"].values()]
    taken_bytes = max(entry["taken_bytes"] for entry in figures["launches"].values())
    told = f"{sum(counts)} in {_launches(figures)} launches"
    told += f"; yet {taken_bytes:,} bytes less are free afterwards" if taken_bytes > 0 else ""
    return sum(counts) == 0 and taken_bytes <= 0, told


def _waits(figures: _Figures) -> tuple[bool, str]:
    entries = (*figures["launches"].values(), *figures["calls"].values())
    count = sum(entry["wait"] for entry in entries)
    torch = [e["torch_waited"] for e in figures["calls"].values() if e["torch_waited"]]
    early = all(e["came_back_before_the_device"] for e in figures["calls"].values())
    told = f"{count} in {_launches(figures)} launches"
    told += f"; PyTorch: {torch[0]}" if torch else ""
    told += "; calls come back while the device is busy" if early else "; a call came back late"
    return count == 0 and not torch and early, told


def _launches(figures: _Figures) -> int:
    return sum(e["launches"] for e in (*figures["launches"].values(), *figures["calls"].values()))


def _parity(figures: _Figures) -> tuple[bool, str]:
    found = figures["fp32"].values()
    if any(entry["relative"] is None for entry in found):
        return False, "answers are not finite"
    worst = max(entry["relative"] for entry in found)
    same = min(entry["same_exit"] for entry in found)
    batches = ", ".join(figures["fp32"])
    told = f"{worst:.1e} of the largest logit, {100 * same:.2f} % of exits the same, batches of {batches}"
    return worst <= _PARITY and same == 1.0, told


def interval(figure: Mapping[str, float], digits: int = 3) -> str:
    """A value and its interval."""
    value, lower, upper = (f"{figure[key]:.{digits}f}" for key in ("value", "lower", "upper"))
    return f"{value} ({lower} to {upper})"


def one_line(text: str, most: int = 400) -> str:
    """A cell of a table; of long ones the beginning and, where errors are named, the end."""
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= most else f"{line[: most // 4]} ... {line[5 - most + most // 4 :]}"
