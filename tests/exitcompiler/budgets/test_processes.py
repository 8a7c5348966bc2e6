"""Fresh processes measure real programs, and whatever ends one is told."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import artifact_of, chain, plain, random_rows

import exitcompiler
from exitcompiler.budgets import processes
from exitcompiler.budgets.answering import answer, gather_rows
from exitcompiler.budgets.figures import Answered
from exitcompiler.budgets.memory import peak_resident_bytes
from exitcompiler.budgets.processes import Job, Processes, timeout_s
from exitcompiler.errors import ArtifactError, InputError, MeasurementError
from exitcompiler.runtime.loading import load, open_artifact

pytest.importorskip("onnxruntime")

ROWS = random_rows(60)


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Job:
    path = tmp_path_factory.mktemp("artifact") / "program.exit"
    open_artifact(artifact_of(chain(), chain(1), plain())).save(path)
    return Job(str(path), "onnxruntime", 1, batch_sizes=(1, 100), seconds=0.02)


@pytest.fixture(scope="module")
def answers(job: Job) -> tuple[Answered, np.ndarray]:
    program = load(job.artifact)
    return answer(program, program.plain, gather_rows(ROWS))


@contextmanager
def running(job: Job, answers: tuple[Answered, np.ndarray]) -> Iterator[Processes]:
    answered, exit_index = answers
    with Processes(job, gather_rows(ROWS), exit_index, answered) as opened:
        yield opened


def test_processes_measure_all_there_is(
    job: Job,
    answers: tuple[Answered, np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Neither the working directory nor what it holds makes a difference, and no path has to be set.
    (tmp_path / "numpy.py").write_text("raise RuntimeError", encoding="utf-8")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.chdir(tmp_path)
    relative = replace(job, artifact=os.path.relpath(job.artifact))
    answered, _ = answers
    with running(relative, answers) as opened:
        folder = opened._folder
        figures = [opened.run(number) for number in (0, 1)]
        assert opened.notes == ()
    assert not folder.exists()
    assert [found.first for found in figures] == ["program", "plain"]
    for found in figures:
        assert list(found.exits_us) == list(answered.exits) == ["exit1", "exit2", "backbone"]
        assert list(found.blocks_us) == ["first", "second", "third"]
        shares = [count / answered.rows for count in answered.exits.values()]
        expected = math.fsum(s * us for s, us in zip(shares, found.exits_us.values(), strict=True))
        assert found.program.mean_us == pytest.approx(expected, rel=1e-12)
        for side in (found.program, found.plain):
            assert 0 < side.p50_us <= side.p95_us <= side.p99_us
            assert list(side.rows_per_second) == [1, 100]
        assert 0 < found.load_ms < 1e3 * found.seconds
        # Its own memory: that of this process, which started it, is far more.
        assert 10 * 2**20 < found.peak_bytes < peak_resident_bytes()
    assert figures[0] != figures[1]


def test_another_operating_point_with_an_exit_that_no_row_takes(job: Job) -> None:
    program = load(job.artifact).select(name="point1")
    exits = program.run(ROWS).exit_index
    taken = exits == exits[0]
    pool = gather_rows({"x": ROWS[taken]})
    answered, exit_index = answer(program, program.plain, pool)
    assert 0 in answered.exits.values()
    with Processes(replace(job, operating_point="point1"), pool, exit_index, answered) as opened:
        found = opened.run(0)
    assert all(us > 0 for us in found.exits_us.values())
    assert found.program.mean_us == pytest.approx(found.exits_us[program.exits[exits[0]]])


def test_too_many_rows_are_timed_in_part(
    job: Job, answers: tuple[Answered, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, exit_index = answers
    monkeypatch.setattr(processes, "_MOST_BYTES", 30 * ROWS[0].nbytes)
    with running(job, answers) as opened:
        (note,) = opened.notes
        kept = np.load(opened._folder / "exit_index.npy")
        rows = np.load(opened._folder / "input0.npy")
    assert note.startswith(f"times are of {len(kept)} of the 60 rows")
    assert len(rows) == len(kept) < 60
    program = load(job.artifact)
    np.testing.assert_array_equal(program.run(rows).exit_index, kept)
    assert set(kept) == set(exit_index)


def test_errors_of_the_process_are_raised_here(
    job: Job, answers: tuple[Answered, np.ndarray], tmp_path: Path
) -> None:
    with (
        running(replace(job, artifact=str(tmp_path / "none.exit")), answers) as opened,
        pytest.raises(ArtifactError, match="there is nothing here") as raised,
    ):
        opened.run(3)
    assert raised.value.remedy == "check the path"
    assert str(tmp_path) in str(raised.value.where)
    assert "process 3" in raised.value.__notes__[0]
    with (
        running(replace(job, operating_point="none"), answers) as opened,
        pytest.raises(InputError, match="no operating point"),
    ):
        opened.run(0)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import os; os.kill(os.getpid(), 9)", "killed from outside, mostly since memory was short"),
        ("import os; os.kill(os.getpid(), 11)", "crashed: it was ended by SIGSEGV"),
        ("raise MemoryError('so much')", r"exit code 1\n.*last it printed:(.|\n)*MemoryError: so much"),
        ("import sys; sys.exit(137)", "killed from outside"),
        ("print('nothing')", r"without having measured anything\n.*\n.*nothing"),
        ("", "it printed nothing"),
        (
            "import sys, pathlib; path = pathlib.Path(sys.argv[1])\n"
            "(path.parent / 'result2.json').write_text('{')",
            "what cannot be read: .*not valid JSON",
        ),
    ],
)
@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_what_ends_a_process_is_told(
    job: Job,
    answers: tuple[Answered, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    code: str,
    said: str,
) -> None:
    monkeypatch.setattr(processes, "_WORKER", ("-c", code))
    with running(job, answers) as opened, pytest.raises(MeasurementError, match=said) as raised:
        opened.run(2)
    assert raised.value.where == "process 2"


def test_a_process_that_hangs_is_stopped(
    job: Job, answers: tuple[Answered, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes, "_WORKER", ("-c", _sleeping(tmp_path / "pid")))
    monkeypatch.setattr(processes, "timeout_s", lambda job, exits: 2.0)
    with running(job, answers) as opened, pytest.raises(MeasurementError, match="not ended after 2 s") as it:
        opened.run(0)
    assert "going to sleep" in str(it.value.remedy)
    assert _is_gone(int((tmp_path / "pid").read_text(encoding="ascii")))


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
def test_an_interrupt_ends_the_process_too(
    job: Job, answers: tuple[Answered, np.ndarray], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pid = tmp_path / "pid"
    monkeypatch.setattr(processes, "_WORKER", ("-c", _sleeping(pid)))
    main = threading.main_thread().ident
    assert main is not None

    def interrupt() -> None:
        while not pid.exists():
            time.sleep(0.01)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with running(job, answers) as opened:
            threading.Thread(target=interrupt, daemon=True).start()
            with pytest.raises(KeyboardInterrupt):
                opened.run(0)
    finally:
        signal.signal(signal.SIGINT, before)
    assert _is_gone(int(pid.read_text(encoding="ascii")))


@pytest.mark.skipif(os.name != "posix", reason="signals are those of POSIX")
@pytest.mark.parametrize(("how", "group"), [("SIGTERM", False), ("SIGTERM", True), ("SIGKILL", False)])
def test_nothing_is_left_of_a_check_that_is_killed(job: Job, tmp_path: Path, how: str, group: bool) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import sys; from pathlib import Path\n"
        "from exitcompiler.budgets.worker import end_with_parent\n"
        f"end_with_parent(Path(sys.argv[1]).parent)\n{_sleeping(tmp_path / 'pid')}",
        encoding="utf-8",
    )
    script = f"""
        import numpy as np
        from exitcompiler.budgets import processes
        from exitcompiler.budgets.answering import gather_rows
        from exitcompiler.budgets.figures import Answered

        processes._WORKER = ({str(worker)!r},)
        pool = gather_rows(np.ones((4, 3), np.float32))
        answered = Answered(4, "", {{"backbone": 4}}, 0)
        job = processes.Job({str(job.artifact)!r})
        with processes.Processes(job, pool, np.zeros(4, np.int32), answered) as opened:
            opened.run(0)
    """
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    check = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, start_new_session=True
    )
    _wait_until((tmp_path / "pid").exists)
    assert len(list(tmp_path.glob("exitcompiler-check-*"))) == 1
    (os.killpg if group else os.kill)(check.pid, signal.Signals[how])
    assert check.wait(timeout=60) == -signal.Signals[how]
    pid = int((tmp_path / "pid").read_text(encoding="ascii"))
    _wait_until(lambda: _is_gone(pid))
    assert list(tmp_path.glob("exitcompiler-check-*")) == []


def test_no_folder_but_a_temporary_one_is_removed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path\n"
        "from exitcompiler.budgets.worker import end_with_parent\n"
        f"end_with_parent(Path({str(tmp_path)!r})); time.sleep(600)"
    )
    ended = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, timeout=60)
    assert ended.returncode == 1
    assert tmp_path.is_dir()


def test_without_a_temporary_folder_the_error_says_what_to_do(
    job: Job, answers: tuple[Answered, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", refuse)
    with pytest.raises(InputError, match="cannot be written: No space") as raised, running(job, answers):
        pass
    assert "TMPDIR" in str(raised.value.remedy)


def test_processes_are_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("COVERAGE_PROCESS_START", "COVERAGE_PROCESS_CONFIG", "COV_CORE_SOURCE", "COVERAGES"):
        monkeypatch.setenv(name, "x")
    assert [name for name in processes._environment() if name.startswith("COV")] == ["COVERAGES"]


def test_without_an_executable_there_is_no_fresh_process(
    job: Job, answers: tuple[Answered, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(job, answers) as opened:
        monkeypatch.setattr("sys.executable", "")
        with pytest.raises(MeasurementError, match="does not know its own executable"):
            opened.run(0)
        monkeypatch.setattr("sys.executable", "/nowhere/python")
        with pytest.raises(MeasurementError, match="cannot be started"):
            opened.run(0)


def test_an_installed_package_is_found_without_a_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "mine")
    home = str(Path(exitcompiler.__file__).parent.parent)
    monkeypatch.setattr("site.getsitepackages", list)
    assert processes._environment()["PYTHONPATH"] == os.pathsep.join([home, "mine"])
    monkeypatch.setattr("site.getsitepackages", lambda: [home])
    assert processes._environment() == dict(os.environ)


def test_larger_jobs_may_take_longer() -> None:
    job = Job("program.exit", batch_sizes=(1, 10), seconds=0.02)
    assert timeout_s(job, 3) < timeout_s(replace(job, seconds=10.0), 3)
    assert timeout_s(job, 3) < timeout_s(job, 9)
    assert timeout_s(job, 3) < timeout_s(replace(job, batch_sizes=(1, 20)), 3)


def _sleeping(pid: Path) -> str:
    """A program that writes its process id, and then does nothing for a long time."""
    return (
        "import os, time, pathlib; print('going to sleep', flush=True)\n"
        f"made = pathlib.Path({str(pid)!r} + '.new'); made.write_text(str(os.getpid()))\n"
        f"made.rename({str(pid)!r}); time.sleep(600)"
    )


def _wait_until(done: Callable[[], bool]) -> None:
    """However long it takes, up to a minute."""
    for _ in range(6000):
        if done():
            return
        time.sleep(0.01)
    pytest.fail("it did not come about within a minute")


def _is_gone(pid: int) -> bool:
    """Whether it has ended; where nobody asks for its exit code, Linux keeps its name."""
    try:
        os.kill(pid, 0)
        return ") Z" in Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # another system, or this very moment
        return False
