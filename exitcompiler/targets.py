"""The backend that a program is compiled for: the one asked for, or the one that is fastest here."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from exitcompiler.data import Rows
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.errors import BackendUnavailableError
from exitcompiler.profile import block_times_us
from exitcompiler.program import Program
from exitcompiler.runtime.backends import (
    BACKENDS,
    DEVICE_BACKENDS,
    Backend,
    create_backend,
    unavailable_reason,
)
from exitcompiler.settings import Settings

__all__ = ["candidate_backends", "fastest_plain"]

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


def fastest_plain(
    program: Program, rows: Rows, backends: Sequence[Backend], lowerer: Lowerer, batch_size: int
) -> tuple[Engines, dict[str, float]]:
    """The engines of the backend that runs the plain model fastest.

    Args:
        program: One block.
        rows: Real rows.
        backends: To choose from.
        lowerer: Where ONNX models come from.
        batch_size: How many rows a call has.

    Returns:
        The engines, and backend name -> microseconds per row, of all.
    """
    engines = {backend.name: Engines(backend, lowerer) for backend in backends}
    times = {
        name: block_times_us(found.typed(program).blocks, found, rows, batch_size, repeats=60)[0]
        for name, found in engines.items()
    }
    return engines[min(times, key=lambda name: times[name])], times
