"""What the fine-tuning benchmark compiles, and what is kept of it: artifacts, figures, re-splits."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from cascade_use import resplit_program
from cifar import AugmentedImages, load_resnet
from cifar10_compile import compile_cascade, compile_frozen, compiled_figures, settings_of
from cifar10_contenders import logits_in_batches, open_static, static_artifact, without_exits
from cifar10_finetune_clock import TimedBatches, TrainingClock
from cifar10_frontiers import score_all
from cifar10_setup import THREADS, Figures, Job

import exitcompiler
from exitcompiler.cascades import CascadeOptions, cascade_in_detail
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.finetuning.options import FineTune
from exitcompiler.gates import RECIPES as GATE_RECIPES
from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["MADE", "Made", "make", "models_of", "statics_of", "tuned_name"]

DEPTHS: Final = (20, 32, 44, 56)
MAX_EXITS: Final = 3
"""The same in cascades, so that their members are the networks that were tuned alone."""

BACKEND: Final = "onnxruntime"


@dataclass(frozen=True)
class Made:
    """A program that is compiled for the benchmark.

    Args:
        name: In tables; also of the stage that makes it.
        file: Of its artifact, without the ending.
        depths: Its networks; the last one is what drops count from.
        tuned: Networks are trained together with their exits.
        lossless: It was asked for no drop at all.
        optional: Its part, if it can be left out.
    """

    name: str
    file: str
    depths: tuple[int, ...]
    tuned: bool = True
    lossless: bool = False
    optional: str = ""

    @property
    def reference(self) -> str:
        """The network that it is measured against."""
        return f"ResNet-{self.depths[-1]}"


MADE: Final = (
    Made("ResNet-20 tuned", "tuned-resnet20", (20,)),
    Made("ResNet-20 tuned, limit 0", "tuned-resnet20-limit-0", (20,), lossless=True),
    Made("ResNet-56 tuned", "tuned-resnet56", (56,)),
    Made("ResNet-56 tuned, limit 0", "tuned-resnet56-limit-0", (56,), lossless=True),
    Made("cascade tuned", "tuned-cascade", (20, 56)),
    Made("ResNet-56 frozen", "frozen-resnet56", (56,), tuned=False, optional="frozen"),
    Made("cascade as given", "cascade", (20, 56), tuned=False, optional="cascade"),
)


def tuned_name(depth: int) -> str:
    """What the last exit alone of a tuned network is called: a network without exits."""
    return f"ResNet-{depth} tuned, no exits"


def make(job: Job, made: Made, recipes: Mapping[int, FineTune], figures: Figures) -> None:
    """Compile a program, save it with its report, judge its gates over re-splits.

    Args:
        job: Development rows calibrate.
        made: Which program.
        recipes: Depth -> how that network is tuned.
        figures: Gets a stage of the program's name.
    """
    with figures.stage(made.name) as found:
        details, compiled = _compiled(job, made, recipes)
        found |= compiled
        details.compiled.save(job.out / f"{made.file}.exit")
        details.compiled.report(job.out / f"{made.file}.html")
        for depth, fitted in zip(made.depths, details.fitted, strict=False):
            if fitted.tuned is not None:
                whole = without_exits(job, fitted.tuned.program, _structure(details))
                open_static(whole, BACKEND).save(_path(job, tuned_name(depth)))
        found["places"] = {
            str(depth): [place.cut.name for place in fitted.places if place.chosen]
            for depth, fitted in zip(made.depths, details.fitted, strict=False)
        }
        found["finetune"] = details.compiled.artifact.report.get("finetune", {})
        found["resplits"] = {} if made.lossless else _resplits(job, made, details)


def _structure(details: Details) -> Any:
    return details.compiled.artifact.manifest.output_structure


def _compiled(job: Job, made: Made, recipes: Mapping[int, FineTune]) -> tuple[Details, dict[str, Any]]:
    if not made.tuned:
        pair = replace(job, effort=replace(job.effort, networks=made.depths))
        if len(made.depths) > 1:
            return compile_cascade(pair, early_exits=False)
        return compile_frozen(job)
    with _clocks(job, made) as (clocks, images):
        tunings = [
            replace(recipes[depth], train_data=images[depth], checkpoint=_folder(job, depth))
            for depth in made.depths
        ]
        started = time.monotonic()
        details = _tuned(job, made, tunings)
        seconds = time.monotonic() - started
        for depth, tuning, fitted in zip(made.depths, tunings, details.fitted, strict=True):
            trained = fitted.tuned is not None and fitted.tuned.resumed_at < tuning.epochs
            clocks[depth].stop(trained=trained)
    training = {str(depth): clocks[depth].read() for depth in made.depths}
    return details, {**compiled_figures(details, seconds), "training": training}


def _tuned(job: Job, made: Made, tunings: list[FineTune]) -> Details:
    settings = replace(
        settings_of(job),
        max_accuracy_drop=0.0 if made.lossless else job.effort.max_drop,
        max_exits=MAX_EXITS,
    )
    models = [load_resnet(job.weights, depth) for depth in made.depths]
    rows = job.split.x, job.split.y
    if len(models) == 1:
        return compile_in_detail(models[0], rows, None, replace(settings, finetune=tunings[0]))
    names = [f"resnet{depth}" for depth in made.depths]
    options = CascadeOptions(names=names, early_exits=True, finetune=tunings)
    return cascade_in_detail(models, rows, None, settings, options)


@contextmanager
def _clocks(job: Job, made: Made) -> Iterator[tuple[dict[int, TrainingClock], dict[int, TimedBatches]]]:
    """A clock for the training of each network, and the images that drive it."""
    facts = {"rows": len(job.split.train_labels), "threads": torch.get_num_threads(), "program": made.name}
    clocks = {depth: TrainingClock(_folder(job, depth) / "time.json", facts) for depth in made.depths}
    # Torch's own generator draws, whose state is in the checkpoints.
    augmented = AugmentedImages(job.split.train_pixels, job.split.train_labels, seed=None)
    images = {depth: clock.over(augmented) for depth, clock in clocks.items()}
    try:
        yield clocks, images
    finally:
        for clock in clocks.values():
            clock.write()


def _folder(job: Job, depth: int) -> Path:
    return job.out / "finetune" / f"resnet{depth}"


def _resplits(job: Job, made: Made, details: Details) -> dict[str, Any]:
    """Gates learned on random halves of the test rows, for the limit asked for and for none."""
    if details.candidates is None or details.selection is None:
        return {}
    table, _ = score_all(details.candidates, details.engines, job.split)
    if made.tuned:
        original = open_static(static_artifact(job, made.depths[-1]), BACKEND)
        rows = np.concatenate([job.split.x, job.split.final_x])
        table = replace(table, original_logits=logits_in_batches(original, rows))
    if len(made.depths) > 1:  # by the recipe that it came out with: there is more to learn
        recipes, steps = (details.selection.frontier.recipe,), job.effort.part_steps
    else:
        recipes, steps = GATE_RECIPES, job.effort.sweep_steps
    limits = {"asked": job.effort.max_drop, "not_lower": 0.0}
    return resplit_program(table, details.costs, job.effort.resplits, limits, recipes, steps)


def models_of(job: Job, wanted: tuple[Made, ...]) -> dict[str, CompiledModel]:
    """What was saved, opened again: by name, with one thread."""
    return {made.name: _load(job.out / f"{made.file}.exit") for made in wanted}


def statics_of(job: Job) -> dict[str, CompiledModel]:
    """The networks without exits: as they were given, from ResNet-56 down; then the tuned ones."""
    given = {f"ResNet-{d}": open_static(static_artifact(job, d), BACKEND) for d in reversed(DEPTHS)}
    tuned = [tuned_name(depth) for depth in (56, 20)]
    return given | {name: _load(_path(job, name)) for name in tuned if _path(job, name).exists()}


def _load(path: Path) -> CompiledModel:
    return exitcompiler.load(path, BACKEND, threads=THREADS)


def _path(job: Job, name: str) -> Path:
    return job.out / f"{name.lower().replace(',', '').replace(' ', '-')}.exit"
