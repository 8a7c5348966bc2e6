"""What this machine is."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Final

__all__ = ["processor_identity", "processor_name"]

_CPUINFO: Final = Path("/proc/cpuinfo")
_NAMES: Final = ("model name", "cpu model", "uarch", "cpu")
"""Where Linux has the maker's name: on most machines, on MIPS, on RISC-V, on POWER."""
_NUMBERS: Final = (
    ("cpu family", "model", "stepping"),  # x86, where the name in a virtual machine may be a mere brand
    ("CPU implementer", "CPU part", "CPU variant", "CPU revision"),  # ARM, where there is mostly no name
)
_BARE: Final = frozenset({"arm", "i386", "powerpc"})
"""What `platform.processor` calls any processor of an architecture, beside the name of that."""


def processor_name() -> str:
    """The processor as its maker calls it; may be empty where the system does not tell."""
    return _linux_value(_NAMES) or _macos_name() or _python_name()


def processor_identity() -> str:
    """Name and numbers of the processor, as far as the system tells; equal for processors of one kind.

    Returns:
        Empty where nothing is known but the architecture, which very different processors share.
    """
    numbers = (
        " ".join(f"{key.removeprefix('CPU ').removeprefix('cpu ')} {found}" for key, found in group)
        for group in (_linux_numbers(keys) for keys in _NUMBERS)
        if len(group) > 1
    )
    return ", ".join(part for part in (processor_name(), *numbers) if part)


def _linux_value(keys: Sequence[str]) -> str:
    """The value of the first of these keys that is there."""
    lines = _linux_lines()
    return next((value for key in keys for found, value in lines if found == key and value), "")


def _linux_numbers(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Keys and values; where cores are of several kinds, the values of all."""
    lines = _linux_lines()
    values = {key: sorted({value for found, value in lines if found == key}) for key in keys}
    return [(key, "/".join(found)) for key, found in values.items() if found]


def _linux_lines() -> list[tuple[str, str]]:
    try:
        text = _CPUINFO.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    pairs = (line.partition(":") for line in text.splitlines())
    return [(key.strip(), value.strip()) for key, _, value in pairs]


def _macos_name() -> str:
    if platform.system() != "Darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _python_name() -> str:
    name = platform.processor()
    return "" if name in _BARE or name == platform.machine() else name
