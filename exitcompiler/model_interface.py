"""What goes into a model and what comes out of it: examples by name, logits out of what it returns."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from exitcompiler.controlflow import DTYPES, RESERVED, ControlFlow, OutputStructure
from exitcompiler.errors import CalibrationError, InputError, UnsupportedModelError
from exitcompiler.row_independence import take_rows

__all__ = [
    "Example",
    "as_tensors",
    "bind_example",
    "check_fit",
    "check_logits",
    "is_array",
    "sample_rows",
    "select_logits",
    "to_tensor",
]

Example: TypeAlias = Tensor | np.ndarray[Any, Any] | Mapping[str, Any] | tuple[Any, ...] | list[Any]


def bind_example(module: nn.Module, example: Example | None) -> dict[str, Tensor]:
    """The example by the names of the parameters of ``forward``, in their order.

    Raises:
        InputError: The example does not fit the parameters.
        UnsupportedModelError: ``forward`` takes what is no named tensor.
        CalibrationError: The example holds NaN or infinite values.
    """
    if example is None:
        raise InputError("a module needs an example of its inputs", remedy="pass a batch of calibration data")
    parameters = inspect.signature(module.forward).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters) and not isinstance(example, Mapping):
        raise UnsupportedModelError(
            "forward(*args) gives its inputs no names", remedy="wrap the model: def forward(self, x): ..."
        )
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    names = [p.name for p in named]
    if isinstance(example, Mapping) and open_ended:
        names += [name for name in example if name not in names]
    inputs = as_tensors(example, names)
    missing = [p.name for p in named if p.default is p.empty and p.name not in inputs]
    if missing:
        raise InputError(f"the example lacks the model's parameters {missing}")
    return inputs


def as_tensors(example: Example, names: Sequence[str]) -> dict[str, Tensor]:
    """Check an example and put it on the CPU, by name and in the order of ``names``.

    Raises:
        InputError: A name is unknown, or the rows do not match.
        UnsupportedModelError: A value is no tensor, or of an unsupported dtype.
        CalibrationError: The example holds NaN or infinite values, or an array is not of numbers.
    """
    if isinstance(example, Mapping):
        unknown = [name for name in example if name not in names]
        if unknown:
            raise InputError(f"the model has no parameters {unknown}", remedy=f"it has {list(names)}")
        raw = {name: example[name] for name in names if name in example}
    else:
        values = tuple(example) if isinstance(example, tuple | list) else (example,)
        if len(values) > len(names):
            raise InputError(f"{len(values)} inputs for a model that takes {list(names)}")
        raw = dict(zip(names, values, strict=False))
    inputs: dict[str, Tensor] = {}
    for name, value in raw.items():
        where = f"input {name!r}"
        tensor = to_tensor(value, where) if is_array(value) else value
        if not isinstance(tensor, Tensor):
            raise UnsupportedModelError(
                f"inputs must be tensors, not {type(value).__name__}",
                where=where,
                remedy="leave constants out of the example (defaults are kept), or fix them in a wrapper",
            )
        if name in RESERVED:
            raise UnsupportedModelError("this name is reserved", where=where, remedy="rename the parameter")
        if str(tensor.dtype).removeprefix("torch.") not in DTYPES:
            raise UnsupportedModelError(f"inputs of dtype {tensor.dtype} are not supported", where=where)
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise InputError(f"needs rows along dim 0, has shape {list(tensor.shape)}", where=where)
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise CalibrationError("the example holds NaN or infinite values", where=where)
        inputs[name] = tensor
    if len({tensor.shape[0] for tensor in inputs.values()}) > 1:
        shapes = {name: list(tensor.shape) for name, tensor in inputs.items()}
        raise InputError(f"the inputs have different numbers of rows: {shapes}")
    if not inputs:
        raise InputError("the example holds no inputs")
    return inputs


def is_array(value: Any) -> bool:
    """Whether a value is one that rows can be read from."""
    return isinstance(value, np.ndarray | Tensor)


def to_tensor(value: npt.NDArray[Any] | Tensor, where: str) -> Tensor:
    """An array as a tensor on the CPU, without a copy where possible.

    Raises:
        CalibrationError: It holds strings, objects or records.
    """
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.from_numpy(value)
    except ValueError:  # torch knows no negative strides and no foreign byte order
        return torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
    except TypeError:
        raise CalibrationError(
            f"an array of dtype {value.dtype} is not data", where=where, remedy="give an array of numbers"
        ) from None


def check_fit(
    inputs: Mapping[str, Tensor], labels: npt.NDArray[np.int64] | None, model: ControlFlow, argument: str
) -> None:
    """Check rows against a model's inputs and classes.

    Args:
        inputs: By name, all of the model's.
        labels: ``int64 [rows]``, 0 and up, or None.
        model: The captured one, whose first output is its logits.
        argument: What to call the data in messages.

    Raises:
        CalibrationError: Shapes or dtypes differ, or a label is no class of the model.
    """
    for name, spec in model.inputs.items():
        found = (str(inputs[name].dtype).removeprefix("torch."), tuple(inputs[name].shape[1:]))
        if found != (spec.dtype, tuple(spec.shape[1:])):
            raise CalibrationError(
                f"rows are {found[0]}{list(found[1])}, the model takes {spec}",
                where=f"{argument}, input {name!r}",
            )
    classes = int(next(iter(model.outputs.values())).shape[1])
    if labels is not None and len(labels) and int(labels.max()) >= classes:
        raise CalibrationError(
            f"label {int(labels.max())} is out of range: the model has {classes} classes",
            where=argument,
            remedy=f"number the classes 0..{classes - 1} in the order of the model's outputs",
        )


def sample_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """At most five rows of the example, and two at least: a single row is repeated."""
    present = next(iter(inputs.values())).shape[0]
    return take_rows(inputs, range(min(present, 5)) if present > 1 else (0, 0))


def select_logits(answer: Any, wanted: str | int | None) -> tuple[OutputStructure, Tensor, str]:
    """Pick the logits out of what the model returns.

    Returns:
        Their structure, the tensor, and a name for it.

    Raises:
        UnsupportedModelError: There is a choice and ``wanted`` does not make it.
    """
    if isinstance(answer, Tensor):
        if wanted not in (None, 0, "logits"):
            raise UnsupportedModelError(f"the model returns one tensor, there is no output {wanted!r}")
        return OutputStructure("tensor"), answer, "logits"
    choices: dict[str | int, Any]
    if isinstance(answer, Mapping):
        kind, choices = "dict", {str(key): value for key, value in answer.items()}
    elif isinstance(answer, tuple | list):
        kind, choices = "tuple", dict(enumerate(answer))
        fields = getattr(answer, "_fields", ())
        wanted = fields.index(wanted) if wanted in fields else wanted
    else:
        raise UnsupportedModelError(
            f"the model returns {type(answer).__name__}, not tensors",
            remedy="wrap the model so that it returns its logits",
        )
    tensors = {key: value for key, value in choices.items() if isinstance(value, Tensor)}
    if wanted is None and len(tensors) == 1:
        wanted = next(iter(tensors))
    if kind == "dict" and isinstance(wanted, int) and -len(tensors) <= wanted < len(tensors):
        wanted = list(tensors)[wanted]
    if kind == "tuple" and isinstance(wanted, int) and wanted < 0:
        wanted += len(choices)
    if wanted is None or wanted not in tensors:
        asked = "the model has several outputs" if wanted is None else f"the model has no output {wanted!r}"
        raise UnsupportedModelError(asked, remedy=f"pass logits= with one of {list(tensors)}")
    if kind == "tuple":
        return OutputStructure(kind), tensors[wanted], "logits"
    return OutputStructure(kind, str(wanted)), tensors[wanted], _identifier(str(wanted))


def _identifier(name: str) -> str:
    safe = re.sub(r"\W", "_", name)
    return safe if safe.isidentifier() and safe not in RESERVED else f"output_{safe}"


def check_logits(logits: Tensor, rows: Mapping[str, Tensor]) -> None:
    """Check that logits are finite ``float32[batch, classes]`` with a row for every input row.

    Raises:
        UnsupportedModelError: Shape or dtype are others.
        CalibrationError: They hold NaN or infinite values.
    """
    count = next(iter(rows.values())).shape[0]
    if logits.ndim != 2 or logits.shape[0] != count or logits.shape[1] < 2:
        raise UnsupportedModelError(
            f"logits must be [batch, classes], two classes at least; {count} rows gave {list(logits.shape)}",
            remedy="choose another output with logits=, or wrap the model (for one sigmoid logit z, "
            "return torch.stack([-z, z], 1) / 2)",
        )
    if logits.dtype != torch.float32:
        raise UnsupportedModelError(
            f"logits must be float32, not {logits.dtype}",
            remedy="convert the model with model.float(); precision= chooses what the program runs at",
        )
    if not bool(logits.isfinite().all()):
        raise CalibrationError(
            "the model's logits for the example hold NaN or infinite values",
            remedy="check the weights and that inputs are scaled as in training",
        )
