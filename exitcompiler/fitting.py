"""From a captured backbone to candidate exits with trained heads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from exitcompiler.candidates import Candidates
from exitcompiler.controlflow import Return, ValueSpec
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Rows, TrainingData
from exitcompiler.engines import Engines
from exitcompiler.errors import CalibrationError
from exitcompiler.flops import count_flops
from exitcompiler.heads import LinearHead, deep_head, head_flops, lower_head
from exitcompiler.naming import DEEP, LINEAR
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import block_name, split_block
from exitcompiler.placement import PROBE_ROWS, Place, choose_places, probe
from exitcompiler.profile import block_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.scores import HeadKey
from exitcompiler.settings import Settings
from exitcompiler.training import FeatureStream, train_heads

__all__ = ["Fitted", "fit_exits"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """Candidate exits with their heads, and where they come from.

    Args:
        candidates: The chain and the heads; None: the network has no place for an exit.
        places: Every cut point that was looked at.
        head_flops: (exit, kind) -> floating-point operations of a head for one row.
        backbone_flops: Of the whole network for one row.
        rows: How many training rows an epoch had.
        epochs: How many epochs the heads were trained for.
    """

    candidates: Candidates | None
    places: Sequence[Place]
    head_flops: dict[HeadKey, int]
    backbone_flops: int
    rows: int
    epochs: int


def fit_exits(
    program: Program,
    data: TrainingData,
    sample: Rows,
    engines: Engines,
    settings: Settings,
    reporter: Reporter,
) -> Fitted:
    """Find cut points, probe them, train heads at the promising ones.

    Args:
        program: The captured backbone, one block.
        data: What heads are fitted on.
        sample: A few rows to measure times on.
        engines: For measuring how long the backbone takes to each cut.
        settings: Seed, recipe, how many exits at most.
        reporter: Progress.

    Raises:
        CalibrationError: The training data cannot be used.
        LoweringError: A block cannot be lowered.
    """
    flops = count_flops(program.entry.body)
    cuts = _distinct(find_cut_points(program))
    if not cuts:
        return Fitted(None, (), {}, flops, 0, 0)
    end = program.entry.terminator
    assert isinstance(end, Return)
    logits = end.values[0]
    classes = int(program.entry.values[logits].shape[1])
    rows, batches = _count(data, settings.recipe.batch_size)
    probed = min(rows, PROBE_ROWS)
    with reporter.step("probing cut points", probed) as step:
        stream = FeatureStream.of(program, [*(cut.value for cut in cuts), logits])
        accuracies = probe(
            stream, cuts, data, classes, rows=probed, seed=settings.seed, step=step, target=logits
        )
    with reporter.step("timing the backbone to each cut"):
        shares = _time_shares(split_block(program, cuts), engines, sample, settings.batch_size)
    places = choose_places(
        cuts, shares, accuracies, count=settings.max_exits, chance=_chance(sample, classes)
    )
    chosen = [place.cut for place in places if place.chosen]
    if not chosen:
        return Fitted(None, places, {}, flops, rows, 0)
    torch.manual_seed(settings.seed)
    heads = _new_heads(chosen, classes, flops * settings.recipe.budget_share)
    sizes = {key: head_flops(head, _cut(chosen, key).spec) for key, head in heads.items()}
    target = logits if _unlabelled(data) else None
    values = [*(cut.value for cut in chosen), *([logits] if target else [])]
    epochs = settings.recipe.epochs_for(rows)
    with reporter.step(f"training {len(heads)} exit heads", epochs * batches) as step:
        train_heads(
            FeatureStream.of(program, values),
            heads,
            {key: _cut(chosen, key).value for key in heads},
            data,
            rows=rows,
            batches=batches,
            recipe=replace(settings.recipe, epochs=epochs),
            seed=settings.seed,
            step=step,
            target=target,
        )
    chain = split_block(program, chosen)
    lowered = {
        key: lower_head(key, head, _cut(chosen, key).value, _cut(chosen, key).spec, classes)
        for key, head in heads.items()
    }
    blocks = [block.name for block in chain.blocks]
    block_of = {cut.name: name for cut, name in zip(chosen, blocks, strict=False)}
    assert all(block_of[cut.name].startswith(block_name(cut.name)) for cut in chosen)
    candidates = Candidates(chain, tuple(cut.name for cut in chosen), block_of, lowered)
    return Fitted(candidates, places, sizes, flops, rows, epochs)


def _distinct(cuts: Iterable[CutPoint]) -> list[CutPoint]:
    """Cuts by name; a name that comes twice is told apart by its value."""
    seen: set[str] = set()
    distinct = []
    for cut in cuts:
        named = cut if cut.name not in seen else replace(cut, name=f"{cut.name}:{cut.value}")
        seen.add(named.name)
        distinct.append(named)
    return distinct


def _cut(cuts: Sequence[CutPoint], key: HeadKey) -> CutPoint:
    return next(cut for cut in cuts if cut.name == key[0])


def _new_heads(cuts: Sequence[CutPoint], classes: int, budget_flops: float) -> dict[HeadKey, nn.Module]:
    heads: dict[HeadKey, nn.Module] = {}
    for cut in cuts:
        spec: ValueSpec = cut.spec
        heads[cut.name, LINEAR] = LinearHead(spec, classes)
        heads[cut.name, DEEP] = deep_head(spec, classes, budget_flops=budget_flops)
    return heads


def _time_shares(chain: Program, engines: Engines, sample: Rows, batch_size: int) -> list[float]:
    times = block_times_us(chain.blocks, engines, sample, batch_size, repeats=40)
    reached = np.cumsum(times)
    return [float(time / reached[-1]) for time in reached[:-1]]


def _chance(rows: Rows, classes: int) -> float:
    if rows.labels is None:
        return 1.0 / classes
    return float(np.bincount(rows.labels).max() / len(rows.labels))


def _count(data: TrainingData, batch_size: int) -> tuple[int, int]:
    """Rows and batches in an epoch."""
    source: Any = data.source
    if isinstance(source, Rows):
        return len(source), -(-len(source) // batch_size)
    rows = batches = 0
    generator = torch.Generator().manual_seed(0)
    for inputs, _ in data.epoch(batch_size, generator):
        rows += len(next(iter(inputs.values())))
        batches += 1
        if batches == 1 and hasattr(source, "__len__"):
            return rows * len(source), len(source)
    if rows == 0:
        raise CalibrationError("there are no rows", where="train_data")
    return rows, batches


def _unlabelled(data: TrainingData) -> bool:
    _, labels = next(iter(data.epoch(2, torch.Generator().manual_seed(0))))
    return labels is None
