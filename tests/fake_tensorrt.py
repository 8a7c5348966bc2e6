"""A TensorRT of paper: the attributes that the runtime uses, what was called in which order, no GPU.

It parses real ONNX models, so that names, types and shapes are those of real blocks. An engine is what its
plan says, as JSON behind a header of the real form. It stands for TensorRT 10 (networks are typed weakly
unless asked), 11 (always strongly) or TensorRT-RTX (kernels are compiled when an engine is loaded).
"""

from __future__ import annotations

import contextlib
import enum
import importlib.machinery
import json
import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import onnx

__all__ = ["FakeDriver", "FakeTensorRt", "rewritten"]

_ELEMENTS = {1: "FLOAT", 10: "HALF", 16: "BF16", 6: "INT32", 7: "INT64", 9: "BOOL"}

DataType = enum.Enum("DataType", [*_ELEMENTS.values(), "DOUBLE"])
TensorIOMode = enum.Enum("TensorIOMode", ["INPUT", "OUTPUT"])
TensorLocation = enum.Enum("TensorLocation", ["DEVICE", "HOST"])
TensorFormat = enum.Enum("TensorFormat", ["LINEAR", "CHW32"])
Severity = enum.Enum("Severity", ["INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE"])


class FakeDriver:
    """A device that writes down what it is asked to do.

    Args:
        calls: Where to; shared with a `FakeTensorRt`.
    """

    def __init__(self, calls: list[Any]) -> None:
        self.name = "NVIDIA Paper"
        self.compute_capability = (8, 9)
        self.driver_version = 13000
        self.calls = calls
        self.capturing = False
        self.invalid = False
        self.memory: dict[int, int] = {}
        self.graphs: set[int] = set()
        self.streams: set[int] = set()
        self.stream = 1
        self._next = 256

    def _number(self) -> int:
        self._next += 256
        return self._next

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        yield

    def malloc(self, size_bytes: int) -> int:
        address = self._number()
        self.memory[address] = size_bytes
        return address

    def free(self, address: int) -> None:
        del self.memory[address]

    def create_stream(self) -> int:
        self.streams.add(number := self._number())
        return number

    def destroy_stream(self, stream: int) -> None:
        self.streams.remove(stream)

    def synchronize(self, stream: int) -> None:
        self.calls.append("synchronize")

    def begin_capture(self, stream: int) -> None:
        self.calls.append("begin_capture")
        self.capturing = True

    def end_capture(self, stream: int) -> int:
        from exitcompiler.errors import LoweringError

        assert self.capturing
        self.calls.append("end_capture")
        self.capturing = False
        if self.invalid:
            raise LoweringError("cannot capture a stream: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
        self.graphs.add(graph := self._number())
        return graph

    def destroy_graph(self, graph: int) -> None:
        self.graphs.remove(graph)


class FakeTensorRt(types.ModuleType):
    """The module.

    Args:
        flavour: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: As it says of itself.

    Attributes:
        calls: What contexts and devices were asked to do.
        builds: How many engines were built.
        trouble: What goes wrong: ``"parse"``, ``"build"``, ``"memory"``, ``"run"``, ``"capture"``, ...
        changes: What of an engine becomes something else when it is loaded.
        launch: Does what an engine does, given its context and a stream; None: nothing is computed.
    """

    def __init__(self, flavour: str = "tensorrt", version: str = "10.16.1.11") -> None:
        super().__init__(flavour)
        self.__spec__ = importlib.machinery.ModuleSpec(flavour, None)
        rtx = flavour == "tensorrt_rtx"
        self.__version__ = version
        self.calls: list[Any] = []
        self.builds = 0
        self.trouble: set[str] = set()
        self.changes: dict[str, Any] = {}
        self.launch: Callable[[Any, int], None] | None = None
        self.configs: list[Any] = []
        self.typed = rtx or int(version.split(".")[0]) >= 11
        self.logger: Any = None
        self.ILogger = _ILogger
        self.Severity = Severity
        self.BuilderFlag = enum.IntEnum("BuilderFlag", ["TF32"])
        self.NetworkDefinitionCreationFlag = enum.IntEnum("NetworkDefinitionCreationFlag", ["STRONGLY_TYPED"])
        self.ProfilingVerbosity = enum.Enum("ProfilingVerbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
        self.ExecutionContextAllocationStrategy = enum.Enum("Strategy", ["STATIC", "USER_MANAGED"])
        self.ICudaEngine = _RtxEngine if rtx else _Engine
        self.IExecutionContext = _RtxContext if rtx else _Context
        self.IBuilderConfig = _RtxConfig if rtx else _Config
        if rtx:
            self.IRuntimeConfig = _RuntimeConfig
            self.ComputeCapability = enum.Enum("ComputeCapability", ["SM80", "SM89", "SM120"])
            self.CudaGraphStrategy = enum.Enum("CudaGraphStrategy", ["DISABLED", "WHOLE_GRAPH_CAPTURE"])
            self.DynamicShapesKernelSpecializationStrategy = enum.Enum("Specialize", ["LAZY", "EAGER"])
            self.EngineValidity = enum.Enum("EngineValidity", ["VALID", "SUBOPTIMAL", "INVALID"])
            self.EngineInvalidityDiagnostics = enum.IntFlag(
                "Diagnostics",
                [
                    "VERSION_MISMATCH",
                    "UNSUPPORTED_CC",
                    "OLD_CUDA_DRIVER",
                    "INSUFFICIENT_GPU_MEMORY",
                    "MALFORMED_ENGINE",
                ],
            )
        else:
            self.init_libnvinfer_plugins = lambda logger, namespace: self.calls.append("plugins")

    def Builder(self, logger: Any) -> _Builder:  # noqa: N802 (TensorRT's names)
        self.logger = logger
        return _Builder(self)

    def OnnxParser(self, network: _Network, logger: Any) -> _Parser:  # noqa: N802
        return _Parser(self, network)

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        self.logger = logger
        return (_RtxRuntime if "rtx" in self.__name__ else _Runtime)(self)

    def fails(self, what: str, text: str) -> bool:
        """Whether something goes wrong; says so to the logger."""
        if what in self.trouble:
            self.logger.log(Severity["ERROR"], text)
        return what in self.trouble

    def header(self) -> bytes:
        """How a plan begins."""
        tag = b"vtrt" if "rtx" in self.__name__ else b"ftrt"
        numbers = [int(n) % 256 for n in self.__version__.split(".")]
        return tag + bytes(20) + bytes([*numbers, 0, 0, 0, 0][:4])


class _ILogger:
    def __init__(self) -> None:
        self.made = True


class _Tensor:
    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        kind = value.type.tensor_type
        self.dtype = DataType[_ELEMENTS.get(kind.elem_type, "DOUBLE")]
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)


class _Network:
    def __init__(self, typed: bool) -> None:
        self.typed = typed
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []
        self.model = b""

    def get_flag(self, flag: object) -> bool:
        return self.typed

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_outputs(self) -> int:
        return len(self.outputs)

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]


class _Parser:
    num_errors = 1

    def __init__(self, module: FakeTensorRt, network: _Network) -> None:
        self._module, self._network = module, network

    def parse(self, model: bytes) -> bool:
        if "parse" in self._module.trouble:
            return False
        graph = onnx.ModelProto.FromString(model).graph
        self._network.inputs += map(_Tensor, graph.input)
        self._network.outputs += map(_Tensor, graph.output)
        self._network.model = model
        return True

    def get_error(self, index: int) -> str:
        return "In node 3 with name: odd and operator: Bessel: UNSUPPORTED_NODE"


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, list[list[int]]] = {}

    def set_shape(self, name: str, *shapes: Sequence[int]) -> None:
        self.shapes[name] = [list(shape) for shape in shapes]


class _Config:
    max_aux_streams = -1

    def __init__(self, module: FakeTensorRt) -> None:
        self._module = module
        self.flags = {"TF32"}
        self.profiling_verbosity = module.ProfilingVerbosity.LAYER_NAMES_ONLY
        self.profiles: list[_Profile] = []
        self.cache: _TimingCache | None = None

    def clear_flag(self, flag: Any) -> None:
        self.flags.remove(flag.name)

    def add_optimization_profile(self, profile: _Profile) -> int:
        if "profile" in self._module.trouble:
            return -1
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        return _TimingCache(content)

    def set_timing_cache(self, cache: _TimingCache, ignore_mismatch: bool) -> bool:
        assert not ignore_mismatch
        if cache.content == b"of another device":
            return False
        self.cache = cache
        return True

    def get_timing_cache(self) -> _TimingCache | None:
        return self.cache


class _RtxConfig(_Config):
    num_compute_capabilities = 0
    compute_capability: Any = None

    def set_compute_capability(self, named: Any, index: int) -> bool:
        assert index < self.num_compute_capabilities
        self.compute_capability = named
        return True

    def create_timing_cache(self, content: bytes) -> _TimingCache:
        raise AssertionError("TensorRT-RTX warns that this is deprecated")


class _TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content


class _Builder:
    def __init__(self, module: FakeTensorRt) -> None:
        self._module = module

    def create_network(self, flags: int) -> _Network:
        return _Network(self._module.typed or bool(flags))

    def create_builder_config(self) -> _Config:
        config: _Config = self._module.IBuilderConfig(self._module)
        self._module.configs.append(config)
        return config

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        module = self._module
        assert network.typed, "a weakly typed network"
        if module.fails("build", "no kernels for node conv.0") or module.fails("memory", "Out of memory"):
            return None
        module.builds += 1
        if config.cache is not None:
            config.cache.content += b"timed;"
        ports = [(t, "INPUT") for t in network.inputs] + [(t, "OUTPUT") for t in network.outputs]
        facts = {
            "tensors": {
                t.name: {"mode": mode, "dtype": t.dtype.name, "shape": list(t.shape)} for t, mode in ports
            },
            "profiles": [profile.shapes for profile in config.profiles],
            "aux_streams": config.max_aux_streams,
            "scratch": 3000,
            "model": network.model.hex(),
        }
        return module.header() + json.dumps(facts).encode()


class _Runtime:
    def __init__(self, module: FakeTensorRt) -> None:
        self._module = module

    def deserialize_cuda_engine(self, plan: bytes) -> _Engine | None:
        module = self._module
        assert plan[:28] == module.header(), "an engine of another version was handed to TensorRT"
        module.calls.append("deserialize")
        if module.fails("load", "magic tag does not match") or module.fails("no room", "out of memory"):
            return None
        engine: _Engine = module.ICudaEngine(module, {**json.loads(plan[28:]), **module.changes})
        return engine


class _RtxRuntime(_Runtime):
    def get_engine_validity(self, plan: bytes) -> tuple[Any, int]:
        module = self._module
        for name, bit in module.EngineInvalidityDiagnostics.__members__.items():
            if name in module.trouble:
                return module.EngineValidity["INVALID"], int(bit)
        return module.EngineValidity["SUBOPTIMAL"], 0


class _Engine:
    def __init__(self, module: FakeTensorRt, facts: dict[str, Any]) -> None:
        self.module, self.facts = module, facts
        self.names = list(facts["tensors"])
        self.num_aux_streams = facts["aux_streams"]

    @property
    def num_io_tensors(self) -> int:
        return len(self.names)

    @property
    def num_optimization_profiles(self) -> int:
        return len(self.facts["profiles"])

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode[self.facts["tensors"][name]["mode"]]

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self.facts["tensors"][name]["dtype"]]

    def get_tensor_shape(self, name: str) -> list[int]:
        """As TensorRT-RTX 1.7: where all profiles are for one number of rows, this number instead of -1."""
        rows = {shape[0] for profile in self.facts["profiles"] for of in profile.values() for shape in of}
        known = rows.pop() if len(rows) == 1 else -1
        return [known if n == -1 else n for n in self.facts["tensors"][name]["shape"]]

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation[self.facts["tensors"][name].get("location", "DEVICE")]

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_format(self, name: str, profile: int) -> TensorFormat:
        return TensorFormat[self.facts["tensors"][name].get("format", "LINEAR")]

    def get_tensor_profile_shape(self, name: str, profile: int) -> list[list[int]]:
        shapes: list[list[int]] = self.facts["profiles"][profile][name]
        return shapes

    def get_device_memory_size_for_profile_v2(self, profile: int) -> int:
        size: int = self.facts["scratch"] + profile
        return size

    def create_execution_context(self, strategy: Any) -> _Context | None:
        assert strategy.name == "USER_MANAGED"
        self.module.calls.append("context")
        if self.module.fails("context", "cannot make a context"):
            return None
        context: _Context = self.module.IExecutionContext(self)
        return context


class _RtxEngine(_Engine):
    def create_runtime_config(self) -> _RuntimeConfig:
        return _RuntimeConfig(self.module)

    def create_execution_context(self, strategy: Any) -> _Context | None:
        config = strategy
        assert config.cuda_graph_strategy.name == "DISABLED"
        assert config.dynamic_shapes_kernel_specialization_strategy.name == "EAGER"
        assert config.cache is not None
        config.cache.content += b"kernel;" if not config.cache.content else b""
        return super().create_execution_context(config.strategy)


class _RuntimeConfig:
    def __init__(self, module: FakeTensorRt) -> None:
        self.cuda_graph_strategy: Any = None
        self.dynamic_shapes_kernel_specialization_strategy: Any = None
        self.strategy: Any = None
        self.cache: _KernelCache | None = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> _KernelCache:
        return _KernelCache()

    def set_runtime_cache(self, cache: _KernelCache) -> bool:
        self.cache = cache
        return True


class _KernelCache:
    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> bytes:
        return self.content

    def deserialize(self, content: bytes) -> bool:
        self.content = content
        return True


class _Context:
    """Refuses what TensorRT refuses: shapes before the profile, running before all addresses are set."""

    def __init__(self, engine: _Engine) -> None:
        self.engine = engine
        self.profile: int | None = None
        self.rows: dict[str, int] = {}
        self.addresses: dict[str, int] = {}
        self.memory: tuple[int, int] | None = None

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        self.engine.module.calls.append("memory")
        assert address % 256 == 0
        count = self.engine.num_optimization_profiles
        assert size_bytes >= max(map(self.engine.get_device_memory_size_for_profile_v2, range(count)))
        self.memory = (address, size_bytes)

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.engine.module.calls.append(f"profile {profile}")
        self.profile = profile
        return not self.engine.module.fails("profile", "no such profile")

    def set_input_shape(self, name: str, shape: Sequence[int]) -> bool:
        self.engine.module.calls.append(f"shape {name}")
        assert self.profile is not None
        limits = self.engine.facts["profiles"][self.profile].get(name)
        if limits is None:
            return list(shape) == self.engine.get_tensor_shape(name)
        self.rows[name] = shape[0]
        return bool(limits[0] <= list(shape) <= limits[2])

    def get_tensor_shape(self, name: str) -> list[int]:
        rows = next(iter(self.rows.values()))
        grow = int("shapes" in self.engine.module.trouble)
        return [rows if n == -1 else n + grow for n in self.engine.get_tensor_shape(name)]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.engine.module.calls.append(f"address {name}")
        assert name in self.engine.names
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        module = self.engine.module
        module.calls.append("execute")
        assert self.memory is not None
        assert self.addresses.keys() == set(self.engine.names)
        captured = module.calls.count("begin_capture") > module.calls.count("end_capture")
        if captured and "raise" in module.trouble:
            raise RuntimeError("interrupted")
        if module.launch is not None:
            module.launch(self, stream)
        return not module.fails("capture" if captured else "run", "enqueue failed: illegal")


class _RtxContext(_Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return "uncapturable" not in self.engine.module.trouble


def rewritten(plan: bytes, **facts: Any) -> bytes:
    """A plan that says something else of its engine."""
    return plan[:28] + json.dumps({**json.loads(plan[28:]), **facts}).encode()
