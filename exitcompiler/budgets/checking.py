"""``exitcompiler.check``: whether a compiled program keeps a budget, measured until the answer is clear."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, Final

from exitcompiler.budgets.answering import answer, gather_rows
from exitcompiler.budgets.baseline import write_baseline
from exitcompiler.budgets.baseline_use import comparable, find_baseline
from exitcompiler.budgets.causes import find_causes
from exitcompiler.budgets.environment import differences, environment_of, version_changes
from exitcompiler.budgets.figures import Measurement, ProcessFigures
from exitcompiler.budgets.fit import require_fit
from exitcompiler.budgets.intervals import level_of_look
from exitcompiler.budgets.judging import judge
from exitcompiler.budgets.limits import Budget
from exitcompiler.budgets.outcomes import CheckReport, Outcome
from exitcompiler.budgets.processes import Job, Processes
from exitcompiler.budgets.reading import read_budget
from exitcompiler.data_sources import load_data
from exitcompiler.errors import BudgetError, InputError
from exitcompiler.image_folder import ImagePreprocessing
from exitcompiler.progress import reporting
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import open_artifact

__all__ = ["check"]

FIRST_LOOK: Final = 6
"""Processes before the first look, and in a baseline: a bootstrap over fewer says little."""
GROWTH: Final = 1.5
"""By how much there are more at each further look."""
FEWEST: Final = 3
"""Processes that are measured however long they take."""


def check(
    artifact: str | os.PathLike[str],
    budget: str | os.PathLike[str] | Budget,
    data: Any,
    *,
    baseline: str | os.PathLike[str] | None = None,
    update_baseline: bool = False,
    max_seconds: float = 60.0,
    max_rows: int | None = None,
    backend: str | None = None,
    threads: int | None = None,
    preprocessing: ImagePreprocessing | None = None,
    seed: int = 0,
) -> CheckReport:
    """Measure a compiled program and judge every limit of a budget.

    All rows are answered once, by the program and by the plain backbone in it. Times are measured in fresh
    processes, in which the two take turns on the same rows, and judged by a bootstrap over processes: after
    six of them, then after half as many again, until every interval was on one side of its limit or the time
    is up.

    Args:
        artifact: What ``save`` wrote.
        budget: A ``budget.toml``, or one that is read already.
        data: Held-out rows, with labels where accuracy is limited: DATA as on the command line (an ``.npz``
            file, a folder of images, ``package.module:factory``), or a pair (inputs, labels) of arrays, or an
            iterable of batches.
        baseline: Compare with this file, and not the one that the budget names.
        update_baseline: Measure until ``max_seconds`` are over, and write that as the new baseline; limits on
            changes are still judged against the old one, if there is one.
        max_seconds: When to stop measuring, even if something is still inconclusive. The rows are answered
            however long it takes, and at least three processes are measured, or six for a baseline.
        max_rows: Use only the first rows; None: as the budget says, else all.
        backend: As for ``load``; None: as the budget says, else the artifact's.
        threads: Per call; likewise.
        preprocessing: Of images, where ``data`` names a folder of them.
        seed: Of the choice of rows, their order, and the bootstrap.

    Returns:
        An outcome for each limit, the causes of a change, and all figures.

    Raises:
        BudgetError: The budget or the baseline cannot be read, contradicts itself, or does not fit the
            program or the data; or a limit needs a baseline that is not there.
        ArtifactError: The artifact is missing or damaged.
        BackendUnavailableError: The backend is not installed.
        CalibrationError: There are no rows.
        InputError: The rows do not fit the program, or an argument makes no sense.
        MeasurementError: A process that measures crashed, was killed, or hung.
    """
    began = time.perf_counter()
    _require_sense(artifact, max_seconds, seed)
    if not isinstance(budget, Budget):
        budget = read_budget(Path(budget))
    budget = _with_arguments(budget, baseline, backend, threads, max_rows)
    before, notes = find_baseline(budget, update=update_baseline)
    program, plain = _open(Path(artifact), budget)
    pool = gather_rows(_rows_of(program, data, preprocessing), budget.run.max_rows)
    require_fit(budget, program.exits, labelled=pool.labels is not None)
    answered, exit_index = answer(program, plain, pool)
    if before is not None:
        before, more = comparable(budget, answered, before, update=update_baseline)
        notes += more
    measured = _Measured(
        budget,
        before,
        seed,
        Measurement(
            environment_of(program),
            program.operating_point.name,
            sum(len(content) for content in program.artifact.files.values()),
            answered,
            (),
        ),
    )
    if update_baseline or any(limit.metric.is_timed for limit in budget.limits):
        job = Job(
            artifact=Path(artifact).resolve(),
            backend=program.backend.name,
            threads=program.backend.threads,
            operating_point=program.operating_point.name,
            batch_sizes=budget.batch_sizes,
            seed=seed,
        )
        with Processes(job, pool, exit_index, answered) as processes:
            notes += processes.notes
            _measure(measured, processes, began + max_seconds, update=update_baseline)
    else:
        measured.look(())
    if update_baseline:
        assert budget.baseline is not None
        write_baseline(budget.baseline, measured.measurement)
    causes = None
    if before is not None:
        causes = find_causes(measured.measurement, before, budget.run.confidence, seed)
    return CheckReport(
        artifact=str(artifact),
        outcomes=measured.outcomes,
        causes=causes,
        measurement=measured.measurement,
        baseline=before,
        notes=(*program.notes, *notes, *_notes(measured.measurement, before)),
        seconds=time.perf_counter() - began,
        looks=measured.looks,
        confidence=budget.run.confidence,
        baseline_written=str(budget.baseline) if update_baseline else None,
    )


def _require_sense(artifact: object, max_seconds: float, seed: int) -> None:
    if seed < 0:
        raise InputError(f"{seed} is negative", where="seed")
    if not 0.0 < max_seconds < math.inf:
        raise InputError(f"{max_seconds} is no time to measure for", where="max_seconds")
    if not isinstance(artifact, str | os.PathLike):
        raise InputError(
            f"{type(artifact).__name__} is no path", where="artifact", remedy="save the program: .save(path)"
        )


@dataclass(slots=True)
class _Measured:
    """What has been measured so far, and how each limit stands.

    Args:
        budget: The limits.
        before: The baseline.
        seed: Of the bootstrap.
        measurement: All but its processes is final.
    """

    budget: Budget
    before: Measurement | None
    seed: int
    measurement: Measurement
    looks: int = 0
    outcomes: tuple[Outcome, ...] = ()

    def look(self, processes: Sequence[ProcessFigures]) -> None:
        """Judge what is open; what was clear at one look stays so, as the next ones are stricter."""
        self.looks += 1
        self.measurement = replace(self.measurement, processes=tuple(processes))
        level = level_of_look(self.budget.run.confidence, self.looks)
        judged = judge(self.budget, self.measurement, self.before, level, self.seed)
        earlier = self.outcomes or judged
        self.outcomes = tuple(
            new if old.verdict == "INCONCLUSIVE" else old for old, new in zip(earlier, judged, strict=True)
        )

    @property
    def is_clear(self) -> bool:
        """Whether measuring longer would tell nothing more."""
        return all(o.verdict != "INCONCLUSIVE" or not o.limit.metric.is_timed for o in self.outcomes)


def _measure(measured: _Measured, processes: Processes, deadline: float, *, update: bool) -> None:
    """Measure in more and more processes and look, until all is clear or the time is up.

    A baseline, which is compared with again and again, is measured until the time is up.
    """
    figures: list[ProcessFigures] = []
    with reporting() as reporter, reporter.step("measuring in fresh processes") as step:
        for target in [None] if update else _targets():
            while target is None or len(figures) < target:
                if len(figures) >= (FIRST_LOOK if update else FEWEST) and not _fits(figures, deadline):
                    measured.look(figures)
                    return
                figures.append(processes.run(len(figures)))
                step.advance()
            measured.look(figures)
            if measured.is_clear:
                return


def _targets() -> Iterator[int]:
    """After how many processes there is a look."""
    target = FIRST_LOOK
    while True:
        yield target
        target = int(GROWTH * target)


def _fits(figures: Sequence[ProcessFigures], deadline: float) -> bool:
    """Whether one more process of the usual length ends in time."""
    return time.perf_counter() + median(process.seconds for process in figures) <= deadline


def _with_arguments(
    budget: Budget,
    baseline: str | os.PathLike[str] | None,
    backend: str | None,
    threads: int | None,
    max_rows: int | None,
) -> Budget:
    """The budget with what the caller says instead."""
    run = replace(
        budget.run,
        backend=budget.run.backend if backend is None else backend,
        threads=budget.run.threads if threads is None else threads,
        max_rows=budget.run.max_rows if max_rows is None else max_rows,
    )
    return replace(budget, run=run, baseline=budget.baseline if baseline is None else Path(baseline))


def _open(artifact: Path, budget: Budget) -> tuple[CompiledModel, CompiledModel]:
    """The program at the operating point that is checked, and the plain backbone."""
    program = open_artifact(read_artifact(artifact), budget.run.backend or "auto", threads=budget.run.threads)
    point = budget.run.operating_point
    try:
        chosen = program if point is None else program.select(name=point)
        plain = chosen.plain
    except InputError as error:
        where = str(artifact) if point is None else f"{artifact}, run.operating_point {point!r}"
        raise BudgetError(error.what, where=where, remedy=error.remedy) from error
    return chosen, plain


def _rows_of(program: CompiledModel, data: Any, preprocessing: ImagePreprocessing | None) -> Any:
    if not isinstance(data, str | os.PathLike):
        return data
    specs = list(program.manifest.inputs.values())
    shape = specs[0].shape if len(specs) == 1 else None
    return load_data(os.fspath(data), input_shape=shape, preprocessing=preprocessing)


def _notes(measurement: Measurement, before: Measurement | None) -> Iterator[str]:
    if len(measurement.answered.exits) == 1:
        yield "the program has no exits: it is the plain backbone itself"
    count = len(measurement.processes)
    if 0 < count < FIRST_LOOK:
        seconds = FIRST_LOOK * max(process.seconds for process in measurement.processes)
        yield (
            f"only {count} processes were measured in the time given, which tells little: "
            f"{FIRST_LOOK} take about {seconds:.0f} s (--max-seconds)"
        )
    if before is None:
        return
    if reasons := differences(measurement.environment, before.environment):
        yield f"the baseline is of another place, so only ratios are compared with it: {'; '.join(reasons)}"
    for change in version_changes(measurement.environment, before.environment):
        yield f"since the baseline: {change}"
    if measurement.point != before.point:
        yield f"operating point {measurement.point!r}, in the baseline it was {before.point!r}"
    if measurement.answered.exits.keys() != before.answered.exits.keys():
        yield (
            f"the exits are others ({', '.join(measurement.answered.exits)}; in the baseline "
            f"{', '.join(before.answered.exits)}), so kernels and exit mix cannot be told apart"
        )
