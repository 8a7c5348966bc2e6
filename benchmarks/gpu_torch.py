"""What PyTorch itself offers: eager, ``torch.compile`` with CUDA graphs, ``torch.cond`` in a CUDA graph."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from gpu_lab import Lab
from torch import Tensor, nn

from exitcompiler.controlflow import Branch, Edge, LinearGate, Return, Successor
from exitcompiler.program import Block, Program
from exitcompiler.runtime.batch_norm_folding import fold_batch_norms

__all__ = [
    "CondGraph",
    "TorchCall",
    "compiled_network",
    "eager_network",
    "gate_tensors",
    "has_cond_in_graphs",
    "run_chain",
]


class TorchCall:
    """A function of one tensor, called on the lab's stream.

    Args:
        lab: Its stream is made PyTorch's current one.
        call: What answers.
        x: An example of the rows, on the device; rows are staged there.
        warm_up: Calls before anything is timed: compilation and recording happen there.
    """

    def __init__(self, lab: Lab, call: Callable[[Tensor], object], x: Tensor, warm_up: int = 5) -> None:
        self._lab = lab
        self._call = call
        self._x = x
        for _ in range(warm_up):
            self.launch()
            self._lab.wait()

    def stage(self, x: npt.NDArray[np.float32]) -> None:
        """See `Contender`."""
        with self._lab.current():
            self._x.copy_(torch.from_numpy(x))
        self._lab.wait()

    def launch(self) -> None:
        """See `Contender`."""
        with self._lab.current(), torch.inference_mode():
            self._call(self._x)


def eager_network(lab: Lab, network: nn.Module, x: Tensor) -> TorchCall:
    """The whole network, operator by operator."""
    return TorchCall(lab, copy.deepcopy(network).to(x.device).eval(), x)


def compiled_network(lab: Lab, network: nn.Module, x: Tensor) -> TorchCall:
    """The whole network by ``torch.compile(mode="reduce-overhead")``: Inductor's kernels in CUDA graphs."""
    compiled = torch.compile(copy.deepcopy(network).to(x.device).eval(), mode="reduce-overhead")

    def call(x: Tensor) -> object:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(x)

    return TorchCall(lab, call, x)


def has_cond_in_graphs() -> bool:
    """Whether this PyTorch turns ``torch.cond`` into conditional nodes while a graph is captured."""
    try:
        from torch._higher_order_ops import cudagraph_conditional_nodes
    except ImportError:
        return False
    return hasattr(cudagraph_conditional_nodes, "CUDAGraphCaptureControlFlowOpDispatchMode")


class CondGraph:
    """The program written with ``torch.cond``, captured by PyTorch into one CUDA graph.

    Args:
        lab: Where.
        program: A chain with float32 inputs.
        x: An example of one row, on the device.
    """

    def __init__(self, lab: Lab, program: Program, x: Tensor) -> None:
        from torch._higher_order_ops.cudagraph_conditional_nodes import (
            CUDAGraphCaptureControlFlowOpDispatchMode,
        )

        self._lab = lab
        self._x = x
        bodies = {block.name: copy.deepcopy(block.body).to(x.device) for block in program.blocks}
        for body in bodies.values():
            fold_batch_norms(body)  # as the program that it is compared with
        gates = gate_tensors(program, x.device)
        with lab.current(), torch.inference_mode():
            for way in (0, 1):  # both sides are run once, so that nothing is set up while it is recorded
                run_chain(program, bodies, gates, x, _always(way))
        lab.wait()
        self._graph = torch.cuda.CUDAGraph()
        with (
            torch.inference_mode(),
            torch.cuda.graph(self._graph, capture_error_mode="thread_local"),
            CUDAGraphCaptureControlFlowOpDispatchMode(),
        ):
            self._answer = run_chain(program, bodies, gates, x, torch.ops.higher_order.cond)
        torch.cuda.synchronize()

    def stage(self, x: npt.NDArray[np.float32]) -> None:
        """See `Contender`."""
        with self._lab.current():
            self._x.copy_(torch.from_numpy(x))
        self._lab.wait()

    def launch(self) -> None:
        """See `Contender`."""
        with self._lab.current():
            self._graph.replay()

    def answer(self) -> npt.NDArray[np.float32]:
        """The logits of the row that was launched last."""
        self._lab.wait()
        return np.asarray(self._answer.cpu().numpy())


def run_chain(
    program: Program,
    bodies: Mapping[str, Callable[..., Any]],
    gates: Mapping[str, tuple[Tensor, Tensor]],
    x: Tensor,
    cond: Callable[[Tensor, Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]], Any],
) -> Tensor:
    """One row through a program, with ``cond`` where it branches; the logits.

    Args:
        program: Branches have two ways.
        bodies: Block -> its body, where ``x`` is.
        gates: Block -> weight and bias of its gate.
        x: The row.
        cond: ``(predicate, if true, if false, operands)``, as ``torch.cond``.
    """

    def run(block: Block, params: tuple[Tensor, ...]) -> Tensor:
        results = bodies[block.name](*params)
        values = {
            **dict(zip(block.params, params, strict=True)),
            **dict(zip(block.results, results, strict=True)),
        }
        terminator = block.terminator
        if not isinstance(terminator, Branch):
            way = terminator if isinstance(terminator, Return) else terminator.edge
            return follow(way, tuple(values[name] for name in way.values))
        assert isinstance(terminator.gate, LinearGate)
        weight, bias = gates[block.name]
        features = torch.cat([values[name] for name in terminator.gate.reads], dim=1)
        scores = (features @ weight.T + bias)[0]
        first, second = terminator.edges
        operands = tuple(values[name] for name in (*first.values, *second.values))
        split = len(first.values)
        answer = cond(
            scores[0] >= scores[1],  # a tie goes to the lowest action
            lambda *given: follow(first, given[:split]),
            lambda *given: follow(second, given[split:]),
            operands,
        )
        assert isinstance(answer, Tensor)
        return answer

    def follow(way: Successor, values: tuple[Tensor, ...]) -> Tensor:
        # An answer is a copy: what one side returns must not be memory that the other side reads.
        return run(program.block(way.target), values) if isinstance(way, Edge) else values[0].clone()

    return run(program.entry, (x,))


def gate_tensors(program: Program, device: torch.device) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of every linear gate, by block."""
    found = {}
    for block in program.blocks:
        if isinstance(block.terminator, Branch) and isinstance(block.terminator.gate, LinearGate):
            gate = block.terminator.gate
            found[block.name] = (
                torch.tensor(gate.weight, device=device),
                torch.tensor(gate.bias, device=device),
            )
    return found


def _always(way: int) -> Callable[..., Any]:
    def cond(
        _: Tensor, if_true: Callable[..., Any], if_false: Callable[..., Any], operands: tuple[Tensor, ...]
    ) -> Any:
        return (if_true, if_false)[way](*operands)

    return cond
