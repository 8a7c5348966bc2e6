"""split-block: splits a captured backbone into a chain of blocks, so that exits can be put between them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from exitcompiler.cut_points import CutPoint
from exitcompiler.errors import PassError
from exitcompiler.fx_utils import extract_body, node_spec, nodes_by_name, required_inputs
from exitcompiler.naming import free_name
from exitcompiler.program import Block, Edge, Jump, Program, Return, ValueSpec

__all__ = ["block_name", "split_block"]


def split_block(program: Program, cuts: Sequence[CutPoint]) -> Program:
    """Split a program of one block into a chain of blocks joined by jumps.

    ::

        backbone: (x) -> (y); return (y)
            =>  to_layer1:   (x) -> (h);  jump to_backbone(h)
                to_backbone: (h) -> (y);  return (y)

    Values keep their names along the chain. The bodies share the parameters of the original. Sizes,
    position tables and the like are computed again in every block that needs them; inputs that a later
    block needs (an attention mask) are passed along. In torch the chain gives the same bits.

    Args:
        program: One block, as ``capture`` makes it.
        cuts: Of this program, in any order; none leaves the program as it is.

    Returns:
        One block more than there are cuts: ``to_<cut>`` for each, then ``to_<exit>``.

    Raises:
        PassError: The program has several blocks, or a cut is not one of this program.
    """
    if len(program.blocks) != 1 or not isinstance(program.entry.terminator, Return):
        raise PassError("only a program of one block can be split", where="split-block")
    if not cuts:
        return program
    whole = program.entry
    end = program.entry.terminator
    nodes = nodes_by_name(whole.body)
    ordered = _in_order(cuts, list(nodes))
    params = _chain_params(whole, ordered)
    taken: set[str] = set()
    names = [free_name(block_name(place), taken) for place in (*(cut.name for cut in ordered), end.exit)]
    blocks = []
    for i, name in enumerate(names):
        last = i == len(ordered)
        handed_on = end.values if last else params[i + 1]
        results = tuple(dict.fromkeys(value for value in handed_on if value not in params[i]))
        blocks.append(
            Block(
                name,
                {value: _spec(whole, value) for value in params[i]},
                {value: _spec(whole, value) for value in results},
                end if last else Jump(Edge(names[i + 1], handed_on)),
                extract_body(whole.body, params[i], results),
            )
        )
    return Program(program.inputs, program.outputs, tuple(blocks))


def block_name(place: str) -> str:
    """The name of the block that leads to a place: ``layer1.2`` -> ``to_layer1_2``."""
    return "to_" + re.sub(r"\W", "_", place)


def _in_order(cuts: Sequence[CutPoint], order: Sequence[str]) -> list[CutPoint]:
    position = {name: i for i, name in enumerate(order)}
    for cut in cuts:
        unknown = [value for value in cut.live if value not in position]
        if unknown or cut.value not in cut.live:
            raise PassError(f"the program has no values {unknown or [cut.value]}", where=f"cut {cut.name!r}")
    if len({cut.value for cut in cuts}) != len(cuts):
        raise PassError("two cuts go through the same value", where="split-block")
    return sorted(cuts, key=lambda cut: position[cut.value])


def _chain_params(whole: Block, cuts: Sequence[CutPoint]) -> list[tuple[str, ...]]:
    """The params of every block, from the last one back: what it needs and has to hand on."""
    params: list[tuple[str, ...]] = []
    needed: tuple[str, ...] = tuple(whole.terminator.values) if isinstance(whole.terminator, Return) else ()
    for cut in reversed(cuts):
        extra = required_inputs(whole.body, needed, cut.live)
        needed = tuple(dict.fromkeys((*cut.live, *extra)))
        params.append(needed)
    return [tuple(whole.params), *reversed(params)]


def _spec(whole: Block, value: str) -> ValueSpec:
    if value in whole.values:
        return whole.values[value]
    spec = node_spec(nodes_by_name(whole.body)[value])
    if spec is None or spec.batch_axis != 0:
        raise PassError(f"{value!r} does not have rows along dim 0: it cannot cross", where="split-block")
    return spec
