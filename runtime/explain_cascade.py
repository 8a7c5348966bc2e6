"""What the report of a cascade says about its networks: kept or pruned, how they are used, in words.

Everything here also takes the report of a single network, where there is nothing to say about others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from exitcompiler.runtime.wording import (
    as_sentence,
    count_noun,
    dict_at,
    format_duration,
    format_points,
    format_share,
    list_at,
    wrap,
)

__all__ = [
    "baselines_text",
    "full_topology",
    "inner_exits",
    "is_cascade",
    "jump_edges",
    "kept_text",
    "network_facts",
    "network_of_exit",
    "networks_text",
    "plain_name",
    "reference_name",
]

_BASELINES = {
    "myopic": "myopic (one confidence threshold per network)",
    "uniform": "uniform (random routing)",
    "networks": "one network alone",
    "oracle": "soft oracle (a bound)",
}


def is_cascade(report: Mapping[str, Any]) -> bool:
    """Whether the program was made of several networks."""
    return bool(report.get("cascade"))


def reference_name(report: Mapping[str, Any]) -> str:
    """What accuracy drop and speed-up are against: ``resnet56 alone``, or ``the whole network``."""
    if not is_cascade(report):
        return "the whole network"
    reference = dict_at(report, "cascade").get("reference")
    return f"{reference} alone" if reference else "the last network alone"


def plain_name(report: Mapping[str, Any]) -> str:
    """What speed is compared with, and what comes back where nothing pays: where int8 was tried, in which."""
    names = {"int8": "the plain network in int8", "fp32": "the plain network in float32"}
    plain = dict_at(report, "quantization").get("plain")
    return names.get(plain, reference_name(report)) if isinstance(plain, str) else reference_name(report)


def inner_exits(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Exits inside networks: all but those at the end of a network of a cascade."""
    return [exit for exit in list_at(report, "exits") if not exit.get("end")]


def kept_text(report: Mapping[str, Any]) -> str:
    """How much was kept: ``2 networks kept of 4, 1 exit inside them of 3 places``."""
    exits = inner_exits(report)
    kept = sum(bool(exit.get("kept")) for exit in exits)
    networks = list_at(dict_at(report, "cascade"), "networks")
    if not networks:
        return f"{count_noun(kept, 'exit')} kept" + (f" of {len(exits)} places" if exits else "")
    text = f"{count_noun(sum(bool(n.get('kept')) for n in networks), 'network')} kept of {len(networks)}"
    return text + (f", {count_noun(kept, 'exit')} inside them of {len(exits)} places" if exits else "")


def network_of_exit(report: Mapping[str, Any], exit: str) -> str | None:
    """The network of a cascade that answers at this exit; the reference answers in the plain program."""
    cascade = dict_at(report, "cascade")
    known = {entry.get("name"): entry.get("network") for entry in list_at(report, "exits")}
    names = [network["name"] for network in list_at(cascade, "networks")]
    for name in (known.get(exit), exit, exit.rpartition("/")[0]):
        if name in names:
            return str(name)
    return cascade.get("reference")


def network_facts(
    report: Mapping[str, Any], point: str | None, rates: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Per network what it is alone, and what it does at an operating point.

    Args:
        report: The report of a cascade.
        point: The name of the operating point.
        rates: Exit name -> share of the rows, at this point.

    Returns:
        The report's ``networks``, in order, each with ``answered`` (share of the rows; None where nothing
        is known), ``end`` (the entry of its end among the exits), and ``share_of_rows_run`` and
        ``share_of_time`` where the report has them for this point.
    """
    cascade = dict_at(report, "cascade")
    used: dict[str, Mapping[str, Any]] = {
        network["name"]: network
        for budget in list_at(cascade, "budgets")
        if point is not None and budget.get("point") == point
        for network in list_at(budget, "networks")
    }
    ends = {exit.get("network"): exit for exit in list_at(report, "exits") if exit.get("end")}
    answered: dict[str | None, float] = {}
    for exit, rate in rates.items():
        name = network_of_exit(report, exit)
        answered[name] = answered.get(name, 0.0) + rate
    return [
        {
            **network,
            "answered": answered.get(network["name"], 0.0) if rates else None,
            "end": ends.get(network["name"], {}),
            **{key: used.get(network["name"], {}).get(key) for key in ("share_of_rows_run", "share_of_time")},
        }
        for network in list_at(cascade, "networks")
    ]


def networks_text(
    report: Mapping[str, Any], point: str | None, rates: Mapping[str, float], *, title: str = "Networks"
) -> str:
    """The section about networks: each with its verdict, then the ways between them.

    Args:
        report: The report of a program.
        point: The name of the operating point that the report describes.
        rates: Exit name -> share of the rows, at this point.
        title: The section's.

    Returns:
        Lines; empty if this is no cascade.
    """
    networks = network_facts(report, point, rates)
    if not networks:
        return ""
    reference = dict_at(report, "cascade").get("reference")
    lines = [title + (f"; {reference} is the reference" if reference else "")]
    width = max(len(network["name"]) for network in networks)
    for network in networks:
        verdict = "kept  " if network.get("kept") else "pruned"
        first = f"  {network['name']:<{width}}  {verdict}  "
        lines.append(wrap(_network_text(network), first=first, rest=" " * len(first)))
    ways = _ways_text(dict_at(report, "cascade"))
    return "\n".join([*lines, "", ways] if ways else lines)


def jump_edges(
    cascade: Mapping[str, Any], edges: Iterable[Sequence[str]]
) -> dict[tuple[str, str], list[str]]:
    """The edges that lead past other networks.

    Args:
        cascade: The report's part about the cascade; its ``edges`` are all that were allowed.
        edges: Pairs of names, the ones to look at.

    Returns:
        (from, to) -> the networks on longer ways between the two, in order.
    """
    following: dict[str, list[str]] = {}
    for start, end in list_at(cascade, "edges"):
        following.setdefault(start, []).append(end)

    def reach(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            for name in following.get(waiting.pop(), ()):
                if name not in found:
                    found.add(name)
                    waiting.append(name)
        return found

    names = [network["name"] for network in list_at(cascade, "networks")]
    between = {(a, b): [n for n in names if n in reach(a) and b in reach(n)] for a, b in edges}
    return {edge: past for edge, past in between.items() if past}


def full_topology(cascade: Mapping[str, Any]) -> str:
    """The name of the topology of all networks: ``resnet20 > resnet56``."""
    return " > ".join(network["name"] for network in list_at(cascade, "networks"))


def _baseline_label(name: str, cascade: bool) -> str:
    """What a baseline is called."""
    if name == "oracle" and cascade:  # several together may know better
        return "soft oracle (of single networks)"
    return _BASELINES.get(name, name.replace("_", " "))


def baselines_text(report: Mapping[str, Any]) -> str:
    """How fast the baselines, and the cascades of fewer networks, are within the drop that was asked for."""
    limit = dict_at(report, "settings").get("max_accuracy_drop")
    if limit is None:
        return ""
    found = []
    for name, points in dict_at(report, "baselines").items():
        latency = _fastest(points, limit)
        if latency is not None:
            found.append(f"{_baseline_label(name, is_cascade(report))} {format_duration(latency)}")
    cascade = dict_at(report, "cascade")
    fewer = [
        (latency, topology)
        for topology, points in dict_at(cascade, "frontiers").items()
        if topology != full_topology(cascade) and (latency := _fastest(points, limit)) is not None
    ]
    if fewer:
        latency, topology = min(fewer)
        found.append(f"learned policy on {topology} only {format_duration(latency)}")
    if not found:
        return ""
    return f"estimated mean latency at a drop of at most {format_points(limit)}: {', '.join(found)}."


def _fastest(points: Iterable[Mapping[str, Any]], limit: float) -> float | None:
    return min((p["mean_latency_ms"] for p in points if p["accuracy_drop"] <= limit), default=None)


def _network_text(network: Mapping[str, Any]) -> str:
    facts = []
    accuracy, latency = network.get("accuracy"), network.get("latency_ms")
    if accuracy is not None:
        within = "" if latency is None else f" in {format_duration(latency)}"
        facts.append(f"alone right on {format_share(accuracy)}{within}")
    if network.get("kept"):
        run, time = network.get("share_of_rows_run"), network.get("share_of_time")
        if run is not None:
            spent = "" if time is None else f" and takes {format_share(time)} of the time"
            facts.append(f"runs on {format_share(run)} of the rows{spent}")
        facts += _answers(network)
    text = "; ".join(facts)
    reason = network.get("reason") or ""
    reason = as_sentence(reason.removeprefix("kept: ").removeprefix("pruned: ")) if reason else ""
    return f"{text}. {reason}" if text and reason else f"{text}{reason}"


def _answers(network: Mapping[str, Any]) -> list[str]:
    """What share it answers, of that at its end how, and how often it is right there."""
    answered, end = network.get("answered"), network["end"]
    if answered is None:
        return []
    text = f"answers {format_share(answered)} of the rows"
    at_end = end.get("exit_rate") if end.get("kept") else None
    if at_end:
        inner = answered - at_end > 5e-4
        text += f", {format_share(at_end)} at its end" if inner else ""
        kind = end.get("head") or ""
        if kind == "own":
            text += " by itself"
        elif kind.startswith("with "):
            text += " together " + " and ".join(kind.split("+"))
        if end.get("exit_accuracy") is not None:
            text += f", {format_share(end['exit_accuracy'])} of {'these' if inner else 'them'} right"
    return [text]


def _ways_text(cascade: Mapping[str, Any]) -> str:
    if cascade.get("used_edges") is None:
        return ""
    used, allowed = cascade["used_edges"], list_at(cascade, "edges")
    lines = [f"Ways between networks, {len(used)} used" + (f" of {len(allowed)}" if allowed else "")]
    jumps = jump_edges(cascade, used)
    for start, end in used:
        past = jumps.get((start, end))
        lines.append(
            wrap(f"{start} > {end}" + (f"  jumps over {', '.join(past)}" if past else ""), first="  ")
        )
    return "\n".join(lines)
