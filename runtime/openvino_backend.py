"""OpenVINO on the CPU: fp32 unless bf16 or int8 is asked for, tensors wired once.

OpenVINO by itself runs bf16 where the CPU has it, so the precision is always set. A model with a fixed
batch runs 4 to 5 % faster than one for any batch, so single rows get an engine of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import openvino as ov

from exitcompiler.controlflow import BlockInterface, EngineSignature, ValueSpec
from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.runtime.backends import (
    Array,
    Engine,
    Form,
    load_onnx_block,
    require_precision,
    require_signature,
)
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.single_row import bound_stopwatch

__all__ = ["OpenVinoBackend"]

_NAME = "openvino"

# int8 is in the models: what is not quantised there stays float32.
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}

_TYPES = {
    "bool": "boolean",
    "uint8": "u8",
    "int8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "float16": "f16",
    "float32": "f32",
    "float64": "f64",
}


@functools.cache
def _core() -> ov.Core:
    """The only one of the process, which is never freed.

    A core gives the thread that it is made on a stack for signals. Freed on another thread, it takes the
    memory away and leaves the first thread with it: the next signal handled there ends the process.
    """
    return ov.Core()


class OpenVinoBackend:
    """Engines that are compiled OpenVINO models.

    Raises:
        BackendUnavailableError: For bf16 on a CPU without it, and for precisions there are not.
    """

    name = _NAME
    form: Form = "onnx"
    on_device = False
    specialises = True
    channels_last = False  # that makes its blocks slower (docs/design.md)

    def __init__(self, *, precision: str = "fp32", threads: int) -> None:
        require_precision(_NAME, precision, tuple(_HINTS))
        self.precision = precision
        self.threads = threads
        self._core = _core()
        if precision == "bf16" and "BF16" not in self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise BackendUnavailableError(
                "this CPU has no bf16 instructions", where="precision", remedy="use precision='fp32'"
            )
        self._config: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
        }

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """See `Backend.load`."""
        try:
            network = self._core.read_model(model=model, weights=b"")
            used = _used(signature.inputs, network.inputs)
            for kind, specs, ports in (
                ("input", used, network.inputs),
                ("output", signature.outputs, network.outputs),
            ):
                _require_ports(kind, specs, ports)
            if static_batch is not None:
                network.reshape(
                    {
                        name: [static_batch, *spec.shape[1:]] if spec.batch_axis == 0 else list(spec.shape)
                        for name, spec in used.items()
                    }
                )
            compiled = self._core.compile_model(network, "CPU", self._config)
        except RuntimeError as error:
            raise LoweringError(
                f"OpenVINO {ov.__version__} does not take the model: {error}",
                where=f"backend {_NAME!r}",
                remedy="pip install --upgrade openvino, or choose another backend",
            ) from error
        return _OpenVinoEngine(compiled, signature)

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        """See `Backend.load_block`."""
        return load_onnx_block(self, files, point, block, static_batch)


def _require_ports(kind: str, specs: Mapping[str, ValueSpec], ports: Sequence[Any]) -> None:
    found = {_port_name(port, specs): port.get_element_type().get_type_name() for port in ports}
    expected = {name: _TYPES.get(spec.dtype, spec.dtype) for name, spec in specs.items()}
    require_signature(_NAME, found, expected, kind)


def _used(specs: Mapping[str, ValueSpec], ports: Sequence[Any]) -> dict[str, ValueSpec]:
    """The inputs that the model has: OpenVINO drops those that nothing in the block reads."""
    names = set().union(*(port.get_names() for port in ports))
    return {name: spec for name, spec in specs.items() if name in names}


def _port_name(port: Any, specs: Mapping[str, ValueSpec]) -> str:
    """Which of our names a port has; optimisations may have given it more than one."""
    names = port.get_names()
    return next((name for name in specs if name in names), str(sorted(names)))


class _OpenVinoEngine:
    def __init__(self, compiled: ov.CompiledModel, signature: EngineSignature) -> None:
        self.signature = signature
        self._compiled = compiled
        used = _used(signature.inputs, compiled.inputs)
        # (place among the signature's inputs, place among the model's)
        places = [i for i, name in enumerate(signature.inputs) if name in used]
        self._inputs = list(zip(places, _positions(used, compiled.inputs), strict=True))
        self._outputs = _positions(signature.outputs, compiled.outputs)
        self._own = self.runner()

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        return [np.array(output) for output in self._own(inputs)]

    def runner(self) -> Callable[[Sequence[Array]], Sequence[Array]]:
        request = self._compiled.create_infer_request()
        places, outputs = self._inputs, self._outputs

        def call(inputs: Sequence[Array]) -> list[Array]:
            given = {position: inputs[place] for place, position in places}
            request.infer(given, share_inputs=True, share_outputs=True)
            return [request.get_output_tensor(i).data for i in outputs]

        return call

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Callable[[], object]:
        request = self._compiled.create_infer_request()
        for place, position in self._inputs:
            request.set_input_tensor(position, ov.Tensor(inputs[place], shared_memory=True))
        for position, array in zip(self._outputs, outputs, strict=True):
            request.set_output_tensor(position, ov.Tensor(array, shared_memory=True))
        return functools.partial(request.infer, share_outputs=True)

    def stopwatch(self, inputs: Sequence[Array]) -> Callable[[], float]:
        return bound_stopwatch(self, inputs)


def _positions(specs: Mapping[str, ValueSpec], ports: Sequence[Any]) -> list[int]:
    names = [_port_name(port, specs) for port in ports]
    return [names.index(name) for name in specs]
