"""Where a program is measured, and whether times from two places can be compared."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final, cast

from exitcompiler.budgets.figures import Environment
from exitcompiler.machine import processor_identity
from exitcompiler.runtime.backends import Backend, default_threads

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel
    from exitcompiler.runtime.device_engines import DeviceBackend

__all__ = ["differences", "environment_of", "version_changes"]

_PACKAGES: Final[Mapping[str, tuple[str, ...]]] = {
    "cuda": ("torch", "cuda-bindings"),
    "tensorrt": ("tensorrt", "tensorrt_rtx"),
}
"""Backend -> the packages that decide how fast it is, where they are called otherwise than the backend."""


def environment_of(compiled: CompiledModel) -> Environment:
    """Where, and with what, a program runs in this process."""
    backend = compiled.backend
    versions = {"python": platform.python_version()}
    for package in ("exitcompiler", "numpy", *_PACKAGES.get(backend.name, (backend.name,))):
        version = _version(package)
        if version is not None:
            versions[package] = version
    return Environment(
        cpu=_processor(backend),
        cores=default_threads(),
        system=f"{platform.system()}-{platform.machine()}",
        backend=backend.name,
        threads=backend.threads,
        precision=backend.precision,
        versions=versions,
    )


def differences(now: Environment, before: Environment) -> tuple[str, ...]:
    """Why times measured in one place must not be compared with those of another.

    Args:
        now: Where it is measured now.
        before: Where the baseline was measured.

    Returns:
        A sentence per reason; empty: they may be compared. Other versions of packages are no reason. A
        processor that is not known is another one than any, also than one that is not known either.
    """
    compared = (
        ("processor", now.cpu, before.cpu),
        ("number of cores", now.cores, before.cores),
        ("system", now.system, before.system),
        ("backend", now.backend, before.backend),
        ("number of threads", now.threads, before.threads),
        ("precision", now.precision, before.precision),
    )
    return tuple(
        f"the {what} is {_shown(here)}, and was {_shown(there)} when the baseline was measured"
        for what, here, there in compared
        if here != there or here == ""
    )


def version_changes(now: Environment, before: Environment) -> tuple[str, ...]:
    """What was upgraded, installed or removed since the baseline: ``"numpy 2.3.0 -> 2.4.6"``."""
    names = sorted(now.versions.keys() | before.versions.keys())
    pairs = [(name, before.versions.get(name, "none"), now.versions.get(name, "none")) for name in names]
    return tuple(f"{name} {there} -> {here}" for name, there, here in pairs if here != there)


def _shown(value: str | int) -> str:
    return "unknown" if value == "" else str(value)


def _processor(backend: Backend) -> str:
    """The processor, after the GPU where that does the work: who launches it counts too."""
    processor = processor_identity()
    if not backend.on_device:
        return processor
    gpu = cast("DeviceBackend", backend).driver.name
    return f"{gpu} + {processor}" if gpu and processor else ""


def _version(package: str) -> str | None:
    """Of an installed package; one that goes by another name in the registry is asked itself."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = getattr(sys.modules.get(package), "__version__", None)
        return None if version is None else str(version)
