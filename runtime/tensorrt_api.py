"""TensorRT as it is installed here: ``tensorrt`` 10 or 11, or ``tensorrt_rtx``, and what it can do.

The three share nearly one API. What differs is asked of the module (has it this attribute?), never
concluded from a version, so that a version nobody has seen yet works if it can.
"""

from __future__ import annotations

import functools
import importlib
import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Final

from exitcompiler.errors import BackendUnavailableError
from exitcompiler.runtime.backends import is_installed

__all__ = [
    "TENSORRT_FLAVOURS",
    "Messages",
    "TensorRt",
    "installed_flavours",
    "load_tensorrt",
    "plan_origin",
    "version_numbers",
]

_log = logging.getLogger(__name__)

TENSORRT_FLAVOURS: Final = ("tensorrt", "tensorrt_rtx")
"""Names of the modules, in the order they are tried."""

_INSTALL: Final = "pip install tensorrt (data-centre and workstation GPUs), or pip install tensorrt_rtx"

_TAGS: Final = {b"ftrt": "tensorrt", b"vtrt": "tensorrt_rtx"}
_HEADER_BYTES: Final = 28

_NEEDED: Final = (
    ("IBuilderConfig", "max_aux_streams"),
    ("ExecutionContextAllocationStrategy", "USER_MANAGED"),
    ("IExecutionContext", "set_device_memory"),
)

_ALARMS: Final = ("INTERNAL_ERROR", "ERROR", "WARNING")

# What fails is raised, with TensorRT's words; here it is only told.
_LEVELS: Final = {"INTERNAL_ERROR": logging.INFO, "ERROR": logging.INFO}


@dataclass
class Messages:
    """What TensorRT said during a call.

    Args:
        everything: Keep all of it, not only errors and warnings.
        entries: (severity, text).
    """

    everything: bool = False
    entries: list[tuple[str, str]] = field(default_factory=list)

    def hear(self, severity: str, text: str) -> None:
        """Take note of a message."""
        if self.everything or severity in _ALARMS:
            self.entries.append((severity, text))

    @property
    def text(self) -> str:
        """Everything, a message a line."""
        return "\n".join(text for _, text in self.entries)

    @property
    def errors(self) -> str:
        """The errors, or a word on why there are none."""
        found = [text for severity, text in self.entries if severity in ("ERROR", "INTERNAL_ERROR")]
        return "; ".join(found) or "TensorRT gives no reason (it logs to whoever used it first here)"

    @property
    def out_of_memory(self) -> bool:
        """Whether an error is that there is too little memory."""
        text = self.errors.lower().replace("_", " ")
        return any(sign in text for sign in ("out of memory", "outofmemory", "memoryallocation"))


@dataclass(frozen=True)
class TensorRt:
    """An installed TensorRT.

    Args:
        module: The Python module.
        flavour: Its name: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        logger: What it logs to; `messages` listens there.
        lock: To be held while it builds, loads or captures: it logs to one place per process.
    """

    module: Any
    flavour: str
    logger: Any
    lock: Any = field(default_factory=threading.RLock)

    @property
    def version(self) -> str:
        """As the module says: ``"10.16.1.11"``."""
        return str(self.module.__version__)

    @property
    def compiles_when_loading(self) -> bool:
        """Whether kernels are made when an engine is loaded (and kept in a runtime cache).

        Such a TensorRT times nothing when building: its timing cache does nothing, and says so.
        """
        return hasattr(getattr(self.module, "IRuntimeConfig", None), "create_runtime_cache")

    @property
    def has_timing_cache(self) -> bool:
        """Whether what was timed once can be kept for the next build."""
        return hasattr(self.module.IBuilderConfig, "create_timing_cache") and not self.compiles_when_loading

    @property
    def builds_for_named_devices(self) -> bool:
        """Whether it can be told what device to build for, without having one."""
        return hasattr(self.module.IBuilderConfig, "set_compute_capability")

    def compute_capability(self, wanted: tuple[int, int]) -> Any | None:
        """The module's name for a compute capability; None: it has none for this one."""
        return getattr(self.module.ComputeCapability, f"SM{wanted[0]}{wanted[1]}", None)

    @contextmanager
    def messages(self, everything: bool = False) -> Iterator[Messages]:
        """Listen to what TensorRT says."""
        heard = Messages(everything)
        self.logger.listeners.append(heard)
        try:
            yield heard
        finally:
            self.logger.listeners.remove(heard)


def installed_flavours() -> tuple[str, ...]:
    """Which TensorRT modules are installed (found, not imported)."""
    return tuple(name for name in TENSORRT_FLAVOURS if is_installed(name))


def load_tensorrt(flavour: str | None = None) -> TensorRt:
    """Import TensorRT.

    Args:
        flavour: One of ``TENSORRT_FLAVOURS``; None: the first one that is installed.

    Raises:
        BackendUnavailableError: It is not installed, does not load, or is older than 10.
    """
    names: Sequence[str] = installed_flavours() if flavour is None else (flavour,)
    if not names:
        raise BackendUnavailableError("TensorRT is not installed", where="TensorRT", remedy=_INSTALL)
    try:
        module = importlib.import_module(names[0])
    except (ImportError, OSError) as error:  # OSError: one of its libraries is not there
        raise BackendUnavailableError(
            f"{names[0]} cannot be imported: {error}", where="TensorRT", remedy=_INSTALL
        ) from error
    return _prepared(module, names[0])


@functools.cache  # TensorRT keeps the first logger of a process and drops all others, so there is one
def _prepared(module: ModuleType, flavour: str) -> TensorRt:
    for kind, attribute in _NEEDED:
        if not hasattr(getattr(module, kind, None), attribute):
            raise BackendUnavailableError(
                f"{flavour} {getattr(module, '__version__', '?')} is too old: it has no {kind}.{attribute}",
                where="TensorRT",
                remedy=f"pip install --upgrade {flavour}",
            )
    trt = TensorRt(module, flavour, _make_logger(module))
    if hasattr(module, "init_libnvinfer_plugins"):
        module.init_libnvinfer_plugins(trt.logger, "")
    _log.info("using %s %s", flavour, trt.version)
    return trt


def _make_logger(module: Any) -> Any:
    class Logger(module.ILogger):  # type: ignore[misc]
        """Hands messages to Python's logging and to whoever listens."""

        def __init__(self) -> None:
            module.ILogger.__init__(self)
            self.listeners: list[Messages] = []

        def log(self, severity: Any, message: str) -> None:
            for heard in tuple(self.listeners):
                heard.hear(severity.name, message)
            _log.log(_LEVELS.get(severity.name, logging.DEBUG), "%s", message)

    return Logger()


def version_numbers(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with: ``"10.16.1.11"`` -> (10, 16, 1, 11)."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def plan_origin(plan: bytes) -> tuple[str, tuple[int, ...]] | None:
    """What made a serialised engine, as the first bytes of the file say.

    Args:
        plan: The file; its first 28 bytes are enough.

    Returns:
        The flavour, and the four numbers of its version, each modulo 256; None: this is no engine, or one
        of a form that is not known here.
    """
    flavour = _TAGS.get(bytes(plan[:4]))
    if flavour is None or len(plan) < _HEADER_BYTES or any(plan[4:8]):
        return None
    return flavour, tuple(plan[24:28])
