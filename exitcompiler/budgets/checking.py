"""``exitcompiler.check``: whether a compiled program keeps a budget, measured until the answer is clear."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from exitcompiler.budgets.answering import RowPool, answer, gather_rows
from exitcompiler.budgets.baseline import read_baseline, write_baseline
from exitcompiler.budgets.causes import find_causes
from exitcompiler.budgets.environment import differences, environment_of, version_changes
from exitcompiler.budgets.figures import Answered, Measurement, ProcessFigures
from exitcompiler.budgets.intervals import level_of_look
from exitcompiler.budgets.judging import judge
from exitcompiler.budgets.limits import Budget
from exitcompiler.budgets.outcomes import CheckReport, Outcome
from exitcompiler.budgets.processes import Job, Processes
from exitcompiler.budgets.reading import read_budget
from exitcompiler.data_sources import load_data
from exitcompiler.errors import BudgetError, InputError
from exitcompiler.files import require_writable
from exitcompiler.image_folder import ImagePreprocessing
from exitcompiler.progress import Step, reporting
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import open_artifact

__all__ = ["check"]

FIRST_LOOK: Final = 6
"""Processes before the first look: a bootstrap over fewer says little."""
GROWTH: Final = 1.5
"""By how much there are more at each further look."""
FEWEST: Final = 3
"""Processes that are measured however long they take."""
BASELINE_PROCESSES: Final = 20
"""A baseline is compared with again and again, so it is measured longer."""

_TIMED: Final = frozenset({"latency", "throughput", "memory", "load"})


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
    six of them, then after half as many again, until every interval is on one side of its limit or the time
    is up.

    Args:
        artifact: What ``save`` wrote.
        budget: A ``budget.toml``, or one that is read already.
        data: Held-out rows, with labels where accuracy is limited: DATA as on the command line (an ``.npz``
            file, a folder of images, ``package.module:factory``), or a pair (inputs, labels) of arrays, or an
            iterable of batches.
        baseline: Compare with this file, and not the one that the budget names.
        update_baseline: Write what was measured as the new baseline; limits on changes are still judged
            against the old one, if there is one.
        max_seconds: When to stop measuring, even if something is still inconclusive. The rows are answered
            however long it takes, and at least three processes are measured.
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
        InputError: The rows do not fit the program.
    """
    began = time.perf_counter()
    if not isinstance(budget, Budget):
        budget = read_budget(Path(budget))
    budget = _with_arguments(budget, baseline, backend, threads, max_rows)
    before = _baseline_of(budget, update_baseline)
    program, plain = _open(Path(artifact), budget)
    pool = gather_rows(_rows_of(program, data, preprocessing), budget.run.max_rows)
    _require_fit(budget, program, pool)
    answered, exit_index = answer(program, plain, pool)
    measurement = Measurement(
        environment_of(program),
        program.operating_point.name,
        sum(len(content) for content in program.artifact.files.values()),
        answered,
        (),
    )
    job = Job(
        artifact=Path(artifact).resolve(),
        backend=program.backend.name,
        threads=program.backend.threads,
        operating_point=program.operating_point.name,
        batch_sizes=budget.batch_sizes,
        seed=seed,
    )
    looks = 0
    outcomes: tuple[Outcome, ...] = ()
    timed = update_baseline or any(limit.metric.family in _TIMED for limit in budget.limits)
    with (
        Processes(job, pool, exit_index, answered) as processes,
        reporting() as reporter,
        reporter.step("measuring in fresh processes") as step,
    ):
        for so_far in _measure(processes, began + max_seconds, update_baseline, timed, step):
            looks += 1
            measurement = replace(measurement, processes=so_far)
            level = level_of_look(budget.run.confidence, looks)
            outcomes = judge(budget, measurement, before, level, seed)
            if not update_baseline and all(o.verdict != "INCONCLUSIVE" for o in outcomes):
                break
    causes = None if before is None else find_causes(measurement, before, budget.run.confidence, seed)
    if update_baseline:
        assert budget.baseline is not None
        write_baseline(budget.baseline, measurement)
    return CheckReport(
        artifact=str(artifact),
        outcomes=outcomes,
        causes=causes,
        measurement=measurement,
        baseline=before,
        notes=(*program.notes, *processes.notes, *_notes(measurement, before)),
        seconds=time.perf_counter() - began,
        looks=looks,
        confidence=budget.run.confidence,
        baseline_written=str(budget.baseline) if update_baseline else None,
    )


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


def _baseline_of(budget: Budget, update: bool) -> Measurement | None:
    """The baseline to compare with; None if none is needed, or it is now written for the first time."""
    path = budget.baseline
    if update:
        if path is None:
            raise BudgetError(
                "there is no place for a baseline",
                where="update_baseline",
                remedy='name a file: baseline = "baseline.json" in the budget, or the baseline argument',
            )
        require_writable(path)
    if path is not None and path.exists():
        return read_baseline(path)
    needing = [limit.key for limit in budget.limits if limit.needs_baseline]
    if needing and not update:
        raise BudgetError(
            f"{needing[0]} needs a baseline, and {'none is named' if path is None else 'it is missing'}",
            where="baseline" if path is None else str(path),
            remedy="measure one with --update-baseline (update_baseline=True), look at it, and commit it",
        )
    return None


def _open(artifact: Path, budget: Budget) -> tuple[CompiledModel, CompiledModel]:
    """The program at the operating point that is checked, and the plain backbone."""
    program = open_artifact(read_artifact(artifact), budget.run.backend or "auto", threads=budget.run.threads)
    if budget.run.operating_point is not None:
        program = program.select(name=budget.run.operating_point)
    try:
        return program, program.plain
    except InputError as error:
        raise BudgetError(error.what, where=str(artifact), remedy=error.remedy) from error


def _rows_of(program: CompiledModel, data: Any, preprocessing: ImagePreprocessing | None) -> Any:
    if not isinstance(data, str | os.PathLike):
        return data
    specs = list(program.manifest.inputs.values())
    shape = specs[0].shape if len(specs) == 1 else None
    return load_data(os.fspath(data), input_shape=shape, preprocessing=preprocessing)


def _require_fit(budget: Budget, program: CompiledModel, pool: RowPool) -> None:
    """Refuse limits that this program or these rows can say nothing about, before the long measurement."""
    for limit in budget.limits:
        metric = limit.metric
        if metric.family == "accuracy" and metric.name == "drop" and pool.labels is None:
            raise BudgetError(
                "the data has no labels, so there is no accuracy",
                where=limit.key,
                remedy="give labels, or limit accuracy.max_disagreement, which needs none",
            )
        if metric.family == "exit_rates" and metric.name and metric.name not in program.exits:
            raise BudgetError(
                f"the program has no exit {metric.name!r}; it has {', '.join(program.exits)}",
                where=limit.key,
                remedy="name one of these, or check which operating point is meant",
            )


def _measure(
    processes: Processes, deadline: float, update: bool, timed: bool, step: Step
) -> Iterator[tuple[ProcessFigures, ...]]:
    """Figures of more and more processes, each time that is worth a look; the last time is up then."""
    if not timed:
        yield ()
        return
    figures: list[ProcessFigures] = []
    target = BASELINE_PROCESSES if update else FIRST_LOOK
    while True:
        in_time = _fill(figures, target, processes, deadline, step)
        yield tuple(figures)
        if update or not in_time or not _fits(figures, deadline):
            return
        target = max(target + 1, int(GROWTH * target))


def _fill(
    figures: list[ProcessFigures], target: int, processes: Processes, deadline: float, step: Step
) -> bool:
    """Measure until there are as many as wanted; False if the time was up before."""
    while len(figures) < target:
        if len(figures) >= FEWEST and not _fits(figures, deadline):
            return False
        figures.append(processes.run(len(figures)))
        step.advance()
    return True


def _fits(figures: Sequence[ProcessFigures], deadline: float) -> bool:
    """Whether one more process, as slow as the slowest so far, ends in time."""
    return time.perf_counter() + max(process.seconds for process in figures) <= deadline


def _notes(measurement: Measurement, before: Measurement | None) -> Iterator[str]:
    count = len(measurement.processes)
    if 0 < count < FIRST_LOOK:
        yield f"only {count} processes were measured in the time given, so intervals are wide"
    if before is None:
        return
    if reasons := differences(measurement.environment, before.environment):
        yield f"the baseline is of another place, so only ratios are compared with it: {'; '.join(reasons)}"
    for change in version_changes(measurement.environment, before.environment):
        yield f"since the baseline: {change}"
    if measurement.point != before.point:
        yield f"operating point {measurement.point!r}, in the baseline it was {before.point!r}"
    yield from _notes_on_rows(measurement.answered, before.answered)


def _notes_on_rows(now: Answered, before: Answered) -> Iterator[str]:
    if now.fingerprint != before.fingerprint:
        yield "the rows are others than the baseline's: exit rates are compared as two samples"
    if now.exits.keys() != before.exits.keys():
        yield (
            f"the exits are others ({', '.join(now.exits)}; in the baseline {', '.join(before.exits)}), so "
            "kernels and exit mix cannot be told apart"
        )
