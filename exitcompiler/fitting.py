"""From a captured backbone to candidate exits with trained heads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from exitcompiler.candidates import Candidates, chain_candidates
from exitcompiler.controlflow import Return, ValueSpec
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Extent, Rows, TrainingData
from exitcompiler.engines import Engines
from exitcompiler.flops import count_flops
from exitcompiler.heads import LinearHead, deep_head, head_flops, lower_head
from exitcompiler.naming import DEEP, LINEAR
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import split_block
from exitcompiler.placement import PROBE_ROWS, Place, choose_places, probe
from exitcompiler.profile import block_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.scores import HeadKey
from exitcompiler.settings import Settings
from exitcompiler.training import FeatureStream, train_heads

__all__ = ["Fitted", "distinct_cuts", "fit_exits"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fitted:
    """Candidate exits with their heads, and where they come from.

    Args:
        candidates: The chain and the heads; None: the network has no place for an exit.
        places: Every cut point that was looked at.
        head_flops: (exit, kind) -> floating-point operations of a head for one row.
        rows: How many training rows an epoch had; 0: they were not looked at.
    """

    candidates: Candidates | None
    places: Sequence[Place]
    head_flops: dict[HeadKey, int]
    rows: int


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
    cuts = distinct_cuts(find_cut_points(program))
    if not cuts:
        return Fitted(None, (), {}, 0)
    # A loader that shuffles draws from torch's global generator: seeded here, and left as it was found.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        data = data.for_model(program)
        extent = data.count(settings.recipe.batch_size)
        places = _places(program, cuts, data, extent, sample, engines, settings, reporter)
        chosen = [place.cut for place in places if place.chosen]
        if not chosen:
            return Fitted(None, places, {}, extent.rows)
        heads = _trained_heads(program, chosen, data, extent, settings, reporter)
    by_name = {cut.name: cut for cut in chosen}
    sizes = {key: head_flops(head, by_name[key[0]].spec) for key, head in heads.items()}
    classes = _classes(program)
    lowered = {
        key: lower_head(key, head, by_name[key[0]].value, by_name[key[0]].spec, classes)
        for key, head in heads.items()
    }
    return Fitted(chain_candidates(program, chosen, lowered), places, sizes, extent.rows)


def _places(
    program: Program,
    cuts: Sequence[CutPoint],
    data: TrainingData,
    extent: Extent,
    sample: Rows,
    engines: Engines,
    settings: Settings,
    reporter: Reporter,
) -> list[Place]:
    """Probe every cut, time the backbone to it, choose."""
    classes, logits = _classes(program), _logits(program)
    probed = min(extent.rows, PROBE_ROWS)
    with reporter.step("probing cut points", probed) as step:
        stream = FeatureStream.of(program, [*(cut.value for cut in cuts), logits])
        accuracies = probe(
            stream, cuts, data, classes, rows=probed, seed=settings.seed, step=step, target=logits
        )
    with reporter.step("timing the backbone to each cut"):
        shares = _time_shares(split_block(program, cuts), engines, sample, settings.batch_size)
    return choose_places(cuts, shares, accuracies, count=settings.max_exits, chance=_chance(sample, classes))


def _trained_heads(
    program: Program,
    cuts: Sequence[CutPoint],
    data: TrainingData,
    extent: Extent,
    settings: Settings,
    reporter: Reporter,
) -> dict[HeadKey, nn.Module]:
    """Two heads for every cut, all trained on one stream."""
    budget_flops = count_flops(program.entry.body) * settings.recipe.budget_share
    heads = _new_heads(cuts, _classes(program), budget_flops)
    value_of = {cut.name: cut.value for cut in cuts}
    target = None if extent.labelled else _logits(program)
    values = [*value_of.values(), *([target] if target else [])]
    epochs = settings.recipe.epochs_for(extent.rows)
    with reporter.step(f"training {len(heads)} exit heads", epochs * extent.batches) as step:
        train_heads(
            FeatureStream.of(program, values),
            heads,
            {key: value_of[key[0]] for key in heads},
            data,
            epochs=epochs,
            batches=extent.batches,
            recipe=settings.recipe,
            seed=settings.seed,
            step=step,
            target=target,
        )
    return heads


def _logits(program: Program) -> str:
    end = program.entry.terminator
    assert isinstance(end, Return)
    return end.values[0]


def _classes(program: Program) -> int:
    return int(program.entry.values[_logits(program)].shape[1])


def distinct_cuts(cuts: Iterable[CutPoint]) -> list[CutPoint]:
    """Cuts by name; a name that comes twice is told apart by its value."""
    seen: set[str] = set()
    distinct = []
    for cut in cuts:
        named = cut if cut.name not in seen else replace(cut, name=f"{cut.name}:{cut.value}")
        seen.add(named.name)
        distinct.append(named)
    return distinct


def _new_heads(cuts: Sequence[CutPoint], classes: int, budget_flops: float) -> dict[HeadKey, nn.Module]:
    heads: dict[HeadKey, nn.Module] = {}
    for cut in cuts:
        spec: ValueSpec = cut.spec
        heads[cut.name, LINEAR] = LinearHead(spec, classes)
        heads[cut.name, DEEP] = deep_head(spec, classes, budget_flops=budget_flops)
    return heads


def _time_shares(chain: Program, engines: Engines, sample: Rows, batch_size: int) -> list[float]:
    times = block_times_us(engines.typed(chain).blocks, engines, sample, batch_size, repeats=40)
    reached = np.cumsum(times)
    return [float(time / reached[-1]) for time in reached[:-1]]


def _chance(rows: Rows, classes: int) -> float:
    if rows.labels is None:
        return 1.0 / classes
    return float(np.bincount(rows.labels).max() / len(rows.labels))
