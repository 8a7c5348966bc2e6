"""Blocks of a device as engines for arrays in the host's memory, on an emulated driver."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from emulated_cuda import Emulator, HostEngine, emulated_device
from onnx_programs import chain, random_rows

from exitcompiler.controlflow import EngineSignature, ValueSpec
from exitcompiler.errors import DeviceError
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_executor import DEFAULT_MAX_ROWS
from exitcompiler.runtime.device import Captured, DeviceArray
from exitcompiler.runtime.device_engines import MOST_ROWS, TIMED_RUNS, HostArrayEngine, host_dtype
from exitcompiler.runtime.rows import gate_parameters

Device = tuple[Emulator, Driver]


@pytest.fixture
def device() -> Iterator[Device]:
    with emulated_device() as emulator:
        driver = Driver.open()
        yield emulator, driver
        gc.collect()
        driver.close()
        assert emulator.alive() == {}


def engine_of(device: Device) -> tuple[HostEngine, HostArrayEngine]:
    emulator, driver = device
    program = chain(1)
    inner = HostEngine(program.engine(program.flow.entry), driver, emulator)
    return inner, HostArrayEngine(inner, driver)


def test_blocks_run_in_the_buckets_that_programs_run_them_in() -> None:
    assert MOST_ROWS == DEFAULT_MAX_ROWS


@pytest.mark.parametrize("rows", [1, 2, 3, MOST_ROWS, MOST_ROWS + 1, 2 * MOST_ROWS + 5])
def test_any_batch_gives_what_the_block_computes(rows: int, device: Device) -> None:
    block = chain(1).flow.entry
    _, engine = engine_of(device)
    for seed in range(2):
        inputs = [random_rows(rows, seed), *(value + seed for value in gate_parameters(block))]
        expected = chain(1).engine(block).run(inputs)
        outputs = [np.empty_like(array) for array in expected]
        engine.bind(inputs, outputs)()
        for found in (engine.run(inputs), engine.runner()(inputs), outputs):
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)
                assert a.dtype == b.dtype


def test_a_block_is_captured_for_powers_of_two_and_once_each(device: Device) -> None:
    inner, engine = engine_of(device)
    parameters = gate_parameters(chain(1).flow.entry)
    for rows in (1, 3, 4, 3, 1):
        engine.run([random_rows(rows), *parameters])
    assert inner.rows_run == [1, 4, 4, 4, 1]
    assert device[0].count("cuGraphInstantiateWithParams") == 2


def test_what_was_returned_stays_and_any_layout_is_taken(device: Device) -> None:
    _, engine = engine_of(device)
    parameters = gate_parameters(chain(1).flow.entry)
    x = random_rows(6)
    first = engine.run([x, *parameters])
    kept = [array.copy() for array in first]
    second = engine.run([np.asfortranarray(x), *parameters])
    engine.run([random_rows(6, 1), *parameters])
    for a, b, c in zip(first, kept, second, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)


@pytest.mark.parametrize(("rows", "launches"), [(1, 1), (5, 1), (MOST_ROWS + 1, 2)])
def test_a_stopwatch_times_the_block_without_transfers(rows: int, launches: int, device: Device) -> None:
    emulator, _ = device
    inner, engine = engine_of(device)
    x, parameters = random_rows(rows), gate_parameters(chain(1).flow.entry)
    watch = engine.stopwatch([x, *parameters])
    watch()
    transfers = [emulator.count(name) for name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")]
    inner.rows_run.clear()
    assert watch() >= 0.0
    assert transfers == [emulator.count(name) for name in ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync")]
    size = min(1 << (rows - 1).bit_length(), MOST_ROWS)
    assert inner.rows_run == [size] * (2 * TIMED_RUNS)  # once to keep the device busy, once timed


def test_a_stopwatch_tells_time_per_run(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = engine_of(device)
    monkeypatch.setattr(device[1], "elapsed_us", lambda begin, end: 320.0)
    parameters = gate_parameters(chain(1).flow.entry)
    assert engine.stopwatch([random_rows(4), *parameters])() == 320.0 / TIMED_RUNS
    assert engine.stopwatch([random_rows(2 * MOST_ROWS), *parameters])() == 2 * 320.0 / TIMED_RUNS


@dataclass
class _Doubling:
    """Copies its input, as bits, and says that it is bfloat16."""

    driver: Driver
    signature: EngineSignature

    def capture(self, rows: int, inputs: Sequence[DeviceArray], outputs: Sequence[DeviceArray]) -> Captured:
        (source,), (target,) = inputs, outputs
        assert source.shape == target.shape == (rows, 3)
        graph = self.driver.create_graph()
        self.driver.add_copy(graph, [], target.address, source.address, rows * 3 * 2)
        return Captured(graph, destroy=lambda: self.driver.destroy_graph(graph))


def test_bfloat16_is_its_bits(device: Device) -> None:
    spec = ValueSpec(("batch", 3), "bfloat16")
    assert host_dtype(spec) == np.uint16
    engine = HostArrayEngine(_Doubling(device[1], EngineSignature({"x": spec}, {"y": spec})), device[1])
    bits = np.arange(15, dtype=np.uint16).reshape(5, 3)
    (found,) = engine.run([bits])
    np.testing.assert_array_equal(found, bits)
    assert found.dtype == np.uint16


@pytest.mark.parametrize("function", ["cuMemAlloc_v2", "cuGraphInstantiateWithParams"])
def test_what_fails_leaves_nothing_behind(function: str, device: Device) -> None:
    emulator, driver = device
    _ = driver.stream
    before = emulator.alive()
    _, engine = engine_of(device)
    emulator.fail(function.removesuffix("_v2"), 2, call=2 if "Alloc" in function else 1)
    with pytest.raises(DeviceError):
        engine.run([random_rows(2), *gate_parameters(chain(1).flow.entry)])
    assert emulator.alive() == before
    engine.run([random_rows(2), *gate_parameters(chain(1).flow.entry)])
