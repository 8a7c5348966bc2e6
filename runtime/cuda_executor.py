"""Runs a program on a GPU: one launch a call, every decision made on the device."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ControlFlow, ValueSpec
from exitcompiler.errors import InputError, LoweringError
from exitcompiler.runtime.backends import Array
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_kernels import MOST_ROWS, compile_kernels
from exitcompiler.runtime.device_program import DeviceEngineSource, DeviceProgram
from exitcompiler.runtime.planning import plan_program, powers_of_two
from exitcompiler.runtime.rows import require_row_outputs

__all__ = ["DEFAULT_MAX_ROWS", "DeviceExecutor"]

DEFAULT_MAX_ROWS: Final = 32
"""Rows of one launch, at most, where nobody says otherwise; larger batches are several launches."""

_log = logging.getLogger(__name__)


class DeviceExecutor:
    """Runs a program on batches, one launch for up to ``max_rows`` rows. For one thread at a time.

    One row has a graph of its own, in which values are read where they were written; for batches there is
    one graph, whose blocks are captured for 1, 2, 4, ... rows. Both are made when they are first needed.

    Args:
        flow: The program.
        engines: Block -> engine, asked once for each block that needs one and each graph.
        driver: The device.
        max_rows: Rows of one launch, at most 1024. A program that cannot run several rows at once (a value
            that does not belong to rows differs by the way that they came) runs one at a time.
        buckets: The numbers of rows that blocks are captured for, rising, instead of powers of two up to
            ``max_rows``.
        compile_image: Architecture -> the kernels as a module to load.

    Raises:
        VerifyError: An output has no rows.
        InputError: ``max_rows`` is not in 1..1024.
    """

    def __init__(
        self,
        flow: ControlFlow,
        engines: DeviceEngineSource,
        driver: Driver,
        *,
        max_rows: int = DEFAULT_MAX_ROWS,
        buckets: Sequence[int] | None = None,
        compile_image: Callable[[str], bytes] = compile_kernels,
    ) -> None:
        require_row_outputs(flow)
        if buckets is not None:
            max_rows = buckets[-1]
        if not 1 <= max_rows <= MOST_ROWS:
            raise InputError(f"max_rows={max_rows} is not in 1..{MOST_ROWS}")
        self._buckets = powers_of_two(max_rows) if buckets is None else tuple(buckets)
        try:
            plan_program(flow, max_rows, self._buckets)
        except LoweringError as error:
            _log.warning("%s; running it one row at a time", error.what)
            max_rows, self._buckets = 1, (1,)
        self.max_rows = max_rows
        self._flow = flow
        self._engines = engines
        self._driver = driver
        self._compile_image = compile_image
        self._programs: dict[int, DeviceProgram] = {}

    def run(self, inputs: Sequence[Array], rows: int) -> tuple[list[Array], NDArray[np.int32]]:
        """Answer a batch that lies in the host's memory; as `BatchExecutor.run`.

        Raises:
            LoweringError: A block cannot be captured, or the graph not be built.
            DeviceError: The device refuses, or has no memory left.
        """
        parts = [
            self.program(count).run(self._part(inputs, start, count), count)
            for start, count in self._launches(rows)
        ]
        if len(parts) == 1:
            return parts[0]
        columns = zip(*(outputs for outputs, _ in parts), strict=True)
        return [np.concatenate(column) for column in columns], np.concatenate([exits for _, exits in parts])

    def run_device(self, inputs: Sequence[Any], rows: int) -> tuple[list[Any], Any]:
        """Answer a batch of torch tensors on this device, in the order of torch's current stream.

        Returns at once: nothing here waits for the device, and once the graph is built nothing is allocated
        there but what torch's allocator hands out for the answers.

        Args:
            inputs: CUDA tensors, one per program input.
            rows: The batch size.

        Returns:
            The program's outputs, then what it carries; and ``int32[rows]``, each row's exit (-1 where an
            engine went wrong, which `run` would raise for). CUDA tensors that are the caller's own.

        Raises:
            InputError: That stream is being captured into a graph of the caller's.
            LoweringError: As in `run`.
            DeviceError: As in `run`.
        """
        torch = sys.modules["torch"]  # whoever has a tensor has imported it
        if torch.cuda.is_current_stream_capturing():
            raise InputError(
                "a program that is a CUDA graph of its own cannot be captured into another one",
                remedy="call it outside of torch.cuda.graph, or compile with backend='torch'",
            )
        # All are built before one of them runs: building is not in the order of the caller's stream.
        programs = {count: self.program(count) for _, count in self._launches(rows)}
        specs = [*self._flow.outputs.values(), *self._flow.carried.values(), ValueSpec((rows,), "int32")]
        results = [
            torch.empty(
                (rows, *map(int, spec.shape[1:])), dtype=getattr(torch, spec.dtype), device=inputs[0].device
            )
            for spec in specs
        ]
        stream = torch.cuda.current_stream(inputs[0].device).cuda_stream
        whole = [tensor.contiguous() for tensor in inputs]
        for start, count in self._launches(rows):
            sources = [tensor.data_ptr() for tensor in self._part(whole, start, count)]
            targets = [tensor[start : start + count].data_ptr() for tensor in results]
            programs[count].enqueue(sources, targets, count, stream)
        *outputs, exits = results
        return outputs, exits

    def program(self, rows: int) -> DeviceProgram:
        """What answers that many rows, made now if it is new."""
        buckets = (1,) if rows == 1 and self._buckets[0] == 1 else self._buckets
        capacity = buckets[-1]
        if capacity not in self._programs:
            self._programs[capacity] = DeviceProgram(
                self._flow, self._engines, self._driver, buckets, self._compile_image
            )
        return self._programs[capacity]

    def close(self) -> None:
        """Free everything on the device; the next call makes it anew."""
        for program in self._programs.values():
            program.close()
        self._programs.clear()

    def _launches(self, rows: int) -> Iterator[tuple[int, int]]:
        """The first row of each launch that a batch takes, and how many rows it has."""
        for start in range(0, rows, self.max_rows):
            yield start, min(self.max_rows, rows - start)

    def _part(self, inputs: Sequence[Any], start: int, count: int) -> list[Any]:
        """What a launch takes of arrays or tensors."""
        return [
            value[start : start + count] if spec.batch_axis == 0 else value
            for spec, value in zip(self._flow.inputs.values(), inputs, strict=True)
        ]
