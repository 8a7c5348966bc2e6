"""Synthetic score tables for the tests of gate learning."""

from __future__ import annotations

import numpy as np

from exitcompiler.policies import CostModel, GoOn, Leave, LinearRule, Policy
from exitcompiler.scores import HeadScores, ScoreTable


def make_table(
    rows: int = 400,
    exits: int = 3,
    kinds: tuple[str, ...] = ("linear", "deep"),
    classes: int = 5,
    seed: int = 0,
    labelled: bool = True,
) -> ScoreTable:
    """A table whose heads grow better with depth and know when a row is hard."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=rows)
    hardness = generator.gamma(2.0, 1.0, size=rows)

    def logits(skill: float) -> np.ndarray:
        noise = generator.normal(size=(rows, classes)) * (0.4 + hardness)[:, None]
        return (skill * np.eye(classes)[labels] * 3.0 + noise).astype(np.float32)

    names = tuple(f"exit{index}" for index in range(exits))
    heads = {
        (name, kind): HeadScores(name, kind, logits(0.5 + depth / (exits + 1) + 0.2 * place))
        for depth, name in enumerate(names)
        for place, kind in enumerate(kinds)
    }
    return ScoreTable(names, heads, logits(2.0), labels.astype(np.int64) if labelled else None)


def make_costs(table: ScoreTable, gate_us: float = 5.0, head_us: float = 40.0) -> CostModel:
    """Equal segments of 200 us; the second kind of head costs twice the first."""
    heads = {key: head_us * (1 + table.kinds(key[0]).index(key[1])) for key in table.heads}
    return CostModel((200.0,) * (len(table.exits) + 1), heads, gate_us)


def random_policy(table: ScoreTable, seed: int) -> Policy:
    """Any valid policy."""
    generator = np.random.default_rng(seed)
    decisions: list[GoOn | Leave | LinearRule] = []
    kept: list[tuple[str, str]] = []
    for name in table.exits:
        kind = str(generator.choice(table.kinds(name)))
        what = generator.choice(["on", "leave", "rule", "rule", "rule"])
        if what == "on":
            decisions.append(GoOn())
            continue
        earlier = [key for key in kept if generator.random() < 0.5]
        reads = ((name, kind), *earlier)
        kept.append((name, kind))
        if what == "leave":
            decisions.append(Leave(kind))
        else:
            weight = tuple(float(w) for w in generator.normal(size=3 * len(reads)))
            decisions.append(LinearRule(kind, reads, weight, float(generator.normal())))
    return Policy(table.exits, tuple(decisions))
