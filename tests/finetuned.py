"""What tests of compiling with fine-tuning share: a small trained network, and short cuts."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from trained import SmallResNet, _trained, stripes

from exitcompiler import cascade_findings, compiler, delivery, fitting, profile, selection
from exitcompiler.costs import CostModel
from exitcompiler.finetuning import exit_search
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted
from exitcompiler.frontier import sweep
from exitcompiler.fx_utils import extract_body
from exitcompiler.gates import RECIPES
from exitcompiler.program import Return

CALIBRATION = stripes(600, seed=2)
TRAINING = stripes(640, seed=3)
FRESH = stripes(80, seed=4)
HARMFUL = {"lr": 1.0, "adamw_lr": 0.1}
"""Rates at which a network forgets."""


@functools.cache
def network() -> SmallResNet:
    """Four convolutions, trained; nobody may change it."""
    return _trained(8, 3, rate=1e-2)


@functools.cache
def smaller_network() -> SmallResNet:
    """Three of them, narrow, which know less."""
    return _trained(4, 2, rate=2e-2)


def tuning_of(**changed: Any) -> FineTune:
    """One short pass; rates that do no harm."""
    options = {
        "epochs": 1, "batch_size": 64, "lr": 0.005, "adamw_lr": 5e-4, "head_lr": 0.05, "head_adamw_lr": 4e-3,
        "mixed_precision": False, "device": "cpu", "freeze_batchnorm": False,
    }  # fmt: skip
    return FineTune(**{**options, **changed})


def _fixed_costs(candidates: Any, *_: Any) -> CostModel:
    """A network costs three times as much as the one before it."""
    topology = candidates.topology
    segments = tuple(100.0 * 3**number for number in topology.network_of)
    last = topology.network_of[-1]
    whole = sum(cost for cost, number in zip(segments, topology.network_of, strict=True) if number == last)
    return CostModel(segments, dict.fromkeys(candidates.heads, 10.0), 1.0, whole)


def _fixed_costs_of_heads(program: Any, cuts: Sequence[Any], heads: Mapping[Any, Any], *_: Any) -> CostModel:
    return CostModel((100.0,) * (len(cuts) + 1), dict.fromkeys(heads, 10.0), 1.0)


def _even_shares(chain: Any, *_: Any) -> list[float]:
    return [(place + 1) / len(chain.blocks) for place in range(len(chain.blocks) - 1)]


@contextlib.contextmanager
def quick() -> Iterator[None]:
    """Few rows, trade-offs and repeats; and segments and heads whose times are the same on every machine."""

    def coarse(*given: Any, **options: Any) -> Any:
        return sweep(*given, **{**options, "steps": 6, "folds": 2, "recipes": RECIPES[1:2]})

    changes = {
        compiler: {"measure_costs": _fixed_costs},
        fitting: {"_time_shares": _even_shares},
        exit_search: {"_measured": _fixed_costs_of_heads, "ROW_BUDGET": 1500, "CANDIDATES": 3},
        selection: {"sweep": coarse, "ROUNDS": 1, "SHIPPED_DROPS": ()},
        delivery: {"WORTHWHILE": -1.0, "SPEEDUP_REPEATS": 60},
        cascade_findings: {"STEPS": 2, "THRESHOLD_STEPS": 4},
        profile: {"LIMIT_S": 0.2},
    }
    with contextlib.ExitStack() as stack:
        for module, values in changes.items():
            stack.enter_context(mock.patch.multiple(module, **values))
        yield


@torch.no_grad()
def answers(model: nn.Module, x: np.ndarray) -> np.ndarray:
    """Logits of a network, by hand."""
    logits = model(torch.from_numpy(x))
    assert isinstance(logits, Tensor)
    return logits.numpy()


@torch.no_grad()
def tuned_answers(fitted: Fitted, x: np.ndarray) -> dict[str, np.ndarray]:
    """Logits of every exit of a tuned network, and of its end as "backbone", by hand, without any engine."""
    assert fitted.tuned is not None
    block = fitted.tuned.program.entry
    assert isinstance(block.terminator, Return)
    value_of = {place.cut.name: place.cut.value for place in fitted.places if place.chosen}
    wanted = [*(value_of[name] for name, _ in fitted.tuned.heads), block.terminator.values[0]]
    *values, logits = extract_body(block.body, list(block.params), wanted)(torch.from_numpy(x))
    exits = {
        name: head(value).numpy()
        for ((name, _), head), value in zip(fitted.tuned.heads.items(), values, strict=True)
    }
    return {**exits, "backbone": logits.numpy()}


def never_again(what: str) -> Any:
    """Stands for a step that must not be reached."""

    def fail(*given: Any, **options: Any) -> None:
        raise AssertionError(f"{what} was reached")

    return fail


def kept(folder: Path) -> dict[str, bytes]:
    """The files under a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
