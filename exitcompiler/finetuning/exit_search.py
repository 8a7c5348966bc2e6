"""Chooses the exits that are worth fine-tuning, before hours are spent on it.

Heads are trained for a short while on the frozen network, and every small set of them is judged by the
mean time that one shared threshold reaches. That is a proxy, and good for ranking sets only:

- features are those of the untuned network; tuning helps early exits more than late ones;
- rows are training rows, on which the network itself is nearly always right, so that speed-ups are lower
  than they will be on fresh rows, and one point of accuracy is harder to keep;
- gates that are learned later do better than a shared threshold.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import nn

from exitcompiler.candidates import chain_candidates
from exitcompiler.costs import CostModel
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Extent, Rows, TrainingData
from exitcompiler.engines import Engines
from exitcompiler.finetuning.exit_ranking import JudgedSet, rank_sets
from exitcompiler.finetuning.joint_network import backbone_logits, class_count
from exitcompiler.flops import count_flops
from exitcompiler.heads import deep_head, lower_head
from exitcompiler.naming import DEEP
from exitcompiler.placement import Place, chance_level, choose_places
from exitcompiler.profile import measure_costs
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, Step
from exitcompiler.scores import HeadKey, HeadScores, ScoreTable
from exitcompiler.settings import DEFAULT_DROP, Settings
from exitcompiler.topology import Topology
from exitcompiler.training import FeatureStream, HeadRecipe, train_at_cuts

__all__ = ["ExitSearch", "search_exits"]

logger = logging.getLogger(__name__)

CANDIDATES: Final = 7
"""Places to choose from: 63 sets of up to three."""

ROW_BUDGET: Final = 60_000
MOST_PASSES: Final = 16
JUDGED_ROWS: Final = 5000
HELD_OUT: Final = 0.25
SHOWN: Final = 6


@dataclass(frozen=True, slots=True)
class ExitSearch:
    """Which exits to fine-tune, and why.

    Args:
        places: All places that were given, those of the chosen set marked, each with a reason.
        tried: The chosen set, then the fastest of the others; empty: there was nothing to choose from.
        sets: How many sets were compared.
        within: The accuracy drop that they had to keep.
        asked: The drop that was asked for, which may be tighter.
        rows: How many rows they were judged on.
        seconds: How long it took.
    """

    places: list[Place]
    tried: tuple[JudgedSet, ...] = ()
    sets: int = 0
    within: float = 0.0
    asked: float = 0.0
    rows: int = 0
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """For the report, without the places, which have an entry of their own there."""
        tried = [{**asdict(judged), "exits": list(judged.exits)} for judged in self.tried]
        return {
            "tried": tried, "sets": self.sets, "within": self.within, "asked": self.asked,
            "rows": self.rows, "seconds": self.seconds,
        }  # fmt: skip


def search_exits(
    program: Program,
    places: Sequence[Place],
    data: TrainingData,
    extent: Extent,
    sample: Rows,
    engines: Engines,
    settings: Settings,
    reporter: Reporter,
) -> ExitSearch:
    """Compare sets of exits among a few places, and choose the one that is expected to be fastest.

    Args:
        program: The captured network, one block.
        places: All cuts, with times and probes; which of them are chosen does not count.
        data: Where rows come from; it checks them (``TrainingData.for_model``).
        extent: Of one pass of ``data``, in the batches of fine-tuning.
        sample: A few rows to measure times on.
        engines: Of the backend that the program will run on.
        settings: The drop to keep, how many exits at most, seed, the heads' recipe.
        reporter: Progress.

    Raises:
        CalibrationError: The training data cannot be used.
        LoweringError: A block cannot be lowered.
    """
    places = _candidates(program, places, sample)
    cuts = [place.cut for place in places if place.chosen]
    if len(cuts) < 2:
        return ExitSearch(places)
    started = time.monotonic()
    recipe = settings.recipe
    if settings.finetune is not None:
        recipe = replace(recipe, batch_size=settings.finetune.batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)
        fit, judge, extent = _held_out(data, extent, recipe.batch_size, settings.seed)
        heads = _trained(program, cuts, fit, extent, recipe, settings.seed, reporter)
        judged = min(JUDGED_ROWS, extent.rows)
        with reporter.step("scoring rows to compare exits", judged) as step:
            table = _scored(program, cuts, heads, judge, recipe.batch_size, settings.seed, judged, step)
    with reporter.step("timing segments and heads to compare exits"):
        costs = _measured(program, cuts, heads, sample, engines, settings)
    limit = DEFAULT_DROP if settings.drop_limit is None else settings.drop_limit
    with reporter.step("comparing sets of exits"):
        ranked, within = rank_sets(table, costs, limit, settings.max_exits)
    best, *others = ranked
    chosen = ", ".join(best.exits)
    logger.info("of %d sets of exits %s is expected to be fastest: %.2fx", len(ranked), chosen, best.speedup)
    return ExitSearch(
        places=[_with_reason(place, ranked) for place in places],
        tried=(best, *others[: SHOWN - 1]),
        sets=len(ranked),
        within=within,
        asked=limit,
        rows=table.rows,
        seconds=time.monotonic() - started,
    )


def _candidates(program: Program, places: Sequence[Place], sample: Rows) -> list[Place]:
    """The places with those marked that sets are made of, spread over the network's time."""
    cuts = [place.cut for place in places]
    shares = [place.time_share for place in places]
    accuracies = [place.probe_accuracy for place in places]
    chance = chance_level(sample, class_count(program))
    return choose_places(cuts, shares, accuracies, count=CANDIDATES, chance=chance)


def _held_out(
    data: TrainingData, extent: Extent, batch_size: int, seed: int
) -> tuple[TrainingData, TrainingData, Extent]:
    """What heads are trained on, what they are judged on, and the extent of the former.

    Of rows in memory a quarter is kept apart. A loader's rows cannot be told apart from one pass to the
    next: there heads are judged on rows as the loader draws them once more. They have seen these at most
    a few times, in other guises where it augments; all heads are of one size and have seen them as often,
    which favours none.
    """
    if not isinstance(data.source, Rows):
        return data, data, extent
    order = np.random.default_rng(seed).permutation(len(data.source))
    apart, left = np.split(order, [round(HELD_OUT * len(order))])
    fit, judge = (replace(data, source=data.source.take(np.sort(part))) for part in (left, apart))
    return fit, judge, fit.count(batch_size)


def _trained(
    program: Program,
    cuts: Sequence[CutPoint],
    data: TrainingData,
    extent: Extent,
    recipe: HeadRecipe,
    seed: int,
    reporter: Reporter,
) -> dict[HeadKey, nn.Module]:
    """A deep head for every cut, trained on about ``ROW_BUDGET`` rows of the frozen network."""
    classes = class_count(program)
    budget_flops = count_flops(program.entry.body) * recipe.budget_share
    heads = {(cut.name, DEEP): deep_head(cut.spec, classes, budget_flops=budget_flops) for cut in cuts}
    passes = max(1, min(MOST_PASSES, round(ROW_BUDGET / extent.rows)))
    batches = min(extent.batches, math.ceil(extent.batches * ROW_BUDGET / extent.rows))
    with reporter.step(f"training {len(heads)} heads to compare exits", passes * batches) as step:
        train_at_cuts(
            program, cuts, heads, data, epochs=passes, batches=batches, recipe=recipe, seed=seed, step=step,
            target=None if extent.labelled else backbone_logits(program),
        )  # fmt: skip
    return heads


@torch.no_grad()
def _scored(
    program: Program,
    cuts: Sequence[CutPoint],
    heads: Mapping[HeadKey, nn.Module],
    data: TrainingData,
    batch_size: int,
    seed: int,
    rows: int,
    step: Step,
) -> ScoreTable:
    """The logits of every head and of the network on the first ``rows`` rows of a pass, or a few more."""
    logits = backbone_logits(program)
    stream = FeatureStream.of(program, [*(cut.value for cut in cuts), logits])
    found: dict[HeadKey, list[np.ndarray]] = {key: [] for key in heads}
    whole: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    seen = 0
    for inputs, known in data.epoch(batch_size, torch.Generator().manual_seed(seed + 1)):
        values = stream(inputs)
        whole.append(values[logits].float().numpy())
        labels += [] if known is None else [known]
        for cut, (key, head) in zip(cuts, heads.items(), strict=True):
            with stream.autocast():
                found[key].append(head(values[cut.value]).float().numpy())
        seen += len(whole[-1])
        step.advance(len(whole[-1]))
        if seen >= rows:
            break
    scores = {key: HeadScores(*key, np.concatenate(parts)) for key, parts in found.items()}
    topology = Topology.chain([cut.name for cut in cuts])
    return ScoreTable(topology, scores, np.concatenate(whole), np.concatenate(labels) if labels else None)


def _measured(
    program: Program,
    cuts: Sequence[CutPoint],
    heads: Mapping[HeadKey, nn.Module],
    sample: Rows,
    engines: Engines,
    settings: Settings,
) -> CostModel:
    """Times of segments, heads and gates, as the compiler measures them later."""
    lowered = {
        key: lower_head(key, head, cut.value, cut.spec, class_count(program))
        for cut, (key, head) in zip(cuts, heads.items(), strict=True)
    }
    candidates = engines.typed_candidates(chain_candidates(program, cuts, lowered))
    return measure_costs(candidates, [engines.typed(program)], engines, sample, settings.batch_size)


def _with_reason(place: Place, ranked: Sequence[JudgedSet]) -> Place:
    """A place marked as chosen or not by what was found, with the reason."""
    if not place.chosen:
        return place
    best, name = ranked[0], place.cut.name
    if name in best.exits:
        return replace(
            place, reason=f"in the set of exits that was expected to be fastest: {best.speedup:.2f}x"
        )
    reason = f"not in the set of exits that was expected to be fastest ({best.speedup:.2f}x)"
    with_it = next((judged.speedup for judged in ranked if name in judged.exits), None)
    best_with_it = (
        "no set with it kept the accuracy" if with_it is None else f"with it at best {with_it:.2f}x"
    )
    return replace(place, chosen=False, reason=f"{reason}: {best_with_it}")
