"""Cuts a program in two at an edge: a near part that answers what it can, and a far part for the rest.

Blocks stay the files that they are; only control flow is rewritten, so neither torch nor onnx is needed.
In the near part the edge becomes an exit: rows that take it leave with the answer that their block has,
and carry what the far part takes as its inputs::

    small: (x) -> (out, conf)                      small: (x) -> (out, conf)
      branch [conf]:                                 branch [conf]:
        return "small" (out)                           return "small" (out)
        large(x)                          =>           return "small:large" (out), carrying (x)
    large: (x) -> (out)
      return "large" (out)                         large: (x) -> (out)
                                                     return "large" (out)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from exitcompiler.control_flow_checks import verify_control_flow
from exitcompiler.controlflow import (
    BlockInterface,
    ControlFlow,
    Edge,
    OutputStructure,
    Return,
    Successor,
    map_successors,
    successors,
)
from exitcompiler.errors import InputError
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.hand_over import HandOver, row_bytes
from exitcompiler.runtime.loading import load
from exitcompiler.runtime.manifest import Artifact, Part, block_path, torch_paths
from exitcompiler.runtime.manifest_json import control_flow_to_json

__all__ = ["CutEdge", "Split", "SplitArtifacts", "edges_of", "split", "split_artifact"]

Pair: TypeAlias = "tuple[str, str]"


@dataclass(frozen=True, slots=True)
class CutEdge:
    """An edge at which a program may be cut.

    Args:
        source: Name of the block that rows come from.
        target: Name of the block that they go to.
        bytes_per_row: Size of what a row takes along.
        obstacle: Why the program cannot be cut here; None: it can.
    """

    source: str
    target: str
    bytes_per_row: int
    obstacle: str | None

    @property
    def name(self) -> str:
        """``source:target``, which is also the exit that rows leave at."""
        return f"{self.source}:{self.target}"


@dataclass(frozen=True, slots=True)
class SplitArtifacts:
    """The two parts of a program.

    Args:
        near: Where rows start.
        far: Takes what the near part hands over.
        hand_over: What that is.
        share: The share of rows that go on in the far part, as far as it is known from the estimates.
        shared: Blocks that are in both parts, as rows also get there without taking the edge.
    """

    near: Artifact
    far: Artifact
    hand_over: HandOver
    share: float | None
    shared: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Split:
    """The two parts of a program, ready to run; fields as in `SplitArtifacts`."""

    near: CompiledModel
    far: CompiledModel
    hand_over: HandOver
    share: float | None
    shared: tuple[str, ...]


def split(program: CompiledModel | str | os.PathLike[str], edge: Pair | str) -> Split:
    """Cut a compiled program in two, for instance for a device and a server.

    ``near.run(x)`` answers a batch and has, in ``handed_over``, the rows that go on and what to call
    ``far`` with for them. Together they give exactly the answers of the program; see `docs/split.md`.

    Args:
        program: A compiled model, which is cut at its operating point; or where an artifact lies.
        edge: Names of two blocks, (source, target) or ``"source:target"``; or the target alone: all edges
            that lead there are cut.

    Raises:
        InputError: There is no such edge, a text may mean several, or the program cannot be cut there; names
            the edges that can.
        ArtifactError: The artifact cannot be read, or the program is forced to one exit.
        BackendUnavailableError: Nothing here can run the artifact.
    """
    compiled = program if isinstance(program, CompiledModel) else load(program)
    parts = split_artifact(compiled.selected_artifact(), edge)
    near, far = (compiled.with_artifact(artifact) for artifact in (parts.near, parts.far))
    return Split(near, far, parts.hand_over, parts.share, parts.shared)


def split_artifact(artifact: Artifact, edge: Pair | str) -> SplitArtifacts:
    """Cut the selected operating point of an artifact in two; see `split`. Needs no backend.

    Args:
        artifact: Its other operating points, its report and its certificate are in neither part.
        edge: As in `split`.

    Raises:
        InputError: There is no such edge, or the program cannot be cut there; names the edges that can.
    """
    point = artifact.manifest.operating_points[artifact.manifest.selected]
    flow = point.control_flow
    cut = _find(flow, edge)
    pairs = tuple((found.source, found.target) for found in cut)
    near, far = _near(flow, pairs), _far(flow, pairs[0][1])
    for part in (near, far):
        verify_control_flow(part)
    document = [control_flow_to_json(flow), dict(point.files), pairs]
    whole = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    names = {block.name for block in near.blocks}
    rates, share = _rates(near, far, point.estimate.exit_rates)
    return SplitArtifacts(
        near=_artifact(artifact, near, Part("near", pairs, whole), rates),
        far=_artifact(artifact, far, Part("far", pairs, whole), rates),
        hand_over=HandOver(near.carried, whole),
        share=share,
        shared=tuple(block.name for block in far.blocks if block.name in names),
    )


def edges_of(flow: ControlFlow) -> list[CutEdge]:
    """All edges of a program, in its order, with what rows take along.

    Args:
        flow: The program.
    """
    pairs = dict.fromkeys((block.name, way.target) for block in flow.blocks for way in _edges(block))
    return [_describe(flow, *pair) for pair in pairs]


def _describe(flow: ControlFlow, source: str, target: str) -> CutEdge:
    params = flow.block(target).params
    shared = [name for name, spec in params.items() if spec.batch_axis is None]
    obstacle = None
    if shared or not params:
        obstacle = f"{shared or 'nothing'} would be handed over, and not values of rows"
    elif _answer(flow.block(source)) is None:
        obstacle = "no answer to fall back on"
    rows = (spec for spec in params.values() if spec.batch_axis is not None)
    return CutEdge(source, target, sum(map(row_bytes, rows)), obstacle)


def _find(flow: ControlFlow, edge: Pair | str) -> list[CutEdge]:
    """The edges to cut, all into the same block."""
    if flow.carried:
        raise InputError(
            "this is the near part of a program that was split",
            where="split",
            remedy="split the whole program elsewhere, or the far part",
        )
    edges = edges_of(flow)
    if isinstance(edge, str):
        name = edge
        found = _matching(edges, name)
    else:
        name = ":".join(edge)
        found = [e for e in edges if (e.source, e.target) == tuple(edge)]
    wrong = [e for e in found if e.obstacle is not None]
    if not found or wrong:
        what = f"cannot be cut at {wrong[0].name}: {wrong[0].obstacle}" if wrong else f"has no edge {name!r}"
        raise InputError(f"the program {what}", where="split", remedy=_choices(edges))
    return found


def _matching(edges: Sequence[CutEdge], text: str) -> list[CutEdge]:
    """What a text stands for: one edge, or all that lead to a block."""
    named = [[edge] for edge in edges if edge.name == text]
    leading = [edge for edge in edges if edge.target == text]
    meanings = [*named, leading] if leading else named
    if len(meanings) > 1:  # block names may hold a colon
        listed = " or ".join(
            "all edges to " + repr(text) if found is leading else repr((found[0].source, found[0].target))
            for found in meanings
        )
        raise InputError(
            f"{text!r} may mean {listed}",
            where="split",
            remedy="from Python name the edge as a pair of blocks; or name networks without ':'",
        )
    return meanings[0] if meanings else []


def _choices(edges: Sequence[CutEdge]) -> str:
    usable = [f"{edge.name} ({edge.bytes_per_row} bytes per row)" for edge in edges if edge.obstacle is None]
    if not usable:
        return "it has no edge that it can be cut at"
    return f"it can be cut at {', '.join(usable)}; a target alone stands for all edges that lead there"


def _edges(block: BlockInterface) -> Iterable[Edge]:
    return (way for way in successors(block.terminator) if isinstance(way, Edge))


def _answer(block: BlockInterface) -> Return | None:
    """The first way to leave from a block: its answer for rows that nobody else answers."""
    return next((way for way in successors(block.terminator) if isinstance(way, Return)), None)


def _near(flow: ControlFlow, cut: Collection[Pair]) -> ControlFlow:
    """The program with the edges turned into exits, and without what cannot be reached any more."""
    taken = set(flow.exits)

    def hand_over(block: BlockInterface) -> BlockInterface:
        answer = _answer(block)

        def change(way: Successor) -> Successor:
            if isinstance(way, Return) or answer is None or (block.name, way.target) not in cut:
                return way
            exit_name = f"{block.name}:{way.target}"
            while exit_name in taken:  # a block may have two edges to the same target
                exit_name += "'"
            taken.add(exit_name)
            return Return(answer.values, exit_name, way.values)

        return replace(block, terminator=map_successors(block.terminator, change))

    (target,) = {target for _, target in cut}
    changed = replace(
        flow, blocks=tuple(map(hand_over, flow.blocks)), carried=dict(flow.block(target).params)
    )
    return replace(changed, blocks=_reachable(changed, flow.entry.name))


def _far(flow: ControlFlow, entry: str) -> ControlFlow:
    return ControlFlow(flow.block(entry).params, flow.outputs, _reachable(flow, entry))


def _reachable(flow: ControlFlow, entry: str) -> tuple[BlockInterface, ...]:
    reached = {entry}
    for block in flow.blocks:  # in topological order: whoever leads to a block comes before it
        if block.name in reached:
            reached.update(edge.target for edge in _edges(block))
    return tuple(block for block in flow.blocks if block.name in reached)


def _rates(
    near: ControlFlow, far: ControlFlow, rates: Mapping[str, float]
) -> tuple[dict[str, float], float | None]:
    """Exit -> share of all rows, and the share that is handed over, as far as they are known.

    Of an exit that is in both parts, it is not known in which of them its rows are.
    """
    both = set(near.exits) & set(far.exits)
    known = {exit: rate for exit, rate in rates.items() if exit not in both}
    if both:
        return known, None
    share = max(0.0, 1.0 - sum(known.get(exit, 0.0) for exit in near.exits))
    handing = [exit for exit, way in near.returns.items() if way.carries]
    return (known | {handing[0]: share} if len(handing) == 1 else known), share


def _artifact(whole: Artifact, flow: ControlFlow, part: Part, rates: Mapping[str, float]) -> Artifact:
    manifest = whole.manifest
    point = manifest.operating_points[manifest.selected]
    names = {block.name for block in flow.blocks}
    known = {exit: rates[exit] for exit in flow.exits if exit in rates}
    point = replace(
        point,
        control_flow=flow,
        files={block: file for block, file in point.files.items() if block in names},
        torch_files={block: stem for block, stem in point.torch_files.items() if block in names},
        estimate=replace(point.estimate, exit_rates=known),
        execution="blocks",
    )
    needed = {block_path(file) for file in point.files.values()}
    needed.update(path for stem in point.torch_files.values() for path in torch_paths(stem))
    return Artifact(
        replace(
            manifest,
            inputs=flow.inputs,
            output_structure=manifest.output_structure if part.kind == "near" else OutputStructure("tensor"),
            operating_points=(point,),
            selected=0,
            plain=None,
            one_file=None,
            certificate=None,
            files={},
            part=part,
        ),
        {path: content for path, content in whole.files.items() if path in needed},
    )
