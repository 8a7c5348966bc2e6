"""The GPU check as a command: processes, verdicts, tables, the page that they go to."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gpu_sample import sample_run

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"


def judged(bench: Callable[[str], ModuleType], found: dict[str, Any]) -> dict[str, Any]:
    found["targets"] = bench("gpu_targets").judge(found)
    return {target["what"]: target for target in found["targets"]}


# Processes


def test_without_a_gpu_it_ends_at_once_and_says_why(tmp_path: Path) -> None:
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), "--out", str(tmp_path / "out")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "No GPU was used" in done.stderr
    assert "BackendUnavailableError" in done.stderr
    assert "->" in done.stderr
    assert done.stdout == ""
    assert time.monotonic() - began < 30
    assert not (tmp_path / "out").exists()


def test_make_has_the_command() -> None:
    text = subprocess.run(
        ["make", "-n", "gpu-check", "PYTHON=some-python", "OUT=some folder"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert 'some-python benchmarks/gpu.py --out "some folder"' in text
    assert "pip" not in text  # nothing is installed


def test_a_process_that_crashes_is_told_with_its_signal(bench: Callable[[str], ModuleType]) -> None:
    code = "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)"
    outcome = bench("gpu_process").run_process([sys.executable, "-c", code], 30.0)
    assert outcome.code == -11
    assert outcome.reason == "killed by signal 11; it said last: last words"


def test_a_process_that_hangs_is_stopped_with_its_children(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    mark = tmp_path / "child"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    code = (
        "import subprocess, sys, time; print('waiting', flush=True); "
        f"subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    )
    outcome = bench("gpu_process").run_process([sys.executable, "-c", code], 1.0)
    assert outcome.code is None
    assert "time limit of 1 s; it said last: waiting" in str(outcome.reason)
    time.sleep(3)
    assert not mark.exists()


def test_a_step_keeps_what_it_found_before_it_broke(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    record = bench("gpu_steps").Record(tmp_path / "figures.json")
    record["first"] = {"us": 1.5}
    record["second"] = [np.float64("inf"), np.float32(2)]  # JSON has no infinity
    assert json.loads((tmp_path / "figures.json").read_text()) == {"first": {"us": 1.5}, "second": [None, 2]}
    worker = bench("gpu_process").Worker(tmp_path / "worker")
    outcome = worker.run("no-such-step", 60.0)
    assert not outcome["ok"]
    assert outcome["code"] == 1
    assert "no-such-step" in outcome["reason"]


_WORK = """
import os, signal, sys, time
from pathlib import Path

sys.path.insert(0, {benchmarks!r})
import gpu, gpu_steps

def run_step(name, record):
    print("step", name)  # goes to the log, not to who waits for answers
    record["process"] = os.getpid()
    if name == "crash":
        os.kill(os.getpid(), signal.SIGKILL)
    if name == "hang":
        time.sleep(60)
    if name == "error":
        raise RuntimeError("told why")

gpu_steps.run_step = run_step
sys.exit(gpu._work(Path(sys.argv[2])))
"""


def test_steps_share_a_process_until_one_fails(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    script = tmp_path / "work.py"
    script.write_text(_WORK.format(benchmarks=str(BENCHMARKS)))
    worker = bench("gpu_process").Worker(tmp_path / "worker", script)
    names = ("one", "two words", "crash", "three", "hang", "four", "error", "five")
    found = {name: worker.run(name, 2.0 if name == "hang" else 60.0) for name in names}
    worker.close()
    assert [name for name in names if not found[name]["ok"]] == ["crash", "hang", "error"]
    assert [found[name]["code"] for name in ("one", "crash", "hang", "error")] == [0, -9, None, 1]
    assert found["crash"]["reason"] == "killed by signal 9; it said last: step crash"
    assert "time limit of 2 s; it said last: step hang" in found["hang"]["reason"]
    assert found["error"]["reason"].endswith("RuntimeError: told why")
    processes = [found[name]["figures"]["process"] for name in names]  # of those that failed, too
    assert processes[0] == processes[1] == processes[2]
    assert processes[3] == processes[4]
    assert processes[5] == processes[6]
    assert len(set(processes)) == 4
    for process in set(processes):
        with pytest.raises(ProcessLookupError):
            os.kill(process, 0)


def test_steps_go_on_after_one_that_fails_until_the_time_is_over(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = bench("gpu")
    ran = []

    class Worker:
        def __init__(self, folder: Path) -> None:
            self.closed = False

        def run(self, name: str, limit_s: float) -> dict[str, Any]:
            assert not self.closed
            ran.append((name, limit_s))
            good = name != "bad"
            return {"ok": good, "seconds": 1.0, "reason": None if good else "broken", "figures": {}}

        def close(self) -> None:
            self.closed = True

    monkeypatch.setattr(gpu, "Worker", Worker)
    steps = tuple(gpu.Step(name, 40.0) for name in ("environment", "bad", "good"))
    monkeypatch.setattr(gpu, "STEPS", steps)
    found = gpu.run_all(tmp_path, 100.0)
    assert [name for name, _ in ran] == ["environment", "bad", "good"]
    assert all(limit_s == 40.0 for _, limit_s in ran)
    assert json.loads((tmp_path / "gpu.json").read_text())["steps"]["bad"]["reason"] == "broken"
    assert found["steps"]["good"]["ok"]
    late = gpu.run_all(tmp_path, 5.0)
    assert "left out" in late["steps"]["good"]["reason"]
    assert gpu.run_all(tmp_path, 100.0, ["good"])["steps"].keys() == {"environment", "good"}


def test_all_steps_are_known(bench: Callable[[str], ModuleType], tmp_path: Path) -> None:
    names = {step.name for step in bench("gpu").STEPS}
    assert names >= sample_run()["steps"].keys()
    kinds = {name.split()[0] for name in names} - {"tests"}
    record = bench("gpu_steps").Record(tmp_path / "figures.json")
    for kind in kinds:  # each is there, and only lacks its arguments or a GPU
        with pytest.raises(Exception) as caught:  # noqa: PT011
            bench("gpu_steps").run_step(f"{kind} a b c d", record)
        assert not isinstance(caught.value, KeyError)


# Tests that need a GPU


def test_without_pytest_it_is_said_and_not_passed_over(
    bench: Callable[[str], ModuleType], tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    outcome = bench("gpu_process").run_tests(30.0, tmp_path, str(python))
    assert not outcome["ok"]
    assert "pytest is not installed" in outcome["reason"]
    found = sample_run()
    found["steps"]["tests"] = outcome
    line = judged(bench, found)["tests that need a GPU"]
    assert line["outcome"] == "missed"
    assert "pytest is not installed" in line["measured"]


def test_marked_tests_are_found_and_run(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench("gpu_process")
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_other.py").write_text("import not_there\n")
    mark = "mark." + "gpu"  # so that this file is not taken for one with such tests
    marked = (
        f"import pytest\n@pytest.{mark}\ndef test_{{0}}():\n    {{1}}\ndef test_cpu():\n    assert False\n"
    )
    (tests / "test_good.py").write_text(marked.format("good", "pass"))
    (tests / "test_bad.py").write_text(marked.format("bad", "assert 1 == 2, 'sum'"))
    (tests / "test_absent.py").write_text("import not_there\n" + marked.format("absent", "pass"))
    monkeypatch.setattr(process, "ROOT", tmp_path)
    outcome = process.run_tests(60.0, tmp_path)
    assert not outcome["ok"]
    figures = outcome["figures"]
    assert figures["files"] == 3
    assert figures["passed"] == 1
    assert figures["tests"] == 3
    assert sorted(test["name"].rpartition("test_")[2] for test in figures["bad"]) == ["absent", "bad"]
    (tests / "test_bad.py").unlink()
    (tests / "test_absent.py").unlink()
    assert process.run_tests(60.0, tmp_path)["ok"]


def test_a_file_that_hangs_takes_no_other_results_along(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = bench("gpu_process")
    marked = f"import time, pytest\n@pytest.mark.{'gpu'}\ndef test_{{0}}():\n    {{1}}\n"
    for folder, name, body in (
        ("exitcompiler", "whole", "pass"),
        ("runtime", "hangs", "time.sleep(60)"),
        ("runtime", "good", "pass"),
    ):
        path = tmp_path / "tests" / folder / f"test_{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(marked.format(name, body))
    monkeypatch.setattr(process, "ROOT", tmp_path)
    names = [path.stem for path in process.find_gpu_tests(tmp_path / "tests")]
    assert names == ["test_good", "test_hangs", "test_whole"]  # parts first
    outcome = process.run_tests(12.0, tmp_path)
    assert not outcome["ok"]
    assert outcome["figures"]["passed"] == 2
    assert "test_hangs.py: stopped at its time limit" in outcome["reason"]
    assert process.run_tests(0.0, tmp_path)["reason"].count("left out, the 0 s for all tests are over") == 3


def test_results_of_tests_are_read(bench: Callable[[str], ModuleType]) -> None:
    found = bench("gpu_process").read_junit(
        '<testsuites><testsuite><testcase classname="a" name="b"/><testcase classname="a" name="c">'
        '<failure message="AssertionError: no&#10;more">long</failure></testcase><testcase name="d">'
        '<skipped message="no TensorRT"/></testcase><testcase name="e"><failure message="first"/>'
        '<error message="then"/></testcase></testsuite></testsuites>'
    )
    assert found == {
        "tests": 4,
        "passed": 1,
        "skipped": [{"name": "d", "why": "no TensorRT"}],
        "bad": [
            {"name": "a.c", "why": "AssertionError: no"},
            {"name": "e", "why": "first"},
            {"name": "e", "why": "then"},
        ],
    }


# Verdicts


def test_everything_is_reached_in_a_good_run(bench: Callable[[str], ModuleType]) -> None:
    lines = judged(bench, sample_run())
    assert len(lines) == 17
    assert {line["outcome"] for line in lines.values()} == {"reached", "reported"}
    assert sum(line["outcome"] == "reported" for line in lines.values()) == 4


def _over(found: dict[str, Any]) -> None:
    found["steps"]["rows resnet56 fp32"]["figures"]["rows"]["wall"]["over_ideal"]["value"] = 1.051


def _suffix(found: dict[str, Any]) -> None:
    early = found["steps"]["rows resnet56 fp32"]["figures"]["rows"]["device"]["leaving_first"]
    early["suffix_us"]["value"] = 3.0


def _slow_batch(found: dict[str, Any]) -> None:
    found["steps"]["batches resnet56"]["figures"]["batches"]["mixes"][1]["throughput_by_shares"]["value"] = (
        0.89
    )


def _allocates(found: dict[str, Any]) -> None:
    found["steps"]["calls resnet56"]["figures"]["calls"]["1"]["segments"] = 1


def _waits(found: dict[str, Any]) -> None:
    found["steps"]["calls resnet56"]["figures"]["calls"]["1"]["came_back_before_the_device"] = False


def _other_exit(found: dict[str, Any]) -> None:
    found["steps"]["parity resnet56"]["figures"]["fp32"] = {
        "1": {"relative": 0.0, "same_exit": 0.99},
        "2": {"relative": 0.0, "same_exit": 1.0},
    }


def _bad_test(found: dict[str, Any]) -> None:
    found["steps"]["tests"]["figures"]["bad"] = [{"name": "t", "why": "wrong"}]


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        (_over, "ResNet-56, 32x32: mean latency / ideal, batch 1"),
        (_suffix, "ResNet-56, 32x32: what is skipped after the first exit costs"),
        (_slow_batch, "ResNet-56, 32x32: throughput / ideal by shares, batch 32"),
        (_allocates, "ResNet-56, 32x32: allocations between launch and result"),
        (_waits, "ResNet-56, 32x32: waits of the host between launch and result"),
        (_other_exit, "ResNet-56, 32x32: float32 against the oracle"),
        (_bad_test, "tests that need a GPU"),
    ],
)
def test_what_is_not_reached_is_missed(
    bench: Callable[[str], ModuleType], spoil: Callable[[dict[str, Any]], None], what: str
) -> None:
    found = sample_run()
    spoil(found)
    missed = [name for name, line in judged(bench, found).items() if line["outcome"] == "missed"]
    assert missed == [what]


def test_what_was_not_measured_is_missed_with_the_reason(bench: Callable[[str], ModuleType]) -> None:
    found = sample_run()
    step = found["steps"]["rows resnet50 fp32"]
    step.update(ok=False, reason="killed by signal 11; it said last: |\n oh", figures={})
    lines = judged(bench, found)
    missed = [line for line in lines.values() if line["outcome"] == "missed"]
    assert len(missed) == 4  # the step itself, and what it was to reach
    assert all(line["measured"].endswith("killed by signal 11; it said last: / oh") for line in missed)
    del found["steps"]["rows resnet50 fp32"]  # not asked for
    assert all(line["outcome"] != "missed" for line in judged(bench, found).values())


@pytest.mark.parametrize("name", ["nodes", "cond resnet56", "torch resnet50", "tensorrt resnet56"])
def test_a_step_that_breaks_is_missed_whatever_it_measures(
    bench: Callable[[str], ModuleType], name: str
) -> None:
    found = sample_run()
    found["steps"][name].update(ok=False, reason="left out: the 520 s for all are over")
    missed = [line for line in judged(bench, found).values() if line["outcome"] == "missed"]
    assert [line["what"] for line in missed] == [f"step: {name}"]
    assert missed[0]["measured"] == "left out: the 520 s for all are over"


def test_answers_that_are_not_finite_are_missed(bench: Callable[[str], ModuleType]) -> None:
    found = sample_run()
    for model in ("resnet56", "resnet50"):
        found["steps"][f"parity {model}"]["figures"]["fp32"]["32"]["relative"] = None
    line = judged(bench, found)["ResNet-56, 32x32: float32 against the oracle"]
    assert (line["outcome"], line["measured"]) == ("missed", "answers are not finite")
    assert "| ResNet-56, 32x32 | fp32 | 32 | not finite | 100.0 |" in bench("gpu_text").section(found)


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [(2, 2, "No GPU was used"), (None, 1, "could not be found out"), (-11, 1, "could not be found out")],
)
def test_a_gpu_that_could_not_be_looked_at_is_not_taken_for_none(
    bench: Callable[[str], ModuleType],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int | None,
    status: int,
    told: str,
) -> None:
    gpu = bench("gpu")
    outcome = {"ok": False, "seconds": 150.0, "code": code, "reason": "why", "figures": {}}
    monkeypatch.setattr(gpu, "run_all", lambda *_: {"steps": {"environment": outcome}})
    assert gpu.main(["--out", str(tmp_path)]) == status
    assert told in caplog.text


# Tables


def test_the_section_holds_every_table(bench: Callable[[str], ModuleType]) -> None:
    found = sample_run()
    judged(bench, found)
    text = bench("gpu_text").section(found)
    assert text.startswith("## Imaginary 9000, driver 580.1, torch 2.11.0+cu130\n")
    for line in (
        "| ResNet-56, 32x32: mean latency / ideal, batch 1 | <= 1.05 | 1.030 (1.020 to 1.040); on the device "
        "alone 1.030 (1.020 to 1.040); if heads and scores were free 1.010 (1.000 to 1.020) | reached |",
        "| ideal | 100.0 | 99.0 | 109.0 | 100.0 |  |",
        "| program, one launch | 103.0 | 102.0 | 112.0 | 103.0 | 1.030 (1.020 to 1.040) of the ideal |",
        "| a graph per block, host branches | 150.0 | 149.0 | 159.0 |  |  |",
        "| ResNet-56, 32x32 | tensorrt: TensorRT is not installed | | | | |",
        "| ResNet-56, 32x32 | whole network, eager | 206.0 | 205.0 | 215.0 | 2.00 (1.99 to 2.01)x |",
        "| 16 + 8 + 8 | 500.0 | 64,000 | 0.920 (0.910 to 0.930) | 0.960 (0.950 to 0.970) |",
        "| 32 + 0 + 0 | no such rows among those that were made | | | |",
        "| IF, not taken | 1.250 | 0.00 | 1.25 | 10.00 |",
        "| IF in IF, inside one that is not taken | 0.010 |  | 8.00 | 8.10 |",
        "Could not be built: IF in IF, all taken 64: too deep",
        "| ResNet-50, 224x224 | fp16 | 1 | 2.0e-06 | 100.0 | 100.0 | 96 |",
        "| ResNet-56, 32x32 | 1 | 50 | launch 50 |",
        "| ResNet-56, 32x32 | 1 | 1.0 | 5.0 | 9.0 | 1.5 | route 3, if 2, block 3, in blocks 240 |",
    ):
        assert line in text.splitlines()
    assert "What did not work" not in text


def test_every_table_has_as_many_cells_in_every_line(bench: Callable[[str], ModuleType]) -> None:
    found = sample_run()
    judged(bench, found)
    width = 0
    for line in bench("gpu_text").section(found).splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        width = width or line.count("|")
        assert line.count("|") == width, line


def test_failures_are_listed_and_the_rest_is_shown(bench: Callable[[str], ModuleType]) -> None:
    found = sample_run()
    found["steps"]["nodes"].update(ok=False, reason="stopped at its time limit", figures={})
    found["steps"]["torch resnet56"].update(ok=False, reason="killed by signal 11")
    found["steps"]["tests"]["figures"]["bad"] = [{"name": "a.test_b", "why": "AssertionError"}]
    judged(bench, found)
    text = bench("gpu_text").section(found)
    assert "- nodes: stopped at its time limit" in text
    assert "- torch resnet56: killed by signal 11" in text
    assert "- test a.test_b: AssertionError" in text
    assert "### Conditional nodes" not in text
    assert "| ResNet-56, 32x32 | torch: did not come to its end, see below | | | | |" in text


def test_machines_stand_below_one_another_and_a_new_run_replaces_its_own(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = bench("gpu")
    page = tmp_path / "verified-on.md"
    page.write_text("# Verified on\n\nWords.\n<!-- runs -->\nNo run yet.\n<!-- /runs -->\n")
    monkeypatch.setattr(gpu, "_PAGE", page)
    first, second = sample_run(), sample_run()
    second["steps"]["environment"]["figures"]["device"] = "Other 1"
    for found in (first, second, first):
        monkeypatch.setattr(gpu, "run_all", lambda *_, found=found: found)
        assert gpu.main(["--out", str(tmp_path / "out"), "--update-docs"]) == 0
    text = page.read_text()
    assert text.startswith("# Verified on\n\nWords.\n<!-- runs -->\n**Runs are recorded below.**")
    assert "No run yet" not in text
    assert text.count("## Imaginary 9000") == text.count("## Other 1") == 1
    assert text.index("## Imaginary 9000") < text.index("## Other 1")
    assert "<!-- gpu: Imaginary-9000-driver-580.1-torch-2.11.0+cu130 -->" in text
    assert json.loads((tmp_path / "out" / "gpu.json").read_text())["targets"]
    assert (tmp_path / "out" / "gpu.md").read_text().startswith("## Imaginary")


def test_a_missed_target_is_the_exit_status(
    bench: Callable[[str], ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = bench("gpu")
    found = sample_run()
    _over(found)
    monkeypatch.setattr(gpu, "run_all", lambda *_: found)
    assert gpu.main(["--out", str(tmp_path)]) == 1
