"""Time a compiled program against the whole network, on real rows, paired and interleaved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from exitcompiler.data_sources import Inputs, batches_of
from exitcompiler.errors import CalibrationError
from exitcompiler.progress import reporting
from exitcompiler.runtime.timing import measure_interleaved
from exitcompiler.statistics import ratio_interval

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["Answers", "answer_rows", "benchmark", "logits_of", "summarize_ms"]

Array: TypeAlias = npt.NDArray[Any]

_WARM_UP_CALLS: Final = 10


@dataclass(frozen=True, slots=True)
class Answers:
    """What a program answered.

    Args:
        predictions: Class per row, ``int64 [rows]``.
        exit_index: Exit taken per row, ``int32 [rows]``, into ``exits``.
        confidence: Per row, ``float32 [rows]``.
        labels: ``int64 [rows]``, or None.
        exits: Names of the exits.
    """

    predictions: Array
    exit_index: Array
    confidence: Array
    labels: Array | None
    exits: tuple[str, ...]

    @property
    def accuracy(self) -> float | None:
        """Share of rows answered right; None without labels."""
        return None if self.labels is None else float(np.mean(self.predictions == self.labels))

    @property
    def exit_rates(self) -> dict[str, float]:
        """Exit name -> share of the rows that left there."""
        counts = np.bincount(self.exit_index, minlength=len(self.exits))
        return {
            name: float(count / len(self.exit_index)) for name, count in zip(self.exits, counts, strict=True)
        }


def logits_of(outputs: Any) -> Array:
    """The logits ``[rows, classes]`` in what a program returns: its first output."""
    while isinstance(outputs, dict | tuple | list):
        outputs = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]
    return np.asarray(outputs)


def answer_rows(compiled: CompiledModel, data: Any, batch_size: int, max_rows: int | None = None) -> Answers:
    """Answer all rows of the data.

    Args:
        compiled: The program.
        data: What ``exitcompiler.data_sources.load_data`` returned.
        batch_size: Rows per call.
        max_rows: Stop after as many rows.

    Raises:
        CalibrationError: There are no rows, or the data is of no known form.
        InputError: The rows do not fit the program.
    """
    predictions, exits, confidences, labels = [], [], [], []
    for inputs, batch_labels in _first_batches(data, batch_size, max_rows):
        result = compiled.run(inputs)
        predictions.append(logits_of(result.outputs).argmax(axis=1))
        exits.append(np.asarray(result.exit_index))
        confidences.append(np.asarray(result.confidence))
        if batch_labels is not None:
            labels.append(batch_labels)
    return Answers(
        np.concatenate(predictions),
        np.concatenate(exits),
        np.concatenate(confidences),
        np.concatenate(labels) if labels else None,
        tuple(compiled.exits),
    )


def benchmark(
    compiled: CompiledModel,
    data: Any,
    *,
    batch_size: int = 1,
    max_rows: int = 1000,
    passes: int = 3,
    seed: int = 0,
) -> dict[str, Any]:
    """Time a program and the whole network on the same rows.

    For every batch both run right after one another, in random order, so that a machine that slows down
    slows down both. The interval of the speed-up is a paired bootstrap
    over batches.

    Args:
        compiled: The program; ``compiled.plain`` is the whole network on the same backend.
        data: What ``exitcompiler.data_sources.load_data`` returned.
        batch_size: Rows per call.
        max_rows: How many rows are used at most.
        passes: How often all of them are run.
        seed: Of the order and of the bootstrap.

    Returns:
        A JSON-able dict: ``rows``, ``batch_size``, ``passes``; ``program`` and ``plain``, each with
        ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms`` (per call), ``rows_per_second`` and, with labels,
        ``accuracy``; ``speedup`` with ``value``, ``lower``, ``upper``; ``exits``, a list with ``name``,
        ``rate``, with labels ``accuracy``, and at batch size 1 the ``mean_ms`` of the rows that left there.

    Raises:
        CalibrationError: There are no rows, or the data is of no known form.
        InputError: The rows do not fit the program.
    """
    batches = _first_batches(data, batch_size, max_rows)
    inputs = [batch for batch, _ in batches]
    plain = compiled.plain
    program_ms, plain_ms = _time_interleaved(compiled, plain, inputs, passes, seed)
    answers = answer_rows(compiled, batches, batch_size)
    whole = answer_rows(plain, batches, batch_size)
    rows = len(answers.predictions)
    figures: dict[str, Any] = {"rows": rows, "batch_size": batch_size, "passes": passes}
    for name, times_ms, given in (("program", program_ms, answers), ("plain", plain_ms, whole)):
        figures[name] = {
            **summarize_ms(times_ms),
            "rows_per_second": float(1000.0 * rows * passes / times_ms.sum()),
            "accuracy": given.accuracy,
        }
    figures["speedup"] = asdict(ratio_interval(plain_ms.mean(axis=0), program_ms.mean(axis=0), seed=seed))
    figures["agreement"] = float(np.mean(answers.predictions == whole.predictions))
    figures["exits"] = _per_exit(answers, program_ms.mean(axis=0) if batch_size == 1 else None)
    return figures


def summarize_ms(times_ms: Array) -> dict[str, float]:
    """Mean and percentiles of latencies in milliseconds: ``mean_ms``, ``p50_ms``, ``p95_ms``, ``p99_ms``."""
    p50, p95, p99 = np.percentile(times_ms, (50, 95, 99))
    return {
        "mean_ms": float(times_ms.mean()),
        "p50_ms": float(p50),
        "p95_ms": float(p95),
        "p99_ms": float(p99),
    }


def _time_interleaved(
    compiled: CompiledModel, plain: CompiledModel, inputs: Sequence[Inputs], passes: int, seed: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Milliseconds ``[passes, batches]`` of both."""
    calls = {"program": compiled, "plain": plain}
    arguments = [(batch,) for batch in inputs]
    samples_us: dict[str, list[npt.NDArray[np.float64]]] = {name: [] for name in calls}
    with reporting() as reporter, reporter.step("timing", total=passes) as step:
        for repeat in range(passes):
            warmup = 0 if repeat else _WARM_UP_CALLS
            timed = measure_interleaved(
                calls, arguments, repeats=len(arguments), warmup=warmup, seed=seed + repeat
            )
            for name, times_us in timed.items():
                samples_us[name].append(times_us)
            step.advance()
    return np.stack(samples_us["program"]) / 1e3, np.stack(samples_us["plain"]) / 1e3


def _per_exit(answers: Answers, times_ms: Array | None) -> list[dict[str, Any]]:
    figures = []
    for index, (name, rate) in enumerate(answers.exit_rates.items()):
        here = answers.exit_index == index
        entry: dict[str, Any] = {"name": name, "rate": rate}
        if here.any() and answers.labels is not None:
            entry["accuracy"] = float(np.mean(answers.predictions[here] == answers.labels[here]))
        if here.any() and times_ms is not None:
            entry["mean_ms"] = float(times_ms[here].mean())
        figures.append(entry)
    return figures


def _first_batches(data: Any, batch_size: int, max_rows: int | None) -> list[tuple[Inputs, Array | None]]:
    batches = list(batches_of(data, batch_size, max_rows))
    if not batches:
        raise CalibrationError("there are no rows", remedy="give data with at least one row")
    return batches
