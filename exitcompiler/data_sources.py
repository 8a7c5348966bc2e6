"""MODEL and DATA as they are named on a command line: files, folders and factories.

MODEL is a ``.pt2`` file or ``package.module:factory``. DATA is an ``.npz`` file with ``x`` and ``y``, a
folder of images by class, or ``package.module:factory``. A factory is code that is imported and called,
and loading a ``.pt2`` file may run code too: name only those that you trust. An ``.npz`` file and a folder
of images are plain data.
"""

from __future__ import annotations

import importlib
import os
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from exitcompiler.errors import CalibrationError, InputError, UnsupportedModelError
from exitcompiler.image_folder import ImageFolder, ImagePreprocessing

__all__ = [
    "Inputs",
    "batches_of",
    "input_shape_of_model",
    "input_shape_of_networks",
    "load_data",
    "load_model",
    "load_transform",
]

Array: TypeAlias = npt.NDArray[Any]
Inputs: TypeAlias = "Array | dict[str, Array]"
Batch: TypeAlias = "tuple[Inputs, Array | None]"

_LABELS = "y"


@dataclass(frozen=True, slots=True)
class _Factory:
    """``package.module:name``, imported from the working directory or from what is installed."""

    module: str
    name: str

    @classmethod
    def parse(cls, text: str) -> _Factory | None:
        """The two parts; None if ``text`` is not of that form."""
        module, colon, name = text.partition(":")
        names = [*module.split("."), *name.split(".")]
        return cls(module, name) if colon and all(part.isidentifier() for part in names) else None

    def call(self, where: str) -> Any:
        """Import the module and call the factory without arguments.

        Raises:
            InputError: There is no such module or name, or it cannot be called.
        """
        folder = os.getcwd()
        sys.path.insert(0, folder)
        try:
            value: Any = importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            raise InputError(
                f"no module named {error.name!r}",
                where=where,
                remedy=f"{self.module!r} is looked for in the working directory and among installed packages",
            ) from error
        finally:
            sys.path.remove(folder)
        for part in self.name.split("."):
            if not hasattr(value, part):
                raise InputError(f"module {self.module!r} has no {self.name!r}", where=where)
            value = getattr(value, part)
        if not callable(value):
            raise InputError(
                f"{self.name!r} is a {type(value).__name__}, not a function",
                where=where,
                remedy="name a factory",
            )
        return value()


def load_model(text: str) -> tuple[Any, Any]:
    """Load the network that MODEL names.

    Args:
        text: A ``.pt2`` file (read by ``torch.export.load``) or ``package.module:factory``; the factory
            returns an ``nn.Module``, an ``ExportedProgram``, or a pair of one and an example input.

    Returns:
        The model, and the example input or None.

    Raises:
        InputError: MODEL is of neither form, or there is no such file or factory.
        UnsupportedModelError: The file or the factory does not hold a model.
    """
    import torch

    where = f"MODEL {text!r}"
    if text.endswith(".pt2"):
        _require_file(text, where)
        try:
            return torch.export.load(text), None
        except Exception as error:  # what torch raises for a damaged file is not specified
            raise UnsupportedModelError(
                f"torch cannot load it: {error}", where=where, remedy="write it with torch.export.save"
            ) from error
    factory = _Factory.parse(text)
    if factory is None:
        raise InputError(
            "is neither a .pt2 file nor package.module:factory",
            where=where,
            remedy="write a function without arguments that returns the nn.Module: module:function",
        )
    made = factory.call(where)
    model, example = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module | torch.export.ExportedProgram):
        raise UnsupportedModelError(
            f"the factory returned a {type(model).__name__}",
            where=where,
            remedy="return an nn.Module, an ExportedProgram, or a pair of one and an example input",
        )
    return model, example


def load_transform(text: str) -> Any:
    """Make the input transform of a network of a cascade.

    Args:
        text: ``package.module:factory``, whose function returns the transform; or ``none``.

    Returns:
        What the factory returned, a module or function of a tensor; None for ``none``.

    Raises:
        InputError: It is of neither form, there is no such factory, or it returned something else.
    """
    if text == "none":
        return None
    where = f"transform {text!r}"
    factory = _Factory.parse(text)
    if factory is None:
        raise InputError("is neither package.module:factory nor none", where=where)
    transform = factory.call(where)
    if not callable(transform):
        raise InputError(
            f"the factory returned a {type(transform).__name__}",
            where=where,
            remedy="return a module or a function that takes and returns a tensor",
        )
    return transform


def input_shape_of_networks(
    networks: Sequence[tuple[Any, Any]], transforms: Sequence[Any] | None
) -> tuple[int | str, ...] | None:
    """The shape of the input of a cascade, as far as a network that takes it as it is tells it.

    Args:
        networks: Models with an example input or None, as `load_model` returns them.
        transforms: Per network, what is done to its input; None: nothing to any.
    """
    untouched = [network for i, network in enumerate(networks) if transforms is None or transforms[i] is None]
    shapes = (input_shape_of_model(*network) for network in untouched)
    return next((shape for shape in shapes if shape is not None), None)


def input_shape_of_model(model: Any, example: Any) -> tuple[int | str, ...] | None:
    """The shape of a model's only input, with its batch, as far as it is known.

    Args:
        model: An ``nn.Module`` or ``ExportedProgram``.
        example: An example input, or None.

    Returns:
        None if the model alone does not tell, or has several inputs.
    """
    import torch

    if isinstance(example, tuple | list):
        example = example[0] if len(example) == 1 else None
    if isinstance(example, torch.Tensor):
        return tuple(example.shape)
    if not isinstance(model, torch.export.ExportedProgram):
        return None
    names = model.graph_signature.user_inputs
    values = {node.name: node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"}
    value = values.get(str(names[0])) if len(names) == 1 else None
    if not isinstance(value, torch.Tensor):
        return None
    return tuple(size if isinstance(size, int) else str(size) for size in value.shape)


def load_data(
    text: str,
    *,
    input_shape: tuple[int | str, ...] | None = None,
    preprocessing: ImagePreprocessing | None = None,
) -> Any:
    """Load the rows that DATA names, in a form that ``exitcompiler.compile`` accepts.

    Args:
        text: An ``.npz`` file, a folder of images by class, or ``package.module:factory``.
        input_shape: ``(batch, channels, height, width)`` of the model's input: what images are resized to.
        preprocessing: What else is done to images.

    Returns:
        An array or a dict of arrays by input name, alone or in a pair with labels (``.npz``); an iterable
        of ``(float32 [rows, channels, height, width], int64 [rows])`` batches (folder); or what the factory
        returned.

    Raises:
        InputError: DATA is of no known form, or there is no such file, folder or factory.
        CalibrationError: The file or folder does not hold usable rows.
    """
    where = f"DATA {text!r}"
    if text.endswith(".npz"):
        _require_file(text, where)
        return _load_npz(Path(text), where)
    if Path(text).is_dir():
        return ImageFolder.open(Path(text), input_shape, preprocessing or ImagePreprocessing(), where)
    factory = _Factory.parse(text)
    if factory is None:
        raise InputError(
            "is neither an .npz file, nor a folder, nor package.module:factory",
            where=where,
            remedy="numpy.savez('data.npz', x=inputs, y=labels) makes such a file",
        )
    return factory.call(where)


def batches_of(data: Any, batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
    """Go through data in batches of a given size, as numpy arrays.

    Args:
        data: What ``load_data`` returned.
        batch_size: Rows per batch; the last one may have fewer.
        max_rows: Stop after as many rows.

    Yields:
        Inputs (an array, or a dict by input name) and labels ``[rows]``, or None for the labels.

    Raises:
        CalibrationError: The data is of no known form.
    """
    left = max_rows
    for batch in _rebatch(data, batch_size):
        rows = _count(batch[0])
        if left is not None and rows >= left:
            yield _take(batch, slice(0, left))
            return
        yield batch
        left = None if left is None else left - rows


def _rebatch(data: Any, batch_size: int) -> Iterator[Batch]:
    if isinstance(data, Mapping) or _is_array(data) or _is_pair(data):
        yield from _slices(*_split_labels(data), batch_size)
        return
    if not isinstance(data, Iterable) or isinstance(data, str | bytes):
        raise CalibrationError(
            f"{type(data).__name__} is not data",
            remedy="give an array, a pair of arrays, or an iterable of batches",
        )
    held: list[Batch] = []
    rows = 0
    for batch in data:
        held.append(_split_labels(batch))
        rows += _count(held[-1][0])
        if rows >= batch_size:
            merged = _merge(held)
            whole = rows - rows % batch_size
            yield from _slices(*_take(merged, slice(0, whole)), batch_size)
            held, rows = ([_take(merged, slice(whole, rows))] if whole < rows else []), rows - whole
    if held:
        yield from _slices(*_merge(held), batch_size)


def _load_npz(path: Path, where: str) -> Any:
    """Inputs, alone or in a pair with labels. Lengths are compared before any array is read."""
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
            shapes = _npz_shapes(path)
            names = [name for name in file.files if name != _LABELS]
            if not names:
                raise CalibrationError(f"holds no inputs, only {file.files}", where=where, remedy=_NPZ_REMEDY)
            rows = {name: shape[0] if shape else 0 for name, shape in shapes.items()}
            if len(set(rows.values())) != 1:
                raise CalibrationError(f"arrays have different numbers of rows: {rows}", where=where)
            if not all(rows.values()):
                raise CalibrationError("holds no rows", where=where, remedy=_NPZ_REMEDY)
            arrays = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, SyntaxError) as error:
        raise CalibrationError(
            f"is not a readable .npz file of plain arrays: {error}", where=where, remedy=_NPZ_REMEDY
        ) from error
    inputs: Inputs = arrays[names[0]] if names == ["x"] else {name: arrays[name] for name in names}
    return (inputs, arrays[_LABELS]) if _LABELS in arrays else inputs


_NPZ_REMEDY = (
    "numpy.savez('data.npz', x=inputs, y=labels): numbers, not objects; "
    "several inputs go by their names instead of x"
)


def _npz_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Array name -> shape, from the headers alone."""
    shapes = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, _, dtype = read(file)
            if dtype.hasobject or dtype.kind not in "biuf":
                raise ValueError(f"array {member.filename!r} holds {dtype}, not numbers")
            shapes[member.filename.removesuffix(".npy")] = shape
    return shapes


def _require_file(text: str, where: str) -> None:
    if not Path(text).is_file():
        raise InputError("there is no such file", where=where)


def _is_array(value: Any) -> bool:
    """Whether ``value`` is an array or a tensor: both have a shape and turn into arrays."""
    return hasattr(value, "shape") and hasattr(value, "__array__")


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple | list)
        and len(value) == 2
        and (_is_array(value[0]) or isinstance(value[0], Mapping))
        and _is_array(value[1])
        # A tuple is a pair, whatever the labels look like; a list may as well hold two batches of inputs.
        and (isinstance(value, tuple) or len(value[1].shape) == 1)
    )


def _split_labels(data: Any) -> Batch:
    inputs, labels = data if _is_pair(data) else (data, None)
    if isinstance(inputs, Mapping):
        return {str(name): np.asarray(value) for name, value in inputs.items()}, _as_labels(labels)
    if not _is_array(inputs):
        raise CalibrationError(
            f"a batch is a {type(inputs).__name__}",
            remedy="give (x, y) pairs of arrays, x by input name if several",
        )
    return np.asarray(inputs), _as_labels(labels)


def _as_labels(labels: Any) -> Array | None:
    array = None if labels is None else np.asarray(labels)
    if array is not None and array.ndim != 1:
        what = f"labels of shape {array.shape} are no class numbers"
        raise CalibrationError(what, remedy="give one number per row, such as y.argmax(axis=1) of one-hot y")
    return array


def _count(inputs: Inputs) -> int:
    return len(next(iter(inputs.values())) if isinstance(inputs, dict) else inputs)


def _take(batch: Batch, rows: slice) -> Batch:
    inputs, labels = batch
    taken = (
        {name: value[rows] for name, value in inputs.items()} if isinstance(inputs, dict) else inputs[rows]
    )
    return taken, None if labels is None else labels[rows]


def _slices(inputs: Inputs, labels: Array | None, batch_size: int) -> Iterator[Batch]:
    for start in range(0, _count(inputs), batch_size):
        yield _take((inputs, labels), slice(start, start + batch_size))


def _merge(parts: list[Batch]) -> Batch:
    first = parts[0][0]
    inputs: Inputs
    if isinstance(first, dict):
        inputs = {name: np.concatenate([part[0][name] for part in parts]) for name in first}
    else:
        inputs = np.concatenate([np.asarray(part[0]) for part in parts])
    labels = [part[1] for part in parts if part[1] is not None]
    if labels and len(labels) != len(parts):
        raise CalibrationError("some batches have labels and some have not")
    return inputs, np.concatenate(labels) if labels else None
