"""What a program is compiled for: the backend asked for or the fastest, and the plain engine to beat."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from exitcompiler.data import Rows
from exitcompiler.engines import Engines, lowerer_for, typed_as
from exitcompiler.errors import BackendUnavailableError
from exitcompiler.float_layers import Settled, require_accuracy, settle
from exitcompiler.profile import block_times_us, programs_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.quantization import Quantizer
from exitcompiler.runtime.backends import (
    BACKENDS,
    DEVICE_BACKENDS,
    Backend,
    create_backend,
    unavailable_reason,
)
from exitcompiler.scores import FloatArray
from exitcompiler.scoring import float_logits, plain_logits
from exitcompiler.settings import Settings

__all__ = ["Target", "candidate_backends", "choose_target"]

logger = logging.getLogger(__name__)


def candidate_backends(settings: Settings) -> list[Backend]:
    """The backend asked for; under "auto" all that are installed and have the precision, but torch.

    A GPU is used only when it is asked for: what a call costs there depends on where its inputs lie, and
    building engines for it takes minutes.

    Raises:
        BackendUnavailableError: It, or any, is not installed.
    """
    if settings.backend != "auto":
        return [create_backend(settings.backend, precision=settings.precision, threads=settings.threads)]
    found: list[Backend] = []
    for name in BACKENDS:
        if name == "torch" or name in DEVICE_BACKENDS:  # torch would win only where nothing is installed
            continue
        if unavailable_reason(name) is not None:
            continue
        try:
            found.append(create_backend(name, precision=settings.precision, threads=settings.threads))
        except BackendUnavailableError as error:
            logger.info("%s", error)
    if not found:
        raise BackendUnavailableError(
            f"no backend that 'auto' may choose, and that has precision {settings.precision!r}, is installed",
            remedy="backend='cuda' or 'tensorrt', on a machine with a GPU"
            if settings.precision == "fp16"
            else "pip install 'exitcompiler[cpu]'",
        )
    return found


@dataclass(frozen=True)
class Target:
    """What a network is compiled for.

    Args:
        engines: Of the backend that was chosen.
        times_us: Backend -> microseconds per row of the whole network in the precision asked for.
        whole: The whole network as the backend runs it.
        plain: The engine to beat, and what comes back where no exit pays: the whole, or the network in
            float32 where that is faster, or where int8 does not keep the accuracy asked for.
        plain_us: Its time per row.
        original: What the network answers in float32 on the rows it was tried on, ``float32[rows, classes]``;
            None: it runs in float32.
        whole_logits: What ``whole`` answers on these; None: the same.
        settled: How it was quantised, if it was.
        float_us: The time per row of the network in float32, if ``whole`` is int8.
    """

    engines: Engines
    times_us: Mapping[str, float]
    whole: Program
    plain: Program
    plain_us: float
    original: FloatArray | None = None
    whole_logits: FloatArray | None = None
    settled: Settled | None = None
    float_us: float | None = None

    @property
    def plain_precision(self) -> str:
        """In which precision the plain engine is."""
        return self.engines.backend.precision if self.plain is self.whole else "fp32"


def choose_target(
    program: Program,
    rows: Rows,
    backends: Sequence[Backend],
    settings: Settings,
    reporter: Reporter,
    *,
    required: bool = True,
) -> Target:
    """The backend that runs the whole network fastest; in int8 also how it is quantised.

    Args:
        program: The network, one block.
        rows: Real rows that it was not trained on.
        backends: To choose from, all of one precision.
        settings: What was asked for.
        reporter: Progress.
        required: Whether the network is refused if int8 breaks it; else it is compared with in float32.

    Raises:
        CalibrationError: There are too few rows to quantise it, or its accuracy does not bear it.
        LoweringError: A backend does not take it.
    """
    int8 = any(typed_as(backend) == "int8" for backend in backends)
    quantizer = Quantizer(rows) if int8 else None
    with reporter.step("lowering the plain model" if quantizer is None else "quantising the plain model"):
        engines, times_us = _fastest_plain(program, rows, backends, quantizer, settings.batch_size)
    name = engines.backend.name
    whole = engines.typed(program)
    if engines.backend.precision == "fp32":
        return Target(engines, times_us, whole, whole, times_us[name])
    original = float_logits(program, rows)
    if quantizer is None:
        return Target(
            engines, times_us, whole, whole, times_us[name], original, plain_logits(whole, engines, rows)
        )
    limit = settings.plain_limit
    with reporter.step("trying int8") as step:
        settled = settle(program, engines, rows, original, limit, step.advance)
        if required and settings.drop_limit is not None:
            require_accuracy(settled, settings.drop_limit)
    engines = settled.engines
    whole = engines.typed(program)
    (whole_us,), (float_us,) = programs_times_us(
        [whole.blocks, program.blocks], engines, rows, settings.batch_size, repeats=60
    )
    times_us = {**times_us, name: whole_us}
    keeps = settled.trial.drop.value <= limit and whole_us <= float_us
    plain, plain_us = (whole, whole_us) if keeps else (program, float_us)
    return Target(engines, times_us, whole, plain, plain_us, original, settled.logits, settled, float_us)


def _fastest_plain(
    program: Program,
    rows: Rows,
    backends: Sequence[Backend],
    quantizer: Quantizer | None,
    batch_size: int,
) -> tuple[Engines, dict[str, float]]:
    """The engines of the backend that runs the plain model fastest.

    Args:
        program: One block.
        rows: Real rows.
        backends: To choose from.
        quantizer: For backends of precision int8.
        batch_size: How many rows a call has.

    Returns:
        The engines, and backend name -> microseconds per row, of all.
    """
    lowerer = lowerer_for(backends)
    engines = {backend.name: Engines(backend, lowerer, quantizer) for backend in backends}
    times = {
        name: block_times_us(found.typed(program).blocks, found, rows, batch_size, repeats=60)[0]
        for name, found in engines.items()
    }
    return engines[min(times, key=lambda name: times[name])], times
