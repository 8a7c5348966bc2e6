"""What this machine is."""

from __future__ import annotations

import platform

__all__ = ["processor_name"]


def processor_name() -> str:
    """The processor as its maker calls it; may be empty where the system does not tell."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor()
