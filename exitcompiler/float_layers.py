"""How much of a network has to stay in float32 for int8 to keep its accuracy: found by measuring."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import fx

from exitcompiler.calibrated_scales import NEXT_BEST
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.errors import CalibrationError
from exitcompiler.program import Program
from exitcompiler.quantization import evenly_spaced
from exitcompiler.quantized_body import PRODUCTS, fold_norms, has_constant_weight
from exitcompiler.scores import BoolArray, FloatArray
from exitcompiler.scoring import plain_logits
from exitcompiler.statistics import Interval, mean_difference_interval

__all__ = ["Settled", "Trial", "rank_products", "require_accuracy", "settle"]

logger = logging.getLogger(__name__)

RANKING_ROWS: Final = 32
COUNTS: Final = (0, 1, 2, 4, 8, 16)
"""How many of the most sensitive products are tried in float32, until the accuracy is kept."""


@dataclass(frozen=True)
class Trial:
    """A network in int8 with some products left in float32.

    Args:
        kept_float: Their names, the most sensitive first.
        drop: Accuracy against float32, net, with its 95 % interval.
    """

    kept_float: tuple[str, ...]
    drop: Interval


@dataclass(frozen=True)
class Settled:
    """How a network is quantised.

    Args:
        engines: That quantise so.
        logits: Of the network in int8, ``float32[rows, classes]``.
        trials: What was tried, in order; the last one counts, unless ``chosen`` says otherwise.
        chosen: Which of them.
    """

    engines: Engines
    logits: FloatArray
    trials: tuple[Trial, ...]
    chosen: int

    @property
    def trial(self) -> Trial:
        """What it came out as."""
        return self.trials[self.chosen]


def settle(
    program: Program,
    engines: Engines,
    rows: Rows,
    original: FloatArray,
    limit: float,
    on_trial: Callable[[], None] = lambda: None,
) -> Settled:
    """Leave as few products in float32 as keep the accuracy of a network.

    First none; then the one, two, four ... at which the network departs most from itself in float32.

    Args:
        program: The network in float32, one block.
        engines: Of a backend of precision int8.
        rows: Rows that it was not trained on, with their labels if there are any.
        original: What the network answers on these in float32, ``float32[rows, classes]``.
        limit: The accuracy drop allowed.
        on_trial: Called after every trial.

    Returns:
        The first trial within the limit; where there is none, the one with the least drop.

    Raises:
        LoweringError: The network cannot be quantised.
    """
    assert engines.quantizer is not None
    targets = original.argmax(axis=1) if rows.labels is None else rows.labels
    right = original.argmax(axis=1) == targets
    ranked: list[str] = []
    found: list[tuple[Engines, FloatArray, Trial]] = []
    for count in COUNTS:
        if count:
            ranked = ranked or rank_products(program, found[0][0].typed(program), rows)
            if count > len(ranked):
                break
        kept = tuple(ranked[:count])
        trial_engines = Engines(engines.backend, engines.lowerer, engines.quantizer.keeping(kept))
        logits = plain_logits(trial_engines.typed(program), trial_engines, rows)
        trial = Trial(kept, _drop(right, logits.argmax(axis=1) == targets))
        logger.info("int8 with %d products in float32: drop %.4f", count, trial.drop.value)
        found.append((trial_engines, logits, trial))
        on_trial()
        if trial.drop.value <= limit:
            break
    chosen = min(range(len(found)), key=lambda i: (max(found[i][2].drop.value, limit), i))
    trials = tuple(trial for _, _, trial in found)
    return Settled(found[chosen][0], found[chosen][1], trials, chosen)


def _drop(right: BoolArray, quantized_right: BoolArray) -> Interval:
    return mean_difference_interval(right.astype(np.float64), quantized_right.astype(np.float64))


def require_accuracy(settled: Settled, limit: float) -> None:
    """Refuse a network that int8 breaks.

    Raises:
        CalibrationError: The drop is beyond doubt above the limit; names the next best precision.
    """
    best = settled.trial
    if best.drop.lower <= limit:
        return
    tried = ", ".join(str(len(trial.kept_float)) for trial in settled.trials)
    raise CalibrationError(
        f"int8 costs this network {100 * best.drop.value:.2f} points of accuracy "
        f"({100 * best.drop.lower:.2f} to {100 * best.drop.upper:.2f}), {100 * limit:.2f} are allowed; "
        f"tried with {tried} of its most sensitive layers left in float32",
        where="precision 'int8'",
        remedy=f"{NEXT_BEST}; precision='auto' finds out",
    )


@torch.no_grad()
def rank_products(program: Program, quantized: Program, rows: Rows) -> list[str]:
    """The products of a network, those first that add most to its departure from float32.

    The departure of a value is ``|quantised - float|^2 / |float|^2``; a product adds what its result departs
    more than its input does.

    Args:
        program: In float32, one block.
        quantized: The same in int8.
        rows: A few of them are used.
    """
    inputs = evenly_spaced(rows, RANKING_ROWS).inputs
    body = fold_norms(program.entry.body)
    arguments = [inputs[name] for name in program.inputs]
    exact = _values(body, arguments)
    departure = {
        name: float((value - exact[name]).square().sum() / exact[name].square().sum().clamp(min=1e-30))
        for name, value in _values(quantized.entry.body, arguments).items()
        if name in exact and value.dtype == exact[name].dtype
    }
    on_integers = {
        node.name
        for node in quantized.entry.body.graph.nodes
        if node.target in PRODUCTS and node.args[1].op == "call_function"
    }
    added = {
        node.name: departure[node.name] - departure.get(node.args[0].name, 0.0)
        for node in body.graph.nodes
        if has_constant_weight(node) and node.name in departure and node.name in on_integers
    }
    return sorted(added, key=lambda name: -added[name])


def _values(body: fx.GraphModule, arguments: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every value of floating point that a body makes, by name."""
    seen: dict[str, torch.Tensor] = {}

    class _Watcher(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, torch.Tensor) and value.is_floating_point():
                seen[n.name] = value
            return value

    _Watcher(body).run(*arguments)
    return seen
