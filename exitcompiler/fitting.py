"""From a captured backbone to candidate exits with trained heads."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn

from exitcompiler.candidates import Candidates, chain_candidates
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Extent, Rows, TrainingData
from exitcompiler.engines import Engines
from exitcompiler.errors import TrainingError
from exitcompiler.finetuning.checkpoints import read_notes
from exitcompiler.finetuning.exit_search import search_exits
from exitcompiler.finetuning.joint_network import backbone_logits, class_count
from exitcompiler.finetuning.loop import Tuned, train_jointly
from exitcompiler.finetuning.options import FineTune
from exitcompiler.flops import count_flops
from exitcompiler.heads import LinearHead, deep_head, head_flops, lower_head
from exitcompiler.naming import DEEP, LINEAR
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import split_block
from exitcompiler.placement import PROBE_ROWS, Place, chance_level, choose_places, probe
from exitcompiler.profile import block_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.scores import HeadKey
from exitcompiler.settings import Settings
from exitcompiler.training import FeatureStream, HeadRecipe, train_at_cuts

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
        tuned: What fine-tuning came to; None: the backbone is as it was given.
        remarks: What the user should know of how it came about.
    """

    candidates: Candidates | None
    places: Sequence[Place]
    head_flops: dict[HeadKey, int]
    rows: int
    tuned: Tuned | None = None
    remarks: tuple[str, ...] = ()


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
        batch_size = settings.recipe.batch_size if settings.finetune is None else settings.finetune.batch_size
        extent = data.count(batch_size)
        places = _places(program, cuts, data, extent, sample, engines, settings, reporter)
        notes: dict[str, Any] = {}
        if settings.finetune is not None:
            places, notes = _places_to_tune(
                program, places, data, extent, sample, engines, settings, settings.finetune, reporter
            )
        chosen = [place.cut for place in places if place.chosen]
        if not chosen:
            return Fitted(None, places, {}, extent.rows)
        # Again: a training that goes on from a checkpoint did not choose places anew.
        torch.default_generator.manual_seed(settings.seed)
        heads = _new_heads(program, chosen, settings.recipe, linear=settings.finetune is None)
        tuned = None
        if settings.finetune is None:
            _train(program, chosen, heads, data, extent, settings, reporter)
        else:
            tuned = _tune(program, chosen, heads, data, extent, settings, settings.finetune, notes, reporter)
            program, heads = tuned.program, dict(tuned.heads)
    cut_of = {cut.name: cut for cut in chosen}
    sizes = {key: head_flops(head, cut_of[key[0]].spec) for key, head in heads.items()}
    lowered = {
        key: lower_head(key, head, cut_of[key[0]].value, cut_of[key[0]].spec, class_count(program))
        for key, head in heads.items()
    }
    candidates = chain_candidates(program, chosen, lowered)
    return Fitted(candidates, places, sizes, extent.rows, tuned, _remarks(chosen, settings))


def _remarks(chosen: Sequence[CutPoint], settings: Settings) -> tuple[str, ...]:
    if len(chosen) <= settings.max_exits:
        return ()
    names = ", ".join(cut.name for cut in chosen)
    return (
        f"fine-tuning went on with the {len(chosen)} exits of its checkpoint ({names}), more than "
        f"max_exits={settings.max_exits}: another checkpoint folder would have exits chosen anew",
    )


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
    classes, logits = class_count(program), backbone_logits(program)
    probed = min(extent.rows, PROBE_ROWS)
    with reporter.step("probing cut points", probed) as step:
        stream = FeatureStream.of(program, [*(cut.value for cut in cuts), logits])
        accuracies = probe(
            stream, cuts, data, classes, rows=probed, seed=settings.seed, step=step, target=logits
        )
    with reporter.step("timing the backbone to each cut"):
        shares = _time_shares(split_block(program, cuts), engines, sample, settings.batch_size)
    return choose_places(
        cuts, shares, accuracies, count=settings.max_exits, chance=chance_level(sample, classes)
    )


def _train(
    program: Program,
    cuts: Sequence[CutPoint],
    heads: Mapping[HeadKey, nn.Module],
    data: TrainingData,
    extent: Extent,
    settings: Settings,
    reporter: Reporter,
) -> None:
    """Train heads on the frozen backbone, all on one stream."""
    epochs = settings.recipe.epochs_for(extent.rows)
    with reporter.step(f"training {len(heads)} exit heads", epochs * extent.batches) as step:
        train_at_cuts(
            program, cuts, heads, data,
            epochs=epochs, batches=extent.batches, recipe=settings.recipe, seed=settings.seed, step=step,
            target=None if extent.labelled else backbone_logits(program),
        )  # fmt: skip


def _places_to_tune(
    program: Program,
    places: Sequence[Place],
    data: TrainingData,
    extent: Extent,
    sample: Rows,
    engines: Engines,
    settings: Settings,
    options: FineTune,
    reporter: Reporter,
) -> tuple[list[Place], dict[str, Any]]:
    """The places for exits of a network that is tuned, and what to remember of the choice.

    They are chosen on measured times, which are never the same twice: a training that is gone on with
    keeps those that it began with.
    """
    notes = None if options.folder is None else read_notes(options.folder)
    if notes is None:
        search = search_exits(program, places, data, extent, sample, engines, settings, reporter)
        chosen = [place.cut.name for place in search.places if place.chosen]
        return search.places, {"exits": chosen, "search": search.as_dict()}
    exits = notes.get("exits")
    if not isinstance(exits, list) or not all(isinstance(name, str) for name in exits):
        raise TrainingError(
            "the checkpoint does not say which exits it is of",
            where=str(options.folder),
            remedy="give another checkpoint folder, or remove this one",
        )
    kept = set(exits)
    lost = kept - {place.cut.name for place in places}
    if lost:
        raise TrainingError(
            f"the checkpoint is of a network with exits at {sorted(lost)}, this one has no such places",
            where=str(options.folder),
            remedy="give another checkpoint folder, or remove this one",
        )
    reasons = {True: "training went on with the exits of its checkpoint", False: "not among the checkpoint's"}
    return [
        replace(place, chosen=place.cut.name in kept, reason=reasons[place.cut.name in kept])
        for place in places
    ], notes


def _tune(
    program: Program,
    cuts: Sequence[CutPoint],
    heads: Mapping[HeadKey, nn.Module],
    data: TrainingData,
    extent: Extent,
    settings: Settings,
    options: FineTune,
    notes: Mapping[str, Any],
    reporter: Reporter,
) -> Tuned:
    """Train the backbone and its heads together."""
    value_of = {cut.name: cut.value for cut in cuts}
    reads = {key: value_of[key[0]] for key in heads}
    with reporter.step(f"fine-tuning with {len(cuts)} exits", options.epochs * extent.batches) as step:
        return train_jointly(
            program, heads, reads, data, extent, options, seed=settings.seed, step=step, notes=notes
        )


def distinct_cuts(cuts: Iterable[CutPoint]) -> list[CutPoint]:
    """Cuts by name; a name that comes twice is told apart by its value."""
    seen: set[str] = set()
    distinct = []
    for cut in cuts:
        named = cut if cut.name not in seen else replace(cut, name=f"{cut.name}:{cut.value}")
        seen.add(named.name)
        distinct.append(named)
    return distinct


def _new_heads(
    program: Program, cuts: Sequence[CutPoint], recipe: HeadRecipe, *, linear: bool
) -> dict[HeadKey, nn.Module]:
    """Untrained heads: a linear and a deep one for every cut, or the deep one alone.

    A linear head on early features would pull a network that is trained with it towards features that can be
    told apart by a line there, at the cost of all that comes after.
    """
    budget_flops = count_flops(program.entry.body) * recipe.budget_share
    classes = class_count(program)
    heads: dict[HeadKey, nn.Module] = {}
    for cut in cuts:
        if linear:
            heads[cut.name, LINEAR] = LinearHead(cut.spec, classes)
        heads[cut.name, DEEP] = deep_head(cut.spec, classes, budget_flops=budget_flops)
    return heads


def _time_shares(chain: Program, engines: Engines, sample: Rows, batch_size: int) -> list[float]:
    times = block_times_us(engines.typed(chain).blocks, engines, sample, batch_size, repeats=40)
    reached = np.cumsum(times)
    return [float(time / reached[-1]) for time in reached[:-1]]
