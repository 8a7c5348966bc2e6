"""Processors of different kinds have different identities, or none."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from exitcompiler import machine
from exitcompiler.machine import processor_identity, processor_name

X86 = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 1
model name\t: AMD EPYC
stepping\t: 1
flags\t\t: fpu vme
"""
ARM = """processor\t: {core}
BogoMIPS\t: 243.75
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x{variant}
CPU part\t: 0x{part}
CPU revision\t: 1

"""


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What Linux tells; nothing is known otherwise."""
    path = tmp_path / "cpuinfo"
    monkeypatch.setattr(machine, "_CPUINFO", path)
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    monkeypatch.setattr(platform, "processor", lambda: "aarch64")
    return path


def test_generations_that_share_a_brand_are_told_apart(cpuinfo: Path) -> None:
    cpuinfo.write_text(X86)
    assert processor_name() == "AMD EPYC"
    assert processor_identity() == "AMD EPYC, family 25 model 1 stepping 1"
    cpuinfo.write_text(X86.replace("model\t\t: 1", "model\t\t: 17"))
    assert processor_name() == "AMD EPYC"
    assert processor_identity() == "AMD EPYC, family 25 model 17 stepping 1"


def test_arm_has_numbers_and_no_name(cpuinfo: Path) -> None:
    cpuinfo.write_text("".join(ARM.format(core=core, variant=3, part="d0c") for core in (0, 1)))
    assert processor_name() == ""
    assert processor_identity() == "implementer 0x41 part 0xd0c variant 0x3 revision 1"
    cpuinfo.write_text(ARM.format(core=0, variant=0, part="d05") + ARM.format(core=1, variant=0, part="d0b"))
    assert processor_identity() == "implementer 0x41 part 0xd05/0xd0b variant 0x0 revision 1"


def test_an_architecture_is_no_identity(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor_identity() == ""
    cpuinfo.write_text("processor\t: 0\nisa\t: rv64imafdc\n")
    assert processor_identity() == ""
    monkeypatch.setattr(platform, "processor", lambda: "Intel64 Family 6 Model 158 Stepping 10")
    assert processor_identity() == "Intel64 Family 6 Model 158 Stepping 10"


def test_macos_is_asked_for_the_name(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "processor", lambda: "arm")

    def answer(command: list[str], **_: Any) -> Any:
        assert command[1:] == ["-n", "machdep.cpu.brand_string"]
        return SimpleNamespace(stdout="Apple M3 Pro\n")

    monkeypatch.setattr(subprocess, "run", answer)
    assert processor_identity() == "Apple M3 Pro"

    def fail(*_: Any, **__: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(subprocess, "run", fail)
    assert processor_identity() == ""
