"""TensorRT engines on a device: loaded, checked, and captured into CUDA graphs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from exitcompiler.controlflow import EngineSignature
from exitcompiler.errors import ArtifactError, DeviceError, LoweringError
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.device import Captured, DeviceArray
from exitcompiler.runtime.tensorrt_api import Messages, TensorRt
from exitcompiler.runtime.tensorrt_build import Profile
from exitcompiler.runtime.tensorrt_checks import (
    ANOTHER_BACKEND,
    engine_differences,
    refuse,
    require_same_version,
    require_valid,
)

__all__ = ["JitCache", "Memory", "Scratch", "TensorRtEngine", "deserialize"]

_log = logging.getLogger(__name__)


class JitCache(Protocol):
    """Where kernels that are compiled when an engine is loaded are kept."""

    def read(self) -> bytes | None:
        """What was kept; None: nothing."""
        ...

    def write(self, content: bytes) -> None:
        """Keep it."""
        ...


class Memory:
    """A piece of device memory that is freed with the last who holds this.

    Args:
        device: Where.
        size_bytes: How much.
    """

    def __init__(self, device: Driver, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.address = device.malloc(size_bytes)
        # Not at exit: there the driver takes everything back by itself.
        weakref.finalize(self, device.free, self.address).atexit = False


class Scratch:
    """One piece of memory for all engines to work in: no two of them run at the same time.

    Programs run in the order of one stream, `Driver.stream`, and the blocks of a program one after another,
    so that together they need no more than the one that needs most. An address that a graph was captured
    with is final: should a larger engine come later, it and those after it get a larger piece, and the old
    one lives as long as its graphs.

    Args:
        device: Where.
    """

    def __init__(self, device: Driver) -> None:
        self._device = device
        self._needed = 256
        self._memory: weakref.ref[Memory] | None = None

    def reserve(self, size_bytes: int) -> None:
        """Say early how much will be needed, so that one piece does for all."""
        self._needed = max(self._needed, size_bytes)

    def take(self, size_bytes: int) -> Memory:
        """Memory of at least this size, the same for all as far as it can be."""
        self.reserve(size_bytes)
        memory = None if self._memory is None else self._memory()
        if memory is None or memory.size_bytes < size_bytes:
            memory = Memory(self._device, self._needed)
            self._memory = weakref.ref(memory)
        return memory


@dataclass(frozen=True)
class _Loaded:
    """An engine, what has to live as long, and how to come by the right one should it prove wrong."""

    engine: Any
    runtime: Any
    remedy: str


def deserialize(
    trt: TensorRt,
    device: Driver,
    plan: bytes,
    signature: EngineSignature,
    profiles: Sequence[Profile],
    where: str,
    remedy: str = ANOTHER_BACKEND,
) -> _Loaded:
    """Load a serialised engine onto a device and check that it is the one that is needed.

    Args:
        trt: The TensorRT that built it.
        device: Where to.
        plan: The serialised engine. It is run as it is: it has to come from who is trusted.
        signature: What it has to take and give.
        profiles: The rows that it has to be built for.
        where: Which it is, for errors.
        remedy: How to come by the one that is needed.

    Raises:
        ArtifactError: It is not; another version or device built it, or it is damaged.
        BackendUnavailableError: This TensorRT does not run it on this device.
        DeviceError: There is too little memory.
    """
    require_same_version(trt, plan, where, remedy)
    with trt.lock, device.current(), trt.messages() as heard:
        runtime = trt.module.Runtime(trt.logger)
        require_valid(trt, runtime, plan, where, remedy)
        engine = runtime.deserialize_cuda_engine(plan)
        if engine is None:
            what = f"{trt.flavour} {trt.version} cannot load the engine: {heard.errors}"
            if heard.out_of_memory:
                raise DeviceError(what, where=where, remedy="let go of other memory on the device")
            raise ArtifactError(what, where=where, remedy=remedy)
        if differences := engine_differences(engine, signature, profiles):
            refuse(differences, where, remedy)
    return _Loaded(engine, runtime, remedy)


class TensorRtEngine:
    """A block on a device, for the numbers of rows that it was built for.

    Args:
        trt: The TensorRT that built it.
        device: Where it is.
        loaded: As `deserialize` gives it.
        signature: What it takes and gives.
        profiles: Its profiles.
        scratch: Memory to work in, shared with others.
        where: Which block it is, for errors.
        jit: Where kernels are kept that are compiled when it is first used, if it is such a TensorRT.

    Attributes:
        scratch_bytes: How much memory it works in, besides its inputs, outputs and weights.
    """

    def __init__(
        self,
        trt: TensorRt,
        device: Driver,
        loaded: _Loaded,
        signature: EngineSignature,
        profiles: Sequence[Profile],
        scratch: Scratch,
        where: str,
        jit: JitCache | None = None,
    ) -> None:
        self.signature = signature
        self.profiles = tuple(profiles)
        self._trt = trt
        self._device = device
        self._loaded = loaded
        self._scratch = scratch
        self._where = where
        self._jit = jit
        self._jit_size = 0
        self._runtime_cache: Any = None
        self.scratch_bytes = max(_scratch_bytes(loaded.engine), 256)
        scratch.reserve(self.scratch_bytes)

    def capture(self, rows: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> Captured:
        """A graph that runs the engine once, on these arrays; see `DeviceEngine`.

        The engine runs once before, on what the arrays hold: they have to hold something it can work with.

        Raises:
            LoweringError: There is no profile for ``rows``, or TensorRT cannot be captured.
            ArtifactError: The engine makes other shapes.
            DeviceError: The device refuses, or has too little memory.
        """
        profile = self._profile(rows)
        trt, device = self._trt, self._device
        with trt.lock, device.current(), trt.messages() as heard:
            memory = self._scratch.take(self.scratch_bytes)
            context = self._set_up(profile, memory, inputs, outputs, heard)
            self._require(context.execute_async_v3(device.stream), "run", heard)
            device.synchronize(device.stream)
            self._keep_compiled()
            graph = self._record(context, heard)
        keep = (context, self._loaded, memory, self._runtime_cache)
        return Captured(graph, keep, _destroyer(device, graph))

    def _profile(self, rows: int) -> int:
        """The number of the profile for so many rows; one that is for nothing else goes first."""
        fitting = [i for i, p in enumerate(self.profiles) if p.least <= rows <= p.most]
        if not fitting:
            raise LoweringError(
                f"the engine is built for {', '.join(map(str, self.profiles))} rows, not for {rows}",
                where=self._where,
                remedy="build it for this number of rows as well (buckets=...)",
            )
        return min(fitting, key=lambda i: self.profiles[i].most - self.profiles[i].least)

    def _set_up(
        self,
        profile: int,
        memory: Memory,
        inputs: Sequence[DeviceArray],
        outputs: Sequence[DeviceArray],
        heard: Messages,
    ) -> Any:
        """A context with everything final: memory, profile, shapes, addresses; in this order."""
        context = self._create_context()
        self._require(context is not None, "make an execution context", heard)
        context.set_device_memory(memory.address, memory.size_bytes)
        stream = self._device.stream
        chosen = context.set_optimization_profile_async(profile, stream)
        self._require(chosen, f"take the profile for {self.profiles[profile]} rows", heard)
        self._device.synchronize(stream)
        named_inputs = dict(zip(self.signature.inputs, inputs, strict=True))
        named_outputs = dict(zip(self.signature.outputs, outputs, strict=True))
        for name, array in named_inputs.items():
            if self.signature.inputs[name].batch_axis == 0:
                taken = context.set_input_shape(name, array.shape)
                self._require(taken, f"take {list(array.shape)} for input {name!r}", heard)
        self._require_shapes(context, named_outputs)
        for name, array in (*named_inputs.items(), *named_outputs.items()):
            taken = context.set_tensor_address(name, array.address)
            self._require(taken, f"take the address of {name!r}", heard)
        return context

    def _create_context(self) -> Any:
        """A context without memory of its own that makes no graphs of its own either."""
        module, engine = self._trt.module, self._loaded.engine
        strategy = module.ExecutionContextAllocationStrategy.USER_MANAGED
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(strategy)
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(strategy)
        if hasattr(config, "cuda_graph_strategy"):
            config.cuda_graph_strategy = module.CudaGraphStrategy.DISABLED
        if hasattr(config, "dynamic_shapes_kernel_specialization_strategy"):
            # By default a stand-in runs until the right kernel is compiled, and would be what is captured.
            eager = module.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
        if self._trt.compiles_when_loading:
            config.set_runtime_cache(self._kernels(config))
        return engine.create_execution_context(config)

    def _kernels(self, config: Any) -> Any:
        """The cache of compiled kernels that all contexts of the engine share."""
        if self._runtime_cache is None:
            self._runtime_cache = config.create_runtime_cache()
            kept = None if self._jit is None else self._jit.read()
            if kept is not None and not self._runtime_cache.deserialize(kept):
                _log.warning("%s: the kept kernels do not fit here; they are compiled again", self._where)
        return self._runtime_cache

    def _keep_compiled(self) -> None:
        """Keep kernels that have come to be since the last time."""
        if self._jit is None or self._runtime_cache is None:
            return
        content = bytes(self._runtime_cache.serialize())
        if len(content) != self._jit_size:
            self._jit_size = len(content)
            self._jit.write(content)

    def _require_shapes(self, context: Any, outputs: Mapping[str, DeviceArray]) -> None:
        wrong = [
            f"output {name!r} would be {list(found)} instead of {list(array.shape)}"
            for name, array in outputs.items()
            if (found := tuple(context.get_tensor_shape(name))) != array.shape
        ]
        if wrong:
            refuse(wrong, self._where, self._loaded.remedy)

    def _record(self, context: Any, heard: Messages) -> int:
        """Capture one run, on a stream of its own: nobody else's work gets into it."""
        device = self._device
        stream = device.create_stream()
        try:
            capturable = getattr(context, "is_stream_capturable", None)
            if capturable is not None:
                self._require(capturable(stream), "be captured", heard)
            device.begin_capture(stream)
            try:
                queued = context.execute_async_v3(stream)
                self._require(queued, "be captured", heard)
            except BaseException:
                _abandon(device, stream)
                raise
            return device.end_capture(stream)
        except LoweringError as error:
            if error.where is not None:
                raise
            raise LoweringError(
                f"the engine cannot be captured: {error.what}; {heard.errors}",
                where=self._where,
                remedy=ANOTHER_BACKEND,
            ) from error
        finally:
            device.destroy_stream(stream)

    def _require(self, done: object, doing: str, heard: Messages) -> None:
        if done:
            return
        what = f"{self._trt.flavour} {self._trt.version} cannot {doing}: {heard.errors}"
        if heard.out_of_memory:
            raise DeviceError(
                what, where=self._where, remedy="let go of other memory on the device, or take fewer rows"
            )
        raise LoweringError(what, where=self._where, remedy=ANOTHER_BACKEND)


def _scratch_bytes(engine: Any) -> int:
    """The most scratch memory that any profile needs."""
    for name in ("get_device_memory_size_for_profile_v2", "get_device_memory_size_for_profile"):
        if hasattr(engine, name):
            needed = getattr(engine, name)
            return max(int(needed(i)) for i in range(engine.num_optimization_profiles))
    return int(engine.device_memory_size)


def _abandon(device: Driver, stream: int) -> None:
    """End a capture that has failed; what it has recorded is of no use, nor is a second error."""
    try:
        graph = device.end_capture(stream)
    except LoweringError:
        return
    device.destroy_graph(graph)


def _destroyer(device: Driver, graph: int) -> Callable[[], None]:
    def destroy() -> None:
        device.destroy_graph(graph)

    return destroy
