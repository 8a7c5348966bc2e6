"""The report and the control flow of a cascade, for the tests of whatever shows them."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from sample_report import sample_report

from exitcompiler.controlflow import (
    BATCH,
    BlockInterface,
    Branch,
    ControlFlow,
    Edge,
    LinearGate,
    Return,
    ValueSpec,
)

__all__ = ["all_edges_control_flow", "sample_cascade_control_flow", "sample_cascade_report"]

NETWORKS = {  # accuracy and latency (ms) alone
    "resnet20": (0.926, 0.41),
    "resnet32": (0.935, 0.62),
    "resnet44": (0.9401, 0.84),
    "resnet56": (0.9437, 1.05),
}
RATES = {"resnet20/layer2.2": 0.24, "resnet20": 0.41, "resnet32": 0.15, "resnet56": 0.2}


def sample_cascade_report() -> dict[str, Any]:
    """Four networks, one of them pruned, an exit kept inside the first; every key of the schema is there."""
    accuracy, slowest = NETWORKS["resnet56"]
    point = {"excess_error": 0.011, "shipped": True, "chosen": False}
    plain = {"accuracy": accuracy, "accuracy_drop": 0.0, "mean_latency_ms": slowest, "speedup": 1.0}
    chosen = {"accuracy": accuracy - 0.008, "accuracy_drop": 0.008, "mean_latency_ms": 0.436, "speedup": 2.41}
    return sample_report() | {
        "model": {"name": "cascade of 4 networks", "parameters": 2_656_000, "flops": 332_000_000},
        "exits": _exits(),
        "frontier": [
            {**point, **plain, "name": "plain", "exit_rates": {"resnet56": 1.0}},
            {**point, **chosen, "name": "drop+0.80", "exit_rates": RATES, "chosen": True},
        ],
        "baselines": {
            "myopic": _curve(0.41, 1.05, 0.0177, 0.0005, 0.35),
            "uniform": _curve(0.41, 1.05, 0.0177, 0.0, 0.98),
            "networks": [
                {"accuracy_drop": accuracy - right, "mean_latency_ms": latency}
                for right, latency in NETWORKS.values()
            ],
            "oracle": [{"accuracy_drop": 0.0, "mean_latency_ms": 0.46}],
        },
        "certificate": sample_report()["certificate"] | {"point": "drop+0.80"},
        "latency": {
            "point": "drop+0.80",
            "program": {"mean_ms": 0.436, "p50_ms": 0.31, "p99_ms": 1.71},
            "plain": {"mean_ms": 1.051, "p50_ms": 1.04, "p99_ms": 1.18},
            "speedup": {"value": 2.41, "lower": 2.35, "upper": 2.48},
            "execution": "blocks",
            "backend": "onnxruntime",
            "threads": 1,
        },
        "rounds": [{"exits": [*RATES, "resnet44"], "mean_latency_ms": 0.45}],
        "reliability": {"resnet20": sample_report()["reliability"]["layer1.8"]},
        "cascade": _cascade(),
    }


def _exits() -> list[dict[str, Any]]:
    inner = {
        "name": "resnet20/layer2.2",
        "network": "resnet20",
        "depth": 0.48,
        "kept": True,
        "reason": "what its rows save pays for the head",
        "head": "deep",
        "probe_accuracy": 0.61,
        "head_accuracy": 0.78,
        "prefix_ms": 0.2,
        "head_ms": 0.03,
        "exit_rate": 0.24,
        "exit_accuracy": 0.991,
        "gate": "linear on 3 features of 1 head",
    }
    other = {"name": "resnet32/layer2.4", "network": "resnet32", "depth": 0.5, "kept": False}
    ends = {
        "resnet20": ("own", 0.41, 0.989),
        "resnet32": ("with resnet20", 0.15, 0.951),
        "resnet44": ("own", 0.0, None),
        "resnet56": ("own", 0.2, 0.812),
    }
    return [
        inner,
        {**other, "probe_accuracy": 0.6, "reason": "the linear probe is right on too few rows"},
        *(
            {
                "name": name,
                "network": name,
                "depth": None,
                "end": True,
                "kept": rate > 0,
                "head": head,
                "head_accuracy": NETWORKS[name][0],
                "exit_rate": rate,
                "exit_accuracy": right,
                "reason": "what its rows save pays for it",
            }
            for name, (head, rate, right) in ends.items()
        ),
    ]


def _cascade() -> dict[str, Any]:
    names = list(NETWORKS)
    sizes = dict(zip(names, (272_474, 466_906, 661_338, 855_770), strict=True))
    reasons = (
        "where all rows start",
        "answers what resnet20 is unsure of",
        "pruned: no row goes there",
        "the reference",
    )
    networks = [
        {
            "name": name,
            "parameters": sizes[name],
            "flops": 150 * sizes[name],
            "accuracy": right,
            "latency_ms": latency,
            "kept": name != "resnet44",
            "reason": reason,
        }
        for (name, (right, latency)), reason in zip(NETWORKS.items(), reasons, strict=True)
    ]
    budgets = (
        ("drop+1.60", 0.29, 0.016, (1.0, 0.1, 0.0, 0.05), (0.86, 0.09, 0.0, 0.05), (0.76, 0.1, 0.0, 0.14)),
        ("drop+0.80", 0.436, 0.008, (1.0, 0.22, 0.0, 0.2), (0.65, 0.15, 0.0, 0.2), (0.44, 0.16, 0.0, 0.4)),
        ("drop+0.10", 0.61, 0.001, (1.0, 0.3, 0.1, 0.31), (0.5, 0.14, 0.05, 0.31), (0.37, 0.2, 0.07, 0.36)),
    )
    keys = ("name", "share_of_rows_run", "share_of_rows_answered", "share_of_time")
    return {
        "reference": "resnet56",
        "networks": networks,
        "edges": [list(edge) for edge in combinations(names, 2)],
        "used_edges": [["resnet20", "resnet32"], ["resnet20", "resnet56"], ["resnet32", "resnet56"]],
        "frontiers": _frontiers(),
        "budgets": [
            {
                "point": point,
                "mean_latency_ms": mean,
                "accuracy_drop": drop,
                "networks": [
                    dict(zip(keys, entry, strict=True)) for entry in zip(names, *shares, strict=True)
                ],
            }
            for point, mean, drop, *shares in budgets
        ],
        "overlap": _overlap(),
    }


def _frontiers() -> dict[str, list[dict[str, float]]]:
    best = NETWORKS["resnet56"][0]
    found = {}
    for index, members in enumerate(m for size in (2, 3, 4) for m in combinations(NETWORKS, size)):
        (first, start), (last, end) = NETWORKS[members[0]], NETWORKS[members[-1]]
        start *= 0.8 if len(members) == 4 else 1.0
        sag = 0.33 if len(members) == 4 else 0.47 - 0.03 * len(members) + 0.012 * (index % 5)
        found[" > ".join(members)] = _curve(start, end, best - first, best - last - 0.0005, sag)
    return found


def _overlap() -> dict[str, Any]:
    a, b, c, d = names = list(NETWORKS)
    patterns: list[tuple[list[str], float]] = [
        (names, 0.874), ([], 0.037), ([b, c, d], 0.014), ([c, d], 0.011), ([d], 0.0109), ([a, b, c], 0.0072),
        ([a, c, d], 0.0065), ([a, b, d], 0.0061), ([c], 0.006), ([b, d], 0.0055), ([b], 0.0049),
        ([b, c], 0.0041), ([a], 0.004), ([a, d], 0.0031), ([a, c], 0.003), ([a, b], 0.0027),
    ]  # fmt: skip
    return {
        "networks": names,
        "patterns": [{"right": right, "share": share} for right, share in patterns],
        "only_right": [
            [sum(s for r, s in patterns if one in r and other not in r) for other in names] for one in names
        ],
    }


def _curve(start: float, end: float, worst: float, best: float, sag: float) -> list[dict[str, float]]:
    """From the cheapest point to the dearest; the smaller ``sag``, the sooner the drop is made up for."""
    steps = [0.1 * i for i in range(11)]
    return [
        {"mean_latency_ms": start + (end - start) * t, "accuracy_drop": best + (worst - best) * (1 - t**sag)}
        for t in steps
    ]


IMAGE = ValueSpec((BATCH, 3, 32, 32), "float32")
LOGITS = ValueSpec((BATCH, 10), "float32")
FEATURES = ValueSpec((BATCH, 3), "float32")
HIDDEN = ValueSpec((BATCH, 32, 16, 16), "float32")


def _block(
    name: str, params: dict[str, ValueSpec], *ways: Edge | str, made: dict[str, ValueSpec] | None = None
) -> BlockInterface:
    """A block with a gate that reads what it makes itself; a way that is a text is a return."""
    logits, features = f"{name}_logits", f"{name}_confidence"
    gate = LinearGate((features,), ((1.0, 0.0, 0.0),) * len(ways), (0.0,) * len(ways))
    to = tuple(Return((logits,), way) if isinstance(way, str) else way for way in ways)
    results = {logits: LOGITS, features: FEATURES, **(made or {})}
    first = to[0]
    return BlockInterface(
        name,
        {"x": IMAGE, **params},
        results,
        first if len(to) == 1 and isinstance(first, Return) else Branch(gate, to),
    )


def sample_cascade_control_flow() -> ControlFlow:
    """The chosen point of ``sample_cascade_report``: an exit inside, and a jump over two networks."""
    start = Edge("to_resnet20", ("x", "hidden"))
    to_32 = Edge("to_resnet32", ("x", "to_resnet20_logits"))
    to_56 = Edge("to_resnet56", ("x",))
    blocks = (
        _block("to_resnet20_layer2_2", {}, "resnet20/layer2.2", start, made={"hidden": HIDDEN}),
        _block("to_resnet20", {"h": HIDDEN}, "resnet20", to_32, to_56),
        _block("to_resnet32", {"earlier": LOGITS}, "resnet32", to_56),
        _block("to_resnet56", {}, "resnet56"),
    )
    return ControlFlow(inputs={"x": IMAGE}, outputs={"logits": LOGITS}, blocks=blocks)


def all_edges_control_flow(networks: int = 4) -> ControlFlow:
    """A cascade in which rows may go from every network to every later one."""
    names = [f"net{i}" for i in range(networks)]
    blocks = tuple(
        _block(f"to_{name}", {}, name, *(Edge(f"to_{later}", ("x",)) for later in names[index + 1 :]))
        for index, name in enumerate(names)
    )
    return ControlFlow(inputs={"x": IMAGE}, outputs={"logits": LOGITS}, blocks=blocks)
