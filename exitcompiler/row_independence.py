"""Checks that a row's answer does not depend on the rows that share its batch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from exitcompiler.errors import UnsupportedModelError

__all__ = ["check_row_independence", "differing_rows", "take_rows", "tolerance"]

logger = logging.getLogger(__name__)

_BATCHES = ((0, 1), (1, 0), (0, 2), (2, 1, 0), (3, 0, 4, 1, 2), (4, 3, 2, 1, 0), (0, 0, 0, 1))
"""Compositions tried: other sizes, other neighbours, another order, the same row several times."""

_ROWS = 5


def check_row_independence(
    run: Callable[[Mapping[str, Tensor]], Tensor],
    example: Mapping[str, Tensor],
    place: Callable[[Mapping[str, Tensor], Sequence[int]], str | None] = lambda rows, batch: None,
) -> None:
    """Compare a row's answer alone with its answer among others, in other orders and batch sizes.

    Args:
        run: Inputs by name -> logits ``[batch, classes]``.
        example: At least one row per input; the rows that are missing are made from these.
        place: Rows, and the indices of those that go wrong together -> where in the model that is.

    Raises:
        UnsupportedModelError: The answers differ, or the model fails at some batch size.
    """
    rows = differing_rows(example)
    alone = [_run(run, rows, (i,), place) for i in range(_ROWS)]
    # A made-up row may lie outside the model's domain; it says nothing then.
    usable = [bool(answer.isfinite().all()) for answer in alone]
    if all(torch.equal(alone[0], answer) for answer in alone[1:]):
        logger.warning("all rows tried get the same answer: rows that influence each other cannot be found")
    if not any(usable):
        raise UnsupportedModelError(
            "a row alone gets NaN or infinite logits, in a batch of two it does not",
            where=place(rows, (0, 1)),
            remedy="remove what computes statistics over dim 0, the batch",
        )
    limit = tolerance(torch.cat([answer for answer, ok in zip(alone, usable, strict=True) if ok]))
    for batch in _BATCHES:
        if not all(usable[row] for row in batch):
            continue
        answers = _run(run, rows, batch, place)
        if answers.shape[0] != len(batch):
            raise UnsupportedModelError(
                f"{len(batch)} rows give {answers.shape[0]} answers",
                where="the logits",
                remedy="keep the rows along dim 0, one answer for each",
            )
        difference = max(float((answers[i] - alone[row][0]).abs().max()) for i, row in enumerate(batch))
        if not difference <= limit:
            raise UnsupportedModelError(
                "the rows of a batch influence each other: a row's logits change by "
                f"{difference:.3g} in a batch of {len(batch)}",
                where=place(rows, batch),
                remedy="rows take different exits, so each must be answered by itself: remove what computes "
                "over dim 0 (a mean or softmax over the batch, batch norm with batch statistics)",
            )


def differing_rows(example: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Five rows per input, in the domain of the example as far as can be told.

    Rows that the example lacks are made from those it has: shifted along the last axis, with noise
    on floating-point values.
    """
    generator = torch.Generator().manual_seed(0)
    made: dict[str, Tensor] = {}
    for name, values in example.items():
        present = values[:_ROWS]
        rows = [present]
        for i in range(present.shape[0], _ROWS):
            row = values[i % present.shape[0]].unsqueeze(0)
            if row.ndim > 1:
                row = row.roll(i, -1)
            if row.is_floating_point():
                spread = float(row.float().std()) if row.numel() > 1 else 0.0
                noise = torch.randn(row.shape, generator=generator)
                row = row + (noise * (0.5 * spread if spread > 0 else 0.1)).to(row.dtype)
            elif row.ndim > 1 and row.numel() and int(row.min()) == int(row.max()) > 0:
                # A constant, such as a mask of ones: a shift leaves it as it is.
                row = row.clone()
                tail = row[..., row.shape[-1] - min(i, row.shape[-1] - 1) :]
                tail.copy_(tail.long() - 1)
            rows.append(row)
        made[name] = torch.cat(rows)
    return made


def tolerance(logits: Tensor) -> float:
    """How far two answers may lie apart that mean the same: 1e-4 of the largest logit."""
    return 1e-4 * max(float(logits.abs().max()), 1e-6)


def take_rows(inputs: Mapping[str, Tensor], rows: Sequence[int]) -> dict[str, Tensor]:
    """The rows with these indices of every input."""
    return {name: values[list(rows)] for name, values in inputs.items()}


def _run(
    run: Callable[[Mapping[str, Tensor]], Tensor],
    rows: Mapping[str, Tensor],
    batch: Sequence[int],
    place: Callable[[Mapping[str, Tensor], Sequence[int]], str | None],
) -> Tensor:
    try:
        return run(take_rows(rows, batch))
    except (RuntimeError, ValueError, IndexError, AssertionError) as error:
        message = str(error).strip().splitlines()
        raise UnsupportedModelError(
            f"the model fails for a batch of {len(batch)}: {message[0] if message else type(error).__name__}",
            where=place(rows, batch),
            remedy="it has to take any batch size: read it from the input (x.shape[0]) instead of fixing it",
        ) from error
