"""Times the blocks of a program, each one alone, on what a real row brings them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from exitcompiler.budgets.undisturbed import measure_undisturbed
from exitcompiler.controlflow import Edge, engine_signature, successors
from exitcompiler.runtime.backends import Array, Engine
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.runtime.timing import OwnClock

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["time_blocks"]

_WARM_UP_TURNS = 3


def time_blocks(
    compiled: CompiledModel, row: Mapping[str, Array], *, limit_s: float, minimum: int, seed: int
) -> dict[str, float]:
    """Mean microseconds of every block that computes something, as an engine of its own.

    The row goes through all blocks, whatever the gates say; where several ways lead to a block, it comes by
    the first. Blocks take turns.

    Args:
        compiled: The program.
        row: Input -> array with a batch of 1.
        limit_s: Stop after so many seconds,
        minimum: but not before so many turns.
        seed: Of the order.

    Returns:
        Block -> microseconds, in the order of the program. Empty with TensorRT, where engines of single
        blocks would have to be built first, which takes minutes.

    Raises:
        LoweringError: The backend does not take a block.
    """
    if compiled.backend.name == "tensorrt":
        return {}
    watches = {
        name: OwnClock(engine.stopwatch(values)) for name, (engine, values) in _inputs(compiled, row).items()
    }
    if not watches:
        return {}
    timed = measure_undisturbed(
        watches, [()], limit_s=limit_s, minimum=minimum, warmup=_WARM_UP_TURNS, seed=seed
    )
    return {name: block.mean_us for name, block in timed.items()}


def _inputs(compiled: CompiledModel, row: Mapping[str, Array]) -> dict[str, tuple[Engine, list[Array]]]:
    """Block -> its engine and what it takes, for blocks that have one."""
    flow = compiled.operating_point.control_flow
    arriving: dict[str, list[Array]] = {flow.entry.name: [row[name] for name in flow.inputs]}
    found: dict[str, tuple[Engine, list[Array]]] = {}
    for block in flow.blocks:
        values: dict[str, Array] = dict(zip(block.params, arriving[block.name], strict=True))
        signature = engine_signature(block)
        if signature.outputs:
            engine = compiled.engine(block, 1)
            taken = [*values.values(), *gate_parameters(block)]
            found[block.name] = (engine, taken)
            values.update(zip(signature.outputs, engine.run(taken), strict=True))
        for way in successors(block.terminator):
            if isinstance(way, Edge):
                arriving.setdefault(way.target, [values[name] for name in way.values])
    return found
