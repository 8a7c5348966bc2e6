"""The cuda backend: blocks as torch graphs on a GPU, each captured into a CUDA graph.

PyTorch's settings hold as they are found when a block is captured. One of them lets cuDNN compute
float32 convolutions in TF32, which has float16's digits and float32's range, and is on unless
``torch.backends.cudnn.allow_tf32 = False``; that for products of matrices is off unless it was turned on.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import weakref
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from exitcompiler.controlflow import ACTION, BlockInterface, EngineSignature, engine_signature
from exitcompiler.errors import BackendUnavailableError, DeviceError, ExitCompilerError, LoweringError
from exitcompiler.runtime.backends import Engine, Form, require_precision, require_torch_graph
from exitcompiler.runtime.batch_norm_folding import fold_batch_norms
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DEFAULT_MAX_ROWS
from exitcompiler.runtime.device import Captured, DeviceArray
from exitcompiler.runtime.device_engines import HostArrayEngine
from exitcompiler.runtime.manifest import OperatingPoint
from exitcompiler.runtime.planning import powers_of_two
from exitcompiler.runtime.torch_bodies import Body, Place, move_body, run_block

__all__ = ["CudaBackend", "CudaEngine"]

_NAME: Final = "cuda"
_PRECISIONS: Final = ("fp32", "fp16", "bf16")
_WARM_UPS: Final = 3

# What numpy calls a type where PyTorch reads an array's; it has no word for bfloat16, whose bits are read.
_TYPES: Final = {
    "bool": "|b1",
    "uint8": "|u1",
    "int8": "|i1",
    "int16": "<i2",
    "int32": "<i4",
    "int64": "<i8",
    "float16": "<f2",
    "bfloat16": "<i2",
    "float32": "<f4",
    "float64": "<f8",
}


class CudaBackend:
    """Engines that run a block's torch graph on device 0, or what ``CUDA_VISIBLE_DEVICES`` calls so.

    A lower precision is one of the graphs: they are cast when they are compiled.

    Raises:
        BackendUnavailableError: There is no GPU, its driver is too old, or torch cannot use it; or there is
            no such precision.
    """

    name = _NAME
    form: Form = "torch"
    on_device = True
    specialises = False
    channels_last = False
    buckets = powers_of_two(DEFAULT_MAX_ROWS)

    def __init__(self, *, precision: str = "fp32", threads: int) -> None:
        require_precision(_NAME, precision, _PRECISIONS)
        self.precision = precision
        self.threads = threads
        self.driver = Driver.open(0)
        try:
            _require_torch()
        except BackendUnavailableError:
            self.driver.close()
            raise
        self.driver.make_room = torch.cuda.empty_cache
        self._device = torch.device("cuda", 0)
        self._moved: MutableMapping[Place, torch.Tensor] = weakref.WeakValueDictionary()
        self._captures = _Captures(self._device, self.driver)

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """Torch runs no ONNX.

        Raises:
            LoweringError: Always.
        """
        raise LoweringError(
            "the cuda backend does not run ONNX models",
            where=f"backend {_NAME!r}",
            remedy="use backend='tensorrt', 'onnxruntime' or 'openvino'",
        )

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        """Make an engine for arrays in the host's memory; errors as in `load_device_block`."""
        return HostArrayEngine(self.load_device_block(files, point, block), self.driver)

    def load_device_block(
        self, files: Mapping[str, bytes], point: OperatingPoint, block: BlockInterface
    ) -> CudaEngine:
        """The engine of a block's graph and weights in the artifact.

        Raises:
            ArtifactError: The artifact was saved without them.
            DeviceError: The device has no memory left for the weights.
        """
        from exitcompiler.runtime.torch_graphs import load_body

        graph, weights = require_torch_graph(_NAME, files, point, block)
        with _explained(_where(block), "its weights cannot be loaded"):
            body = load_body(graph, weights, device=str(self._device), rewrite=_rewrite)
        return CudaEngine(block, body, self._captures)

    def load_body(self, block: BlockInterface, body: fx.GraphModule) -> Engine:
        """Make an engine for arrays in the host's memory; as `load_device_body`."""
        return HostArrayEngine(self.load_device_body(block, body), self.driver)

    def load_device_body(self, block: BlockInterface, body: fx.GraphModule) -> CudaEngine:
        """The engine of a block whose graph is at hand; equal weights are on the device once.

        Args:
            block: Its interface.
            body: On the CPU.

        Raises:
            DeviceError: The device has no memory left for the weights.
        """
        with _explained(_where(block), "its weights cannot be loaded"):
            moved = move_body(body, self._device, self._moved)
            _rewrite(moved)
        # The body is kept, since moved tensors are known by the addresses of its own.
        return CudaEngine(block, lambda values: moved(*values), self._captures, keep=body)


def _rewrite(body: fx.GraphModule) -> None:
    """Fold what can be folded, and let go of the tensors that nothing reads any more."""
    if fold_batch_norms(body):
        read = {str(node.target) for node in body.graph.find_nodes(op="get_attr")}
        for name in [name for name, _ in body.named_buffers() if name not in read]:
            delattr(body, name)


def _where(block: BlockInterface) -> str:
    return f"backend {_NAME!r}, block {block.name!r}"


def _require_torch() -> None:
    if torch.version.cuda is None:
        raise BackendUnavailableError(
            f"the installed torch ({torch.__version__}) is a build without CUDA",
            where=f"backend {_NAME!r}",
            remedy="install a build of torch for CUDA 12.8 or later, or use another backend",
        )
    if not hasattr(torch.cuda.CUDAGraph, "raw_cuda_graph"):
        raise BackendUnavailableError(
            f"torch {torch.__version__} does not hand out the CUDA graphs that it captures",
            where=f"backend {_NAME!r}",
            remedy="install torch 2.11 or later, or use another backend",
        )
    if not torch.cuda.is_available():
        raise BackendUnavailableError(
            f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no GPU that it can use",
            where=f"backend {_NAME!r}",
            remedy="python -c 'import torch; torch.cuda.init()' says why; compare CUDA_VISIBLE_DEVICES",
        )


class _Captures:
    """What all captures of a backend have in common: two streams, and memory to work in.

    The memory is shared by all blocks of all programs: they never run at the same time, as programs run in
    the order of `Driver.stream`, and what a block made is copied out before the next one runs.

    Nothing but captures is done on the stream that is captured: cuBLAS's workspace there is then allocated
    while one is going on, from the pool, and stays mapped as long as any graph of the pool lives.
    """

    def __init__(self, device: torch.device, driver: Driver) -> None:
        self.device = device
        self.lock = threading.Lock()
        # Not one of PyTorch's pool, which others may get as well. It stays until the process ends, since
        # PyTorch's allocator remembers it.
        self.stream = torch.cuda.ExternalStream(driver.create_stream(), device)  # type: ignore[no-untyped-call]
        self.warm_up_stream = torch.cuda.ExternalStream(driver.stream, device)  # type: ignore[no-untyped-call]
        self._begin()

    def _begin(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()
        self._keeps_pool = torch.cuda.CUDAGraph(keep_graph=True)
        with torch.cuda.device(self.device), self.capture(self._keeps_pool):
            torch.zeros(1, device=self.device)

    def capture(self, graph: torch.cuda.CUDAGraph) -> contextlib.AbstractContextManager[None]:
        """Record into a graph what is done meanwhile, on `stream`."""
        return torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local")

    def mend(self) -> None:
        """Begin anew after a capture that failed.

        PyTorch before 2.13 leaves the pool and the random generator as if it still went on; ending the one by
        hand, and a capture that succeeds, put both right.
        """
        with contextlib.suppress(Exception):  # later versions have done so themselves
            torch._C._cuda_endAllocateToPool(self.device.index, self.pool)
        self._begin()


class CudaEngine:
    """A block's torch graph on a GPU; see `DeviceEngine`.

    Args:
        block: Tells the signature and what the gate reads.
        body: Params to results, on the device.
        captures: What it shares with the other blocks.
        keep: Lives as long as the engine.
    """

    def __init__(self, block: BlockInterface, body: Body, captures: _Captures, keep: object = None) -> None:
        self.signature: EngineSignature = engine_signature(block)
        self._block = block
        self._body = body
        self._captures = captures
        self._keep = keep

    def capture(self, rows: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> Captured:
        """See `DeviceEngine.capture`.

        Raises:
            LoweringError: The block does something that cannot be captured; says what PyTorch says.
            DeviceError: The device has no memory left.
        """
        captures, device = self._captures, self._captures.device
        where = f"{_where(self._block)}, {rows} row{'s' if rows > 1 else ''}"
        with (
            captures.lock,
            torch.inference_mode(),
            torch.autocast("cuda", enabled=False),
            torch.cuda.device(device),
            torch.cuda.stream(captures.warm_up_stream),  # and the old one again, even where a capture fails
        ):
            sources = [_tensor(array, device) for array in inputs]
            targets = [_tensor(array, device) for array in outputs]
            with _explained(where, "torch cannot run it on the GPU"):
                self._warm_up(sources, targets, where)
            graph = torch.cuda.CUDAGraph(keep_graph=True)
            try:
                with _explained(where, "it cannot be captured into a CUDA graph"), captures.capture(graph):
                    self._run(sources, targets)
            except ExitCompilerError:
                captures.mend()
                raise
        return Captured(graph.raw_cuda_graph(), keep=(graph, self, sources, targets))

    def _warm_up(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor], where: str) -> None:
        """Let libraries choose their kernels and get their workspaces; look at what comes out.

        On zeros, as what lies in the inputs may be no valid index, and one such kills the whole process. In
        the order of all programs: it shares memory to work in with none that is running.
        """
        device, stream = self._captures.device, self._captures.warm_up_stream
        zeros = [torch.zeros_like(tensor) for tensor in inputs]
        made = [torch.empty_like(tensor) for tensor in outputs]
        stream.wait_stream(torch.cuda.default_stream(device))  # where the weights came from
        before = torch.cuda.get_rng_state(device)
        for _ in range(_WARM_UPS):
            values = self._run(zeros, made)
        stream.synchronize()
        if not torch.equal(before, torch.cuda.get_rng_state(device)):
            raise LoweringError(
                "it draws random numbers, which would be the same ones in every launch",
                where=where,
                remedy="remove what is random from the model, or use a backend on the CPU",
            )
        for name, target in zip(self.signature.outputs, outputs, strict=True):
            value = values[name]
            dtype = target.dtype if name == ACTION else value.dtype
            if (value.shape, dtype) != (target.shape, target.dtype):
                raise LoweringError(
                    f"{name!r} comes out as {value.dtype}{list(value.shape)}, not as "
                    f"{target.dtype}{list(target.shape)}",
                    where=where,
                    remedy="compile the model again",
                )

    def _run(self, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        values = run_block(self._block, self._body, dict(zip(self.signature.inputs, inputs, strict=True)))
        for name, target in zip(self.signature.outputs, outputs, strict=True):
            target.copy_(values[name])
        return values


@dataclass(frozen=True, slots=True)
class _Address:
    """Device memory as PyTorch takes it from others: the CUDA array interface, version 3."""

    array: DeviceArray

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.array.shape,
            "typestr": _TYPES[self.array.dtype],
            "data": (self.array.address, False),
            "strides": None,
            "version": 3,
        }


def _tensor(array: DeviceArray, device: torch.device) -> torch.Tensor:
    """A tensor on this very memory."""
    tensor = torch.as_tensor(_Address(array), device=device)
    return tensor.view(torch.bfloat16) if array.dtype == "bfloat16" else tensor


@contextlib.contextmanager
def _explained(where: str, what: str) -> Iterator[None]:
    """Turn what PyTorch raises into a typed error; of a chain the first cause, not the failure after it."""
    handled = sys.exception()  # by whoever called us: no cause of ours
    try:
        yield
    except ExitCompilerError:
        raise
    except Exception as error:  # operators raise anything
        cause: BaseException = error
        while cause.__context__ not in (None, handled):
            cause = cause.__context__
        text = str(cause).partition("\n")[0] or type(cause).__name__
        if isinstance(cause, torch.OutOfMemoryError):
            raise DeviceError(
                f"{what}: {text}",
                where=where,
                remedy="let go of other memory on the device, or take a smaller batch size",
            ) from error
        raise LoweringError(
            f"{what}: {text}",
            where=where,
            remedy="a block may not wait for the device (.item(), a shape that depends on values) nor read a "
            "tensor on the CPU; change this part of the model, or use a backend on the CPU",
        ) from error
