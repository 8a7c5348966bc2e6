"""Says exactly how an engine differs from what a block needs, before anything runs on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NoReturn

from exitcompiler.controlflow import EngineSignature, ValueSpec
from exitcompiler.errors import ArtifactError, BackendUnavailableError, DeviceError
from exitcompiler.runtime.tensorrt_api import TensorRt, plan_origin, version_numbers
from exitcompiler.runtime.tensorrt_build import Profile, element_dtype

__all__ = ["ANOTHER_BACKEND", "engine_differences", "refuse", "require_same_version", "require_valid"]

ANOTHER_BACKEND: Final = "use backend='cuda' for this program"
"""The remedy where this TensorRT does not do what is needed, and building again would not change that."""


def require_same_version(trt: TensorRt, plan: bytes, where: str, remedy: str) -> None:
    """Refuse a serialised engine of another TensorRT by its first bytes, without reading it any further.

    Args:
        trt: The one that is here.
        plan: The serialised engine.
        where: Which it is, for errors.
        remedy: How to come by the one that is needed.

    Raises:
        ArtifactError: It is none, or another version made it.
    """
    origin = plan_origin(plan)
    if origin is None:
        raise ArtifactError("this is not a TensorRT engine of a known form", where=where, remedy=remedy)
    flavour, version = origin
    here = tuple(n % 256 for n in version_numbers(trt.version))
    if flavour != trt.flavour or version[: len(here)] != here[: len(version)]:
        raise ArtifactError(
            f"the engine was built by {flavour} {'.'.join(map(str, version))}, here is "
            f"{trt.flavour} {trt.version}",
            where=where,
            remedy=remedy,
        )


def require_valid(trt: TensorRt, runtime: Any, plan: bytes, where: str, remedy: str) -> None:
    """Ask a TensorRT that can tell whether an engine would run on the device here; see above for arguments.

    Raises:
        ArtifactError: The engine is damaged, or of another version.
        BackendUnavailableError: This TensorRT does not run it on this device, or with this driver.
        DeviceError: There is too little memory for it.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, bits = runtime.get_engine_validity(plan)
    if validity.name != "INVALID":
        return
    kinds = getattr(trt.module, "EngineInvalidityDiagnostics", None)
    members: Mapping[str, Any] = getattr(kinds, "__members__", {})
    reasons = [name for name, member in members.items() if int(bits) & int(member)]
    what = f"{trt.flavour} {trt.version} does not run the engine on this device: "
    what += ", ".join(reasons) or "it gives no reason"
    if "INSUFFICIENT_GPU_MEMORY" in reasons:
        raise DeviceError(what, where=where, remedy="let go of other memory on the device")
    if {"VERSION_MISMATCH", "MALFORMED_ENGINE"} & {*reasons}:
        raise ArtifactError(what, where=where, remedy=remedy)
    raise BackendUnavailableError(
        what,
        where=where,
        remedy="build it on this device; if it was: use tensorrt instead of tensorrt_rtx, or backend='cuda'"
        if "UNSUPPORTED_CC" in reasons
        else "upgrade the NVIDIA driver, or use backend='cuda'",
    )


@dataclass(frozen=True)
class _Engine:
    """What is asked of an engine, without TensorRT's enumerations.

    Args:
        engine: Deserialised.
    """

    engine: Any

    def names(self, mode: str) -> list[str]:
        names = (self.engine.get_tensor_name(i) for i in range(self.engine.num_io_tensors))
        return [name for name in names if self.engine.get_tensor_mode(name).name == mode]

    def dtype(self, name: str) -> str:
        return element_dtype(self.engine.get_tensor_dtype(name))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.engine.get_tensor_shape(name))

    def profile(self, name: str, number: int) -> tuple[tuple[int, ...], ...]:
        return tuple(map(tuple, self.engine.get_tensor_profile_shape(name, number)))


def engine_differences(engine: Any, signature: EngineSignature, profiles: Sequence[Profile]) -> list[str]:
    """How an engine differs from what is needed; empty: not at all.

    Args:
        engine: TensorRT's ``ICudaEngine``.
        signature: What it has to take and give.
        profiles: The rows that it has to be built for, in this order.
    """
    found = _Engine(engine)
    rows = {-1, *(rows for profile in profiles for rows in (profile.least, profile.best, profile.most))}
    differences = [
        *_ports(found, "input", signature.inputs, rows),
        *_ports(found, "output", signature.outputs, rows),
    ]
    if engine.num_optimization_profiles != len(profiles):
        differences.append(f"{engine.num_optimization_profiles} profiles instead of {len(profiles)}")
    else:
        differences += _profiles(found, signature, profiles)
    if getattr(engine, "num_aux_streams", 0):
        differences.append(f"{engine.num_aux_streams} auxiliary streams instead of none (--maxAuxStreams=0)")
    return differences


def _ports(found: _Engine, kind: str, specs: Mapping[str, ValueSpec], rows: Collection[int]) -> Iterator[str]:
    names = found.names(kind.upper())
    yield from (f"no {kind} {name!r}: {spec}" for name, spec in specs.items() if name not in names)
    for name in names:
        spec = specs.get(name)
        if spec is None:
            yield f"{kind} {name!r}: {found.dtype(name)}{list(found.shape(name))} is not known"
            continue
        if found.dtype(name) != spec.dtype:
            yield f"{kind} {name!r} is {found.dtype(name)} instead of {spec.dtype}"
        if not _fits(found.shape(name), spec, rows):
            yield f"{kind} {name!r} has shape {list(found.shape(name))} instead of {_text(spec)}"
        location = found.engine.get_tensor_location(name).name
        if location != "DEVICE" or found.engine.is_shape_inference_io(name):
            yield f"{kind} {name!r} is read on the host"
        layouts = {
            found.engine.get_tensor_format(name, i).name
            for i in range(found.engine.num_optimization_profiles)
        }
        if layouts - {"LINEAR"}:
            yield f"{kind} {name!r} has layout {sorted(layouts)} instead of LINEAR"


def _fits(shape: tuple[int, ...], spec: ValueSpec, rows: Collection[int]) -> bool:
    """Whether a shape is that of a value.

    An engine whose profiles are all for the same number of rows says this number instead of -1. What each
    profile takes is another question (`_profiles`).
    """
    return len(shape) == len(spec.shape) and all(
        size in rows if axis == spec.batch_axis else size == wanted
        for axis, (size, wanted) in enumerate(zip(shape, spec.shape, strict=True))
    )


def _text(spec: ValueSpec) -> str:
    return str(["-1" if axis == spec.batch_axis else n for axis, n in enumerate(spec.shape)]).replace("'", "")


def _profiles(found: _Engine, signature: EngineSignature, profiles: Sequence[Profile]) -> Iterator[str]:
    names = found.names("INPUT")
    for number, rows in enumerate(profiles):
        for name, spec in signature.inputs.items():
            if spec.batch_axis != 0 or name not in names or len(found.shape(name)) != len(spec.shape):
                continue
            shapes = found.profile(name, number)
            if [len(shape) for shape in shapes] != [len(spec.shape)] * 3:
                yield f"profile {number} has no shapes for input {name!r}"
                continue
            takes = tuple(shape[0] for shape in shapes)
            if takes != (rows.least, rows.best, rows.most):
                yield (
                    f"profile {number} takes {takes[0]}..{takes[2]} rows of input {name!r}, best {takes[1]}, "
                    f"instead of {rows.least}..{rows.most}, best {rows.best}"
                )


def refuse(differences: Sequence[str], where: str, remedy: str) -> NoReturn:
    """Raise what says how an engine differs.

    Args:
        differences: Of `engine_differences`.
        where: Which engine it is.
        remedy: How to come by the one that is needed.

    Raises:
        ArtifactError: Always.
    """
    raise ArtifactError(
        f"the engine is not the one that is needed: {'; '.join(differences)}", where=where, remedy=remedy
    )
