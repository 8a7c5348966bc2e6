"""The program: a control-flow graph whose bodies are straight-line FX graphs."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from exitcompiler.controlflow import (
    BATCH,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Gate,
    Jump,
    LinearGate,
    Return,
    Successor,
    Terminator,
    ValueSpec,
    successors,
)

__all__ = [
    "BATCH",
    "Block",
    "BlockInterface",
    "Branch",
    "ConstantGate",
    "Edge",
    "ExitHead",
    "Gate",
    "Jump",
    "LinearGate",
    "Program",
    "Return",
    "Successor",
    "Terminator",
    "ValueSpec",
    "spec_of",
    "successors",
    "torch_dtype",
]


@dataclass(frozen=True)
class Block(BlockInterface):
    """A basic block: an interface and the body that computes its results from its params.

    Args:
        body: One placeholder per param, named like it and in the same order; its output node is a
            tuple with one node per result, in order. Straight-line, functional (no in-place
            operators), reads nothing but its placeholders and its own parameters, and holds no
            symbolic size from elsewhere.
    """

    body: fx.GraphModule

    def run(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The results for given params (all rows of a batch at once)."""
        outputs = self.body(*(values[name] for name in self.params))
        return dict(zip(self.results, outputs, strict=True))

    def weight_bytes(self) -> dict[str, int]:
        """Path of a parameter -> its size; tensors that share memory count once."""
        sizes: dict[int, tuple[str, int]] = {}
        for node in self.body.graph.find_nodes(op="get_attr"):
            value = operator.attrgetter(node.target)(self.body)
            if isinstance(value, torch.Tensor):
                sizes.setdefault(value.data_ptr(), (node.target, value.numel() * value.itemsize))
        return dict(sizes.values())


@dataclass(frozen=True)
class Program(ControlFlow):
    """A whole program: inputs, outputs, and blocks with bodies in topological order."""

    blocks: tuple[Block, ...]

    @property
    def entry(self) -> Block:
        """The block where every row starts."""
        return self.blocks[0]

    def block(self, name: str) -> Block:
        """The block called ``name``.

        Raises:
            KeyError: There is none.
        """
        block = super().block(name)
        assert isinstance(block, Block)
        return block

    def with_blocks(self, changed: Mapping[str, Block]) -> Program:
        """This program with some blocks replaced, by name."""
        return replace(self, blocks=tuple(changed.get(block.name, block) for block in self.blocks))

    def __str__(self) -> str:
        from exitcompiler.printer import print_program

        return print_program(self)


@dataclass(frozen=True)
class ExitHead:
    """A head's graph, ready to be attached.

    Args:
        exit: Name of the exit, unique in the program.
        body: Placeholders are named like the block's values that the head reads; results are named
            as they shall be called in the program.
        results: Name -> type, in the body's order.
        answer: The results that bind the program's outputs, in order.
    """

    exit: str
    body: fx.GraphModule
    results: Mapping[str, ValueSpec]
    answer: tuple[str, ...]


def spec_of(tensor: torch.Tensor, *, rows: bool = True) -> ValueSpec:
    """The type of a sample tensor.

    Args:
        tensor: A sample; with ``rows`` its dim 0 is the batch, whatever its size.
        rows: Whether the value belongs to rows.
    """
    shape: tuple[int | str, ...] = tuple(int(size) for size in tensor.shape)
    return ValueSpec((BATCH, *shape[1:]) if rows else shape, str(tensor.dtype).removeprefix("torch."))


def torch_dtype(spec: ValueSpec) -> torch.dtype:
    """The torch dtype of a value."""
    dtype = getattr(torch, spec.dtype)
    assert isinstance(dtype, torch.dtype)
    return dtype
