"""Writes what became of the zoo as docs/zoo.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

__all__ = ["page", "summary"]

_Found = Sequence[Mapping[str, Any]]

_WORKS: Final = "works"
_REFUSED: Final = "refused"
_NEEDED: Final = {"torchvision": 0.95, "timm": 0.9}
_INTRODUCTION: Final = """# Zoo

Which networks compile. Each is captured, cut, given three exits that it has to keep, and one more whose
gate always goes on, which has to go again with its head; then it is lowered and run: every exit forced in
turn, in a batch of four and alone, and the one-file model on a batch whose rows leave at different exits and
on single rows. All answers have to be torch's to 1e-3 of the largest.

Nothing is trained, so this says nothing of what exits would save. Weights are random, batch-norm statistics
are those of the eight rows, parameters that are constant in a new network (zeros above all) are replaced,
and inputs are as small as the network takes them.

    make zoo                                                # everything, about two hours on one core
    python benchmarks/zoo.py --library timm --only 'swin*'  # some; what has been run is not run again

A network that cannot be compiled is refused: an error of the compiler's own that says where and what to do.
Any other exception, a crash, more than three minutes or more memory than allowed is a failure."""


def page(found: _Found, environment: Mapping[str, Any], remark: str = "") -> str:
    """The whole page.

    Args:
        found: What `zoo_process.run_apart` returned for every network.
        environment: Versions and machine; ``date``.
        remark: What a reader has to know about the run, beside these.
    """
    libraries = list(dict.fromkeys(one["library"] for one in found))
    parts = [
        _INTRODUCTION,
        " ".join([_surroundings(environment), *([remark] if remark else [])]),
        "\n".join(summary(found)),
        "\n".join(_not_working(found)),
    ]
    for library in libraries:
        those = [one for one in found if one["library"] == library]
        parts.append(_details(library, those))
    return "\n\n".join(parts) + "\n"


def summary(found: _Found) -> list[str]:
    """A table with a row per library."""
    lines = [
        "| | networks | families | work | | refused | failed | seconds, median (most) | memory, GB, most "
        "| difference, most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for library in dict.fromkeys(one["library"] for one in found):
        those = [one for one in found if one["library"] == library]
        outcomes = Counter(one["outcome"] for one in those)
        works = [one for one in those if one["outcome"] == _WORKS]
        share = len(works) / len(those)
        needed = f", {_NEEDED[library]:.0%} asked for" if library in _NEEDED else ""
        failed = len(those) - outcomes[_WORKS] - outcomes[_REFUSED]
        seconds = sorted(one["total_s"] for one in those)
        lines.append(
            f"| {library} | {len(those)} | {len({one['family'] for one in those})} | {len(works)} "
            f"| {share:.1%}{needed} | {outcomes[_REFUSED]} | {failed} "
            f"| {seconds[len(seconds) // 2]:.0f} ({seconds[-1]:.0f}) "
            f"| {max(one.get('peak_bytes', 0) for one in those) / 1e9:.1f} "
            f"| {max((_difference(one) for one in works), default=0.0):.0e} |"
        )
    return lines


def _surroundings(environment: Mapping[str, Any]) -> str:
    names = ("torch", "torchvision", "timm", "transformers", "onnx", "onnxruntime", "numpy")
    versions = ", ".join(f"{name} {environment[name]}" for name in names if name in environment)
    return (
        f"Run on {environment['date']} on {environment['processor']}, one thread, one network at a time, "
        f"Python {environment['python']}, {versions}."
    )


def _not_working(found: _Found) -> list[str]:
    """Every network that does not work, those with the same message together."""
    groups: dict[tuple[str, str], list[str]] = {}
    for one in found:
        if one["outcome"] != _WORKS:
            groups.setdefault((one["outcome"], _message(one)), []).append(f"{one['library']}/{one['name']}")
    lines = ["## What does not work", ""]
    if not groups:
        return [*lines, "Everything works."]
    lines += ["| networks | | message |", "|---|---|---|"]
    return lines + [
        f"| {', '.join(names)} | {outcome} | {message} |" for (outcome, message), names in groups.items()
    ]


def _message(one: Mapping[str, Any]) -> str:
    where = f"{one['where']}: " if one.get("where") else ""
    remedy = f" -> {one['remedy']}" if one.get("remedy") else ""
    kind = f"`{one['kind']}` " if one.get("kind") else ""
    return kind + _cell(f"{where}{one['error']}{remedy}")


def _details(library: str, those: _Found) -> str:
    lines = [
        f"## {library}",
        "",
        "<details><summary>All networks</summary>",
        "",
        "| network | | input | parameters, M | nodes | places | exits at | s | memory, GB | difference |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for family in sorted({one["family"] for one in those}):
        members = [one for one in those if one["family"] == family]
        works = sum(one["outcome"] == _WORKS for one in members)
        if [one["name"] for one in members] != [family]:
            lines.append(f"| **{family}** | {works} of {len(members)} | | | | | | | | |")
        lines += [_row(one) for one in members]
    return "\n".join([*lines, "", "</details>"])


def _row(one: Mapping[str, Any]) -> str:
    sizes = ", ".join("x".join(map(str, size)) for size in dict(one.get("inputs", {})).values())
    cells: Iterable[object] = (
        one["name"],
        one["outcome"],
        sizes,
        f"{one['parameters'] / 1e6:.1f}" if "parameters" in one else "",
        one.get("nodes", ""),
        one.get("cut_points", ""),
        ", ".join(one.get("exits", ())),
        f"{one['total_s']:.0f}",
        f"{one['peak_bytes'] / 1e9:.1f}" if "peak_bytes" in one else "",
        f"{_difference(one):.0e}" if one["outcome"] == _WORKS else "",
    )
    return f"| {' | '.join(map(str, cells))} |"


def _difference(one: Mapping[str, Any]) -> float:
    return max(one["difference"], one["one_file_difference"])


def _cell(text: str, most: int = 400) -> str:
    line = " ".join(text.replace("|", "\\|").split())
    return line if len(line) <= most else f"{line[: most - 3]}..."
