"""What goes over the network: a JSON header, then arrays as raw little-endian bytes. No pickle.

    4 bytes   length of the header, little-endian
    header    {"whole": ..., "rows": n, "values": [{"name", "dtype", "shape"}, ...], "exits": [...]}
    arrays    one after the other, in the header's order, C order, nothing between

Both sides know from their artifact what has to come; a message that says or holds anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from exitcompiler.controlflow import BATCH, ValueSpec
from exitcompiler.runtime.backends import numpy_dtype
from exitcompiler.runtime.hand_over import row_bytes

__all__ = [
    "EXIT_INDEX",
    "HEADER_LIMIT_BYTES",
    "PATH",
    "MessageError",
    "answer_specs",
    "decode",
    "encode",
    "message_limit_bytes",
]

PATH = "/answer"
EXIT_INDEX = "exit_index"
HEADER_LIMIT_BYTES = 65_536
_LENGTH_BYTES = 4


class MessageError(ValueError):
    """A message is not what the two sides agreed on."""


def answer_specs(outputs: Mapping[str, ValueSpec]) -> dict[str, ValueSpec]:
    """What an answer holds: the program's outputs, and where each row left."""
    return {**outputs, EXIT_INDEX: ValueSpec((BATCH,), "int32")}


def message_limit_bytes(specs: Mapping[str, ValueSpec], rows: int) -> int:
    """No message of so many rows is longer."""
    return _LENGTH_BYTES + HEADER_LIMIT_BYTES + rows * sum(map(row_bytes, specs.values()))


def encode(arrays: Mapping[str, np.ndarray], whole: str, exits: tuple[str, ...] = ()) -> bytes:
    """Make a message.

    Args:
        arrays: By name; the first dimension of each counts the rows.
        whole: Identifies the program that was split.
        exits: Names that an answer's exit numbers stand for.
    """
    ordered = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    header = {
        "whole": whole,
        "rows": len(next(iter(ordered.values()))),
        "values": [
            {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
            for name, array in ordered.items()
        ],
        "exits": list(exits),
    }
    text = json.dumps(header).encode()
    parts = [array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes() for array in ordered.values()]
    return b"".join([len(text).to_bytes(_LENGTH_BYTES, "little"), text, *parts])


def decode(
    message: bytes, specs: Mapping[str, ValueSpec], whole: str
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Read a message, and check it against what has to come.

    Args:
        message: All of it.
        specs: Name -> type of each array, in order.
        whole: Identifies the program that was split.

    Returns:
        The arrays by name, and the exits.

    Raises:
        MessageError: Saying what is wrong.
    """
    length = int.from_bytes(message[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(message) < _LENGTH_BYTES or length > HEADER_LIMIT_BYTES or len(message) < start:
        raise MessageError("the message ends within its header")
    try:
        header = json.loads(message[_LENGTH_BYTES:start])
    except (ValueError, RecursionError) as error:
        raise MessageError("the header is not JSON") from error
    rows, exits = _check_header(header, specs, whole)
    arrays = {}
    expected = start + rows * sum(map(row_bytes, specs.values()))
    if len(message) != expected:
        raise MessageError(f"{len(message)} bytes, not {expected}")
    for name, spec in specs.items():
        dtype, end = numpy_dtype(spec), start + rows * row_bytes(spec)
        raw = np.frombuffer(message[start:end], dtype.newbyteorder("<"))
        if spec.dtype == "bool" and raw.view(np.uint8).max(initial=0) > 1:
            raise MessageError(f"{name!r} holds truth values that are neither 0 nor 1")
        arrays[name] = raw.astype(dtype).reshape(rows, *spec.shape[1:])
        start = end
    return arrays, exits


def _check_header(header: Any, specs: Mapping[str, ValueSpec], whole: str) -> tuple[int, tuple[str, ...]]:
    if not isinstance(header, dict):
        raise MessageError("the header is not an object")
    if header.get("whole") != whole:
        raise MessageError("the other side has a part of another program")
    rows, exits = header.get("rows"), header.get("exits", [])
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise MessageError(f"{rows!r} rows")
    values = [
        {"name": name, "dtype": numpy_dtype(spec).name, "shape": [rows, *spec.shape[1:]]}
        for name, spec in specs.items()
    ]
    if header.get("values") != values:
        raise MessageError(f"values {header.get('values')}, not {values}")
    if not isinstance(exits, list) or not all(isinstance(name, str) for name in exits):
        raise MessageError("exits are not names")
    return rows, tuple(exits)
