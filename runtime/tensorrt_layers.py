"""Reads what TensorRT compiled an engine to, and finds where it would decide on the host.

A program that decides on the device may hold no layer that copies a value to the host to look at it, and
none that jumps by such a value: a CUDA graph cannot record either. TensorRT's own ``If`` is made of both.

The text comes from the builder's log at its most talkative, for an engine built with
``BuildSettings(detailed=True)``, or from an engine on a device:
``engine.create_engine_inspector().get_engine_information(LayerInformationFormat.ONELINE)``. Its form is
nowhere documented: a text without it is an error, never an engine without layers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from exitcompiler.errors import LoweringError

__all__ = ["CompiledLayer", "compiled_layers", "host_decisions", "side_streams"]

_HEADING: Final = "Layers:"
_LAYER: Final = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<type>[^,\s]*), Inputs: (?P<rest>.*)")
_STREAM: Final = re.compile(r"StreamId: (\d+)")
_JUMPS: Final = frozenset({"jmp", "cjmp"})
_HOST_COPY: Final = re.compile(r"(^|[^a-z])d2h([^a-z]|$)", re.IGNORECASE)
_HOST_VALUE: Final = re.compile(r"Name: host\^")


@dataclass(frozen=True, slots=True)
class CompiledLayer:
    """A layer as it will run.

    Args:
        name: TensorRT's.
        type: ``"kgen"``, ``"gemm"``, ``"copy"``, ``"cjmp"``, ...
        stream: The number of the stream it runs on; 0 is the caller's.
        text: All that was said of it.
    """

    name: str
    type: str
    stream: int
    text: str

    @property
    def decides_on_host(self) -> bool:
        """Whether it jumps, or moves a value between device and host."""
        if self.type in _JUMPS:
            return True
        return bool(_HOST_COPY.search(self.name) or _HOST_VALUE.search(self.text))


def compiled_layers(log_text: str) -> tuple[CompiledLayer, ...]:
    """The layers that a text lists.

    Args:
        log_text: A builder's log, a message a line, or what an engine inspector says.

    Returns:
        All of them, in order; those of one profile come after one another.

    Raises:
        LoweringError: There is no list in it, it is empty, or a line of it is not understood.
    """
    lines = iter(log_text.splitlines())
    for line in lines:
        if line.strip().endswith(_HEADING):
            break
    else:
        raise _unreadable("the text lists no compiled layers")
    found = []
    for line in lines:
        if not line.strip():
            break
        layer, stream = _LAYER.fullmatch(line.strip()), _STREAM.search(line)
        if layer is None or stream is None:
            raise _unreadable(f"a compiled layer is listed in a form that is not known: {line.strip()[:200]}")
        found.append(CompiledLayer(layer["name"], layer["type"], int(stream[1]), line.strip()))
    if not found:
        raise _unreadable("the list of compiled layers is empty")
    return tuple(found)


def _unreadable(what: str) -> LoweringError:
    return LoweringError(
        what,
        where="compiled layers",
        remedy="build with detailed=True, and give all that the builder logs",
    )


def host_decisions(layers: Iterable[CompiledLayer]) -> list[CompiledLayer]:
    """The layers at which the host would copy a value, or jump: no CUDA graph can hold such an engine."""
    return [layer for layer in layers if layer.decides_on_host]


def side_streams(layers: Iterable[CompiledLayer]) -> list[CompiledLayer]:
    """The layers that run on a stream of their own: there should be none with ``max_aux_streams=0``."""
    return [layer for layer in layers if layer.stream != 0]
