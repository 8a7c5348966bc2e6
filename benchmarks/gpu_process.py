"""Runs the steps of the GPU check in processes of their own, with time limits.

Steps share a process as long as they work, since to start one and to trace a network takes longer than most
of them. Who fails or hangs ends its process, and the next step starts a new one.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

__all__ = [
    "ROOT",
    "Outcome",
    "Worker",
    "figures_path",
    "find_gpu_tests",
    "left_out",
    "read_junit",
    "run_process",
    "run_tests",
]

ROOT: Final = Path(__file__).resolve().parent.parent
_SCRIPT: Final = Path(__file__).with_name("gpu.py")
_TAIL: Final = 2000
_END_S: Final = 20.0
_NOT_PASSED: Final = ("failure", "error", "skipped")
_MARK: Final = "mark.gpu"
_TESTS_FAILED: Final = 1
_NO_TESTS: Final = 5
"""Exit statuses of pytest: what failed is in its results, and a file may be skipped as a whole."""

_PYTEST_INI: Final = """[pytest]
pythonpath = "{tests}"
addopts = --import-mode=importlib -ra -p no:cacheprovider
markers =
    gpu: needs a CUDA device
    slow: takes more than a few seconds
    timeout: of pytest-timeout, which need not be here
"""


@dataclass(frozen=True)
class Outcome:
    """How a process ended.

    Args:
        code: Its exit status; None: it was stopped at its time limit.
        seconds: How long it ran.
        tail: The end of what it said.
    """

    code: int | None
    seconds: float
    tail: str

    @property
    def reason(self) -> str | None:
        """Why it did not work; None: it did."""
        if self.code == 0:
            return None
        if self.code is None:
            return f"stopped at its time limit of {self.seconds:.0f} s; it said last: {self.tail}"
        died = f"killed by signal {-self.code}" if self.code < 0 else f"exit status {self.code}"
        return f"{died}; it said last: {self.tail}"


def run_process(command: Sequence[str], limit_s: float) -> Outcome:
    """Run a command, and stop it with all that it has started when its time is over.

    Args:
        command: Run in the repository's root, which is put on the path of Python.
        limit_s: Seconds.
    """
    began = time.monotonic()
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, _ = process.communicate(timeout=limit_s)
            code: int | None = process.returncode
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            said, _ = process.communicate()
            code = None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    return Outcome(code, time.monotonic() - began, said.strip()[-_TAIL:])


class Worker:
    """A process that runs steps one after another until one of them fails; then there is a new one.

    Args:
        folder: For what steps find and say; no other worker's.
        script: What is started, as ``gpu.py --work folder``.
    """

    def __init__(self, folder: Path, script: Path = _SCRIPT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._script = script
        self._log = folder / "log.txt"
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, name: str, limit_s: float) -> dict[str, Any]:
        """Run a step of ``gpu_steps``.

        Args:
            name: As in `gpu_steps.run_step`.
            limit_s: Seconds.

        Returns:
            ``ok``, ``seconds``, ``code``, ``reason`` (None where it worked) and ``figures``: all that it
            found, even where it did not come to its end.
        """
        began = time.monotonic()
        said = self._log.stat().st_size if self._log.exists() else 0
        process = self._started()
        code = self._ask(process, name, limit_s)
        if code != 0:
            self.close()
        with self._log.open("rb") as log:
            log.seek(said)
            tail = log.read().decode(errors="replace").strip()[-_TAIL:]
        outcome = Outcome(code, time.monotonic() - began, tail)
        path = figures_path(self._folder, name)
        figures = json.loads(path.read_text()) if path.exists() else {}
        return _told(outcome, figures)

    def close(self) -> None:
        """End the process with all that it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()

    def _started(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:  # it died while nobody asked
            self.close()
        if self._process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, str(self._script), "--work", str(self._folder)],
                    cwd=ROOT,
                    env=_environment(),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    bufsize=0,
                    start_new_session=True,
                )
        return self._process

    def _ask(self, process: subprocess.Popen[bytes], name: str, limit_s: float) -> int | None:
        """0 if the step worked, None if its time is over, else the exit status of the process."""
        assert process.stdin is not None
        assert process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.write(f"{name}\n".encode())
        readable, _, _ = select.select([process.stdout], [], [], limit_s)
        if not readable:
            return None
        if process.stdout.read(1):  # one byte for each step that worked
            return 0
        try:
            return process.wait(_END_S) or 1
        except subprocess.TimeoutExpired:  # it has said why it ends, and hangs in doing so
            return 1


def figures_path(folder: Path, name: str) -> Path:
    """Where a step writes down what it finds."""
    return folder / f"{name.replace(' ', '-')}.json"


def left_out(reason: str) -> dict[str, Any]:
    """What became of a step that did not run."""
    return {"ok": False, "seconds": 0.0, "code": None, "reason": reason, "figures": {}}


def _told(outcome: Outcome, figures: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "ok": outcome.code == 0,
        "seconds": round(outcome.seconds, 1),
        "code": outcome.code,
        "reason": outcome.reason,
        "figures": dict(figures),
    }


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path}


def run_tests(limit_s: float, folder: Path, python: str = sys.executable) -> dict[str, Any]:
    """Run every test that is marked ``gpu``, with settings of their own: plug-ins of pytest need not be here.

    Every file has a process of its own, so that one that hangs or crashes takes only its own results along.

    Args:
        limit_s: Seconds, for all together.
        folder: For settings and results.
        python: With pytest, or without: then that is said.

    Returns:
        As `Worker.run`; ``ok`` if there are such tests and all of them passed.
    """
    files = find_gpu_tests(ROOT / "tests")
    began = time.monotonic()
    if run_process([python, "-c", "import pytest"], 60.0).code != 0:
        missing = f"pytest is not installed for {python}: {len(files)} files with GPU tests were not run"
        return left_out(missing)
    settings = folder / "pytest.ini"
    settings.write_text(_PYTEST_INI.format(tests=ROOT / "tests"))
    found: dict[str, Any] = {"tests": 0, "passed": 0, "skipped": [], "bad": []}
    broken = []
    for number, path in enumerate(files):
        left_s = limit_s - (time.monotonic() - began)
        name = str(path.relative_to(ROOT))
        if left_s < 1:
            broken.append(f"{name}: left out, the {limit_s:.0f} s for all tests are over")
            continue
        results = folder / f"junit-{number}.xml"
        command = [python, "-m", "pytest", "-v", "-c", str(settings), "--rootdir", str(ROOT), "-m", "gpu"]
        most_s = left_s if path is files[-1] else left_s / 2  # one that hangs leaves something to the others
        outcome = run_process([*command, f"--junitxml={results}", str(path)], most_s)
        for key, value in read_junit(results.read_text() if results.exists() else "<testsuites/>").items():
            found[key] += value
        if outcome.reason is not None and outcome.code not in (_TESTS_FAILED, _NO_TESTS):
            broken.append(f"{name}: {outcome.reason}")
    reason = "; ".join(broken) or None
    if reason is None and not found["passed"]:
        reason = "no GPU test ran"
    return {
        "ok": reason is None and not found["bad"],
        "seconds": round(time.monotonic() - began, 1),
        "code": None,
        "reason": reason,
        "figures": {**found, "files": len(files)},
    }


def find_gpu_tests(folder: Path) -> list[Path]:
    """The files that hold tests marked ``gpu``: others need not even be importable here.

    Those of parts come before those of the whole, which say less where they fail.
    """
    found = [path for path in folder.rglob("test_*.py") if _MARK in path.read_text(encoding="utf-8")]
    return sorted(found, key=lambda path: (path.parent.name == "exitcompiler", path))


def read_junit(text: str) -> dict[str, Any]:
    """``tests``, ``passed``, ``skipped`` and ``bad``: name and first line of what failed, by JUnit's XML."""
    cases = list(ET.fromstring(text).iter("testcase"))
    bad: list[dict[str, str]] = []
    skipped: list[dict[str, str]] = []
    for case in cases:
        name = f"{case.get('classname', '')}.{case.get('name', '')}".strip(".")
        for kind, found in zip(_NOT_PASSED, (bad, bad, skipped), strict=True):
            for entry in case.findall(kind):
                found.append({"name": name, "why": _first_line(entry)})
    passed = [case for case in cases if not any(entry.tag in _NOT_PASSED for entry in case)]
    return {
        "tests": len(cases),
        "passed": len(passed),
        "skipped": skipped,
        "bad": bad,
    }


def _first_line(entry: ET.Element) -> str:
    lines: Mapping[str, Any] = entry.attrib
    text = str(lines.get("message") or entry.text or "")
    return text.strip().splitlines()[0][:300] if text.strip() else ""
