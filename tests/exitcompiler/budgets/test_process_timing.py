"""What a process measures, seen through: with times that are made up, and with spies."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx_programs import Builder, artifact_of, cascade, chain, diamond, plain, random_rows

from exitcompiler.budgets import process_timing
from exitcompiler.budgets.block_times import time_blocks
from exitcompiler.budgets.jobs import Job, Order, Rows
from exitcompiler.budgets.process_timing import Latencies, measure_process
from exitcompiler.budgets.undisturbed import Timed
from exitcompiler.controlflow import (
    BlockInterface,
    ControlFlow,
    Edge,
    Jump,
    Return,
    engine_signature,
    successors,
)
from exitcompiler.errors import InputError, MeasurementError
from exitcompiler.runtime.loading import open_artifact

pytest.importorskip("onnxruntime")


def test_exits_count_by_their_share_however_often_they_were_timed() -> None:
    times_us = np.array([10.0, 12.0, 14.0, 100.0])
    latencies = Latencies(times_us, np.array([0, 0, 0, 2]), np.array([0.9, 0.0, 0.1]))
    assert latencies.exit_means_us() == {0: 12.0, 2: 100.0}
    side = latencies.summarize({8: 5.0})
    assert side.mean_us == 0.9 * 12.0 + 0.1 * 100.0
    assert (side.p50_us, side.p95_us, side.p99_us) == (12.0, 100.0, 100.0)
    assert side.rows_per_second == {8: 5.0}


@pytest.mark.parametrize(("number", "first"), [(0, "program"), (1, "plain")])
def test_memory_is_taken_before_the_other_one_is_made(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, number: int, first: str
) -> None:
    from exitcompiler.runtime.onnxruntime_backend import OnnxRuntimeBackend

    made: list[str] = []
    seen: list[list[str]] = []
    load_block = OnnxRuntimeBackend.load_block

    def spy(self: Any, files: Any, point: Any, block: Any, **rest: Any) -> Any:
        made.append(point.name)
        return load_block(self, files, point, block, **rest)

    monkeypatch.setattr(OnnxRuntimeBackend, "load_block", spy)
    monkeypatch.setattr(process_timing, "peak_resident_bytes", lambda: seen.append(made.copy()) or 1)
    artifact = artifact_of(chain(), plain())
    open_artifact(artifact).save(tmp_path / "program.exit")
    x = random_rows(50)
    exit_index = open_artifact(artifact).run(x).exit_index
    made.clear()
    counts = np.bincount(exit_index, minlength=3).tolist()
    exits = dict(zip(("exit1", "exit2", "backbone"), counts, strict=True))
    job = Job(str(tmp_path / "program.exit"), threads=1, batch_sizes=(16,), seconds=0.01)
    found = measure_process(Order(job, number, exits, None, "unused"), Rows((x,), None, exit_index))
    assert found.first == first
    assert [set(names) for names in seen] == [{"point1" if first == "plain" else "point0"}]
    assert set(made) == {"point0", "point1"}


def test_sessions_share_threads_as_on_the_command_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    from exitcompiler.runtime.onnxruntime_backend import OnnxRuntimeBackend

    events: list[Any] = []
    make = OnnxRuntimeBackend.__init__

    def spy(self: Any, *args: Any, **kwargs: Any) -> None:
        events.append("a backend is made")
        make(self, *args, **kwargs)

    monkeypatch.setattr(OnnxRuntimeBackend, "__init__", spy)
    monkeypatch.setattr("exitcompiler.runtime.backends.share_threads", lambda *given: events.append(given))
    artifact = artifact_of(chain(), plain())
    open_artifact(artifact).save(tmp_path / "program.exit")
    x = random_rows(20)
    exit_index = open_artifact(artifact).run(x).exit_index
    counts = np.bincount(exit_index, minlength=3).tolist()
    job = Job(str(tmp_path / "program.exit"), "onnxruntime", threads=2, seconds=0.01)
    events.clear()
    exits = dict(zip(("exit1", "exit2", "backbone"), counts, strict=True))
    measure_process(Order(job, 0, exits, None, "unused"), Rows((x,), None, exit_index))
    assert events[0] == ("onnxruntime", 2)
    assert "a backend is made" in events[1:]


def test_a_batch_that_is_too_large_is_named() -> None:
    def answer(batch: Any) -> None:
        raise RuntimeError("Failed to allocate memory for requested buffer of size 32768000000")

    program: Any = answer
    with pytest.raises(MeasurementError, match=r"a batch of 1000000 rows .*Failed to allocate") as raised:
        process_timing._answer_batch(program, None, 1_000_000)
    assert raised.value.where == "throughput.1000000"

    def refuse(batch: Any) -> None:
        raise InputError("the rows do not fit")

    program = refuse
    with pytest.raises(InputError, match="do not fit"):
        process_timing._answer_batch(program, None, 8)


def test_a_stall_of_one_batch_is_not_the_throughput(monkeypatch: pytest.MonkeyPatch) -> None:
    times_us = {"program": [900.0, 1000.0, 1100.0, 1000.0, 9e6], "plain": [2000.0] * 5}

    def measure(candidates: Any, inputs: Any, *, minimum: int, **_: Any) -> dict[str, Timed]:
        assert minimum == 5
        assert len(inputs) >= minimum
        return {name: Timed(np.array(times_us[name]), np.arange(5)) for name in candidates}

    monkeypatch.setattr(process_timing, "measure_undisturbed", measure)
    rows = Rows((random_rows(20),), None, np.zeros(20, np.int32))
    program: Any = None
    rates = process_timing._throughput(
        program, program, rows, np.full(20, 0.05), 8, 0.1, np.random.default_rng(0)
    )
    assert rates == pytest.approx((8e6 / (3100.0 / 3), 4000.0))


def passing_on() -> Any:
    """The second of three blocks only hands on what it is given, so it has no engine."""
    make = Builder(0)
    make.block("stem", {"x": 4}, {"h": 5}, Jump(Edge("nothing", ("h",))))
    make.block("nothing", {"p": 5}, {}, Jump(Edge("head", ("p",))))
    make.block("head", {"q": 5}, {"out": 3}, Return(("out",), "backbone"))
    return make.program()


@pytest.mark.parametrize("make", [chain, cascade, diamond, plain, passing_on])
def test_every_block_that_computes_is_timed_on_what_reaches_it(
    monkeypatch: pytest.MonkeyPatch, make: Any
) -> None:
    from exitcompiler.runtime import onnxruntime_backend

    program = make()
    row = random_rows(1, seed=3)
    compiled = open_artifact(artifact_of(program, plain()), threads=1)
    taken: dict[int, list[np.ndarray]] = {}
    stopwatch = onnxruntime_backend.bound_stopwatch

    def spy(engine: Any, inputs: Any) -> Any:
        taken[id(engine)] = inputs
        return stopwatch(engine, inputs)

    monkeypatch.setattr(onnxruntime_backend, "bound_stopwatch", spy)
    times_us = time_blocks(compiled, {"x": row}, limit_s=0.01, minimum=5, seed=0)
    assert list(times_us) == [block.name for block in program.flow.blocks if block.results]
    assert all(us > 0 for us in times_us.values())
    values: dict[str, dict[str, np.ndarray]] = {}
    for block in program.flow.blocks:
        params = _first_brought(program.flow, block, values) or {"x": row}
        made = {name: affine(params) for name, affine in program.bodies[block.name].items()}
        values[block.name] = {**params, **made}
        if made:
            inputs = taken[id(compiled.engine(block, 1))]
            assert len(inputs) == len(engine_signature(block).inputs)
            for array, expected in zip(inputs, params.values(), strict=False):
                np.testing.assert_array_equal(array, expected)


def _first_brought(flow: ControlFlow, block: BlockInterface, values: Any) -> dict[str, np.ndarray]:
    """What the first edge that leads to a block binds its params to."""
    for source, given in values.items():
        for way in successors(flow.block(source).terminator):
            if isinstance(way, Edge) and way.target == block.name:
                return dict(zip(block.params, [given[name] for name in way.values], strict=True))
    return {}


def test_blocks_are_not_timed_where_engines_would_have_to_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = open_artifact(artifact_of(chain(), plain()), threads=1)
    monkeypatch.setattr(type(compiled.backend), "name", "tensorrt")
    assert time_blocks(compiled, {"x": random_rows(1)}, limit_s=0.01, minimum=5, seed=0) == {}
