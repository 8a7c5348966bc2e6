"""What a caller hands in, checked: arrays or tensors, by position or by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ValueSpec
from exitcompiler.errors import InputError
from exitcompiler.runtime.backends import Array, numpy_dtype

__all__ = ["DEVICE", "Given", "InputReader", "as_tensor", "finite_check", "require_finite"]

DEVICE: Final = 0
"""The GPU that programs run on: the first one that ``CUDA_VISIBLE_DEVICES`` names."""

Given: TypeAlias = Literal["numpy", "torch", "device"]
"""What a caller passed, and gets: arrays, tensors in the host's memory, tensors on the GPU."""

_DOT_LIMIT = 8192
"""Up to this many numbers a dot product is the fastest check; BLAS may start threads for more."""


class InputReader:
    """Reads the arguments of a call.

    Args:
        specs: The model's inputs, in order.
        on_device: Whether the program runs on a GPU, so that tensors there are taken as they are.
    """

    def __init__(self, specs: Mapping[str, ValueSpec], *, on_device: bool = False) -> None:
        self._specs = dict(specs)
        self._on_device = on_device
        self._expected = [
            (name, spec, numpy_dtype(spec), spec.shape[1:] if spec.batch_axis == 0 else spec.shape)
            for name, spec in specs.items()
        ]

    def read(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[list[Any], int, Given]:
        """Check the arguments of a call.

        Args:
            args: One array per input, in order; or one dict by name.
            named: Inputs by name.

        Returns:
            The arrays in order (tensors, where they are on the GPU), the batch size, and what was given:
            tensors if any of them was one.

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
                return [value], len(value), "numpy"
        given = args if len(args) == len(self._expected) and not named else self._by_name(args, named)
        if isinstance(given[0], Mapping):
            given = self._by_name((), given[0])
        rows = -1
        kinds: list[Given] = []
        arrays: list[Any] = []
        for value, (name, spec, dtype, tail) in zip(given, self._expected, strict=True):
            array: Any = value
            kind: Given = "numpy"
            if type(value) is not np.ndarray:
                array, kind = self._take(value, name)
            kinds.append(kind)
            # Only a tensor's type has to be told by its name, which takes longer.
            if str(array.dtype) != f"torch.{spec.dtype}" if kind == "device" else array.dtype != dtype:
                raise _wrong_dtype(name, spec, array, kind)
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
        return arrays, max(rows, 1), _together(kinds, list(self._specs))

    def _take(self, value: Any, name: str) -> tuple[Any, Given]:
        """What is not simply an array, as one, or as the tensor on the GPU that it is."""
        torch = sys.modules.get("torch")  # whoever has a tensor has imported it
        if torch is not None and isinstance(value, torch.Tensor):
            if value.device.type == "cuda" and self._on_device:
                return _on_our_device(value, name), "device"
            if value.device.type != "cpu":
                raise InputError(
                    f"the tensor is on device {str(value.device)!r}",
                    where=f"input {name!r}",
                    remedy=f"this program runs on {'cuda:0' if self._on_device else 'the CPU'}: pass x.cpu()",
                )
            if value.dtype == torch.bfloat16:
                raise InputError("the tensor is bfloat16", where=f"input {name!r}", remedy="pass x.float()")
            return value.detach().numpy(), "torch"
        if isinstance(value, np.ndarray | np.generic):
            return np.asarray(value), "numpy"
        raise InputError(
            f"expected a numpy array or a torch tensor, found {type(value).__name__}",
            where=f"input {name!r}",
            remedy="convert it with numpy.asarray(x, dtype=...)",
        )

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


def _on_our_device(value: Any, name: str) -> Any:
    if value.device.index != DEVICE:
        raise InputError(
            f"the tensor is on {str(value.device)!r}, the program runs on 'cuda:{DEVICE}'",
            where=f"input {name!r}",
            remedy=f"pass x.to('cuda:{DEVICE}'), or choose the device with CUDA_VISIBLE_DEVICES",
        )
    return value.detach()


def _together(kinds: Sequence[Given], names: Sequence[str]) -> Given:
    """What the inputs are all in all; those on the GPU cannot be mixed with others."""
    if "device" not in kinds:
        return "torch" if "torch" in kinds else "numpy"
    for name, kind in zip(names, kinds, strict=True):
        if kind != "device":
            raise InputError(
                "it is in the host's memory, others are on the GPU",
                where=f"input {name!r}",
                remedy=f"pass all inputs as tensors on 'cuda:{DEVICE}', or none",
            )
    return "device"


def _wrong_dtype(name: str, spec: ValueSpec, array: Any, given: Given) -> InputError:
    cast = f"x.astype(numpy.{spec.dtype})" if given == "numpy" else f"x.to(torch.{spec.dtype})"
    found = str(array.dtype).removeprefix("torch.")
    return InputError(f"expected {spec}, found {found}", where=f"input {name!r}", remedy=f"pass {cast}")


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
