"""What the cascade benchmark has to reach, next to what it measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from cascade_latency import ASKED, NOT_LOWER
from cifar10_format import interval, ratio
from cifar10_targets import Target, area_target, verdict

__all__ = ["cascade_targets", "domination_target"]

REPORTED: Final = "reported"


def cascade_targets(figures: Mapping[str, Any]) -> list[Target]:
    """All lines, from the figures of all stages."""
    limit = figures["effort"]["cascade_drop"]
    allowed = f"at most {100 * limit:.1f} points lower"
    return [
        _speedup(figures, allowed, ASKED, "asked", limit, (2.3, 3.0)),
        _speedup(figures, "not lower at all", NOT_LOWER, "not_lower", 0.0, (1.9, 2.3)),
        area_target(
            "area under the frontier, myopic baseline minus learned policy",
            figures["families"]["families"]["myopic"]["learned_minus_this_us"],
            "myopic",
        ),
        domination_target(figures["domination"]),
        _oracle(figures["oracle"]),
        _inside(figures["final"]),
        _ideal(figures["ideal"]),
    ]


def _speedup(
    figures: Mapping[str, Any], allowed: str, point: str, key: str, limit: float, bars: tuple[float, float]
) -> Target:
    """The point made for the limit; and the fastest shipped one that keeps it on final rows, which counts."""
    texts = []
    for name, final in figures["final"][point]["programs"].items():
        spread = figures[f"resplits {name}"]["limits"][key]
        texts.append(
            f"{name}: the point made for this {ratio(final['speedup'])} at a drop of "
            f"{100 * final['drop']['value']:.2f} points on the final rows, {100 * spread['drop_mean']:.2f} "
            "in the mean over re-splits"
        )
    shipped = [row for row in figures["table"]["onnxruntime"] if row["kind"] == "program"]
    kept = [row for row in shipped if row["drop"]["value"] <= limit]
    outcome = "miss"
    if kept:
        best = max(kept, key=lambda row: float(row["speedup"]["value"]))
        outcome = verdict(best["speedup"]["value"], *bars, at_least=True)
        texts.append(
            f"of the shipped points that keep it on the final rows the fastest is {best['name']}: "
            f"{ratio(best['speedup'])} at {100 * best['drop']['value']:.2f}"
        )
    what = f"speed-up over ResNet-56 alone, batch 1, fp32, ONNX Runtime, {allowed}"
    must, aim = (f"{bar}x" for bar in bars)
    return Target(what, must, aim, "; ".join(texts), outcome)


def domination_target(domination: Mapping[str, Any]) -> Target:
    """Whether anything static or smaller is faster at the same accuracy.

    The aim is that nothing is as fast anywhere; the must, that nothing is faster by more than chance.
    """
    first, last = (100 * domination["accuracies"][end] for end in (0, -1))
    what = f"against every static network and sub-topology, from {first:.1f} to {last:.1f} %"
    families = domination["families"]
    faster = {name: found for name, found in families.items() if found["faster"]}
    surely = [name for name, found in faster.items() if found["surely_faster"]]
    level = any(found["as_fast"] for found in families.values())
    outcome = "miss" if surely else ("must" if faster or level else "aim")
    text = f"{len(faster)} of {len(families)} faster somewhere, {len(surely)} of them beyond chance"
    if faster:
        name = max(faster, key=lambda name: float(faster[name]["gain_us"]["value"]))
        worst = faster[name]
        text += f"; furthest ahead: {name} at {100 * worst['at']:.1f} % by {interval(worst['gain_us'], 1)} us"
    return Target(what, "nowhere dominated", "above everywhere", text, outcome)


def _oracle(oracle: Mapping[str, Any]) -> Target:
    learned, myopic = oracle["learned_us"], oracle["myopic_us"]
    text = f"{interval(learned, 1)} us, myopic {interval(myopic, 1)} us"
    if "ratio" in oracle:
        text += f"; ratio {interval(oracle['ratio'], 2)}"
    what = f"distance to the soft oracle at a drop of {100 * oracle['drop']:.1f} points"
    # Where thresholds are past the oracle, which stays at a drop of 0, there is no distance to halve.
    halved = myopic["value"] > 0.0 and learned["value"] <= 0.5 * myopic["value"]
    outcome = "aim" if halved else "reported"
    return Target(what, REPORTED, "half of myopic's", text, outcome)


def _inside(final: Mapping[str, Any]) -> Target:
    pairs = {point: found["pair"] for point, found in final.items()}
    text = "; ".join(
        f"{ratio(pair['speedup'])} at {point}, accuracy {100 * pair['accuracy_gain']['value']:+.2f} points"
        for point, pair in pairs.items()
    )
    faster = [pair for pair in pairs.values() if pair["speedup"]["value"] >= 1.15]
    # Faster for less accuracy is another point of the same frontier.
    outcome = "aim" if any(pair["accuracy_gain"]["value"] >= 0.0 for pair in faster) else "reported"
    return Target("with exits inside the members against without, in turns", REPORTED, "1.15x", text, outcome)


def _ideal(ideal: Mapping[str, Any]) -> Target:
    found = ideal["latency_ratio"]
    outcome = verdict(found["value"], 1.07, 1.02, at_least=False)
    what = "mean latency / ideal (sum of route rate x sum of the members' own latencies), batch 1"
    return Target(what, "<= 1.07", "<= 1.02", interval(found, 3), outcome)
