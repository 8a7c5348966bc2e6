"""Programs that are no chains, with torch bodies, on a GPU: ways that part and join. For `make gpu-check`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from device_programs import interfaces
from row_programs import cascade, diamond, exit_chain, rows

from exitcompiler.errors import BackendUnavailableError
from exitcompiler.interpreter import interpret
from exitcompiler.program import Program
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.cuda_backend import CudaBackend
from exitcompiler.runtime.cuda_executor import DeviceExecutor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

MAX_ROWS = 8
BATCHES = (1, 2, 3, 5, 8, 20)
"""Buckets, what lies between two, and more than a launch takes."""

Make = Callable[[], Program]


@pytest.fixture
def backend() -> CudaBackend:
    try:
        made = create_backend("cuda")
    except BackendUnavailableError as error:
        pytest.skip(str(error))
    assert isinstance(made, CudaBackend)
    return made


def executor_of(backend: CudaBackend, program: Program) -> DeviceExecutor:
    return DeviceExecutor(
        interfaces(program),
        lambda block: backend.load_device_body(block, program.block(block.name).body),
        backend.driver,
        max_rows=MAX_ROWS,
    )


@pytest.mark.parametrize("make", [exit_chain, diamond, cascade])
def test_every_row_answers_as_the_oracle_says(make: Make, backend: CudaBackend) -> None:
    program = make()
    executor = executor_of(backend, program)
    taken = set()
    for seed, count in enumerate(BATCHES):
        inputs = rows(count, program, seed)
        expected = interpret(program, inputs)
        (found,), exits = executor.run([x.numpy() for x in inputs.values()], count)
        np.testing.assert_array_equal(exits, expected.exit_index)
        np.testing.assert_allclose(found, expected.outputs["y"].numpy(), rtol=1e-5, atol=1e-5)
        for row in range(count):
            (alone,), exit_index = executor.run([x[row : row + 1].numpy() for x in inputs.values()], 1)
            assert exit_index[0] == exits[row]
            np.testing.assert_allclose(alone[0], found[row], rtol=1e-5, atol=1e-5)
        taken.update(exits.tolist())
    assert taken == set(range(len(program.exits)))
    executor.close()


@pytest.mark.parametrize("make", [exit_chain, diamond, cascade])
def test_tensors_on_the_device_are_answered_alike(make: Make, backend: CudaBackend) -> None:
    program = make()
    executor = executor_of(backend, program)
    for seed, count in enumerate(BATCHES):
        inputs = rows(count, program, seed)
        expected = interpret(program, inputs)
        (found,), exits = executor.run_device([x.cuda() for x in inputs.values()], count)
        np.testing.assert_array_equal(exits.cpu().numpy(), expected.exit_index)
        torch.testing.assert_close(found.cpu(), expected.outputs["y"], rtol=1e-5, atol=1e-5)
    executor.close()


def test_ways_that_part_are_the_bodies_of_one_node(backend: CudaBackend) -> None:
    executor = executor_of(backend, cascade())
    alone, batch = (executor.program(count).graph.node_counts for count in (1, MAX_ROWS))
    assert (alone["switch"], alone["block"]) == (1, 4)  # the way on from the first block
    assert batch["switch"] == 4  # the buckets of every block
    executor.close()
