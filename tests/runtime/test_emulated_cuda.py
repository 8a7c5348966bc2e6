"""The emulated CUDA driver keeps to what CUDA's documentation says; what it lets pass, a GPU may not."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from emulated_cuda import (
    Emulator,
    allocate_in_capture,
    call_host_in_capture,
    emulated_device,
    load,
)
from emulated_cuda.bench import SOURCE, Bench
from emulated_cuda.build import build_image

from exitcompiler.errors import BackendUnavailableError, DeviceError, LoweringError
from exitcompiler.runtime.cuda_driver import Driver

OUT_OF_MEMORY = 2


@pytest.fixture
def emulator() -> Iterator[Emulator]:
    with emulated_device() as device:
        yield device


@pytest.fixture
def bench(emulator: Emulator) -> Bench:
    return Bench(emulator)


# The device and its memory


def test_there_is_a_device_only_where_it_is_asked_for() -> None:
    load()
    with pytest.raises(BackendUnavailableError, match="CUDA_ERROR_NO_DEVICE"):
        Driver.open()
    with emulated_device(compute_capability_major=12, driver_version=12080) as emulator:
        driver = Driver.open()
        assert (driver.name, driver.compute_capability) == ("Emulated", (12, 0))
        driver.close()
        assert emulator.alive() == {}
    with emulated_device(driver_version=12040), pytest.raises(BackendUnavailableError, match=r"12\.4"):
        Driver.open()
    with emulated_device(devices=0), pytest.raises(BackendUnavailableError, match="NO_DEVICE"):
        Driver.open()


def test_memory_is_new_aligned_limited_and_counted(emulator: Emulator) -> None:
    emulator.set("total_memory_bytes", 1000)
    driver = Driver.open()
    first, second = driver.malloc(300), driver.malloc(700)
    assert first % 256 == second % 256 == 0
    assert (emulator.view(first, (300,), "uint8") == 0xFF).all()
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        driver.malloc(1)
    pinned = driver.host_alloc(8)
    assert emulator.alive() == {"device allocations": 2, "host allocations": 1, "contexts": 1}
    driver.free(first)
    emulator.fail("cuMemAlloc", OUT_OF_MEMORY, call=2)
    third = driver.malloc(1)
    with pytest.raises(DeviceError, match="CUDA_ERROR_OUT_OF_MEMORY"):
        driver.malloc(1)
    for address in (second, third, driver.malloc(1)):
        driver.free(address)
    driver.host_free(pinned)
    driver.close()
    assert emulator.alive() == {}
    assert emulator.count("cuMemAlloc") == 6


def test_misuse_of_memory_is_found(emulator: Emulator) -> None:
    driver = Driver.open()
    address = driver.malloc(10)
    ctypes.memset(address + 10, 0, 1)
    assert emulator.take_violations() == ["something is written beyond an allocation of 10 bytes"]
    ctypes.memset(address + 10, 0xA7, 1)  # as it was
    driver.free(address)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        driver.free(address)
    assert emulator.take_violations() == ["memory is freed that is not allocated"]
    ctypes.memset(address, 0, 1)
    assert emulator.take_violations() == ["freed memory is written"]
    ctypes.memset(address, 0xDD, 1)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        driver.fill(address, 0, 1, 0)
    with pytest.raises(DeviceError, match="INVALID_VALUE"):
        driver.upload(driver.malloc(4), np.zeros(2, np.float32), 0)
    assert emulator.take_violations() == ["a copy's memory is not what the copy says"]


# Streams


def test_work_waits_until_somebody_waits_for_it(bench: Bench) -> None:
    driver, stream = bench.driver, bench.stream
    pinned = driver.host_alloc(8).view(np.int32)
    pinned[:] = 5
    driver.upload(bench.words, pinned[:1], stream)
    pinned[0] = 6  # read late: this is what arrives
    driver.download(pinned[1:], bench.words, stream)
    assert pinned[1] == 5
    driver.synchronize(stream)
    assert pinned[1] == 6
    pageable = np.full(1, 7, np.int32)
    driver.upload(bench.words, pageable, stream)
    pageable[0] = 8  # was read at once
    before = bench.emulator.count("host_syncs")
    assert bench.read() == 7  # comes back when it is there
    assert bench.emulator.count("host_syncs") == before + 1


def test_streams_wait_for_one_another_where_they_are_told_to(bench: Bench) -> None:
    driver, first, second = bench.driver, bench.stream, bench.driver.create_stream()
    driver.synchronize(first)
    bench.write(0, 3)
    value = np.zeros(1, np.int32)
    driver.download(value, bench.words, second)
    assert value[0] == 0
    event, later = driver.create_event(), driver.create_event()
    driver.record(event, first)
    driver.wait(second, event)
    driver.download(value, bench.words, second)
    assert value[0] == 3
    driver.record(later, second)
    assert driver.elapsed_us(event, later) > 0


def test_what_fails_on_the_device_loses_it(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    bench.kernel(graph, [], "store", bench.word(), ctypes.c_longlong(64))
    bench.driver.launch(bench.driver.instantiate(graph), bench.stream)
    for _ in range(2):
        with pytest.raises(DeviceError, match="CUDA_ERROR_ILLEGAL_ADDRESS"):
            bench.driver.synchronize(bench.stream)
    (violation,) = bench.emulator.take_violations()
    assert violation.startswith("kernel store: thread 0 uses 4 bytes at 0x")


# Kernels


@pytest.mark.parametrize(
    ("name", "arguments", "error", "violation"),
    [
        ("store_wide", (), "MISALIGNED_ADDRESS", "a misaligned address is used"),
        ("index_shared", (ctypes.c_int(4),), "ILLEGAL_ADDRESS", "an index is beyond an array"),
        ("total", (ctypes.c_int(2),), "LAUNCH_FAILED", "threads wait at different barriers"),
    ],
)
def test_what_a_kernel_must_not_do_is_found(
    bench: Bench, name: str, arguments: tuple[object, ...], error: str, violation: str
) -> None:
    graph = bench.driver.create_graph()
    bench.kernel(graph, [], name, bench.word(), *arguments, threads=2 if name == "total" else 1)
    with pytest.raises(DeviceError, match=error):
        bench.run(graph)
    assert bench.emulator.take_violations() == [f"kernel {name}: {violation}"]


def test_threads_meet_at_barriers_and_nowhere_else(bench: Bench) -> None:
    graphs = [bench.driver.create_graph() for _ in range(2)]
    for barriers, graph in enumerate(graphs):
        bench.kernel(graph, [], "total", bench.word(), ctypes.c_int(barriers), threads=64)
    assert {bench.run(graphs[1]) for _ in range(5)} == {64}
    assert any(bench.run(graphs[0]) != 64 for _ in range(5))  # shared memory does not begin as 0 either


def test_kernels_see_where_they_are(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    function = bench.driver.function(bench.module, "where")
    bench.driver.add_kernel(graph, [], function, (2, 3, 2), 4, [bench.word()])
    bench.run(graph)
    bench.driver.synchronize(bench.stream)
    seen = bench.emulator.view(bench.words, (12, 4), "int32")[1:]  # `run` clears the first word
    assert (seen == 100 * np.arange(1, 12)[:, None] + np.arange(4)).all()


@pytest.mark.parametrize(("grid", "threads"), [((0, 1, 1), 1), ((1, 65536, 1), 1), ((1, 1, 1), 1025)])
def test_launches_beyond_the_devices_limits_are_refused(
    bench: Bench, grid: tuple[int, int, int], threads: int
) -> None:
    function = bench.driver.function(bench.module, "where")
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.add_kernel(bench.driver.create_graph(), [], function, grid, threads, [bench.word()])


def test_what_is_no_module_is_refused(bench: Bench) -> None:
    cubin = bytearray(build_image(SOURCE))
    cubin[18:20] = (190).to_bytes(2, "little")  # for an NVIDIA GPU
    for image, error in ((b"PTX" * 30, "INVALID_IMAGE"), (bytes(cubin), "NO_BINARY_FOR_GPU")):
        with pytest.raises(DeviceError, match=error):
            bench.driver.load_module(image)
    with pytest.raises(DeviceError, match="NOT_FOUND"):
        bench.driver.function(bench.module, "missing")


# Captures


def capture(bench: Bench, record: Callable[[int], object]) -> int:
    bench.driver.begin_capture(bench.stream)
    record(bench.stream)
    return bench.driver.end_capture(bench.stream)


def test_a_capture_records_and_does_nothing(bench: Bench) -> None:
    graph = capture(bench, lambda stream: bench.write(0, 9))
    assert bench.driver.node_types(graph) == ["memset"]
    assert bench.read() == 0
    bench.driver.launch(bench.driver.instantiate(graph), bench.stream)
    assert bench.read() == 9
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.end_capture(bench.stream)


def test_events_carry_a_capture_to_other_streams_and_back(bench: Bench) -> None:
    driver, other = bench.driver, bench.driver.create_stream()
    fork, join = driver.create_event(), driver.create_event()

    def forked(stream: int) -> None:
        driver.set_word(bench.words, 1, stream)
        driver.record(fork, stream)
        driver.wait(other, fork)
        driver.set_word(bench.words, 2, other)
        driver.record(join, other)

    with pytest.raises(LoweringError, match="CAPTURE_UNJOINED"):
        capture(bench, forked)
    graph = capture(bench, lambda stream: (forked(stream), driver.wait(stream, join), bench.write(1, 3)))
    assert (bench.run(graph), bench.read(1)) == (2, 3)


@pytest.mark.parametrize("illegal", ["wait", "allocate", "break"])
def test_what_cannot_be_captured_spoils_a_capture(bench: Bench, illegal: str) -> None:
    def spoil(stream: int) -> None:
        if illegal == "break":
            bench.emulator.break_capture(stream)
            return
        with pytest.raises(DeviceError, match="STREAM_CAPTURE_UNSUPPORTED"):
            bench.driver.synchronize(stream) if illegal == "wait" else bench.driver.malloc(4)

    with pytest.raises(LoweringError, match="STREAM_CAPTURE_INVALIDATED"):
        capture(bench, spoil)
    bench.driver.destroy_graph(capture(bench, lambda stream: bench.write(0, 1)))


def test_what_must_not_stand_in_a_body_is_found_when_the_graph_is_made(bench: Bench) -> None:
    pageable = np.zeros(1, np.int32)
    host = capture(bench, call_host_in_capture)
    upload = capture(bench, lambda stream: bench.driver.upload(bench.words, pageable, stream))
    for child in (host, upload):
        graph, _, (body,) = bench.conditional("if", 1)
        bench.driver.add_child(body, [], child)
        with pytest.raises(LoweringError, match="INVALID_VALUE"):
            bench.driver.instantiate(graph)
    allocation = capture(bench, allocate_in_capture)
    assert bench.driver.node_types(allocation) == ["mem alloc"]
    with pytest.raises(LoweringError, match="INVALID_VALUE"):
        bench.driver.add_child(bench.driver.create_graph(), [], allocation)


def test_a_host_function_runs_where_a_kernel_would(bench: Bench) -> None:
    graph = bench.driver.create_graph()
    seen: list[int] = []
    node = bench.add(graph, [], 4)
    view = bench.emulator.view
    body = bench.emulator.host_function(lambda: seen.append(int(view(bench.words, (1,), "int32")[0])))
    bench.driver.add_kernel(graph, [node], body, (1, 1, 1), 1, [])
    bench.driver.launch(bench.driver.instantiate(graph), bench.stream)
    assert seen == []
    bench.driver.synchronize(bench.stream)
    assert seen == [4]
    broken = bench.driver.create_graph()
    fails = bench.emulator.host_function(lambda: seen.remove(7))
    bench.driver.add_kernel(broken, [], fails, (1, 1, 1), 1, [])
    with pytest.raises(DeviceError, match="LAUNCH_FAILED"):
        bench.run(broken)
    assert [type(error) for error in bench.emulator.raised] == [ValueError]
    bench.emulator.raised.clear()
