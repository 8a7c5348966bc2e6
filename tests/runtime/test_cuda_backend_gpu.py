"""The cuda backend on a GPU: captured blocks, whole programs, refusals. For `make gpu-check`."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from device_programs import images, interfaces, network_with_exits

from exitcompiler.controlflow import BlockInterface, Return, ValueSpec, engine_signature
from exitcompiler.errors import BackendUnavailableError, DeviceError, LoweringError
from exitcompiler.interpreter import interpret
from exitcompiler.program import Program
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.cuda_backend import CudaBackend, CudaEngine
from exitcompiler.runtime.cuda_executor import DeviceExecutor
from exitcompiler.runtime.device import DeviceArray
from exitcompiler.runtime.rows import gate_parameters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

PRECISIONS = ("fp32", "fp16", "bf16")
CLOSE = {"fp32": 0.01, "fp16": 0.03, "bf16": 0.15}
"""Of the largest logit; "fp32" may be TF32."""

CAPTURABLE = {"kernel", "memcpy", "memset", "empty"}


def backend_of(precision: str = "fp32") -> CudaBackend:
    try:
        backend = create_backend("cuda", precision=precision)
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(backend, CudaBackend)
    return backend


@contextmanager
def executor_of(backend: CudaBackend, program: Program, max_rows: int = 8) -> Iterator[DeviceExecutor]:
    executor = DeviceExecutor(
        interfaces(program),
        lambda block: backend.load_device_body(block, program.block(block.name).body),
        backend.driver,
        max_rows=max_rows,
    )
    yield executor
    executor.close()


def check(logits: torch.Tensor, exits: torch.Tensor, expected: Any, precision: str) -> None:
    same = exits.numpy() == expected.exit_index
    assert same.mean() > 0.9  # a score on the edge of a threshold may fall to either side
    close = CLOSE[precision] * float(expected.outputs["logits"].abs().max())
    torch.testing.assert_close(logits[same], expected.outputs["logits"][same], atol=close, rtol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_program_answers_as_the_oracle(precision: str) -> None:
    program = network_with_exits(precision)
    expected = interpret(network_with_exits(), {"image": images(60, 2)})
    x = images(60, 2)
    with executor_of(backend_of(precision), program) as executor:
        (logits,), exits = executor.run([x.numpy()], 60)
        check(torch.from_numpy(logits), torch.from_numpy(exits), expected, precision)
        for row in range(20):
            (alone,), exit_index = executor.run([x[row : row + 1].numpy()], 1)
            assert exit_index[0] == exits[row]
            np.testing.assert_allclose(alone[0], logits[row], atol=CLOSE[precision] * 10)
        assert len(set(exits.tolist())) == 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_tensors_on_the_device_are_answered_without_waiting(precision: str) -> None:
    program = network_with_exits(precision)
    x = images(20, 2)
    expected = interpret(network_with_exits(), {"image": x})
    with executor_of(backend_of(precision), program) as executor:
        on_device = x.cuda()
        for rows in (20, 1):  # builds both graphs
            executor.run_device([on_device[:rows]], rows)
        torch.cuda.synchronize()
        allocated = torch.cuda.memory_stats()["num_device_alloc"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            (logits,), exits = executor.run_device([on_device], 20)
            alone = [executor.run_device([on_device[row : row + 1]], 1) for row in range(20)]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        check(logits.cpu(), exits.cpu(), expected, precision)
        assert torch.cat([exit_index for _, exit_index in alone]).tolist() == exits.tolist()
        assert torch.cuda.memory_stats()["num_device_alloc"] == allocated


def test_the_order_of_streams_is_kept() -> None:
    """Inputs that another stream is still making, answers that it reads at once."""
    x = images(8, 3)
    expected = interpret(network_with_exits(), {"image": x})
    with executor_of(backend_of(), network_with_exits()) as executor:
        executor.run_device([x.cuda()], 8)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            made = torch.zeros(8, 1, 16, 16, device="cuda")
            torch.cuda._sleep(50_000_000)
            made += x.cuda(non_blocking=True)
            (logits,), exits = executor.run_device([made], 8)
            made.zero_()
            copied = logits.clone()
        side.synchronize()
        check(copied.cpu(), exits.cpu(), expected, "fp32")


@pytest.mark.parametrize("precision", PRECISIONS)
def test_blocks_alone(precision: str) -> None:
    backend, program = backend_of(precision), network_with_exits(precision)
    block = program.entry
    engine = backend.load_body(block, block.body)
    for rows in (1, 3, 40):
        x = images(rows, 5)
        found = dict(
            zip(
                engine_signature(block).outputs, engine.run([x.numpy(), *gate_parameters(block)]), strict=True
            )
        )
        with torch.no_grad():
            expected = network_with_exits().entry.run({"image": x})
        np.testing.assert_allclose(
            found["blocks_0_linear_logits"],
            expected["blocks_0_linear_logits"],
            atol=CLOSE[precision] * float(expected["blocks_0_linear_logits"].abs().max()),
        )
        assert found["relu_1"].dtype == {"bf16": np.uint16, "fp16": np.float16}.get(precision, np.float32)
    watch = engine.stopwatch([images(4).numpy(), *gate_parameters(block)])
    times = [watch() for _ in range(5)]
    assert all(0.5 < time < 1e5 for time in times), times


def test_captured_nodes_are_of_the_allowed_types() -> None:
    backend, program = backend_of(), network_with_exits()
    with buffers(backend, program.entry, 4) as (inputs, outputs):
        engine = backend.load_device_body(program.entry, program.entry.body)
        captured = engine.capture(4, inputs, outputs)
        assert set(backend.driver.node_types(captured.graph)) <= CAPTURABLE


@contextmanager
def buffers(
    backend: CudaBackend, block: BlockInterface, rows: int
) -> Iterator[tuple[list[DeviceArray], list[DeviceArray]]]:
    driver, made = backend.driver, []

    def array(spec: ValueSpec) -> DeviceArray:
        shape = tuple(rows if size == "batch" else int(size) for size in spec.shape)
        made.append(driver.malloc(int(np.prod(shape)) * 8))
        return DeviceArray(made[-1], shape, spec.dtype)

    signature = engine_signature(block)
    try:
        yield (
            [array(spec) for spec in signature.inputs.values()],
            [array(spec) for spec in signature.outputs.values()],
        )
    finally:
        for address in made:
            driver.free(address)


class _Body:
    """A body that computes ``y`` from ``x`` with a function."""

    def __init__(self, function: Any) -> None:
        self._function = function

    def __call__(self, values: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return (self._function(*values),)


ROW = ValueSpec(("batch", 3), "float32")
BLOCK = BlockInterface("odd", {"x": ROW}, {"y": ROW}, Return(("y",), "end"))


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x * float(x.sum().item()), "cannot be captured"),
        (lambda x: x + x[x[:, 0] >= 0].sum(), "cannot be captured"),
        (lambda x: x + torch.ones(3).cuda(), "cannot be captured"),
        (lambda x: x + torch.rand_like(x), "draws random numbers"),
        (lambda x: x[:, :2], r"comes out as torch.float32\[4, 2\]"),
        (lambda x: x.double(), "comes out as torch.float64"),
        (lambda x: x @ x, "torch cannot run it on the GPU"),
    ],
)
def test_what_cannot_be_captured_says_why_and_harms_nothing(function: Any, message: str) -> None:
    backend = backend_of()
    before = torch.cuda.current_stream()
    with buffers(backend, BLOCK, 4) as (inputs, outputs):
        engine = CudaEngine(BLOCK, _Body(function), backend._captures)
        with pytest.raises(LoweringError, match=rf"backend 'cuda', block 'odd', 4 rows: .*{message}"):
            engine.capture(4, inputs, outputs)
        assert torch.cuda.current_stream() == before
        CudaEngine(BLOCK, _Body(torch.relu), backend._captures).capture(4, inputs, outputs)
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


def test_too_little_memory() -> None:
    backend = backend_of()
    huge = 4 * torch.cuda.mem_get_info()[1]
    with buffers(backend, BLOCK, 4) as (inputs, outputs):
        engine = CudaEngine(
            BLOCK, _Body(lambda x: x + torch.empty(huge, device="cuda")[0]), backend._captures
        )
        with pytest.raises(DeviceError, match=r"out of memory(.|\n)*smaller batch size"):
            engine.capture(4, inputs, outputs)


def test_memory_is_given_back() -> None:
    backend, program = backend_of(), network_with_exits()
    free = []
    for _ in range(4):
        with executor_of(backend, program) as executor:
            executor.run([images(3).numpy()], 3)
        del executor
        gc.collect()
        torch.cuda.empty_cache()
        free.append(backend.driver.free_memory_bytes())
    assert free[-1] >= free[1] - (1 << 20)
