"""The networks of a cascade: captured one by one, with their input transforms, over the same inputs."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Final, TypeAlias

from torch import Tensor, nn
from torch.export import ExportedProgram

from exitcompiler.capture import capture, load_exported
from exitcompiler.controlflow import OutputStructure
from exitcompiler.errors import ExitCompilerError, InputError, UnsupportedModelError
from exitcompiler.input_transforms import Transform, apply_transform, compose_transform
from exitcompiler.model_interface import Example, as_tensors
from exitcompiler.naming import identifier
from exitcompiler.program import Program, Return, spec_of

__all__ = [
    "Model",
    "Network",
    "ending_in",
    "read_networks",
]

Model: TypeAlias = nn.Module | ExportedProgram | str | os.PathLike[str]

_RESERVED: Final = "/+:"
"""They stand in names of exits, of heads, and of edges: ``a/layer1``, ``with a+b``, ``a:b``."""

_TRANSFORM: Final = "say how to make its inputs from the cascade's: transforms=[None, ..., function]"


@dataclass(frozen=True)
class Network:
    """A network of a cascade.

    Args:
        name: Unique in the cascade.
        program: One block that takes the cascade's inputs, by their names, all of them; its exit is called
            after the network.
        structure: How the network hands over its logits.
    """

    name: str
    program: Program
    structure: OutputStructure


def read_networks(
    models: Sequence[Model],
    example: Example,
    *,
    names: Sequence[str] | None = None,
    transforms: Sequence[Transform | None] | None = None,
    logits: str | int | None = None,
) -> tuple[Network, ...]:
    """Capture several networks as programs over the same inputs.

    The inputs are those of the example; they are called as the first network calls them. A network with a
    transform gets what that makes of all of them; another one gets them by name where the names agree,
    and else by position.

    Args:
        models: Modules, exported programs, or paths of ``.pt2`` files with a dynamic batch; two at least.
        example: Rows of calibration data, batch first: a tensor, a tuple, or a dict by name.
        names: One per network, without ``/``, ``+`` and ``:``, which mean something in the names of exits,
            heads and edges; by default the class's or the file's name, numbered where it comes twice.
        transforms: Per network a function or module from the cascade's input tensors, in order, to the
            network's (one tensor, or a tuple in the order of its parameters), or None. It becomes
            a part of the graph; its state is frozen.
        logits: Which output holds the logits, for networks with several: its key or its index.

    Returns:
        The networks, in the order given.

    Raises:
        InputError: There are fewer than two, names or transforms do not fit, a network takes other inputs
            than the cascade, or they have different numbers of classes.
        UnsupportedModelError: A network or a transform cannot be captured; it is named.
        CalibrationError: The example, or a network's logits for it, hold NaN or infinite values.
    """
    if len(models) < 2:
        raise InputError(
            f"a cascade has two networks at least, not {len(models)}",
            remedy="for exits inside a single network use exitcompiler.compile",
        )
    names = _default_names(models) if names is None else _checked_names(names, len(models))
    transforms = [None] * len(models) if transforms is None else transforms
    if len(transforms) != len(models):
        raise InputError(
            f"{len(transforms)} transforms for {len(models)} networks", remedy="give one or None for each"
        )
    inputs: dict[str, Tensor] = {}
    networks: list[Network] = []
    for name, model, transform in zip(names, models, transforms, strict=True):
        try:
            loaded = load_exported(Path(model)) if isinstance(model, str | os.PathLike) else model
            if not networks:
                inputs = _cascade_inputs(loaded, example)
            network = _read(name, loaded, transform, inputs, logits)
            networks.append(replace(network, program=ending_in(network.program, name)))
        except ExitCompilerError as error:
            raise _in_network(error, name, hint=bool(networks) and transform is None) from error
    _check_classes(networks)
    return tuple(networks)


def _read(
    name: str,
    model: nn.Module | ExportedProgram,
    transform: Transform | None,
    inputs: Mapping[str, Tensor],
    logits: str | int | None,
) -> Network:
    if transform is not None:
        made = apply_transform(transform, inputs)
        captured = capture(model, made, logits=logits)
        program = compose_transform(transform, captured.program, inputs)
        return Network(name, program, captured.structure)
    binding = _bind(_parameters(model), list(inputs))
    if isinstance(model, ExportedProgram):
        _check_types(model, binding, inputs)
    captured = capture(model, {param: inputs[source] for param, source in binding.items()}, logits=logits)
    program = captured.program
    if list(program.inputs) != list(inputs):
        sources = [binding[param] for param in program.inputs]
        positions = [list(inputs).index(source) for source in sources]
        program = compose_transform(lambda *given: [given[i] for i in positions], program, inputs)
    return Network(name, program, captured.structure)


def ending_in(program: Program, exit_name: str) -> Program:
    """The program of one block with its exit called after the network."""
    end = program.entry.terminator
    assert isinstance(end, Return)
    entry = replace(program.entry, terminator=replace(end, exit=exit_name))
    return program.with_blocks({entry.name: entry})


def _parameters(model: nn.Module | ExportedProgram) -> dict[str, bool]:
    """The parameters of a network -> whether it cannot do without."""
    if isinstance(model, ExportedProgram):
        return {str(name): True for name in model.graph_signature.user_inputs}
    module: nn.Module = model
    while isinstance(module, nn.DataParallel | nn.parallel.DistributedDataParallel):
        module = module.module
    original: nn.Module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    named = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    found = signature(original.forward).parameters.values()
    return {p.name: p.default is Parameter.empty for p in found if p.kind in named}


def _cascade_inputs(first: nn.Module | ExportedProgram, example: Example) -> dict[str, Tensor]:
    """The example by name: the names of a dict, else those of the first network's parameters."""
    known = list(_parameters(first))
    if isinstance(example, Mapping):
        ordered = [name for name in known if name in example]
        return as_tensors(example, [*ordered, *(str(name) for name in example if name not in ordered)])
    count = len(example) if isinstance(example, tuple | list) else 1
    return as_tensors(example, known + [f"input_{i + 1}" for i in range(len(known), count)])


def _bind(parameters: Mapping[str, bool], inputs: Sequence[str]) -> dict[str, str]:
    """Which input each parameter takes: by name, the others that it cannot do without in order."""
    binding = {name: name for name in parameters if name in inputs}
    free = [name for name in inputs if name not in binding]
    waiting = [name for name, needed in parameters.items() if needed and name not in binding]
    if not binding and not waiting:
        waiting = list(parameters)[: len(free)]
    if len(waiting) > len(free) or not (binding or waiting):
        raise InputError(f"it takes {list(parameters)}, the cascade has {list(inputs)}", remedy=_TRANSFORM)
    binding |= dict(zip(waiting, free, strict=False))
    return {name: binding[name] for name in parameters if name in binding}


def _check_types(model: ExportedProgram, binding: Mapping[str, str], inputs: Mapping[str, Tensor]) -> None:
    nodes = {node.name: node for node in model.graph.nodes}
    for param, source in binding.items():
        value = nodes[param].meta.get("val") if param in nodes else None
        if not isinstance(value, Tensor):
            continue  # capture says what is wrong with it
        given = inputs[source]
        fixed = [size if isinstance(size, int) else None for size in value.shape]
        fits = len(fixed) == given.ndim and all(
            size in (None, int(found)) for size, found in zip(fixed[1:], given.shape[1:], strict=True)
        )
        if not fits or value.dtype != given.dtype:
            dtype = str(value.dtype).removeprefix("torch.")
            sizes = ", ".join("any" if size is None else str(size) for size in fixed[1:])
            raise InputError(
                f"it takes {dtype}[batch, {sizes}], the cascade's input {source!r} is {spec_of(given)}",
                where=f"input {param!r}",
                remedy=_TRANSFORM,
            )


def _in_network(error: ExitCompilerError, name: str, *, hint: bool) -> ExitCompilerError:
    """The error with the network's name; where it fails on the inputs themselves, what to do about that."""
    where = f"network {name!r}" + (f", {error.where}" if error.where else "")
    remedy = error.remedy
    fails_on_inputs = isinstance(error, UnsupportedModelError) and (error.where or "").startswith("inputs ")
    if hint and fails_on_inputs:
        remedy = f"if it takes inputs of other sizes or types than the first network, {_TRANSFORM}"
    return type(error)(error.what, where=where, remedy=remedy)


def _check_classes(networks: Sequence[Network]) -> None:
    classes = {
        network.name: int(next(iter(network.program.outputs.values())).shape[1]) for network in networks
    }
    if len(set(classes.values())) > 1:
        listed = ", ".join(f"{name!r} has {count}" for name, count in classes.items())
        raise InputError(
            f"the networks have different numbers of classes: {listed}",
            where="cascade",
            remedy="they have to answer the same question, with the classes in the same order",
        )


def _default_names(models: Sequence[Model]) -> tuple[str, ...]:
    """Class names and file stems; from the second of a name on with a number."""
    names: list[str] = []
    for model in models:
        if isinstance(model, str | os.PathLike):
            stem = Path(model).stem
        else:
            stem = "network" if isinstance(model, ExportedProgram) else type(model).__name__
        stem = re.sub(f"[{_RESERVED}]", "-", stem)
        name, count = stem, 1
        while identifier(name) in map(identifier, names):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return tuple(names)


def _checked_names(names: Sequence[str], count: int) -> tuple[str, ...]:
    if len(names) != count:
        raise InputError(f"{len(names)} names for {count} networks", where="names")
    bad = [name for name in names if not isinstance(name, str) or not name or set(name) & set(_RESERVED)]
    if bad:
        raise InputError(
            f"{bad} cannot name a network",
            where="names",
            remedy=f"give strings that are not empty and hold none of {' '.join(_RESERVED)}",
        )
    seen = Counter(identifier(name) for name in names)
    alike = [name for name in names if seen[identifier(name)] > 1]
    if alike:
        raise InputError(f"{alike} are too much alike", where="names", remedy="letters or digits must differ")
    return tuple(names)
