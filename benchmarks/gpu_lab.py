"""Where the GPU benchmark measures: a GPU, a stream that PyTorch shares, and contenders that take turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Final, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from exitcompiler.program import Block
from exitcompiler.runtime.cuda_backend import CudaBackend
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.cuda_kernels import compile_kernels
from exitcompiler.runtime.device import DeviceEngine

__all__ = [
    "SEED",
    "Contender",
    "Effort",
    "Lab",
    "Times",
    "came_back_early",
    "device_times",
    "ieee_float32",
    "in_turns",
    "open_lab",
    "wall_times",
    "with_tensorrt",
]

SEED: Final = 0
_HOLD_CYCLES: Final = 1_000_000
"""About half a millisecond: longer than the host takes to queue a launch."""
_LONG_CYCLES: Final = 50_000_000
"""Some 25 milliseconds: longer than anything that does not wait takes on the host."""

Times: TypeAlias = npt.NDArray[np.float64]
"""Microseconds, a turn an entry; entries of all contenders are paired."""


@dataclass(frozen=True)
class Effort:
    """How often things are measured.

    Args:
        turns: Of every contender of a comparison, at most.
        seconds: After which a comparison ends, if it has had ``least`` turns.
        least: See there.
        warm_up: Turns before the first one that counts.
    """

    turns: int = 400
    seconds: float = 8.0
    least: int = 50
    warm_up: int = 10


@dataclass(frozen=True)
class Lab:
    """A device and how it is used.

    Args:
        driver: The device.
        stream: What is timed is given to this one.
        engine: Makes an engine of a block.
        hold: Keeps the stream busy for a moment, so that what is given to it next waits together and then
            runs without the host: times on the device are then times of the device.
        current: While this is entered, ``stream`` is PyTorch's current stream.
        compile_image: The kernels for an architecture.
        effort: How often things are measured.
        owned: Frees what was made here.
    """

    driver: Driver
    stream: int
    engine: Callable[[Block], DeviceEngine]
    hold: Callable[[], None] = lambda: None
    current: Callable[[], AbstractContextManager[Any]] = nullcontext
    compile_image: Callable[[str], bytes] = compile_kernels
    effort: Effort = Effort()
    owned: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def part(self) -> Iterator[Lab]:
        """The same, but what is made there is freed at the end of the block."""
        with ExitStack() as owned:
            yield replace(self, owned=owned)
            self.wait()

    def wait(self) -> None:
        """Until the stream has done all that it was given."""
        self.driver.synchronize(self.stream)


@contextmanager
def open_lab(effort: Effort | None = None) -> Iterator[Lab]:
    """The first GPU, until the end of the block.

    Args:
        effort: How often things are measured; None: as usual.

    Raises:
        BackendUnavailableError: There is none that can be used, or a package is missing.
    """
    backend = CudaBackend(threads=1)
    driver = backend.driver
    with ExitStack() as owned:
        stream = driver.stream  # programs run there, too: captured blocks share memory to work in
        external = torch.cuda.ExternalStream(stream, device=torch.device("cuda", 0))

        def current() -> AbstractContextManager[Any]:
            return torch.cuda.stream(external)

        def hold() -> None:
            with torch.cuda.stream(external):
                torch.cuda._sleep(_HOLD_CYCLES)

        def engine(block: Block) -> DeviceEngine:
            return backend.load_device_body(block, block.body)

        much = effort or Effort()
        yield Lab(driver, stream, engine, hold=hold, current=current, effort=much, owned=owned)
        driver.synchronize(stream)


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Within the block float32 is float32: no TF32 in convolutions or products of matrices."""
    cudnn, matmul = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cudnn, matmul


def came_back_early(call: Callable[[], Any]) -> bool:
    """Whether a call came back while PyTorch's current stream was still busy with what came before it."""
    torch.cuda._sleep(_LONG_CYCLES)
    blocker = torch.cuda.Event()
    blocker.record()
    call()
    early = not blocker.query()
    torch.cuda.synchronize()
    return early


def with_tensorrt(lab: Lab, rows: int) -> Lab:
    """The same with TensorRT engines in the place of PyTorch's graphs, built now and not kept.

    Args:
        lab: The device.
        rows: The only number of rows that they are built for.

    Raises:
        BackendUnavailableError: There is no TensorRT.
    """
    from exitcompiler.passes.lower_to_onnx import lower_blocks
    from exitcompiler.runtime.manifest import block_path
    from exitcompiler.runtime.tensorrt_backend import TensorRtBackend

    backend = TensorRtBackend(buckets=(rows,), cache=None, driver=lab.driver)

    def engine(block: Block) -> DeviceEngine:
        name = "0" * 64
        point: Any = SimpleNamespace(files={block.name: name})  # all that is asked of an operating point
        model = lower_blocks([block])[block.name]
        return backend.load_device_block({block_path(name): model}, point, block)

    return replace(lab, engine=engine)


class Contender(Protocol):
    """Something that answers rows."""

    def stage(self, x: npt.NDArray[np.float32]) -> None:
        """Bring rows to where they are read on the device, and wait until they are there."""
        ...

    def launch(self) -> None:
        """Answer them: give the lab's stream all that is to be done."""
        ...


def in_turns(
    lab: Lab,
    contenders: Mapping[str, Contender],
    inputs: Sequence[npt.NDArray[np.float32]],
    time_one: Callable[[Lab, Contender], float],
    seed: int = SEED,
) -> dict[str, Times]:
    """Time contenders on the same rows, in a new random order each turn, so that a slow phase hits all.

    Args:
        lab: Where.
        contenders: By name.
        inputs: Turn ``i`` uses entry ``i % len(inputs)``; rows are staged before the clock starts.
        time_one: Microseconds of one launch.
        seed: Of the order.

    Returns:
        Name -> ``float64 [turns]``; entry ``i`` of all is the same turn.
    """
    effort, names = lab.effort, list(contenders)
    rng = np.random.default_rng(seed)
    found_us = np.empty((len(names), effort.turns))
    began, turns = time.monotonic(), 0
    for turn in range(-effort.warm_up, effort.turns):
        for which in rng.permutation(len(names)).tolist():
            contender = contenders[names[which]]
            contender.stage(inputs[turn % len(inputs)])
            elapsed_us = time_one(lab, contender)
            if turn >= 0:
                found_us[which, turn] = elapsed_us
        turns = turn + 1
        if turns >= effort.least and time.monotonic() - began > effort.seconds:
            break
    return dict(zip(names, found_us[:, :turns], strict=True))


def wall_times(lab: Lab, contender: Contender) -> float:
    """From the call until the host knows that the answer is there."""
    begin = time.perf_counter_ns()
    contender.launch()
    lab.wait()
    return (time.perf_counter_ns() - begin) / 1e3


def device_times(lab: Lab) -> Callable[[Lab, Contender], float]:
    """A clock between two events on the device, which the launch has been queued between beforehand."""
    driver = lab.driver
    events = [driver.create_event() for _ in range(2)]
    for event in events:
        lab.owned.callback(driver.destroy_event, event)
    begin, end = events

    def time_one(lab: Lab, contender: Contender) -> float:
        lab.hold()
        driver.record(begin, lab.stream)
        contender.launch()
        driver.record(end, lab.stream)
        elapsed_us = driver.elapsed_us(begin, end)
        lab.wait()
        return elapsed_us

    return time_one
