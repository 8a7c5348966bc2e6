"""ONNX Runtime on the CPU: fp32 or int8 (which is in the models), inputs and outputs bound once.

Threads: with one thread a session has no pool. With more, every session has a pool of its own whose
idle workers would spin, and so take cores from the session of the block that runs next (a figure for it
is in docs/backends.md). So workers sleep when they are idle. An application that owns its process can
instead call `share_thread_pool` first, for one pool under all sessions: as fast or a little faster, but
from then on ONNX Runtime refuses every session with a pool of its own in that process, whoever makes it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import onnxruntime as ort

from exitcompiler.controlflow import BlockInterface, EngineSignature
from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.runtime.backends import (
    Array,
    Engine,
    Form,
    load_onnx_block,
    numpy_dtype,
    require_precision,
    require_signature,
)
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.single_row import bound_stopwatch

__all__ = ["OnnxRuntimeBackend", "share_thread_pool"]

_log = logging.getLogger(__name__)

_NAME = "onnxruntime"

_TYPES = {
    "bool": "tensor(bool)",
    "uint8": "tensor(uint8)",
    "int8": "tensor(int8)",
    "int16": "tensor(int16)",
    "int32": "tensor(int32)",
    "int64": "tensor(int64)",
    "float16": "tensor(float16)",
    "float32": "tensor(float)",
    "float64": "tensor(double)",
}


@dataclass(slots=True)
class _SharedPool:
    threads: int | None = None


# Mirrors what ONNX Runtime holds once per process and does not tell.
_shared_pool = _SharedPool()


def share_thread_pool(threads: int) -> None:
    """Give all ONNX Runtime sessions of this process one pool; cannot be undone or resized.

    Only for an application that owns its process: afterwards ``onnxruntime.InferenceSession`` fails
    for anybody who does not set ``use_per_session_threads=False``.

    Args:
        threads: Size of the pool; backends have to be made with the same number.

    Raises:
        BackendUnavailableError: The process already has one of another size.
    """
    if _shared_pool.threads == threads:
        return
    try:
        if _shared_pool.threads is None:
            ort.set_global_thread_pool_sizes(threads, 1)
            _shared_pool.threads = threads
            _log.info("all ONNX Runtime sessions of this process share %d threads", threads)
            return
    except RuntimeError as error:
        raise _pool_conflict(threads) from error
    raise _pool_conflict(threads)


def _pool_conflict(threads: int) -> BackendUnavailableError:
    size = "another size" if _shared_pool.threads is None else f"{_shared_pool.threads} threads"
    return BackendUnavailableError(
        f"the ONNX Runtime sessions of this process already share a pool of {size}, not {threads}",
        where="threads",
        remedy="use that number, or start a fresh process",
    )


class OnnxRuntimeBackend:
    """Engines that are ONNX Runtime sessions.

    Raises:
        BackendUnavailableError: For precisions there are not, or a thread count that a shared pool forbids.
    """

    name = _NAME
    form: Form = "onnx"
    on_device = False
    specialises = False  # a dynamic batch costs a session nothing
    channels_last = True

    def __init__(self, *, precision: str = "fp32", threads: int) -> None:
        require_precision(_NAME, precision, ("fp32", "int8"))
        self.precision = precision
        self.threads = threads
        self._options = _session_options(threads)

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """See `Backend.load`; ``static_batch`` makes no difference here."""
        try:
            session = ort.InferenceSession(
                model, self._options, providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:  # the binding raises one unrelated class per status code
            raise LoweringError(
                f"ONNX Runtime {ort.__version__} does not take the model: {error}",
                where=f"backend {_NAME!r}",
                remedy="pip install --upgrade onnxruntime, or choose another backend",
            ) from error
        for kind, specs, ports in (
            ("input", signature.inputs, session.get_inputs()),
            ("output", signature.outputs, session.get_outputs()),
        ):
            expected = {name: _TYPES.get(spec.dtype, spec.dtype) for name, spec in specs.items()}
            require_signature(_NAME, {port.name: port.type for port in ports}, expected, kind)
        return _OnnxRuntimeEngine(session, signature)

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


def _session_options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    if _shared_pool.threads is not None:
        if _shared_pool.threads != threads:
            raise _pool_conflict(threads)
        options.use_per_session_threads = False
        return options
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if threads > 1:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


class _OnnxRuntimeEngine:
    def __init__(self, session: ort.InferenceSession, signature: EngineSignature) -> None:
        self.signature = signature
        self._session = session
        self._inputs = tuple(signature.inputs)
        self._outputs = list(signature.outputs)

    def run(self, inputs: Sequence[Array]) -> list[Array]:
        outputs: list[Array] = self._session.run(self._outputs, dict(zip(self._inputs, inputs, strict=True)))
        return outputs

    def runner(self) -> Callable[[Sequence[Array]], Sequence[Array]]:
        return self.run

    def bind(self, inputs: Sequence[Array], outputs: Sequence[Array]) -> Callable[[], object]:
        binding = self._session.io_binding()
        for name, array in zip(self._inputs, inputs, strict=True):
            binding.bind_cpu_input(name, array)
        for (name, spec), array in zip(self.signature.outputs.items(), outputs, strict=True):
            binding.bind_output(name, "cpu", 0, numpy_dtype(spec).type, array.shape, array.ctypes.data)
        return partial(self._session.run_with_iobinding, binding)

    def stopwatch(self, inputs: Sequence[Array]) -> Callable[[], float]:
        return bound_stopwatch(self, inputs)
