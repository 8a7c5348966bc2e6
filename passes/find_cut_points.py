"""find-cut-points: finds the places in a captured backbone where exits can be attached.

Changes nothing. A legal cut is a dominator of the tensor data flow where every live value has the batch
as dim 0; of these the ends of the backbone's own building blocks are kept, named as people know them::

    backbone(x): ... layer1.0 ... layer1.1 ... linear
                            ^            ^                 =>  layer1.0, layer1.1
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from exitcompiler.cut_points import Candidate, CutPoint, find_candidates
from exitcompiler.errors import PassError
from exitcompiler.flops import count_flops, node_flops
from exitcompiler.fx_utils import is_symbolic_size
from exitcompiler.program import Program, Return

__all__ = ["CutPoint", "find_cut_points"]

_ENOUGH = 3
"""Finer levels of the module tree are looked at until there are this many cut points."""
_LATE = 0.9
"""A place with more than this share of the FLOPs before it saves next to nothing."""
_STREAMS = 4
"""Where a network has fewer earlier ones, it is cut through up to this many values where modules end."""


@dataclass(frozen=True, slots=True)
class _Named:
    """A candidate and the modules that end there, outermost first."""

    candidate: Candidate
    paths: tuple[str, ...]


def find_cut_points(program: Program, *, max_live_bytes: int = 64 << 20) -> tuple[CutPoint, ...]:
    """Find the places where a program of one block can be split, in order.

    Kept are the ends of building blocks (modules with two or more weighted operators inside); where
    there are fewer than three, the ends of all containers, then of all modules, then all dominators; and
    where fewer than three of these come early, the ends of modules where several values are live.
    Of places with the same FLOPs before them one is kept. ``layer1.8`` and ``layer1``, which end at
    the same value, are one place; it is named after the level with the most places.

    Args:
        program: One block that returns one value, as ``capture`` makes it.
        max_live_bytes: Leave out places where more than this has to cross, per row.

    Returns:
        Cut points with ascending FLOPs shares; empty where the program cannot be cut.

    Raises:
        PassError: The program has several blocks, or its block returns several values.
    """
    if len(program.blocks) != 1 or not isinstance(program.entry.terminator, Return):
        raise PassError("cut points are found in a program of one block", where="find-cut-points")
    if len(program.entry.results) != 1:
        raise PassError("the block must have one result", where="find-cut-points")
    body = program.entry.body
    chosen = _choose_level(body, [c for c in find_candidates(body) if c.live_bytes <= max_live_bytes])
    total = count_flops(body)
    if _places(_early(chosen, total)) < _ENOUGH:
        wide = find_candidates(body, beside=_STREAMS - 1)
        several = _choose_level(body, [c for c in wide if c.live_bytes <= max_live_bytes], modules=True)
        chosen = max(chosen, several, key=lambda level: _places(_early(level, total)))
    members = Counter(_level(path) for named in chosen for path in named.paths)
    chosen = _drop_inner(chosen, members)
    return tuple(
        CutPoint(
            name=_name(named, members),
            value=named.candidate.node.name,
            live=named.candidate.live,
            spec=named.candidate.spec,
            flops_share=named.candidate.flops / total if total else 0.0,
        )
        for named in _one_per_cost(chosen, members)
    )


def _choose_level(
    body: fx.GraphModule, candidates: Sequence[Candidate], *, modules: bool = False
) -> list[_Named]:
    """The coarsest level of the module tree with enough ends; if none has, the one with most.

    Args:
        body: What the candidates cut.
        candidates: All.
        modules: Only those where a module ends.
    """
    every = {path for node in body.graph.nodes for path in _paths(node)}
    containers = {path for path in every if any(other.startswith(f"{path}.") for other in every)}
    weighted: Counter[str] = Counter()
    for node in body.graph.nodes:
        if node_flops(node) or node.target is torch.ops.aten.embedding.default:
            weighted.update(_paths(node))

    def is_building_block(path: str) -> bool:
        return path in containers and weighted[path] > 1

    accepts: tuple[Callable[[str], bool], ...] = (
        is_building_block,
        containers.__contains__,
        every.__contains__,
    )
    levels = [[named for named in _ends(candidates, accept) if named.paths] for accept in accepts]
    if not modules:
        levels.append(_ends(candidates, every.__contains__))
    return next((level for level in levels if _places(level) >= _ENOUGH), max(levels, key=_places))


def _early(level: Iterable[_Named], total: int) -> list[_Named]:
    """Those that leave something to save."""
    return [named for named in level if named.candidate.flops <= _LATE * total]


def _places(level: Iterable[_Named]) -> int:
    """How many there are with different costs."""
    return len({named.candidate.flops for named in level})


def _ends(candidates: Iterable[Candidate], accept: Callable[[str], bool]) -> list[_Named]:
    """For every candidate the accepted modules that end there: their path leaves the stack of all users."""
    found = []
    for candidate in candidates:
        users = [set(_paths(user)) for user in candidate.node.users if not is_symbolic_size(user)]
        paths = tuple(
            path
            for path in _paths(candidate.node)
            if accept(path) and not any(path in stack for stack in users)
        )
        found.append(_Named(candidate, paths))
    return found


def _paths(node: fx.Node) -> list[str]:
    """The modules that a node was captured in, outermost first, the model itself left out."""
    stack = node.meta.get("nn_module_stack")
    return [path for path, _ in stack.values() if path] if stack else []


def _level(path: str) -> str:
    """What the paths of repeated modules have in common: ``layer1.8`` -> ``layerN.N``."""
    return re.sub(r"\d+", "N", path)


def _best_path(named: _Named, members: Mapping[str, int]) -> str:
    """The path whose level has the most members; of equals the outermost. Empty where there is none."""
    return max(named.paths, key=lambda path: members[_level(path)], default="")


def _name(named: _Named, members: Mapping[str, int]) -> str:
    return _best_path(named, members) or named.candidate.node.name


def _drop_inner(chosen: Sequence[_Named], members: Mapping[str, int]) -> list[_Named]:
    """Leave out ends inside a member of the level with the most members: ``layers.0.attention``."""
    if not members:
        return list(chosen)
    main = max(members, key=lambda level: (members[level], -level.count(".")))
    if members[main] < _ENOUGH:
        return list(chosen)

    def is_inner(path: str) -> bool:
        parts = path.split(".")
        return any(_level(".".join(parts[:i])) == main for i in range(1, len(parts)))

    return [named for named in chosen if not is_inner(_best_path(named, members))]


def _one_per_cost(chosen: Iterable[_Named], members: Mapping[str, int]) -> list[_Named]:
    """Of places with the same FLOPs before them, keep one.

    A feature map or sequence rather than a vector made from it, then the end of the most repeated kind
    of module, then the last one (after the activation).
    """
    groups: defaultdict[int, list[_Named]] = defaultdict(list)
    for named in chosen:
        groups[named.candidate.flops].append(named)

    def rank(indexed: tuple[int, _Named]) -> tuple[bool, int, int]:
        index, named = indexed
        return len(named.candidate.spec.shape) > 2, members[_level(_best_path(named, members))], index

    return [max(enumerate(group), key=rank)[1] for _, group in sorted(groups.items())]
