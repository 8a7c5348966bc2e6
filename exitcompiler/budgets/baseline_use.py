"""Finds the baseline of a budget, and says whether what is measured now can be compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from exitcompiler.budgets.baseline import looks_like_baseline, read_baseline
from exitcompiler.budgets.figures import Answered, Measurement
from exitcompiler.budgets.limits import Budget
from exitcompiler.errors import BudgetError
from exitcompiler.files import require_writable

__all__ = ["comparable", "find_baseline"]

_REMEDY: Final = "measure a new one with --update-baseline (update_baseline=True), look at it, and commit it"
_OF_ROWS: Final = frozenset({"latency", "throughput", "accuracy", "exit_rates"})
"""Families whose figures depend on which rows are answered."""


def find_baseline(budget: Budget, *, update: bool) -> tuple[Measurement | None, tuple[str, ...]]:
    """Read the baseline that a budget names.

    Args:
        budget: Names the file.
        update: Whether a new one will be written there: then the old one may be missing or damaged.

    Returns:
        It, or None where none is needed or there is none to compare with yet; and notes.

    Raises:
        BudgetError: It is needed and missing, or cannot be read; or a new one has no place, or one that holds
            something else.
        InputError: The folder of a new one is not there or not writable.
    """
    path = budget.baseline
    if update:
        return _old_baseline(path)
    if path is not None and path.exists():
        return read_baseline(path), ()
    for limit in budget.limits:
        if limit.needs_baseline:
            raise BudgetError(
                f"{limit.key} needs a baseline, and {'none is named' if path is None else 'it is missing'}",
                where="baseline" if path is None else str(path),
                remedy=f'name a file in the budget (baseline = "baseline.json"), and {_REMEDY}'
                if path is None
                else _REMEDY,
            )
    return None, ()


def _old_baseline(path: Path | None) -> tuple[Measurement | None, tuple[str, ...]]:
    if path is None:
        raise BudgetError(
            "there is no place for a baseline",
            where="update_baseline",
            remedy='name a file: baseline = "baseline.json" in the budget, or --baseline (baseline=)',
        )
    require_writable(path)
    if not path.exists():
        return None, ()
    try:
        return read_baseline(path), ()
    except BudgetError as error:
        if not looks_like_baseline(path):
            raise BudgetError(
                "this is no baseline, and will not be overwritten",
                where=str(path),
                remedy="name another file, or remove this one",
            ) from error
        return None, (f"the old baseline could not be read, so nothing was compared with it: {error.what}",)


def comparable(
    budget: Budget, answered: Answered, before: Measurement, *, update: bool
) -> tuple[Measurement | None, tuple[str, ...]]:
    """The baseline, if the limits on changes can be judged by it.

    Args:
        budget: The limits.
        answered: What was answered now.
        before: The baseline.
        update: Whether a new one will be written: then nothing is refused, and nothing compared.

    Returns:
        The baseline, or None; and notes.

    Raises:
        BudgetError: A limit needs it, and it is of other rows, or lacks something.
    """
    for key, reason in _obstacles(budget, answered, before):
        if update or key is None:
            return None, (f"nothing was compared with the old baseline: {reason}",)
        raise BudgetError(reason, where=f"{key}, {budget.baseline}", remedy=_REMEDY)
    return before, ()


def _obstacles(budget: Budget, answered: Answered, before: Measurement) -> Iterator[tuple[str | None, str]]:
    """The limit that cannot be judged (None: no limit is concerned), and why."""
    changes = [limit for limit in budget.limits if limit.needs_baseline]
    if answered.fingerprint != before.answered.fingerprint:
        key = next((limit.key for limit in changes if limit.metric.family in _OF_ROWS), None)
        yield key, f"it was measured on other rows ({before.answered.rows}, now {answered.rows})"
    for limit in changes:
        if limit.metric.family == "throughput" and not _has_throughput(before, int(limit.metric.name)):
            yield limit.key, f"it has no throughput for batches of {limit.metric.name}"
        if str(limit.metric) == "accuracy.drop" and before.answered.lost is None:
            yield limit.key, "it was measured without labels"


def _has_throughput(measurement: Measurement, rows: int) -> bool:
    return all(
        rows in side.rows_per_second
        for process in measurement.processes
        for side in (process.program, process.plain)
    )
