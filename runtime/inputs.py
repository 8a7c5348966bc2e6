"""What a caller hands in, checked: arrays or tensors, by position or by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ValueSpec
from exitcompiler.errors import InputError
from exitcompiler.runtime.backends import Array, numpy_dtype

__all__ = ["InputReader", "as_tensor", "finite_check", "require_finite"]

_DOT_LIMIT = 8192
"""Up to this many numbers a dot product is the fastest check; BLAS may start threads for more."""


class InputReader:
    """Reads the arguments of a call.

    Args:
        specs: The model's inputs, in order.
    """

    def __init__(self, specs: Mapping[str, ValueSpec]) -> None:
        self._specs = dict(specs)
        self._expected = [
            (name, spec, numpy_dtype(spec), spec.shape[1:] if spec.batch_axis == 0 else spec.shape)
            for name, spec in specs.items()
        ]

    def read(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Array], int, bool]:
        """Check the arguments of a call.

        Args:
            args: One array per input, in order; or one dict by name.
            named: Inputs by name.

        Returns:
            The arrays in order, the batch size, and whether a torch tensor was among them.

        Raises:
            InputError: Missing or unknown inputs, wrong dtype, shape or device, no rows.
        """
        if len(args) == 1 and not named and len(self._expected) == 1:  # the common case, quickly
            value, (_, spec, dtype, tail) = args[0], self._expected[0]
            if (
                type(value) is np.ndarray
                and value.dtype == dtype
                and spec.batch_axis == 0
                and value.shape[1:] == tail
                and len(value)
            ):
                return [value], len(value), False
        given = args if len(args) == len(self._expected) and not named else self._by_name(args, named)
        if isinstance(given[0], Mapping):
            given = self._by_name((), given[0])
        rows, torch_given = -1, False
        arrays: list[Array] = []
        for value, (name, spec, dtype, tail) in zip(given, self._expected, strict=True):
            array = value
            if type(value) is not np.ndarray:
                array, is_torch = _to_numpy(value, name)
                torch_given = torch_given or is_torch
            if array.dtype != dtype:
                raise _wrong_dtype(name, spec, array, torch_given)
            batched = spec.batch_axis == 0
            if (array.shape[1:] if batched else array.shape) != tail or (batched and not array.shape):
                raise InputError(
                    f"expected {spec}, found shape {list(array.shape)}",
                    where=f"input {name!r}",
                    remedy=f"dimension 0 counts the rows: one row needs shape {[1, *tail]}"
                    if batched
                    else None,
                )
            if batched and array.shape[0] != rows:
                if rows >= 0:
                    raise InputError(f"{array.shape[0]} rows, others have {rows}", where=f"input {name!r}")
                rows = array.shape[0]
            arrays.append(array)
        if rows == 0:
            raise InputError("the batch has 0 rows", where="input", remedy="pass at least one row")
        return arrays, max(rows, 1), torch_given

    def _by_name(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[Any]:
        names = list(self._specs)
        if len(args) == 1 and isinstance(args[0], Mapping) and not named:
            return self._by_name((), args[0])
        if len(args) > len(names):
            raise InputError(f"{len(args)} inputs given, the model takes {len(names)}: {names}")
        given = dict(zip(names, args, strict=False))
        twice = sorted(given.keys() & named.keys())
        unknown = sorted(named.keys() - set(names))
        given.update(named)
        missing = [name for name in names if name not in given]
        for what, which in (("given twice", twice), ("unknown", unknown), ("missing", missing)):
            if which:
                raise InputError(f"inputs {which} are {what}", remedy=f"the model takes {names}")
        return [given[name] for name in names]


def _to_numpy(value: Any, name: str) -> tuple[Array, bool]:
    torch = sys.modules.get("torch")  # whoever has a tensor has imported it
    if torch is not None and isinstance(value, torch.Tensor):
        if value.device.type != "cpu":
            raise InputError(
                f"the tensor is on device {str(value.device)!r}",
                where=f"input {name!r}",
                remedy="this program runs on the CPU: pass x.cpu()",
            )
        if value.dtype == torch.bfloat16:
            raise InputError("the tensor is bfloat16", where=f"input {name!r}", remedy="pass x.float()")
        array: Array = value.detach().numpy()
        return array, True
    if isinstance(value, np.ndarray | np.generic):
        return np.asarray(value), False
    raise InputError(
        f"expected a numpy array or a torch tensor, found {type(value).__name__}",
        where=f"input {name!r}",
        remedy="convert it with numpy.asarray(x, dtype=...)",
    )


def _wrong_dtype(name: str, spec: ValueSpec, array: Array, torch_given: bool) -> InputError:
    cast = f"x.to(torch.{spec.dtype})" if torch_given else f"x.astype(numpy.{spec.dtype})"
    return InputError(f"expected {spec}, found {array.dtype}", where=f"input {name!r}", remedy=f"pass {cast}")


def require_finite(name: str, array: Array) -> None:
    """Refuse NaN and infinity in a floating-point input.

    Raises:
        InputError: Naming the first row at fault.
    """
    if array.dtype.kind != "f":
        return
    bad = ~np.isfinite(array)
    if not bad.any():
        return
    row = int(np.argwhere(bad)[0][0]) if array.ndim else 0
    raise InputError(
        f"row {row} holds NaN or infinity ({int(bad.sum())} such values in all)",
        where=f"input {name!r}",
        remedy="clean the data; if the model is meant to take them, load it with check_finite=False",
    )


def finite_check(buffers: Mapping[str, Array]) -> Callable[[], None]:
    """`require_finite` for buffers that stay where they are, in about a microsecond where they are small.

    Zero times a finite number is zero, and anything else times zero is NaN: one dot product tells.
    """
    floats = {name: buffer for name, buffer in buffers.items() if buffer.dtype.kind == "f"}
    small = {n: b for n, b in floats.items() if b.dtype == np.float32 and b.size <= _DOT_LIMIT}
    flat: list[tuple[str, NDArray[np.float32], NDArray[np.float32]]] = [
        (name, buffer.reshape(-1).view(np.float32), np.zeros(buffer.size, np.float32))
        for name, buffer in small.items()
    ]
    large = [(name, buffer) for name, buffer in floats.items() if name not in small]

    def check() -> None:
        for name, values, zeros in flat:
            if np.vdot(values, zeros) != 0.0:
                require_finite(name, buffers[name])
        for name, buffer in large:
            require_finite(name, buffer)

    return check


def as_tensor(array: Array) -> Any:
    """A torch tensor over the memory of ``array``; torch is there, as the caller passed a tensor."""
    return sys.modules["torch"].from_numpy(array)
