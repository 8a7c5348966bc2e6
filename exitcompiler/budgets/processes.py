"""Measures in fresh processes, one after another."""

from __future__ import annotations

import os
import signal
import site
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Final, NoReturn, TypeAlias

import numpy as np
import numpy.typing as npt

import exitcompiler
from exitcompiler.budgets.figures import Answered, ProcessFigures
from exitcompiler.budgets.jobs import (
    FOLDER_PREFIX,
    Job,
    Order,
    Rows,
    read_result,
    write_order,
    write_rows,
)
from exitcompiler.budgets.sampling import ROWS_PER_EXIT, stratified_subset
from exitcompiler.errors import ArtifactError, ExitCompilerError, InputError, MeasurementError

if TYPE_CHECKING:
    from exitcompiler.budgets.answering import RowPool

__all__ = ["Job", "Processes", "timeout_s"]

Array: TypeAlias = npt.NDArray[Any]

# -P: what lies in the working directory is not what is to be imported.
_WORKER: Final = ("-P", "-m", "exitcompiler.budgets.worker")

_TRACERS: Final = ("COVERAGE_PROCESS", "COV_CORE_")
"""Beginnings of what coverage and pytest-cov tell processes by: one that is traced measures the tracing."""

_MOST_BYTES: Final = 256 * 2**20
_LAST_LINES: Final = 15
_START_S: Final = 300.0  # on a GPU, engines may have to be built
_SLOWEST_ROW_S: Final = 1.0
_TURNS: Final = 60
_LONGEST_S: Final = 1800.0


class Processes:
    """Runs a job in fresh processes. Close it, or use it with ``with``: the rows are in a temporary folder.

    Args:
        job: What to measure.
        pool: On which rows.
        exit_index: The exit of each, ``int32[rows]``.
        answered: What came out of them.

    Attributes:
        notes: What a reader has to know: that only some of the rows are timed.

    Raises:
        InputError: The temporary folder has no room for the rows.
    """

    def __init__(
        self, job: Job, pool: RowPool, exit_index: npt.NDArray[np.int32], answered: Answered
    ) -> None:
        self._job = replace(job, artifact=os.path.abspath(job.artifact))
        self._exits = dict(answered.exits)
        inputs = pool.inputs
        named = inputs if isinstance(inputs, dict) else None
        rows = Rows(
            (inputs,) if not isinstance(inputs, dict) else tuple(inputs.values()),
            None if named is None else tuple(named),
            exit_index,
        )
        self._names = rows.names
        rows, self.notes = _few_enough(rows, job.seed)
        self._timeout_s = timeout_s(job, len(self._exits))
        try:
            self._temporary = tempfile.TemporaryDirectory(prefix=FOLDER_PREFIX, ignore_cleanup_errors=True)
        except OSError as error:
            raise _no_room(error, "the temporary folder") from error
        self._folder = Path(self._temporary.name)
        try:
            write_rows(self._folder, rows)
        except OSError as error:
            self.close()
            raise _no_room(error, str(self._folder)) from error

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Remove the temporary folder."""
        self._temporary.cleanup()

    def run(self, number: int) -> ProcessFigures:
        """Start a process, wait for it, and read what it measured.

        Args:
            number: Of the process: 0, 1, ...; even ones load the program first, odd ones the plain backbone.

        Raises:
            MeasurementError: It crashed, was killed, took too long, or wrote nothing.
            ExitCompilerError: Whatever was raised there.
        """
        began = time.perf_counter()
        order_file, result = self._folder / f"job{number}.json", self._folder / f"result{number}.json"
        result.unlink(missing_ok=True)
        write_order(order_file, Order(self._job, number, self._exits, self._names, str(result)))
        code, output = self._execute(number, order_file)
        where = f"process {number}"
        if result.exists():
            try:
                found = read_result(result)
            except ArtifactError as error:
                raise MeasurementError(
                    f"it wrote what cannot be read: {error}", where=where, remedy=_said(output)
                ) from error
            if isinstance(found, ExitCompilerError):
                found.add_note(f"raised in {where} of those that measure")
                raise found
            if code == 0:
                return replace(found, seconds=time.perf_counter() - began)
        _explain(code, where, output)

    def _execute(self, number: int, order_file: Path) -> tuple[int, str]:
        """Exit code and what was printed. An interrupt, as any exception, kills the process."""
        if not sys.executable:
            raise MeasurementError(
                "this python does not know its own executable, so that no fresh process can be started",
                where=f"process {number}",
            )
        # The worker ends when nobody holds the other end of its standard input any more.
        ours, its = _pipe()
        with ours:
            try:
                with its:
                    process = subprocess.Popen(
                        [sys.executable, *_WORKER, str(order_file)],
                        stdin=its,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.STDOUT,
                        env=_environment(),
                    )
            except OSError as error:
                raise MeasurementError(
                    f"it cannot be started: {error.strerror}", where=f"process {number}"
                ) from error
            with process:
                return self._wait_for(process, number)

    def _wait_for(self, process: subprocess.Popen[bytes], number: int) -> tuple[int, str]:
        try:
            output, _ = process.communicate(timeout=self._timeout_s)
        except subprocess.TimeoutExpired as error:
            process.kill()
            output, _ = process.communicate()
            raise MeasurementError(
                f"it was stopped, as it had not ended after {self._timeout_s:.0f} s",
                where=f"process {number}",
                remedy=f"see whether the program answers at all; {_said(_text(output))}",
            ) from error
        except BaseException:
            process.kill()
            process.wait()
            raise
        return process.returncode, _text(output)


def _pipe() -> tuple[IO[bytes], IO[bytes]]:
    """The end to write to, which processes started from here do not inherit, and the end to read from."""
    read, write = os.pipe()
    return os.fdopen(write, "wb", 0), os.fdopen(read, "rb", 0)


def _no_room(error: OSError, where: str) -> InputError:
    return InputError(
        f"the rows cannot be written: {error.strerror or error}",
        where=where,
        remedy="set TMPDIR to a folder with more room, or take fewer rows with max_rows",
    )


def timeout_s(job: Job, exits: int) -> float:
    """After how many seconds a process hangs: by then a very slow network is done, but half an hour at most.

    Args:
        job: What it measures.
        exits: How many the program has.
    """
    rows = _TURNS + ROWS_PER_EXIT * exits + 7 * sum(job.batch_sizes)
    needed = _START_S + 10 * job.seconds * (1 + len(job.batch_sizes)) + 2 * _SLOWEST_ROW_S * rows
    return min(needed, _LONGEST_S)


def _few_enough(rows: Rows, seed: int) -> tuple[Rows, tuple[str, ...]]:
    """The rows, or some of them where there are many."""
    count = len(rows.exit_index)
    most = _MOST_BYTES // rows.row_bytes
    if count <= most:
        return rows, ()
    kept = stratified_subset(rows.exit_index, most, np.random.default_rng(seed))
    if len(kept) == count:
        return rows, ()
    few = Rows(tuple(array[kept] for array in rows.arrays), rows.names, rows.exit_index[kept])
    note = f"times are of {len(kept)} of the {count} rows, drawn from each exit; all rows were answered"
    return few, (note,)


def _environment() -> dict[str, str]:
    """This process's, with the place of this very package where python would not look by itself."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(_TRACERS)}
    home = str(Path(exitcompiler.__file__).parent.parent)
    by_itself = [*site.getsitepackages(), site.getusersitepackages()]
    if home not in by_itself:
        given = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([home, given] if given else [home])
    return environment


def _explain(code: int, where: str, output: str) -> NoReturn:
    """Say how a process ended that measured nothing.

    Raises:
        MeasurementError: Always.
    """
    remedy = _said(output)
    if code == 0:
        raise MeasurementError("it ended without having measured anything", where=where, remedy=remedy)
    # As a negative number on POSIX, or as 128 + n where a shell or a container stands between.
    number = -code if code < 0 else code - 128
    killed = os.name == "posix" and number == signal.SIGKILL
    if killed:
        raise MeasurementError(
            "it was killed from outside, mostly since memory was short",
            where=where,
            remedy=f"give it more memory, or measure smaller batches; {remedy}",
        )
    how = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
    raise MeasurementError(f"it crashed: it {how}", where=where, remedy=remedy)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _said(output: str) -> str:
    """The last lines that a process printed."""
    lines = output.strip().splitlines()[-_LAST_LINES:]
    if not lines:
        return "it printed nothing"
    return "\n     ".join(["the last it printed:", *lines])


def _text(output: bytes) -> str:
    return output.decode(errors="replace")
