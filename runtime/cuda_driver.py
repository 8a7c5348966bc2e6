"""The CUDA driver, in plain numbers and arrays: every call to a device goes through here.

Only the driver API is used: its handles are the runtime API's, PyTorch and TensorRT work in the primary
context that is retained here, and it is what a test can put an emulation in the place of. A context is
current only while a call runs: whoever shares the thread keeps the device that they chose.

The driver of CUDA 12.8 or later is asked for: older ones know no SWITCH nodes, and hang on an empty body.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from exitcompiler.errors import DeviceError, InputError, LoweringError
from exitcompiler.runtime.cuda_calls import DriverCalls, load_bindings

__all__ = ["Driver"]


class Driver:
    """One device. Addresses and handles are whole numbers, sizes are in bytes.

    Every method raises `DeviceError` where the device refuses, which says what was tried, CUDA's own name for
    the error, and for memory how much was asked for and is free; methods that make graphs raise
    `LoweringError`, unless it is memory that is missing.

    Args:
        calls: Those of the device.

    Attributes:
        name: As the maker calls it.
        compute_capability: ``(9, 0)``.
        driver_version: The CUDA version of the driver: ``13000`` is 13.0.
        total_memory_bytes: The device's memory.
        make_room: Called where memory is short, before it is asked for again; None: nobody has any to give.
    """

    def __init__(self, calls: DriverCalls) -> None:
        self._calls = calls
        self._call = calls.call
        self._cuda = calls.cuda
        self.driver_version = calls.driver_version
        self.name = bytes(calls.ask("cuDeviceGetName", 256, calls.device)).partition(b"\0")[0].decode()
        self.total_memory_bytes = int(calls.ask("cuDeviceTotalMem", calls.device))
        attributes = calls.cuda.CUdevice_attribute
        major, minor = (
            int(calls.ask("cuDeviceGetAttribute", attribute, calls.device))
            for attribute in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        self.compute_capability: tuple[int, int] = (major, minor)
        self.make_room: Callable[[], object] | None = None
        self._lock = threading.Lock()
        self._stream: int | None = None

    @classmethod
    def open(cls, ordinal: int = 0) -> Driver:
        """Find the driver and a device.

        Args:
            ordinal: Which device.

        Raises:
            BackendUnavailableError: The Python package, the driver or the device is missing, or too old.
        """
        return cls(DriverCalls(load_bindings(), ordinal))

    def close(self) -> None:
        """Let go of the device; whatever was made through here has to be freed before."""
        if self._stream is not None:
            self.destroy_stream(self._stream)
        self._calls.release()

    def current(self) -> AbstractContextManager[None]:
        """Make the device current in this thread: for a library that works there, or once for many calls."""
        return self._calls.current()

    @property
    def forked(self) -> bool:
        """Whether this process is a child of the one that opened the device: nothing of it can be used."""
        return self._calls.forked

    @property
    def stream(self) -> int:
        """The stream in whose order programs run: their blocks share memory to work in."""
        with self._lock:
            if self._stream is None:
                self._stream = self.create_stream()
            return self._stream

    @property
    def architecture(self) -> str:
        """What kernels are compiled for: ``"sm_90"``."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"

    # Memory

    def free_memory_bytes(self) -> int:
        """How much of the device's memory nobody has."""
        free, _ = self._call("ask for free memory", "cuMemGetInfo")
        return int(free)

    def malloc(self, size_bytes: int) -> int:
        """Device memory; its address is a multiple of 256."""
        what, size = f"allocate {size_bytes:,} bytes of device memory", max(size_bytes, 1)
        try:
            return int(self._call(what, "cuMemAlloc", size))
        except DeviceError:
            if self.make_room is None:
                raise
        self.make_room()
        return int(self._call(what, "cuMemAlloc", size))

    def free(self, address: int) -> None:
        """Give memory of `malloc` back; waits for what uses it."""
        self._call("free device memory", "cuMemFree", address)

    def host_alloc(self, size_bytes: int) -> NDArray[np.uint8]:
        """Page-locked host memory, which copies need not be staged for; valid until `host_free`."""
        what = f"allocate {size_bytes:,} bytes of page-locked host memory"
        address = int(self._call(what, "cuMemAllocHost", max(size_bytes, 1)))
        return np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(address))

    def host_free(self, array: NDArray[np.uint8]) -> None:
        """Give memory of `host_alloc` back: no array may look into it any more."""
        self._call("free page-locked host memory", "cuMemFreeHost", array.ctypes.data)

    def upload(self, address: int, array: NDArray[np.generic], stream: int) -> None:
        """Copy an array to the device, in the order of the stream.

        Page-locked memory is read later and has to stay as it is until then; other memory is read at once.
        """
        source, size = _contiguous(array), array.nbytes
        self._call("upload {:,} bytes", "cuMemcpyHtoDAsync", address, source, size, stream, about=(size,))

    def download(self, array: NDArray[np.generic], address: int, stream: int) -> None:
        """Fill an array from the device, in the order of the stream: valid after `synchronize`."""
        target, size = _contiguous(array), array.nbytes
        self._call("download {:,} bytes", "cuMemcpyDtoHAsync", target, address, size, stream, about=(size,))

    def copy(self, target: int, source: int, size_bytes: int, stream: int) -> None:
        """Copy device memory, in the order of the stream."""
        about = (size_bytes,)
        self._call("copy {:,} bytes", "cuMemcpyDtoDAsync", target, source, size_bytes, stream, about=about)

    def fill(self, address: int, byte: int, size_bytes: int, stream: int) -> None:
        """Set every byte of device memory, in the order of the stream."""
        self._call(f"fill {size_bytes:,} bytes", "cuMemsetD8Async", address, byte, size_bytes, stream)

    def set_word(self, address: int, value: int, stream: int) -> None:
        """Set an ``int32`` in device memory to a number known now, in the order of the stream."""
        self._call("set a number on the device", "cuMemsetD32Async", address, value, 1, stream)

    # Streams and events

    def create_stream(self) -> int:
        """A stream that does not wait for the default stream."""
        flag = self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING
        return int(self._call("create a stream", "cuStreamCreate", int(flag)))

    def destroy_stream(self, stream: int) -> None:
        """Free a stream."""
        self._call("destroy a stream", "cuStreamDestroy", stream)

    def synchronize(self, stream: int) -> None:
        """Wait until all that a stream was given is done; errors of kernels come out here."""
        self._call("run what was launched", "cuStreamSynchronize", stream)

    def create_event(self) -> int:
        """An event that takes the time."""
        flag = self._cuda.CUevent_flags.CU_EVENT_DEFAULT
        return int(self._call("create an event", "cuEventCreate", int(flag)))

    def destroy_event(self, event: int) -> None:
        """Free an event."""
        self._call("destroy an event", "cuEventDestroy", event)

    def record(self, event: int, stream: int) -> None:
        """Let an event happen when the stream gets here."""
        self._call("record an event", "cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """Let a stream wait for an event; the host does not."""
        self._call("wait for an event", "cuStreamWaitEvent", stream, event, 0)

    def elapsed_us(self, begin: int, end: int) -> float:
        """Microseconds between two events that were recorded; waits for the second."""
        self._call("run what was launched", "cuEventSynchronize", end)
        return float(self._call("take the time between events", "cuEventElapsedTime", begin, end)) * 1000.0

    # Modules

    def load_module(self, image: bytes) -> int:
        """Load a cubin."""
        return int(self._call("load compiled kernels", "cuModuleLoadData", image))

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        return int(self._call(f"find the kernel {name!r}", "cuModuleGetFunction", module, name.encode()))

    def unload_module(self, module: int) -> None:
        """Free a module; no graph with a kernel of it may be launched any more."""
        self._call("unload compiled kernels", "cuModuleUnload", module)

    # Graphs

    def begin_capture(self, stream: int) -> None:
        """From here on a stream records what it is given; forbids only this thread what does not fit in."""
        mode = self._cuda.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self._call("begin a capture", "cuStreamBeginCapture", stream, mode, error=LoweringError)

    def end_capture(self, stream: int) -> int:
        """The graph of what a stream was given since `begin_capture`: the caller destroys it.

        Raises:
            LoweringError: Something was done that cannot be captured.
        """
        graph = self._call("capture a stream", "cuStreamEndCapture", stream, error=LoweringError)
        return int(graph)

    def create_graph(self) -> int:
        """An empty graph."""
        return int(self._call("create a graph", "cuGraphCreate", 0, error=LoweringError))

    def destroy_graph(self, graph: int) -> None:
        """Free a graph with all graphs in it."""
        self._call("destroy a graph", "cuGraphDestroy", graph)

    def add_kernel(
        self,
        graph: int,
        after: Sequence[int],
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        arguments: Sequence[Any],
    ) -> int:
        """Add a kernel.

        Args:
            graph: Where to.
            after: Nodes that come before it.
            function: The kernel.
            grid: Blocks of threads, in x, y and z.
            threads: Threads of a block.
            arguments: ctypes values, in the kernel's order; copied.
        """
        pointers = (ctypes.c_void_p * max(len(arguments), 1))(*map(ctypes.addressof, arguments))
        params = self._cuda.CUDA_KERNEL_NODE_PARAMS()
        params.func = self._cuda.CUfunction(function)
        params.gridDimX, params.gridDimY, params.gridDimZ = grid
        params.blockDimX, params.blockDimY, params.blockDimZ = threads, 1, 1
        params.kernelParams = ctypes.addressof(pointers)
        return self._add("a kernel", "cuGraphAddKernelNode", graph, after, params)

    def add_child(self, graph: int, after: Sequence[int], child: int) -> int:
        """Add a copy of another graph as one node."""
        return self._add("a captured graph", "cuGraphAddChildGraphNode", graph, after, child)

    def add_copy(self, graph: int, after: Sequence[int], target: int, source: int, size_bytes: int) -> int:
        """Add a copy between device memory and device or page-locked host memory."""
        unified = self._cuda.CUmemorytype.CU_MEMORYTYPE_UNIFIED
        params = self._cuda.CUDA_MEMCPY3D()
        params.srcMemoryType = params.dstMemoryType = unified
        params.srcDevice, params.dstDevice = source, target
        params.WidthInBytes, params.Height, params.Depth = size_bytes, 1, 1
        return self._add("a copy", "cuGraphAddMemcpyNode", graph, after, params, self._calls.context)

    def _add(self, what: str, name: str, graph: int, after: Sequence[int], *arguments: Any) -> int:
        before = [self._cuda.CUgraphNode(node) for node in after]
        node = self._call(
            f"add {what} to a graph", name, graph, before, len(before), *arguments, error=LoweringError
        )
        return int(node)

    def create_condition(self, graph: int, default: int) -> int:
        """A value that a kernel sets and a conditional node of this graph, or of one in it, reads.

        Args:
            graph: Which.
            default: What it is at the beginning of every launch.
        """
        assign = int(self._cuda.CU_GRAPH_COND_ASSIGN_DEFAULT)
        return int(
            self._call(
                "create a condition",
                "cuGraphConditionalHandleCreate",
                graph,
                self._calls.context,
                default,
                assign,
                error=LoweringError,
            )
        )

    def add_conditional(
        self, graph: int, after: Sequence[int], kind: Literal["if", "switch"], handle: int, bodies: int
    ) -> tuple[int, list[int]]:
        """Add a conditional node: it and its bodies, which are empty graphs that belong to it."""
        cuda = self._cuda
        params = cuda.CUgraphNodeParams()
        params.type = cuda.CUgraphNodeType.CU_GRAPH_NODE_TYPE_CONDITIONAL
        params.conditional.handle = cuda.CUgraphConditionalHandle(handle)
        params.conditional.type = getattr(
            cuda.CUgraphConditionalNodeType, f"CU_GRAPH_COND_TYPE_{kind.upper()}"
        )
        params.conditional.size = bodies
        params.conditional.ctx = self._calls.context
        # In cuda-bindings 12 the call that takes edge data, as that of 13 does, has a name of its own.
        name = "cuGraphAddNode_v2" if hasattr(cuda, "cuGraphAddNode_v2") else "cuGraphAddNode"
        before = [cuda.CUgraphNode(node) for node in after]
        node = self._call(
            f"add a conditional node ({kind})",
            name,
            graph,
            before,
            None,
            len(before),
            params,
            error=LoweringError,
        )
        return int(node), [int(body) for body in params.conditional.phGraph_out]

    def node_types(self, graph: int) -> list[str]:
        """What nodes a graph has, those of graphs in it behind the node that holds them: ``"memcpy"``."""
        # Asked for no nodes, the driver answers how many there are.
        _, count = self._call("read a graph", "cuGraphGetNodes", graph, 0)
        if not count:
            return []
        nodes, _ = self._call("read a graph", "cuGraphGetNodes", graph, count)
        types = []
        for node in nodes:
            kind = self._call("read a graph", "cuGraphNodeGetType", node)
            types.append(kind.name.removeprefix("CU_GRAPH_NODE_TYPE_").lower().replace("_", " "))
            if types[-1] == "memcpy":
                types[-1] += self._ends(node)
            elif types[-1] == "graph":
                types += self.node_types(
                    int(self._call("read a graph", "cuGraphChildGraphNodeGetGraph", node))
                )
        return types

    def _ends(self, node: object) -> str:
        """What is to be said of a copy that is not one between device addresses."""
        params = self._call("read a graph", "cuGraphMemcpyNodeGetParams", node)
        kinds = self._cuda.CUmemorytype
        ends = {int(params.srcMemoryType), int(params.dstMemoryType)}
        if int(kinds.CU_MEMORYTYPE_HOST) in ends:
            return " of host memory"
        return " of an array" if int(kinds.CU_MEMORYTYPE_ARRAY) in ends else ""

    def instantiate(self, graph: int) -> int:
        """Make a graph executable.

        Raises:
            LoweringError: The graph is not one that this driver runs; says what the driver found.
        """
        params = self._cuda.CUDA_GRAPH_INSTANTIATE_PARAMS()
        try:
            executable = self._call(
                "instantiate a graph", "cuGraphInstantiateWithParams", graph, params, error=LoweringError
            )
        except LoweringError as error:
            raise LoweringError(f"{error.what}; {params.result_out!s}", remedy=error.remedy) from error
        return int(executable)

    def upload_exec(self, executable: int, stream: int) -> None:
        """Bring an executable graph to the device, so that its first launch is as fast as the others."""
        self._call("upload a graph", "cuGraphUpload", executable, stream)

    def destroy_exec(self, executable: int) -> None:
        """Free an executable graph."""
        self._call("destroy an executable graph", "cuGraphExecDestroy", executable)

    def launch(self, executable: int, stream: int) -> None:
        """Run an executable graph, in the order of the stream."""
        self._call("launch a graph", "cuGraphLaunch", executable, stream)


def _contiguous(array: NDArray[np.generic]) -> int:
    """The address of an array that is one piece of memory."""
    if not array.flags.c_contiguous:
        raise InputError("an array copied from or to a device has to be C-contiguous")
    return array.ctypes.data
