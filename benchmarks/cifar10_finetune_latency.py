"""What the fine-tuning benchmark measures on the wall clock: table, headline points, frontiers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from cascade_domination import RowsOf, domination
from cifar10_contenders import PLAIN, Contender, answers
from cifar10_finetune_programs import Made, tuned_name
from cifar10_latency import WARMUP, final_figure
from cifar10_setup import SEED, Job

from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.timing import measure_interleaved

__all__ = [
    "GIVEN",
    "GIVEN_AND_TUNED",
    "SERIES",
    "contenders",
    "finals",
    "frontiers",
]

ENGINE: Final = "ONNX Runtime fp32"
SMALLER: Final = "ResNet-20"

GIVEN: Final = "networks as given"
GIVEN_AND_TUNED: Final = "networks as given, and tuned without exits"
SERIES: Final = {
    "ResNet-56 tuned": ("ResNet-56 tuned", "ResNet-56 tuned, limit 0"),
    "ResNet-20 tuned": ("ResNet-20 tuned", "ResNet-20 tuned, limit 0"),
    "cascade tuned": ("cascade tuned",),
    "ResNet-56 frozen": ("ResNet-56 frozen",),
    "cascade as given": ("cascade as given",),
}
"""A frontier -> the programs whose points are on it."""


def contenders(
    made: Sequence[Made], models: Mapping[str, CompiledModel], statics: Mapping[str, CompiledModel]
) -> list[Contender]:
    """Everything that is compared; ResNet-56 as it was given first.

    Args:
        made: What was compiled.
        models: Those, by name.
        statics: Networks without exits, by name.
    """
    found = []
    for name, model in statics.items():
        kind = "plain" if name == PLAIN else ("tuned" if name in _tuned_names() else "static")
        beside = SMALLER if name == tuned_name(20) else ""
        found.append(Contender(name, kind, ENGINE, model, beside=beside))
    for program in made:
        model = models[program.name]
        beside = SMALLER if program.reference == SMALLER else ""
        for point in model.operating_points:
            if point.name != model.plain.operating_point.name:
                chosen = point.name == model.operating_point.name
                name, here = f"{program.name}, {point.name}", model.select(name=point.name)
                found.append(Contender(name, "program", ENGINE, here, chosen, program.name, beside))
    return found


def _tuned_names() -> tuple[str, ...]:
    return tuned_name(20), tuned_name(56)


def finals(
    job: Job, made: Sequence[Made], models: Mapping[str, CompiledModel], statics: Mapping[str, CompiledModel]
) -> dict[str, Any]:
    """The point of each program that was asked for, in turns with its reference network as it was given."""
    return {
        program.name: {
            **final_figure(job, models[program.name], statics[program.reference]),
            "reference": program.reference,
        }
        for program in made
    }


@dataclass(frozen=True)
class _Measured:
    """Row by row on all final rows: contender -> drops against ResNet-56, and times."""

    drops: Mapping[str, np.ndarray]
    times_us: Mapping[str, np.ndarray]

    def rows_of(self, names: Sequence[str]) -> RowsOf:
        """Those of some contenders."""
        return [self.drops[name] for name in names], [self.times_us[name] for name in names]


def frontiers(job: Job, found: Sequence[Contender]) -> dict[str, Any]:
    """Each series of points against the networks without exits, at given accuracies.

    Every contender answers every final row once, all taking turns. Of any two points of a family, and
    of the networks, a share of the rows may go to either, at random: between two networks lies whatever
    is on the line from one to the other. ResNet-56 as it was given belongs to every family.

    Args:
        job: Final rows.
        found: What is compared.

    Returns:
        ``reference_accuracy``; ``series``: per series ``domination``'s figures against both families of
        networks.
    """
    measured = _measure(job, found)
    plain_us = float(measured.times_us[PLAIN].mean())
    accuracy = float(np.mean(_right(job, next(c.model for c in found if c.name == PLAIN))))
    given = [c.name for c in found if c.kind in ("plain", "static")]
    networks = {GIVEN: given, GIVEN_AND_TUNED: [*given, *(c.name for c in found if c.kind == "tuned")]}
    series: dict[str, Any] = {}
    for name, programs in SERIES.items():
        ours = [c.name for c in found if c.series in programs]
        if ours:
            points = {name: [PLAIN, *ours], **networks}
            families = {family: measured.rows_of(members) for family, members in points.items()}
            series[name] = domination(name, families, accuracy, plain_us, mixed=True)
    return {"reference_accuracy": accuracy, "plain_us": plain_us, "series": series}


def _measure(job: Job, found: Sequence[Contender]) -> _Measured:
    inputs = [(row[None],) for row in job.split.final_x]
    models = {c.name: c.model for c in found}
    times_us = measure_interleaved(models, inputs, repeats=len(inputs), warmup=WARMUP, seed=SEED)
    right = {name: _right(job, model).astype(np.float64) for name, model in models.items()}
    return _Measured({name: right[PLAIN] - hits for name, hits in right.items()}, times_us)


def _right(job: Job, model: CompiledModel) -> np.ndarray:
    return np.asarray(answers(model, job.split.final_x)[0] == job.split.final_y)
