"""Finds the line of a model that fixes the batch size while the model is exported."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["find_specialisation"]

_LOGGER = "torch.fx.experimental.symbolic_shapes"
_SIGN = "set_replacement"
"""How torch's log begins where a symbolic size turns out to be a number."""


def find_specialisation(export: Callable[[], object]) -> tuple[tuple[FrameType, int], ...]:
    """The frames and lines, innermost last, where a symbolic size became a number; none if that is not seen.

    torch.export says that it happened, but not where; its log is written at that very moment, by the
    code that did it.

    Args:
        export: Exports the model, once more; may fail.
    """
    found: list[tuple[tuple[FrameType, int], ...]] = []

    class Watch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not found and str(record.msg).startswith(_SIGN):
                found.append(tuple(_callers(sys._getframe()))[::-1])

    with _watched(Watch(logging.INFO)):
        try:
            export()
        except Exception:  # it has failed before, and was told then
            logging.getLogger(__name__).debug("failed again", exc_info=True)
    return found[0] if found else ()


def _callers(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


@contextmanager
def _watched(handler: logging.Handler) -> Iterator[None]:
    """Send torch's log to this handler, and to nobody else, for a while."""
    logger = logging.getLogger(_LOGGER)
    before = logger.level, logger.propagate, list(logger.handlers)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers[:] = [handler]
    try:
        yield
    finally:
        logger.level, logger.propagate, logger.handlers[:] = before
