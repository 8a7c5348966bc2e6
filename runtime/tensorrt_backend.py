"""The TensorRT backend: every block one engine, for CUDA graphs that decide on the device.

Engines are built when they are first needed and kept in a cache folder, or taken from a folder that
trtexec filled. Which TensorRT it is (``tensorrt`` 10 or 11, ``tensorrt_rtx``) makes no difference here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import weakref
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from exitcompiler.controlflow import BlockInterface, EngineSignature, engine_signature
from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.runtime.backends import Engine, Form, require_precision
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.device_engines import MOST_ROWS, HostArrayEngine, launched_rows
from exitcompiler.runtime.manifest import Json, OperatingPoint, block_path
from exitcompiler.runtime.planning import powers_of_two, require_buckets
from exitcompiler.runtime.tensorrt_api import TensorRt, load_tensorrt
from exitcompiler.runtime.tensorrt_build import BuildSettings, Profile, build_plan
from exitcompiler.runtime.tensorrt_cache import EngineCache, user_cache_folder
from exitcompiler.runtime.tensorrt_engine import Scratch, TensorRtEngine, deserialize
from exitcompiler.runtime.tensorrt_folder import EXPORT_AGAIN, EngineFolder, read_engine_folder

__all__ = ["TensorRtBackend"]

_log = logging.getLogger(__name__)

_NAME: Final = "tensorrt"
_PRECISIONS: Final = ("fp32", "fp16", "bf16")
_USER_CACHE: Final = "auto"


class TensorRtBackend:
    """Engines that TensorRT builds, on device 0, or what ``CUDA_VISIBLE_DEVICES`` calls so.

    It computes in the types that a model has: a lower precision is one of the models.

    Args:
        precision: ``"fp32"``, ``"fp16"`` or ``"bf16"``: what the models are typed for.
        threads: Of no use here.
        buckets: The numbers of rows that a block's engine is built for, rising: those that programs run
            blocks in. None: powers of two up to 32, or those of ``engines``.
        cache: The folder in which engines and timings are kept; ``"auto"``: one in the user's cache
            folder; None: nothing is kept.
        engines: A folder of engines that trtexec built (`trtexec_export`): a program's blocks are taken
            from there. Only what `load` and `load_block` give, for arrays in the host's memory, is built.
        flavour: ``"tensorrt"`` or ``"tensorrt_rtx"``; None: the first of them that is installed.
        driver: The device; None: device 0.

    Attributes:
        buckets: What every block that `load_device_block` gives can be captured for, rising.

    Raises:
        BackendUnavailableError: There is no GPU, its driver is too old, TensorRT is not installed or too
            old, or has no such precision.
        ArtifactError: ``engines`` is no such folder, was not filled to the end, or on another device, or is
            for another precision.
        InputError: ``buckets`` are not positive and rising, or given together with ``engines``; or there is
            no place for the user's cache.
    """

    name = _NAME
    form: Form = "onnx"
    on_device = True
    specialises = True
    channels_last = False

    def __init__(
        self,
        *,
        precision: str = "fp32",
        threads: int = 1,
        buckets: Sequence[int] | None = None,
        cache: str | os.PathLike[str] | None = _USER_CACHE,
        engines: str | os.PathLike[str] | None = None,
        flavour: str | None = None,
        driver: Driver | None = None,
    ) -> None:
        require_precision(_NAME, precision, _PRECISIONS)
        if buckets is not None:
            require_buckets(buckets)
        if buckets is not None and engines is not None:
            raise InputError(
                "a folder of engines has buckets of its own",
                where="buckets",
                remedy="export it for these (--buckets), and pass engines= alone",
            )
        self.precision = precision
        self.threads = threads
        self.driver = Driver.open(0) if driver is None else driver
        self._trt: TensorRt = load_tensorrt(flavour)
        self._folder = None if engines is None else _open_folder(engines, precision, self.driver)
        own = powers_of_two(MOST_ROWS) if buckets is None else tuple(buckets)
        self.buckets: tuple[int, ...] = own if self._folder is None else self._folder.buckets
        self._cache = None
        if cache is not None:
            self._cache = EngineCache(user_cache_folder() if cache == _USER_CACHE else cache)
        self._scratch = Scratch(self.driver)
        self._lock = threading.Lock()
        self._made: MutableMapping[tuple[str, tuple[Profile, ...]], TensorRtEngine] = (
            weakref.WeakValueDictionary()
        )

    def load(self, model: bytes, signature: EngineSignature, *, static_batch: int | None = None) -> Engine:
        """Make an engine for arrays in the host's memory; see `Backend.load`.

        Raises:
            LoweringError: TensorRT does not take the model, or its signature is another.
            DeviceError: There is too little memory.
        """
        return self._host_engine(model, signature, static_batch, "the model")

    def load_block(
        self,
        files: Mapping[str, bytes],
        point: OperatingPoint,
        block: BlockInterface,
        *,
        static_batch: int | None = None,
    ) -> Engine:
        """The same of a block of an artifact; built here even where there is a folder of engines.

        Raises:
            LoweringError: As `load`.
            DeviceError: As `load`.
        """
        model = files[block_path(point.files[block.name])]
        return self._host_engine(model, engine_signature(block), static_batch, f"block {block.name!r}")

    def load_device_block(
        self, files: Mapping[str, bytes], point: OperatingPoint, block: BlockInterface
    ) -> TensorRtEngine:
        """The engine of a block for every one of ``buckets``; one that is still in use is shared.

        Raises:
            LoweringError: TensorRT does not take the block.
            ArtifactError: The folder of engines holds none for it, or one that is not the one needed.
            DeviceError: There is too little memory.
        """
        model = files[block_path(point.files[block.name])]
        profiles = tuple(map(Profile.of, self.buckets)) if self._folder is None else ()
        return self._engine(_Case.of(model, engine_signature(block), profiles, f"block {block.name!r}"))

    def _host_engine(
        self, model: bytes, signature: EngineSignature, static_batch: int | None, what: str
    ) -> HostArrayEngine:
        """For one batch size its own kernels; for any, one profile does for all: what is built fast."""
        profiles: tuple[Profile, ...] = (Profile(1, MOST_ROWS, MOST_ROWS),)
        if static_batch is not None:
            profiles = tuple(map(Profile.of, launched_rows(static_batch)))
        return HostArrayEngine(self._engine(_Case.of(model, signature, profiles, what)), self.driver)

    def _engine(self, case: _Case) -> TensorRtEngine:
        key = (case.sha256, case.profiles)
        with self._lock:
            engine = self._made.get(key)
            if engine is None:
                found = None if case.profiles else self._folder
                engine = self._make(case) if found is None else self._fetch(case, found)
                self._made[key] = engine
            return engine

    def _fetch(self, case: _Case, folder: EngineFolder) -> TensorRtEngine:
        """From the folder that trtexec filled."""
        plan, planned = folder.plan(case.sha256, case.what)
        profiles = tuple(map(Profile.of, planned.buckets))
        where = f"{folder.folder / planned.plan}, {case.what}"
        loaded = deserialize(self._trt, self.driver, plan, case.signature, profiles, where, folder.rebuild)
        return TensorRtEngine(self._trt, self.driver, loaded, case.signature, profiles, self._scratch, where)

    def _make(self, case: _Case) -> TensorRtEngine:
        """From the cache, or new."""
        trt, device, profiles = self._trt, self.driver, case.profiles
        named = trt.builds_for_named_devices and trt.compute_capability(device.compute_capability) is not None
        settings = BuildSettings(profiles, device.compute_capability if named else None)
        facts = {**self._place(), "onnx": case.sha256, "settings": settings.to_json()}
        jit = None if self._cache is None else _Kept(self._cache, "kernels", {**facts, **self._driver()})
        loaded = None
        kept = None if self._cache is None else self._cache.read("engine", facts)
        if kept is not None:
            try:
                loaded = deserialize(trt, device, kept, case.signature, profiles, case.where)
            except ArtifactError as error:
                _log.warning("the kept engine is built again: %s", error)
        if loaded is None:
            plan = self._build(case, settings)
            loaded = deserialize(trt, device, plan, case.signature, profiles, case.where)
            if self._cache is not None:
                self._cache.write("engine", facts, plan)
        return TensorRtEngine(trt, device, loaded, case.signature, profiles, self._scratch, case.where, jit)

    def _build(self, case: _Case, settings: BuildSettings) -> bytes:
        timings = _Kept(self._cache, "timings", self._place())
        before = timings.read() if self._trt.has_timing_cache else None
        rows = ", ".join(map(str, case.profiles))
        _log.info("%s: building an engine for %s rows", case.where, rows)
        with self.driver.current():
            built = build_plan(
                self._trt, case.model, case.signature, settings, where=case.where, timings=before
            )
        if built.timings is not None and built.timings != before:
            timings.write(built.timings)
        return built.plan

    def _place(self) -> dict[str, Json]:
        """What an engine is made by, and for."""
        return {
            "flavour": self._trt.flavour,
            "version": self._trt.version,
            "device": self.driver.name,
            "compute_capability": list(self.driver.compute_capability),
        }

    def _driver(self) -> dict[str, Json]:
        return {"driver": self.driver.driver_version}


@dataclass(frozen=True)
class _Case:
    """A model to make an engine of.

    Args:
        model: The ONNX file.
        sha256: Its hash.
        signature: What it takes and gives.
        profiles: For how many rows; empty: as a folder of engines says.
        what: What it is, for errors.
    """

    model: bytes
    sha256: str
    signature: EngineSignature
    profiles: tuple[Profile, ...]
    what: str

    @staticmethod
    def of(model: bytes, signature: EngineSignature, profiles: tuple[Profile, ...], what: str) -> _Case:
        """With its hash."""
        return _Case(model, hashlib.sha256(model).hexdigest(), signature, profiles, what)

    @property
    def where(self) -> str:
        """What it is and for whom, for errors."""
        return f"backend {_NAME!r}, {self.what}"


@dataclass(frozen=True)
class _Kept:
    """One entry of a cache, if there is a cache."""

    cache: EngineCache | None
    kind: str
    facts: Mapping[str, Any]

    def read(self) -> bytes | None:
        return None if self.cache is None else self.cache.read(self.kind, self.facts)

    def write(self, content: bytes) -> None:
        if self.cache is not None:
            self.cache.write(self.kind, self.facts, content)


def _open_folder(folder: str | os.PathLike[str], precision: str, device: Driver) -> EngineFolder:
    found = read_engine_folder(folder)
    if found.precision != precision:
        raise ArtifactError(
            f"the engines are for {found.precision}, the program is to run at {precision}",
            where=str(found.folder),
            remedy=f"ask for precision={found.precision!r}, or export the program compiled at {precision}",
        )
    if not found.buckets:
        raise ArtifactError(
            "no number of rows is one that every engine is for", where=str(found.folder), remedy=EXPORT_AGAIN
        )
    found.require_device(device.name, device.compute_capability)
    return found
