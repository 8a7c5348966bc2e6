"""A program as a picture: blocks from top to bottom, exits to the right, as inline SVG.

Blocks stand below one another in program order, so that every edge leads downwards. An edge to the very
next block is a straight line; all others run in lanes on the left, past the blocks between.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape

from exitcompiler.controlflow import (
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Return,
    ValueSpec,
    successors,
)
from exitcompiler.edge_shares import Way, edge_shares
from exitcompiler.runtime.wording import format_share

__all__ = ["draw_control_flow"]

_BOX_WIDTH, _BOX_HEIGHT = 230, 46
_EXIT_WIDTH, _EXIT_HEIGHT, _EXIT_PITCH = 190, 30, 36
_GAP_X, _GAP_Y, _MARGIN = 36, 44, 14
_PORT_PITCH, _LANE_PADDING, _CORNER = 12, 14, 8
_CHARACTER, _WIDE_CHARACTER = 6.2, 7.1  # width of one, in the small and in the bold size
_MAX_CHARACTERS = 40


@dataclass(frozen=True)
class _Place:
    """Where a block stands, in SVG units.

    Args:
        x: Left side of its box.
        y: Upper side of its box.
        width: Of its box: room for the longest name of any block.
        height: Of its box: room for the edges on its left.
    """

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class _Lane:
    """Where an edge runs that leads past other blocks.

    Args:
        number: Counted from the boxes outwards.
        leaves: Its position among the edges that leave the source on the left, from below.
        arrives: Its position among those that arrive at the target on the left, from above.
    """

    number: int
    leaves: int
    arrives: int


def draw_control_flow(
    flow: ControlFlow,
    exit_rates: Mapping[str, float] | None = None,
    block_rates: Mapping[str, float] | None = None,
) -> str:
    """Draw blocks and edges of a program.

    Colours are CSS variables of the page (``--ink``, ``--muted``, ``--surface``, ``--accent``, ``--grid``).

    Args:
        flow: A well-formed program.
        exit_rates: Exit name -> share of rows, written beside the exits.
        block_rates: Block name -> share of rows that run it, as far as known. If given, edges are labelled
            with the share of rows that takes them, where that follows from both.

    Returns:
        An ``<svg>`` element.
    """
    shares = {} if block_rates is None else edge_shares(flow, exit_rates or {}, block_rates)
    lanes = _assign_lanes(flow)
    labels = {way: _lane_text(flow, way, shares, block_rates is not None) for way in lanes}
    pitch = _LANE_PADDING + max((_CHARACTER * len(text) for text in labels.values()), default=0.0)
    places = _place_blocks(flow, lanes, pitch)
    first = places[flow.entry.name]
    exits_x = first.x + first.width + 2 * _GAP_X
    exit_width = _width([_exit_text(exit, exit_rates or {}) for exit in flow.exits], _EXIT_WIDTH)
    parts = []
    for block in flow.blocks:
        place = places[block.name]
        exit_y = place.y + (_BOX_HEIGHT - _EXIT_HEIGHT) / 2
        for action, way in enumerate(successors(block.terminator)):
            key = (block.name, action)
            if isinstance(way, Return):
                parts.append(_draw_exit(way, place, exits_x, exit_y, exit_width, exit_rates or {}))
                exit_y += _EXIT_PITCH
            elif key in lanes:
                parts.append(
                    _draw_lane(way, block, place, places[way.target], lanes[key], pitch, labels[key])
                )
            else:
                parts.append(_draw_straight(way, block, place, places[way.target], shares.get(key)))
    parts += [_draw_block(block, places[block.name]) for block in flow.blocks]
    width = exits_x + exit_width + _MARGIN
    bottom = max(_bottom(block, places[block.name]) for block in flow.blocks) + _MARGIN
    label = f"Program of {len(flow.blocks)} blocks with the exits {', '.join(flow.exits)}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {bottom:g}" role="img" '
        f'aria-label="{escape(label)}" style="max-width: {width:g}px" font-size="12">'
        f"{_ARROW}{''.join(parts)}</svg>"
    )


_ARROW = (
    '<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto">'
    '<path d="M0 0 L8 4 L0 8 z" fill="var(--muted, #666)"/></marker></defs>'
)


def _assign_lanes(flow: ControlFlow) -> dict[Way, _Lane]:
    """Lanes for all edges past other blocks: shorter ones inside, none shared by edges side by side.

    Ports are ordered so that edges of one block do not cross: leaving, the outermost lane is on top;
    arriving, at the bottom.
    """
    row = {block.name: number for number, block in enumerate(flow.blocks)}
    spans = [
        (row[way.target] - row[block.name], row[block.name], action)
        for block in flow.blocks
        for action, way in enumerate(successors(block.terminator))
        if isinstance(way, Edge)
    ]
    taken: list[list[tuple[int, int]]] = []
    lanes: dict[Way, _Lane] = {}
    leaving = dict.fromkeys(row.values(), 0)
    arriving = dict.fromkeys(row.values(), 0)
    used: set[tuple[int, int]] = set()
    for length, start, action in sorted(spans):
        end = start + length
        if length == 1 and (start, end) not in used:
            used.add((start, end))
            continue
        free = (n for n, lane in enumerate(taken) if all(end <= a or b <= start for a, b in lane))
        number = next(free, len(taken))
        if number == len(taken):
            taken.append([])
        taken[number].append((start, end))
        lanes[flow.blocks[start].name, action] = _Lane(number, leaving[start], arriving[end])
        leaving[start] += 1
        arriving[end] += 1
    return lanes


def _place_blocks(flow: ControlFlow, lanes: Mapping[Way, _Lane], pitch: float) -> dict[str, _Place]:
    x = _MARGIN + (1 + max((lane.number for lane in lanes.values()), default=-1)) * pitch
    x += _GAP_X / 2 if lanes else 0
    ports = dict.fromkeys((block.name for block in flow.blocks), 0)
    for name, action in lanes:
        target = successors(flow.block(name).terminator)[action]
        ports[name] += 1
        if isinstance(target, Edge):
            ports[target.target] += 1
    width = _width([text for block in flow.blocks for text in (block.name, _gate_text(block))], _BOX_WIDTH)
    places, y = {}, float(_MARGIN)
    for block in flow.blocks:
        height = max(_BOX_HEIGHT, _PORT_PITCH * (ports[block.name] + 1))
        places[block.name] = _Place(x, y, width, height)
        y += max(height, _returns(block) * _EXIT_PITCH) + _GAP_Y
    return places


def _width(texts: Iterable[str], least: float) -> float:
    """Of a box in which each of the texts has room."""
    return max([least, *(_WIDE_CHARACTER * min(len(text), _MAX_CHARACTERS) + 16 for text in texts)])


def _returns(block: BlockInterface) -> int:
    return sum(isinstance(way, Return) for way in successors(block.terminator))


def _bottom(block: BlockInterface, place: _Place) -> float:
    return place.y + max(place.height, (_BOX_HEIGHT - _EXIT_HEIGHT) / 2 + _returns(block) * _EXIT_PITCH)


def _draw_block(block: BlockInterface, place: _Place) -> str:
    middle = place.x + place.width / 2
    top = place.y + (place.height - _BOX_HEIGHT) / 2
    return (
        f'<rect x="{place.x:g}" y="{place.y:g}" width="{place.width:g}" height="{place.height:g}" rx="7" '
        'fill="var(--surface, #fff)" stroke="var(--muted, #666)" stroke-width="1.3"/>'
        + _text(block.name, middle, top + 20, anchor="middle", weight="600")
        + _text(_gate_text(block), middle, top + 37, anchor="middle", muted=True)
    )


def _gate_text(block: BlockInterface) -> str:
    if not isinstance(block.terminator, Branch):
        return "returns" if isinstance(block.terminator, Return) else "no gate"
    gate = block.terminator.gate
    if isinstance(gate, ConstantGate):
        return f"always takes edge {gate.action}"
    features = len(gate.weight[0])
    ways = "" if gate.actions == 2 else f", {gate.actions} ways"
    return f"gate on {features} confidence feature{'' if features == 1 else 's'}{ways}"


def _exit_text(exit: str, rates: Mapping[str, float]) -> str:
    return exit if exit not in rates else f"{exit}: {format_share(rates[exit])}"


def _draw_exit(
    way: Return, place: _Place, x: float, y: float, width: float, rates: Mapping[str, float]
) -> str:
    start, side = place.y + _BOX_HEIGHT / 2, place.x + place.width
    middle = y + _EXIT_HEIGHT / 2
    return (
        f'<path d="M{side:g} {start:g} C{x - 20:g} {start:g} {side + 20:g} {middle:g} {x:g} {middle:g}" '
        'fill="none" stroke="var(--muted, #666)" stroke-width="1.3" marker-end="url(#arrow)"/>'
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{_EXIT_HEIGHT}" rx="15" '
        'fill="var(--accent, #0b62c4)"/>'
        + _text(
            _exit_text(way.exit, rates),
            x + width / 2,
            middle + 4,
            anchor="middle",
            weight="600",
            fill="var(--on-accent, #fff)",
        )
    )


def _draw_straight(edge: Edge, block: BlockInterface, start: _Place, end: _Place, share: float | None) -> str:
    x, y1, y2 = start.x + start.width / 2, start.y + start.height, end.y
    middle = (y1 + y2) / 2
    line = _line(f"M{x:g} {y1:g} C{x:g} {middle:g} {x:g} {middle:g} {x:g} {y2:g}", edge, block)
    text = _edge_text(edge, block.values)
    if share is None:
        return line + _text(text, x + 8, middle + 4, muted=True)
    rows = _text(f"{format_share(share)} of the rows", x + 8, middle - 3, muted=True)
    return line + rows + _text(text, x + 8, middle + 11, muted=True)


def _draw_lane(
    edge: Edge, block: BlockInterface, start: _Place, end: _Place, lane: _Lane, pitch: float, label: str
) -> str:
    lane_x = start.x - _GAP_X / 2 - (lane.number + 0.5) * pitch
    y1 = start.y + start.height - _PORT_PITCH * (lane.leaves + 1)
    y2 = end.y + _PORT_PITCH * (lane.arrives + 1)
    path = (
        f"M{start.x:g} {y1:g} H{lane_x + _CORNER:g} Q{lane_x:g} {y1:g} {lane_x:g} {y1 + _CORNER:g} "
        f"V{y2 - _CORNER:g} Q{lane_x:g} {y2:g} {lane_x + _CORNER:g} {y2:g} H{end.x:g}"
    )
    if not label:
        return _line(path, edge, block)
    # Between two blocks no edge runs sideways, so that nothing crosses the label.
    y = start.y + start.height + _GAP_Y / 2
    return _line(path, edge, block) + _text(label, lane_x, y + 4, anchor="middle", muted=True, halo=True)


def _line(path: str, edge: Edge, block: BlockInterface) -> str:
    values = ", ".join(f"{name}: {block.values[name]}" for name in edge.values)
    return (
        f'<path d="{path}" fill="none" stroke="var(--muted, #666)" stroke-width="1.3" '
        f'marker-end="url(#arrow)"><title>{escape(values)}</title></path>'
    )


def _lane_text(flow: ControlFlow, way: Way, shares: Mapping[Way, float], with_shares: bool) -> str:
    """The share of rows where shares are shown, for lanes are narrow; else what the edge hands over."""
    if with_shares:
        return format_share(shares[way]) if way in shares else ""
    block = flow.block(way[0])
    edge = successors(block.terminator)[way[1]]
    return _edge_text(edge, block.values)[:_MAX_CHARACTERS] if isinstance(edge, Edge) else ""


def _edge_text(edge: Edge, values: Mapping[str, ValueSpec]) -> str:
    """The largest value handed over, and how many go with it."""
    if not edge.values:
        return ""
    largest = max((values[name] for name in edge.values), key=_row_size)
    more = len(edge.values) - 1
    return f"{largest}" + (f" + {more} more" if more else "")


def _row_size(spec: ValueSpec) -> int:
    size = 1
    for length in spec.shape:
        size *= length if isinstance(length, int) else 1
    return size


def _text(
    text: str,
    x: float,
    y: float,
    *,
    anchor: str = "start",
    weight: str = "400",
    muted: bool = False,
    fill: str = "var(--ink, #111)",
    halo: bool = False,
) -> str:
    shown = text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
    title = "" if shown == text else f"<title>{escape(text)}</title>"
    color, size = ("var(--muted, #666)", 11) if muted else (fill, 12)
    behind = ' stroke="var(--surface, #fff)" stroke-width="8" paint-order="stroke"' if halo else ""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
        f'fill="{color}"{behind}>{escape(shown)}{title}</text>'
    )
