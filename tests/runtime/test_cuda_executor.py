"""The device executor on an emulated driver: real plans, real graphs, the project's own kernels."""

from __future__ import annotations

import gc
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from emulated_cuda import Emulator, HostEngine, call_host_in_capture, emulated_device, kernel_image
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_programs import (
    CLASSES,
    TestProgram,
    cascade,
    chain,
    diamond,
    plain,
    random_program,
    random_rows,
    with_shared_value,
)

from exitcompiler.controlflow import BlockInterface
from exitcompiler.errors import DeviceError, InputError, LoweringError
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.device_program import DeviceProgram
from exitcompiler.runtime.rows import EXIT_INDEX

INVALID_VALUE, OUT_OF_MEMORY = 1, 2
KEPT = {"contexts", "streams"}
"""What a driver has for as long as it lives."""
CALLS = ("cuMemAlloc", "cuMemAllocHost", "host_syncs", "cuGraphLaunch")


@pytest.fixture
def device() -> Iterator[tuple[Emulator, Driver]]:
    with emulated_device() as emulator:
        driver = Driver.open()
        yield emulator, driver
        gc.collect()
        driver.close()
        assert emulator.alive() == {}


def executor_of(program: TestProgram, emulator: Emulator, driver: Driver, **options: Any) -> DeviceExecutor:
    def engine(block: BlockInterface) -> HostEngine:
        return HostEngine(program.engine(block), driver, emulator, block.name)

    return DeviceExecutor(program.flow, engine, driver, compile_image=lambda _: kernel_image(), **options)


def check(program: TestProgram, executor: DeviceExecutor, rows: np.ndarray) -> None:
    outputs, exits = executor.run([rows], len(rows))
    answers = [program.answer_row(row) for row in rows]
    np.testing.assert_array_equal(outputs[0], np.stack([logits for logits, _ in answers]))
    assert [program.flow.exits[i] for i in exits] == [name for _, name in answers]
    assert exits.dtype == np.int32


@pytest.mark.parametrize("make", [chain, cascade, diamond, plain])
@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_known_programs(
    make: Callable[[int], TestProgram], count: int, device: tuple[Emulator, Driver]
) -> None:
    executor = executor_of(make(3), *device, max_rows=8)
    for seed in range(4):
        check(make(3), executor, random_rows(count, seed))
    executor.close()


@settings(max_examples=12)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(1, 11), min_size=2, max_size=3))
def test_any_program_answers_as_each_row_alone(seed: int, sizes: list[int]) -> None:
    program = random_program(seed)
    with emulated_device(seed=seed) as emulator:
        driver = Driver.open()
        executor = executor_of(program, emulator, driver, max_rows=4)
        for number, count in enumerate(sizes):  # an executor forgets the batch before
            check(program, executor, random_rows(count, number))
        executor.close()
        driver.close()
        assert emulator.alive() == {}


def test_one_launch_answers_and_what_is_not_reached_does_not_run(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program = chain(3)
    executor = executor_of(program, emulator, driver)
    rows = random_rows(200)
    by_exit = {program.answer_row(row)[1]: row[None] for row in rows}
    assert len(by_exit) == 3
    ran = {}
    for exit_name, row in by_exit.items():
        executor.run([row], 1)
        ran[exit_name] = [node for node in emulator.executed() if node != "graph"]
    first = ["kernel first", "kernel route"]
    assert ran["exit1"] == [*first, "if 0 none"]
    assert ran["exit2"] == [*first, "if 1", "kernel second", "kernel route", "if 0 none"]
    assert ran["backbone"] == [
        *[*first, "if 1", "kernel second", "kernel route", "if 1", "kernel third", "kernel route"]
    ]
    executor.close()


def test_once_built_nothing_is_allocated_and_the_host_waits_once(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    executor = executor_of(chain(3), emulator, driver, max_rows=8)
    for count in (1, 5):
        executor.run([random_rows(count)], count)
    before = {
        what: emulator.count(what) for what in ("cuMemAlloc", "cuMemAllocHost", "host_syncs", "cuGraphLaunch")
    }
    for count in (1, 5, 8, 3):
        executor.run([random_rows(count)], count)
    after = {what: emulator.count(what) - times for what, times in before.items()}
    assert after == {"cuMemAlloc": 0, "cuMemAllocHost": 0, "host_syncs": 4, "cuGraphLaunch": 4}
    executor.close()


def test_on_the_device_nothing_waits(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program, count = chain(3), 5
    rows = random_rows(count)
    executor = executor_of(program, emulator, driver, max_rows=8)
    prepared = executor.program(count)
    stream = driver.create_stream()
    source = driver.malloc(rows.nbytes)
    targets = [driver.malloc(4 * count * CLASSES), driver.malloc(4 * count)]
    driver.upload(source, rows, stream)
    prepared.run([random_rows(count, 9)], count)
    syncs = emulator.count("host_syncs")
    prepared.enqueue([source], targets, count, stream)
    assert emulator.count("host_syncs") == syncs
    logits, exits = np.empty((count, CLASSES), np.float32), np.empty(count, np.int32)
    driver.download(logits, targets[0], stream)  # in the caller's stream: after the answer
    driver.download(exits, targets[1], stream)
    driver.synchronize(stream)
    answers = [program.answer_row(row) for row in rows]
    np.testing.assert_array_equal(logits, np.stack([answer for answer, _ in answers]))
    assert [program.flow.exits[i] for i in exits] == [name for _, name in answers]
    for address in (source, *targets):
        driver.free(address)
    driver.destroy_stream(stream)
    executor.close()


def test_it_is_freed_with_its_owner(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    executor = executor_of(chain(3), emulator, driver)
    executor.run([random_rows(1)], 1)
    assert emulator.alive()["device allocations"] > 0
    del executor
    gc.collect()
    assert emulator.alive().keys() <= KEPT


def test_closed_it_is_made_anew(device: tuple[Emulator, Driver]) -> None:
    executor = executor_of(chain(3), *device)
    check(chain(3), executor, random_rows(1))
    executor.close()
    check(chain(3), executor, random_rows(1, 1))
    executor.close()


@pytest.mark.parametrize("function", ["cuMemAlloc", "cuMemAllocHost"])
def test_out_of_memory_leaves_nothing_behind(function: str, device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    executor = executor_of(chain(3), emulator, driver)
    executor.run([random_rows(1)], 1)
    executor.close()
    calls = emulator.count(function)
    assert calls > 1
    for call in range(1, calls + 1):
        emulator.fail(function, OUT_OF_MEMORY, call)
        with pytest.raises(DeviceError, match="bytes") as caught:
            executor.run([random_rows(1)], 1)
        assert caught.value.remedy is not None
        assert emulator.alive().keys() <= KEPT
    check(chain(3), executor, random_rows(1))
    executor.close()


def test_a_failure_while_building_leaves_nothing_behind(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    executor = executor_of(chain(3), emulator, driver)
    for function in ("cuModuleLoadData", "cuGraphInstantiateWithParams", "cuGraphAddNode", "cuStreamCreate"):
        emulator.fail(function, INVALID_VALUE)
        with pytest.raises((DeviceError, LoweringError)):
            executor.run([random_rows(1)], 1)
        assert emulator.alive().keys() <= KEPT, function
    check(chain(3), executor, random_rows(1))
    executor.close()


def test_a_block_that_calls_the_host_is_refused_by_name(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program = chain(3)

    def engine(block: BlockInterface) -> HostEngine:
        meddle = call_host_in_capture if block.name == "second" else None
        return HostEngine(program.engine(block), driver, emulator, block.name, meddle)

    executor = DeviceExecutor(program.flow, engine, driver, compile_image=lambda _: kernel_image())
    with pytest.raises(LoweringError, match=r"'second'.*'host'"):
        executor.run([random_rows(1)], 1)
    assert emulator.alive().keys() <= KEPT


def test_a_block_that_cannot_be_captured_is_an_error(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program = chain(3)

    def engine(block: BlockInterface) -> HostEngine:
        return HostEngine(program.engine(block), driver, emulator, block.name, emulator.break_capture)

    executor = DeviceExecutor(program.flow, engine, driver, compile_image=lambda _: kernel_image())
    with pytest.raises(LoweringError, match="captur"):
        executor.run([random_rows(1)], 1)
    assert emulator.alive().keys() <= KEPT


def test_an_action_that_names_no_way_is_an_error(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program = chain(3)

    class Wrong:
        def __init__(self, engine: Any) -> None:
            self.signature, self._engine = engine.signature, engine

        def run(self, inputs: list[Any]) -> list[Any]:
            *results, action = self._engine.run(inputs)
            return [*results, action + 7]

    executor = DeviceExecutor(
        program.flow,
        lambda block: HostEngine(Wrong(program.engine(block)), driver, emulator, block.name),
        driver,
        compile_image=lambda _: kernel_image(),
    )
    for count in (1, 3):
        with pytest.raises(DeviceError, match=f"{count} of {count} rows"):
            executor.run([random_rows(count)], count)
    executor.close()


@pytest.mark.parametrize("max_rows", [0, 1025])
def test_rows_of_a_launch_are_limited(max_rows: int, device: tuple[Emulator, Driver]) -> None:
    with pytest.raises(InputError, match=r"1\.\.1024"):
        executor_of(plain(), *device, max_rows=max_rows)


def test_memory_is_told(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    program = chain(3)
    made = DeviceProgram(
        program.flow,
        lambda block: HostEngine(program.engine(block), driver, emulator),
        driver,
        (1, 4),
        lambda _: kernel_image(),
    )
    assert made.memory_bytes >= sum(4 * int(np.prod(b.shape)) for b in made.plan.buffers.values())
    made.close()
    assert EXIT_INDEX in made.plan.buffers


def test_a_program_whose_rows_cannot_run_together_runs_one_by_one(
    device: tuple[Emulator, Driver], caplog: pytest.LogCaptureFixture
) -> None:
    program = with_shared_value(different=True)
    executor = executor_of(program, *device, max_rows=8)
    assert executor.max_rows == 1
    assert "does not belong to rows" in caplog.text
    rows = random_rows(5)
    outputs, exits = executor.run([rows], 5)
    for row, found, taken in zip(rows, outputs[0], exits, strict=True):
        expected, alone = executor.run([row[None]], 1)
        np.testing.assert_array_equal(found, expected[0][0])
        assert taken == alone[0]
    executor.close()


def test_blocks_are_captured_for_the_buckets_asked_for(device: tuple[Emulator, Driver]) -> None:
    program = chain(3)
    made: dict[str, HostEngine] = {}

    def engine(block: BlockInterface) -> HostEngine:
        made[block.name] = HostEngine(program.engine(block), device[1], device[0], block.name)
        return made[block.name]

    executor = DeviceExecutor(
        program.flow, engine, device[1], buckets=(2, 6), compile_image=lambda _: kernel_image()
    )
    for count in (1, 2, 5, 6, 9):
        check(program, executor, random_rows(count, count))
    assert {rows for host in made.values() for rows in host.rows_run} == {2, 6}
    executor.close()


def test_after_a_fork_the_device_is_refused_and_nothing_is_freed(device: tuple[Emulator, Driver]) -> None:
    emulator, driver = device
    executor = executor_of(chain(3), emulator, driver)
    executor.run([random_rows(1)], 1)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # no exception may leave here: the test would go on twice
        said = "nothing"
        try:
            executor.run([random_rows(1)], 1)
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        executor.close()
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as answer:
        assert re.match(r"DeviceError: a GPU cannot be used in a process that was forked", answer.read())
    assert os.waitpid(child, 0)[1] == 0
    executor.close()
