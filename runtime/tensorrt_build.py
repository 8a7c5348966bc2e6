"""Builds TensorRT engines: an ONNX model in, a serialised engine (a plan) out.

One engine serves all buckets of a block: each is an optimisation profile whose least, best and largest
shape are the same, so that TensorRT picks kernels for exactly this number of rows and computes no shapes
when it runs. Numbers keep the types that the model gives them (a strongly typed network), float32 without
the TF32 shortcut.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from exitcompiler.controlflow import EngineSignature, ValueSpec
from exitcompiler.errors import DeviceError, LoweringError
from exitcompiler.runtime.manifest import Json
from exitcompiler.runtime.tensorrt_api import Messages, TensorRt

__all__ = ["Build", "BuildSettings", "Network", "Profile", "build_plan", "element_dtype", "parse_network"]

_log = logging.getLogger(__name__)

_DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "BOOL": "bool",
    "UINT8": "uint8",
}


@dataclass(frozen=True, slots=True)
class Profile:
    """For how many rows kernels are chosen: ``least`` to ``most``, best for ``best``."""

    least: int
    best: int
    most: int

    def __str__(self) -> str:
        return str(self.best) if self.least == self.most else f"{self.least}..{self.most}"

    @staticmethod
    def of(rows: int) -> Profile:
        """For exactly this many."""
        return Profile(rows, rows, rows)

    def shape(self, spec: ValueSpec, rows: int) -> tuple[int, ...]:
        """The shape of a value for this many rows."""
        return tuple(rows if axis == spec.batch_axis else int(n) for axis, n in enumerate(spec.shape))


@dataclass(frozen=True, slots=True)
class BuildSettings:
    """What an engine is built for, apart from the model and the TensorRT.

    Args:
        profiles: In the order of the engine's profiles.
        compute_capability: Build for devices of this one, where TensorRT can build without a device;
            None: for the device here.
        detailed: Keep what the inspector and `tensorrt_layers` need to show the compiled layers.
    """

    profiles: tuple[Profile, ...]
    compute_capability: tuple[int, int] | None = None
    detailed: bool = False

    def to_json(self) -> dict[str, Json]:
        """As plain data, for keys of a cache."""
        named = self.compute_capability
        return {
            "profiles": [[p.least, p.best, p.most] for p in self.profiles],
            "compute_capability": None if named is None else list(named),
            "detailed": self.detailed,
            "tf32": False,
            "max_aux_streams": 0,
        }


@dataclass(frozen=True)
class Build:
    """What came of a build.

    Args:
        plan: The serialised engine.
        log: What TensorRT said, a message a line: errors and warnings, and everything if it was to be
            detailed (`tensorrt_layers.compiled_layers` reads it).
        timings: The timing cache after the build; None where there is none.
    """

    plan: bytes
    log: str
    timings: bytes | None


@dataclass(frozen=True)
class Network:
    """A parsed model.

    Args:
        network: TensorRT's definition of it.
        builder: What it belongs to.
        keep: What has to live as long.
    """

    network: Any
    builder: Any
    keep: tuple[Any, ...]

    def layer_types(self) -> list[str]:
        """The types of its layers, before anything is fused: ``"CONVOLUTION"``."""
        return [self.network.get_layer(i).type.name for i in range(self.network.num_layers)]


def element_dtype(found: Any) -> str:
    """Our name of a TensorRT data type; one that we do not use keeps TensorRT's."""
    return _DTYPES.get(found.name, str(found.name))


def parse_network(trt: TensorRt, model: bytes, where: str) -> Network:
    """Parse an ONNX model.

    Args:
        trt: Which TensorRT.
        model: The file, weights included.
        where: What it is, for errors.

    Raises:
        LoweringError: TensorRT does not take it; with what its parser says of which node.
    """
    module = trt.module
    builder = module.Builder(trt.logger)
    network = builder.create_network(0)
    flags: Any = getattr(module, "NetworkDefinitionCreationFlag", None)
    if hasattr(flags, "STRONGLY_TYPED") and not _is_typed(network, flags.STRONGLY_TYPED):
        network = builder.create_network(1 << int(flags.STRONGLY_TYPED))
    parser = module.OnnxParser(network, trt.logger)
    if not parser.parse(model):
        reasons = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise LoweringError(
            f"{trt.flavour} {trt.version} does not take the model: {reasons}",
            where=where,
            remedy="choose another precision, write this part of the model with other operators, or choose "
            "another backend",
        )
    return Network(network, builder, (parser, model))


def _is_typed(network: Any, flag: Any) -> bool:
    return hasattr(network, "get_flag") and bool(network.get_flag(flag))


def build_plan(
    trt: TensorRt,
    model: bytes,
    signature: EngineSignature,
    settings: BuildSettings,
    *,
    where: str = "the model",
    timings: bytes | None = None,
) -> Build:
    """Build an engine.

    Args:
        trt: Which TensorRT.
        model: The ONNX file; its types are those that will be computed with.
        signature: What it takes and gives.
        settings: What to build for.
        where: What it is, for errors.
        timings: A timing cache of an earlier build by the same TensorRT on the same device.

    Raises:
        LoweringError: TensorRT does not take the model, or finds no kernels for it.
        DeviceError: There is too little memory.
    """
    with trt.lock, trt.messages(everything=settings.detailed) as heard:
        parsed = parse_network(trt, model, where)
        _require_inputs(parsed.network, signature, where)
        config = parsed.builder.create_builder_config()
        _configure(trt, config, settings, where)
        _add_profiles(parsed, config, signature, settings.profiles, where)
        cache = _attach_timings(trt, config, timings)
        plan = parsed.builder.build_serialized_network(parsed.network, config)
        if plan is None:
            raise _build_error(trt, heard, where)
        kept = None if cache is None else bytes(config.get_timing_cache().serialize())
        return Build(bytes(plan), heard.text, kept)


def _build_error(trt: TensorRt, heard: Messages, where: str) -> LoweringError | DeviceError:
    what = f"{trt.flavour} {trt.version} cannot build an engine: {heard.errors}"
    if heard.out_of_memory:
        return DeviceError(
            what, where=where, remedy="let go of other memory on the device, or build for fewer rows"
        )
    return LoweringError(
        what, where=where, remedy="choose another precision or another backend, or upgrade TensorRT"
    )


def _require_inputs(network: Any, signature: EngineSignature, where: str) -> None:
    """Refuse a model whose inputs or outputs are not those of its block."""
    for kind, specs, count, get in (
        ("input", signature.inputs, network.num_inputs, network.get_input),
        ("output", signature.outputs, network.num_outputs, network.get_output),
    ):
        found = {tensor.name: element_dtype(tensor.dtype) for tensor in map(get, range(count))}
        expected = {name: spec.dtype for name, spec in specs.items()}
        if found != expected:
            raise LoweringError(
                f"the model's {kind}s are {found}, the program needs {expected}",
                where=where,
                remedy="compile the model again",
            )


def _configure(trt: TensorRt, config: Any, settings: BuildSettings, where: str) -> None:
    module = trt.module
    config.max_aux_streams = 0
    if hasattr(module.BuilderFlag, "TF32"):
        config.clear_flag(module.BuilderFlag.TF32)  # float32 means float32
    if settings.detailed:
        config.profiling_verbosity = module.ProfilingVerbosity.DETAILED
    if settings.compute_capability is None:
        return
    major, minor = settings.compute_capability
    if not trt.builds_for_named_devices:
        raise LoweringError(
            f"{trt.flavour} {trt.version} builds only for the device that is here",
            where=where,
            remedy="build on a machine with the GPU that is to run it",
        )
    named = trt.compute_capability((major, minor))
    if named is None:
        raise LoweringError(
            f"{trt.flavour} {trt.version} does not build for compute capability {major}.{minor}",
            where=where,
            remedy="use tensorrt on such a device, or backend='cuda'",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(named, 0)


def _add_profiles(
    parsed: Network, config: Any, signature: EngineSignature, profiles: Sequence[Profile], where: str
) -> None:
    for number, rows in enumerate(profiles):
        profile = parsed.builder.create_optimization_profile()
        for name, spec in signature.inputs.items():
            if spec.batch_axis == 0:
                shapes = (rows.shape(spec, n) for n in (rows.least, rows.best, rows.most))
                profile.set_shape(name, *shapes)
        if config.add_optimization_profile(profile) != number:
            raise LoweringError(f"TensorRT refuses the profile for {rows}", where=where)


def _attach_timings(trt: TensorRt, config: Any, timings: bytes | None) -> Any | None:
    """Give the build a timing cache, the old one where it fits."""
    if not trt.has_timing_cache:
        return None
    attach: Callable[[bytes], Any] = config.create_timing_cache
    for content in (timings, b""):
        if content is None:
            continue
        cache = attach(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
        _log.warning("TensorRT does not take the timing cache, so it starts with an empty one")
    return None
