"""What rows may carry out of a program; all other checks of control flow are in `test_program`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from onnx_programs import CLASSES, chain, rows_of

from exitcompiler.control_flow_checks import verify_control_flow
from exitcompiler.controlflow import ControlFlow, Return, ValueSpec, engine_signature, taken_along
from exitcompiler.errors import LoweringError, VerifyError
from exitcompiler.passes.assemble_onnx import assemble_onnx


def carrying(*names: str, **carried: ValueSpec) -> ControlFlow:
    """A chain whose second exit carries values."""
    flow = chain().flow
    first, second, third = flow.blocks
    branch = second.terminator
    leave = replace(branch.edges[0], carries=names)  # type: ignore[union-attr]
    second = replace(second, terminator=replace(branch, edges=(leave, branch.edges[1])))  # type: ignore[union-attr,arg-type]
    return replace(flow, blocks=(first, second, third), carried=carried)


def test_what_is_carried_is_taken_along() -> None:
    flow = carrying("h", h=rows_of(6))
    verify_control_flow(flow)
    assert taken_along(flow.returns["exit2"]) == ("middle", "h")
    alone = replace(flow.block("second"), terminator=Return(("middle",), "exit2", ("h",)))
    assert list(engine_signature(alone).outputs) == ["h", "middle"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: carrying(h=rows_of(6)), r"no exit carries \['h'\]"),
        (lambda: carrying("h"), "exit 'exit2', carried: 1 values bind 0 params"),
        (lambda: carrying("nowhere", h=rows_of(6)), "'nowhere' does not exist"),
        (lambda: carrying("middle", h=rows_of(6)), f"{CLASSES}\\] cannot bind 'h'"),
        (lambda: carrying("h", h=ValueSpec((6,), "float32")), "does not belong to rows"),
    ],
)
def test_what_cannot_be_carried(make: Callable[[], ControlFlow], message: str) -> None:
    with pytest.raises(VerifyError, match=message):
        verify_control_flow(make())


def test_one_file_has_no_place_for_what_is_carried() -> None:
    with pytest.raises(LoweringError, match="carries values"):
        assemble_onnx(carrying("h", h=rows_of(6)), {})
