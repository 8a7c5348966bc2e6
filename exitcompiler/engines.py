"""Turns blocks into engines while compiling: each different block is lowered once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from torch import Tensor, fx

from exitcompiler.candidates import Candidates, cast_candidates
from exitcompiler.controlflow import BlockInterface, engine_signature
from exitcompiler.fx_utils import find_attribute
from exitcompiler.passes.cast_precision import cast_precision
from exitcompiler.passes.lower_to_onnx import BFLOAT16_OPSET, OPSET, lower_blocks
from exitcompiler.program import Block, Branch, ConstantGate, Program
from exitcompiler.quantization import Quantizer
from exitcompiler.runtime.backends import Backend, Engine

__all__ = ["Engines", "Lowerer", "block_key", "lowerer_for", "typed_as"]


def block_key(block: Block) -> str:
    """What makes two blocks lower to the same model: operators, parameters, signature; not gate numbers.

    Parameters count by where they are in memory: a key means something only as long as they are alive.
    """
    parts = [f"{node.name}={node.target}{node.args}{node.kwargs}" for node in block.body.graph.nodes]
    parts += [f"{name}@{_place(value)}" for name, value in _constants(block).items()]
    signature = engine_signature(block)
    parts += [str(list(signature.inputs.items())), str(list(signature.outputs.items()))]
    if isinstance(block.terminator, Branch) and not isinstance(block.terminator.gate, ConstantGate):
        parts.append(str(block.terminator.gate.reads))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _constants(block: Block) -> dict[str, object]:
    """Node -> the tensor, or other thing, that it reads from the body."""
    nodes = (node for node in block.body.graph.nodes if node.op == "get_attr")
    return {node.name: find_attribute(block.body, str(node.target)) for node in nodes}


def _place(value: object) -> str:
    if not isinstance(value, Tensor):
        return str(id(value))
    return f"{value.data_ptr()} {value.dtype}{list(value.shape)}{value.stride()}"


@dataclass
class Lowerer:
    """Lowers blocks to ONNX and remembers what it has lowered.

    Args:
        opset: ONNX operator set version of all of them.
    """

    opset: int = OPSET
    _models: dict[str, bytes] = field(default_factory=dict)
    # Keeps the memory of what the keys were made of from being used for anything else.
    _constants: dict[str, dict[str, object]] = field(default_factory=dict)

    def lower(self, blocks: Iterable[Block]) -> None:
        """Lower all blocks that are new, in one export.

        Raises:
            LoweringError: A block cannot be lowered; names the block and the node.
        """
        fresh: dict[str, Block] = {}
        for block in blocks:
            key = block_key(block)
            if key not in self._models and engine_signature(block).outputs:
                fresh.setdefault(key, block)
        # Blocks of different programs may share a name; for one export they need different ones.
        renamed = {f"{block.name}#{i}": key for i, (key, block) in enumerate(fresh.items())}
        blocks = [_rename(fresh[key], name) for name, key in renamed.items()]
        models = lower_blocks(blocks, opset=self.opset) if fresh else {}
        for name, key in renamed.items():
            self._models[key] = models[name]
            self._constants[key] = _constants(fresh[key])

    def model(self, block: Block) -> bytes:
        """The ONNX model of a block, lowered now if it is new."""
        self.lower([block])
        return self._models[block_key(block)]

    def models(self, program: Program) -> dict[str, bytes]:
        """Block name -> ONNX model, for all blocks that need an engine."""
        self.lower(program.blocks)
        return {block.name: self.model(block) for block in program.blocks if engine_signature(block).outputs}


def typed_as(backend: Backend) -> str:
    """The precision that programs are rewritten to for a backend.

    On a GPU they compute in their types, and int8 is in a program wherever it runs; bf16 on a CPU is not.
    """
    return backend.precision if backend.on_device or backend.precision == "int8" else "fp32"


def lowerer_for(backends: Iterable[Backend]) -> Lowerer:
    """A lowerer for the backends that a program may run on."""
    bfloat16 = any(typed_as(backend) == "bf16" for backend in backends)
    return Lowerer(BFLOAT16_OPSET if bfloat16 else OPSET)


def _rename(block: Block, name: str) -> Block:
    return Block(name, block.params, block.results, block.terminator, block.body)


@dataclass
class Engines:
    """Engines of one backend for blocks at hand.

    Args:
        backend: What makes engines.
        lowerer: Where ONNX models come from; backends that run torch graphs need none.
        quantizer: What makes programs int8, for a backend of that precision, which runs float32 as well;
            None: programs are left as they are.
    """

    backend: Backend
    lowerer: Lowerer
    quantizer: Quantizer | None = None
    _engines: dict[tuple[str, int | None], Engine] = field(default_factory=dict)
    # As in the lowerer, which knows nothing of blocks that run as torch graphs.
    _constants: dict[str, dict[str, object]] = field(default_factory=dict)
    _typed: dict[int, tuple[Program, Program]] = field(default_factory=dict)

    def typed(self, program: Program) -> Program:
        """A program as the backend runs it; the same object for the same program.

        Raises:
            PassError: An operator does not run in the backend's precision.
            LoweringError: A program cannot be quantised.
        """
        if typed_as(self.backend) == "int8":
            return program if self.quantizer is None else self.quantizer.program(program)
        if id(program) not in self._typed:
            self._typed[id(program)] = (program, cast_precision(program, typed_as(self.backend)))
        return self._typed[id(program)][1]

    def typed_candidates(self, candidates: Candidates) -> Candidates:
        """Candidates as the backend runs them; those of one network where they are quantised.

        Raises:
            PassError: An operator does not run in the backend's precision.
            LoweringError: The network cannot be quantised.
        """
        precision = typed_as(self.backend)
        if precision == "int8":
            return candidates if self.quantizer is None else self.quantizer.candidates(candidates)
        return cast_candidates(candidates, precision)

    def load(self, blocks: Sequence[Block], static_batch: int | None = None) -> Mapping[str, Engine]:
        """Block name -> engine, for all blocks that need one.

        Raises:
            LoweringError: A block cannot be lowered, or the backend does not take it.
        """
        if self.backend.form == "onnx":
            self.lowerer.lower(blocks)
        return {
            block.name: self.engine(block, static_batch)
            for block in blocks
            if engine_signature(block).outputs
        }

    def engine(self, block: Block, static_batch: int | None = None) -> Engine:
        """The engine of one block."""
        batch = static_batch if self.backend.specialises else None
        key = (block_key(block), batch)
        if key not in self._engines:
            self._engines[key] = self._load(block, batch)
            self._constants[key[0]] = _constants(block)
        return self._engines[key]

    def _load(self, block: Block, static_batch: int | None) -> Engine:
        if self.backend.form == "torch":
            return cast(_BodyLoader, self.backend).load_body(block, block.body)
        model = self.lowerer.model(block)
        return self.backend.load(model, engine_signature(block), static_batch=static_batch)


class _BodyLoader(Protocol):
    """What a backend is that runs torch graphs."""

    def load_body(self, block: BlockInterface, body: fx.GraphModule) -> Engine: ...
