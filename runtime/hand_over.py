"""What a part of a split program hands over to the other one: its type, and the values of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ControlFlow, ValueSpec
from exitcompiler.errors import InputError
from exitcompiler.runtime.backends import Array, numpy_dtype
from exitcompiler.runtime.inputs import as_tensor
from exitcompiler.runtime.manifest import Manifest, Part

__all__ = [
    "HandOver",
    "HandedOver",
    "describe_part",
    "hand_over_of",
    "row_bytes",
    "take_handed_over",
    "take_on_device",
]


@dataclass(frozen=True, slots=True)
class HandOver:
    """What goes from the near part of a split program to the far part, for each row that does.

    Args:
        values: Name -> type; the far part's inputs, in order.
        whole: What both parts have to agree on; see `Part`.
    """

    values: Mapping[str, ValueSpec]
    whole: str

    @property
    def bytes_per_row(self) -> int:
        """Size of the values of one row, without any framing."""
        return sum(map(row_bytes, self.values.values()))


@dataclass(frozen=True, slots=True)
class HandedOver:
    """The rows of a batch that go on in the far part; torch tensors where the caller passed tensors.

    Args:
        rows: ``int64[n]``, their positions in the batch, rising.
        values: Name -> array, its first dimension being ``n``: what to call the far part with.
    """

    rows: Any
    values: Mapping[str, Any]


def row_bytes(spec: ValueSpec) -> int:
    """How many bytes a row of a value takes."""
    return prod(map(int, spec.shape[1:])) * numpy_dtype(spec).itemsize


def hand_over_of(manifest: Manifest) -> HandOver:
    """What an artifact hands over, if it is a near part, or takes, if it is a far one.

    Raises:
        InputError: It is neither.
    """
    if manifest.part is None:
        raise InputError(
            "the artifact is a whole program, which hands nothing over",
            where="hand-over",
            remedy="split it: exitcompiler export --split, or exitcompiler.split",
        )
    flow = manifest.operating_points[manifest.selected].control_flow
    return HandOver(flow.carried if manifest.part.kind == "near" else flow.inputs, manifest.part.whole)


def take_handed_over(
    flow: ControlFlow, carried: Sequence[Array], exit_index: NDArray[np.int32], torch_given: bool
) -> HandedOver:
    """The rows that left at an exit that carries, and what they carry.

    Args:
        flow: A near part.
        carried: An array per carried value with an entry for each row of the batch; or none at all, if no
            row carries anything.
        exit_index: Where each row left, ``int32[batch]``.
        torch_given: Whether to make tensors.
    """
    rows: Any = np.flatnonzero(_carries(flow)[exit_index])
    values: dict[str, Any] = {
        name: carried[position][rows] if carried else np.empty((0, *spec.shape[1:]), numpy_dtype(spec))
        for position, (name, spec) in enumerate(flow.carried.items())
    }
    if torch_given:
        rows, values = as_tensor(rows), {name: as_tensor(value) for name, value in values.items()}
    return HandedOver(rows, values)


def take_on_device(flow: ControlFlow, carried: Sequence[Any], exit_index: Any) -> HandedOver:
    """As `take_handed_over`, of tensors on the GPU; waits for it, to know how many rows there are.

    Args:
        flow: A near part.
        carried: A tensor per carried value.
        exit_index: Where each row left.
    """
    rows = as_tensor(np.flatnonzero(_carries(flow)[exit_index.cpu().numpy()])).to(exit_index.device)
    return HandedOver(rows, {name: tensor[rows] for name, tensor in zip(flow.carried, carried, strict=True)})


def _carries(flow: ControlFlow) -> NDArray[np.bool_]:
    """Whether rows that leave at an exit go on elsewhere; behind the last one, False for exit -1 (none)."""
    return np.array([*(bool(way.carries) for way in flow.returns.values()), False])


def describe_part(manifest: Manifest, part: Part) -> str:
    """What a part of a split program is, as text."""
    hand_over = hand_over_of(manifest)
    point = manifest.operating_points[manifest.selected]
    does = {
        "near": "answers the rows that need no more, and hands the others over",
        "far": "answers the rows that the near part hands over",
    }
    lines = [
        f"The {part.kind} part of operating point {point.name}: {does[part.kind]}.",
        f"  Cut at     {', '.join(f'{source}:{target}' for source, target in part.edges)}",
        f"  Hand-over  {hand_over.bytes_per_row} bytes per row: "
        + ", ".join(f"{name}: {spec}" for name, spec in hand_over.values.items()),
        "  Estimates are those of the whole program on one machine: accuracy is the same while the far part "
        "answers.",
    ]
    return "\n".join(lines)
