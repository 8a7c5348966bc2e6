"""Lists of compiled layers, as TensorRT-RTX 1.7 writes them, are read; anything else is an error."""

from __future__ import annotations

import pytest

from exitcompiler.errors import LoweringError
from exitcompiler.runtime.tensorrt_layers import compiled_layers, host_decisions, side_streams

_FLOAT = "Dimensions: [1], Strides: [1], StrideOrder: [0], Datatype: Float, Format: (Linear) Row major"


def line(name: str, kind: str, reads: str = "x", stream: int = 0) -> str:
    return (
        f"Name: {name}, LayerType: {kind}, Inputs: [ {{ Name: {reads}, {_FLOAT} }}], Constants: [], "
        f"Outputs: [ {{ Name: y, {_FLOAT} }}], TacticName: {name}_0x1, StreamId: {stream}, "
        f"Metadata: [ONNX Layer: conv.0]"
    )


HARMLESS = [
    line("__myl_ConvRelu_myl0_0", "kgen"),
    line("gemm_myl0_1", "gemm"),
    line("__mye612_myl0_2", "copy"),  # from one place on the device to another
    line("__myl_Add, Mul_myl0_3", "runtime_fusion"),
]


def log(lines: list[str], heading: str = "Layers:") -> str:
    return "\n".join(["Parsing node: conv.0", heading, *lines, "", "I/O Tensors:", " Name: x, IOMode: Input"])


def test_layers_are_read_in_order_up_to_the_empty_line() -> None:
    layers = compiled_layers(log(HARMLESS))
    assert [layer.name for layer in layers] == [
        "__myl_ConvRelu_myl0_0",
        "gemm_myl0_1",
        "__mye612_myl0_2",
        "__myl_Add, Mul_myl0_3",
    ]
    assert [layer.type for layer in layers] == ["kgen", "gemm", "copy", "runtime_fusion"]
    assert host_decisions(layers) == []
    assert side_streams(layers) == []


def test_a_logger_may_put_something_before_the_heading() -> None:
    assert len(compiled_layers(log(HARMLESS, "[V] Layers:"))) == 4


@pytest.mark.parametrize(
    "bad",
    [
        line("__mye725cbr_myl0_8", "cjmp"),
        line("jmp__mye743_myl0_18", "jmp").replace(
            "StreamId: 0", "StreamId: 0, JumpTarget: __mye824_myl0_25"
        ),
        line("copy_d2h___mye6342_myl0_5", "copy"),
        line("__mye6112_myl0_22", "copy", reads="host^0.first/cast.28.1__mye6340_myl0"),
    ],
)
def test_jumps_and_host_values_are_found_wherever_they_stand(bad: str) -> None:
    for place in range(len(HARMLESS) + 1):
        layers = compiled_layers(log([*HARMLESS[:place], bad, *HARMLESS[place:]]))
        assert [layer.text for layer in host_decisions(layers)] == [bad]


def test_layers_on_other_streams_are_found() -> None:
    layers = compiled_layers(log([*HARMLESS, line("beside", "kgen", stream=1)]))
    assert [layer.name for layer in side_streams(layers)] == ["beside"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "lists no compiled layers"),
        ("Engine Layer Information:\nLayer(Conv): conv.0, Tactic: 0x1, x -> y", "lists no compiled layers"),
        (log([]), "the list of compiled layers is empty"),
        (log(["Layer(Conv): conv.0, Tactic: 0x1, x -> y"]), "in a form that is not known: Layer"),
        (log([HARMLESS[0].replace("StreamId: 0, ", "")]), "in a form that is not known"),
    ],
)
def test_a_text_that_is_not_understood_is_an_error_and_no_empty_engine(text: str, says: str) -> None:
    with pytest.raises(LoweringError, match=says):
        compiled_layers(text)
