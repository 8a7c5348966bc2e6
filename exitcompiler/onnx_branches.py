"""Building ONNX graphs with ``If`` branches: scopes, masks, and the values that branches hand out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from exitcompiler.controlflow import ValueSpec
from exitcompiler.onnx_utils import element_type, value_info

__all__ = ["Arrival", "Guard", "Scope"]


@dataclass(frozen=True)
class Arrival:
    """Who arrives somewhere, as names of values; None in its place stands for every row.

    Args:
        rows: A ``bool[batch]``.
        some: A ``bool[]``, whether any row does.
    """

    rows: str
    some: str


@dataclass
class Scope:
    """A graph under construction: the top level or one branch of an ``If``.

    Args:
        prefix: Starts the names of all values made here.
    """

    prefix: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def within(self, prefix: str) -> Scope:
        """The same graph under another prefix."""
        return Scope(prefix, self.nodes, self.constants)

    def node(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a node with one output; returns the output's name."""
        output = self._fresh(kind) if name is None else name
        self.nodes.append(helper.make_node(kind, inputs, [output], output, **attributes))
        return output

    def constant(self, values: object, dtype: str) -> str:
        """Append an initialiser; returns its name."""
        name = self._fresh("constant")
        self.constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    def filled(self, spec: ValueSpec, batch_size: str, value: int = 0) -> str:
        """Append a tensor that is ``value`` everywhere; ``batch_size`` names an ``int64[1]``."""
        fixed = spec.shape[1:] if spec.batch_axis == 0 else spec.shape
        shape = self.constant(fixed, "int64") if fixed or spec.batch_axis is None else batch_size
        if fixed and spec.batch_axis == 0:
            shape = self.node("Concat", batch_size, shape, axis=0)
        fill = helper.make_tensor("value", element_type(spec), [1], [value])
        return self.node("ConstantOfShape", shape, value=fill)

    def mask(self, who: Arrival, spec: ValueSpec) -> str:
        """A condition that selects rows of a value of type ``spec``; all or none of a value without rows."""
        if spec.batch_axis is None:
            return who.some
        if len(spec.shape) == 1:
            return who.rows
        return self.node("Unsqueeze", who.rows, self.constant(range(1, len(spec.shape)), "int64"))

    def _fresh(self, kind: str) -> str:
        return f"{self.prefix}{kind.lower()}.{len(self.nodes) + len(self.constants)}"


class Guard:
    """An ``If`` under construction.

    Args:
        who: The then-branch is for them; without any, zeros and outer values stand in for its values.
        then: The then-branch.
        prefix: Starts the names of the values handed to the top level.
        batch_size: Names an ``int64[1]``.
    """

    def __init__(self, who: Arrival, then: Scope, prefix: str, batch_size: str) -> None:
        self._who = who
        self._then = then
        self._otherwise = Scope(f"{prefix}else/")
        self._prefix = prefix
        self._batch_size = batch_size
        self._exports: dict[str, tuple[str, str, ValueSpec]] = {}

    def export(self, inner: str, spec: ValueSpec, skipped: str | None = None) -> str:
        """Hand a value of the then-branch to the top level; returns its name there.

        Args:
            inner: Name of the value.
            spec: Its type.
            skipped: Names the outer value to hand on when the block is skipped; None: zeros.
        """
        if inner not in self._exports:
            if skipped is None:
                stand_in = self._otherwise.filled(spec, self._batch_size)
            else:
                stand_in = self._otherwise.node("Identity", skipped)
            self._exports[inner] = (stand_in, f"{self._prefix}out.{len(self._exports)}", spec)
        return self._exports[inner][1]

    def nodes(self) -> list[onnx.NodeProto]:
        """The ``If``; nothing where it would have no outputs."""
        if not self._exports:
            return []
        branches = {
            "then_branch": (self._then, list(self._exports)),
            "else_branch": (self._otherwise, [stand_in for stand_in, _, _ in self._exports.values()]),
        }
        specs = [spec for _, _, spec in self._exports.values()]
        graphs = {
            branch: helper.make_graph(
                scope.nodes,
                scope.prefix,
                [],
                [value_info(name, spec) for name, spec in zip(names, specs, strict=True)],
                scope.constants,
            )
            for branch, (scope, names) in branches.items()
        }
        outputs = [outer for _, outer, _ in self._exports.values()]
        return [helper.make_node("If", [self._who.some], outputs, f"{self._prefix}if", **graphs)]
