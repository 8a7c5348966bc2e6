"""A program as a picture: blocks in layers from top to bottom, exits to the right, as inline SVG."""

from __future__ import annotations

from collections.abc import Mapping
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
from exitcompiler.runtime.explain import format_share

__all__ = ["draw_control_flow"]

_BOX_WIDTH, _BOX_HEIGHT = 230, 46
_EXIT_WIDTH, _EXIT_HEIGHT, _EXIT_PITCH = 190, 30, 36
_GAP_X, _GAP_Y, _MARGIN = 36, 44, 14
_MAX_CHARACTERS = 40


@dataclass(frozen=True)
class _Place:
    """Where a block stands, in SVG units.

    Args:
        layer: Counted from the top.
        x: Left side of its box.
        y: Upper side of its box.
        exits_y: Upper side of its first exit; blocks of a layer have their exits below one another.
    """

    layer: int
    x: float
    y: float
    exits_y: float


def draw_control_flow(flow: ControlFlow, exit_rates: Mapping[str, float] | None = None) -> str:
    """Draw blocks and edges of a program.

    A block's layer is the length of the longest way to it, so that edges lead downwards. Colours are
    CSS variables of the page (``--ink``, ``--muted``, ``--surface``, ``--accent``, ``--grid``).

    Args:
        flow: A well-formed program.
        exit_rates: Exit name -> share of rows, written beside the exits.

    Returns:
        An ``<svg>`` element.
    """
    places = _place_blocks(flow)
    right = max(place.x for place in places.values()) + _BOX_WIDTH
    exits_x = right + 2 * _GAP_X
    parts = []
    for block in flow.blocks:
        place = places[block.name]
        exit_y = place.exits_y
        for way in successors(block.terminator):
            if isinstance(way, Return):
                parts.append(_draw_exit(way, place, exits_x, exit_y, exit_rates or {}))
                exit_y += _EXIT_PITCH
            else:
                parts.append(_draw_edge(way, block, place, places[way.target], right))
    parts += [_draw_block(block, places[block.name]) for block in flow.blocks]
    width = exits_x + _EXIT_WIDTH + _MARGIN
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


def _place_blocks(flow: ControlFlow) -> dict[str, _Place]:
    layers: dict[str, int] = {}
    for block in flow.blocks:
        layer = layers.setdefault(block.name, 0)
        for way in successors(block.terminator):
            if isinstance(way, Edge):
                layers[way.target] = max(layers.get(way.target, 0), layer + 1)
    columns: dict[int, int] = {}
    rows_of_layer = {
        layer: sum(_returns(block) for block in flow.blocks if layers[block.name] == layer)
        for layer in layers.values()
    }
    tops, y = {}, float(_MARGIN)
    for layer in sorted(rows_of_layer):
        tops[layer] = y
        y += max(_BOX_HEIGHT, rows_of_layer[layer] * _EXIT_PITCH) + _GAP_Y
    places = {}
    exits_y = {layer: top + (_BOX_HEIGHT - _EXIT_HEIGHT) / 2 for layer, top in tops.items()}
    for block in flow.blocks:
        layer = layers[block.name]
        column = columns.setdefault(layer, 0)
        columns[layer] += 1
        x = _MARGIN + column * (_BOX_WIDTH + _GAP_X)
        places[block.name] = _Place(layer, x, tops[layer], exits_y[layer])
        exits_y[layer] += _returns(block) * _EXIT_PITCH
    return places


def _returns(block: BlockInterface) -> int:
    return sum(isinstance(way, Return) for way in successors(block.terminator))


def _bottom(block: BlockInterface, place: _Place) -> float:
    return max(place.y + _BOX_HEIGHT, place.exits_y + _returns(block) * _EXIT_PITCH)


def _draw_block(block: BlockInterface, place: _Place) -> str:
    middle = place.x + _BOX_WIDTH / 2
    return (
        f'<rect x="{place.x:g}" y="{place.y:g}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="7" '
        'fill="var(--surface, #fff)" stroke="var(--muted, #666)" stroke-width="1.3"/>'
        + _text(block.name, middle, place.y + 20, anchor="middle", weight="600")
        + _text(_gate_text(block), middle, place.y + 37, anchor="middle", muted=True)
    )


def _gate_text(block: BlockInterface) -> str:
    if not isinstance(block.terminator, Branch):
        return "returns" if isinstance(block.terminator, Return) else "no gate"
    gate = block.terminator.gate
    if isinstance(gate, ConstantGate):
        return f"always takes edge {gate.action}"
    features = len(gate.weight[0])
    return f"gate on {features} confidence feature{'' if features == 1 else 's'}"


def _draw_exit(way: Return, place: _Place, x: float, y: float, rates: Mapping[str, float]) -> str:
    start, side = place.y + _BOX_HEIGHT / 2, place.x + _BOX_WIDTH
    middle = y + _EXIT_HEIGHT / 2
    label = way.exit if way.exit not in rates else f"{way.exit}: {format_share(rates[way.exit])}"
    return (
        f'<path d="M{side:g} {start:g} C{x - 20:g} {start:g} {side + 20:g} {middle:g} {x:g} {middle:g}" '
        'fill="none" stroke="var(--muted, #666)" stroke-width="1.3" marker-end="url(#arrow)"/>'
        f'<rect x="{x:g}" y="{y:g}" width="{_EXIT_WIDTH}" height="{_EXIT_HEIGHT}" rx="15" '
        'fill="var(--accent, #0b62c4)"/>'
        + _text(
            label,
            x + _EXIT_WIDTH / 2,
            middle + 4,
            anchor="middle",
            weight="600",
            fill="var(--on-accent, #fff)",
        )
    )


def _draw_edge(edge: Edge, block: BlockInterface, start: _Place, end: _Place, right: float) -> str:
    x1, y1 = start.x + _BOX_WIDTH / 2, start.y + _BOX_HEIGHT
    x2, y2 = end.x + _BOX_WIDTH / 2, end.y
    if end.layer == start.layer + 1:
        bend = (y1 + y2) / 2
        path = f"M{x1:g} {y1:g} C{x1:g} {bend:g} {x2:g} {bend:g} {x2:g} {y2:g}"
    else:  # past the layers between, on the right of every box
        aside = right + _GAP_X * 0.6
        path = (
            f"M{x1:g} {y1:g} C{x1:g} {y1 + 30:g} {aside:g} {y1 + 8:g} {aside:g} {y1 + 44:g} "
            f"V{y2 - 44:g} C{aside:g} {y2 - 8:g} {x2:g} {y2 - 30:g} {x2:g} {y2:g}"
        )
    line = (
        f'<path d="{path}" fill="none" stroke="var(--muted, #666)" stroke-width="1.3" '
        'marker-end="url(#arrow)">'
        f"<title>{escape(', '.join(f'{name}: {block.values[name]}' for name in edge.values))}</title></path>"
    )
    return line + _text(_edge_text(edge, block.values), (x1 + x2) / 2 + 8, (y1 + y2) / 2 + 4, muted=True)


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
) -> str:
    shown = text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"
    title = "" if shown == text else f"<title>{escape(text)}</title>"
    color, size = ("var(--muted, #666)", 11) if muted else (fill, 12)
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" font-size="{size}" '
        f'fill="{color}">{escape(shown)}{title}</text>'
    )
