"""The compiled model: what the user calls."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import BlockInterface
from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.runtime.backends import Array, Backend, Engine
from exitcompiler.runtime.engine_pool import EnginePool
from exitcompiler.runtime.forcing import force_exit
from exitcompiler.runtime.hand_over import HandedOver, describe_part, take_handed_over, take_on_device
from exitcompiler.runtime.inputs import Given, InputReader, as_tensor, finite_check, require_finite
from exitcompiler.runtime.manifest import Artifact, Execution, Manifest, OperatingPoint
from exitcompiler.runtime.operating_points import OperatingPoints
from exitcompiler.runtime.rows import BatchExecutor
from exitcompiler.runtime.single_row import OneFileExecutor, SingleRowExecutor

if TYPE_CHECKING:
    from exitcompiler.runtime.cuda_executor import DeviceExecutor
    from exitcompiler.runtime.device_engines import DeviceBackend

__all__ = ["CompiledModel", "Result"]

_Answer: TypeAlias = tuple[list[Any], "int | NDArray[np.int32] | Any", Given]


@dataclass(frozen=True, slots=True)
class Result:
    """What `CompiledModel.run` returns; torch tensors where the caller passed tensors.

    Args:
        outputs: What the model returns, in its structure.
        exit_index: ``int32[batch]``, which of ``CompiledModel.exits`` each row took.
        confidence: ``float32[batch]``, the softmax probability of each row's answer.
        handed_over: The rows that go on in the far part of a split program; until it answers, ``outputs``
            holds the answer that they have so far. None if this is not a near part.
    """

    outputs: Any
    exit_index: Any
    confidence: Any
    handed_over: HandedOver | None = None


class CompiledModel:
    """A program that answers easy rows early. Call it as you would call the model.

    Numpy in, numpy out; torch in, torch out. What it returns is the caller's own. Calls from several
    threads are safe and take turns; to answer in parallel, load it once per thread with ``threads=1``.

    On a GPU, CUDA tensors in, CUDA tensors out: the call returns before the answer is there, as any in torch
    does, and the answer is in the order of torch's current stream.

    Args:
        artifact: What was compiled.
        backend: What runs it.
        point: Index of the operating point; None: the artifact's own choice.
        check_finite: Refuse NaN and infinity in floating-point inputs (costs about a microsecond); not in
            CUDA tensors, which would have to be waited for.
        forced: Take this exit for every row, whatever the gates say.
        route: The blocks to pass on the way there; None: the first ways that lead there.
        notes: What the caller should know about how it was loaded.
        engines: Shared with another model of the same artifact and backend.

    Raises:
        InputError: There is no exit ``forced``, or no such route to it.
    """

    def __init__(
        self,
        artifact: Artifact,
        backend: Backend,
        *,
        point: int | None = None,
        check_finite: bool = True,
        forced: str | None = None,
        route: Sequence[str] | None = None,
        notes: Sequence[str] = (),
        engines: EnginePool | None = None,
    ) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.backend = backend
        self.notes = tuple(notes)
        self._index = manifest.selected if point is None else point
        self._point = manifest.operating_points[self._index]
        self._flow = self._point.control_flow
        if forced is not None:
            self._flow = force_exit(self._flow, forced, route)
        self._forced = forced
        self._check_finite = check_finite
        self._engines = EnginePool(artifact, backend) if engines is None else engines
        self._reader = InputReader(manifest.inputs, on_device=backend.on_device)
        self._names = tuple(manifest.inputs)
        self._structure = manifest.output_structure
        self._lock = threading.Lock()
        self._batch: BatchExecutor | None = None
        self._single: SingleRowExecutor | OneFileExecutor | None = None
        self._device: DeviceExecutor | None = None
        self._check: Callable[[], None] = lambda: None

    @property
    def manifest(self) -> Manifest:
        """What the artifact says about itself."""
        return self.artifact.manifest

    @property
    def exits(self) -> tuple[str, ...]:
        """Names of the exits in the order of the program; the last is the deepest."""
        return self._flow.exits

    @property
    def operating_point(self) -> OperatingPoint:
        """The point that runs."""
        return self._point

    @property
    def operating_points(self) -> OperatingPoints:
        """The frontier that was shipped."""
        return OperatingPoints(self.manifest.operating_points)

    @property
    def execution(self) -> Execution:
        """How single rows run: an engine per block, or one engine of the one-file model."""
        one_file = (
            self._point.execution == "single"
            and self._forced is None
            and self._index == self.manifest.one_file
            and self.backend.form == "onnx"
            and not self.backend.on_device
        )
        return "single" if one_file else "blocks"

    @property
    def plain(self) -> CompiledModel:
        """The untouched backbone on the same backend and threads, to compare with.

        Raises:
            InputError: This is a part of a split program, which has none.
        """
        if self.manifest.plain is None:
            raise InputError(
                "a part of a split program holds no plain network to compare with",
                where="plain",
                remedy="use the artifact that was split",
            )
        return self._at(self.manifest.plain)

    def select(
        self,
        *,
        max_accuracy_drop: float | None = None,
        latency_budget_ms: float | None = None,
        name: str | None = None,
    ) -> CompiledModel:
        """The same model at another operating point, sharing files and engines.

        Args:
            max_accuracy_drop: The fastest point that drops at most this much (net, 0..1).
            latency_budget_ms: The most accurate point whose mean latency is at most this.
            name: The point of this name.

        Raises:
            InputError: No point meets it, or not exactly one criterion is given.
        """
        points = self.operating_points
        chosen = points.select(
            max_accuracy_drop=max_accuracy_drop, latency_budget_ms=latency_budget_ms, name=name
        )
        return self._at([point.name for point in points].index(chosen.name))

    def with_artifact(self, artifact: Artifact, *, notes: Sequence[str] | None = None) -> CompiledModel:
        """What another artifact says, on the same backend: its manifest, report and selected point.

        Engines that are made already are kept if its files are those of this one.

        Args:
            artifact: Mostly this one with something added or changed.
            notes: Instead of these.
        """
        same_files = artifact.files == self._engines.artifact.files
        return CompiledModel(
            artifact,
            self.backend,
            check_finite=self._check_finite,
            notes=self.notes if notes is None else notes,
            engines=self._engines if same_files else None,
        )

    def selected_artifact(self) -> Artifact:
        """The artifact with the operating point that runs selected.

        A certificate is one of an operating point: with another one selected the manifest has none.

        Raises:
            ArtifactError: The program is forced to one exit, which an artifact cannot say.
        """
        if self._forced is not None:
            raise ArtifactError("a program forced to one exit cannot be saved", where="save")
        certificate = self.manifest.certificate
        selected = self.manifest.operating_points[self.manifest.selected].name
        if certificate is not None and certificate.get("point", selected) != self._point.name:
            certificate = None
        manifest = replace(self.manifest, selected=self._index, certificate=certificate)
        return replace(self.artifact, manifest=manifest)

    def forced(self, exit_name: str, route: Sequence[str] | None = None) -> CompiledModel:
        """The same program with every row sent to one exit: for parity checks and timing.

        Args:
            exit_name: One of ``exits``.
            route: Names of the blocks that rows pass, from the first to the one with the exit, where
                several ways lead to it; None: the first of these.

        Raises:
            InputError: There is no such exit, or no such route to it.
        """
        return self._at(self._index, exit_name, route)

    def _at(self, point: int, forced: str | None = None, route: Sequence[str] | None = None) -> CompiledModel:
        return CompiledModel(
            self.artifact,
            self.backend,
            point=point,
            check_finite=self._check_finite,
            forced=forced,
            route=route,
            notes=self.notes,
            engines=self._engines,
        )

    def __call__(self, *inputs: Any, **named: Any) -> Any:
        """What the model returns, for any batch of at least one row.

        Args:
            inputs: Arrays or tensors, in the model's order; or one dict by name.
            named: The same, by name.

        Raises:
            InputError: The inputs do not fit the model.
        """
        (logits, *_), _, given = self._answer(inputs, named)
        return self._wrap(logits, given)

    def run(self, *inputs: Any, **named: Any) -> Result:
        """Like calling it, and says where each row left and how sure it was.

        Raises:
            InputError: The inputs do not fit the model.
        """
        values, exits, given = self._answer(inputs, named)
        if given == "device":
            return self._result_on_device(values, exits)
        logits, flow = values[0], self._flow
        exit_index: Any = np.array([exits], np.int32) if isinstance(exits, int) else exits
        handed_over = None
        if flow.carried:
            carried = values[len(flow.outputs) :]
            handed_over = take_handed_over(flow, carried, exit_index, given == "torch")
        spread = np.exp(logits - logits.max(axis=1, keepdims=True)).sum(axis=1)
        confidence: Any = (1.0 / spread).astype(np.float32)  # a softmax's largest term is exp(0) / sum
        if given == "torch":
            exit_index, confidence = as_tensor(exit_index), as_tensor(confidence)
        return Result(self._wrap(logits, given), exit_index, confidence, handed_over)

    def _result_on_device(self, values: list[Any], exit_index: Any) -> Result:
        logits, flow = values[0], self._flow
        handed_over = None
        if flow.carried:
            handed_over = take_on_device(flow, values[len(flow.outputs) :], exit_index)
        confidence = logits.softmax(dim=1).amax(dim=1).float()
        return Result(self._wrap(logits, "device"), exit_index, confidence, handed_over)

    def _answer(self, inputs: Sequence[Any], named: dict[str, Any]) -> _Answer:
        """Outputs and what is carried, each row's exit (a number for one row), and what was given."""
        arrays, rows, given = self._reader.read(inputs, named)
        if self.backend.on_device:
            return self._answer_on_device(arrays, rows, given)
        if rows == 1:
            with self._lock:
                single = self._single
                if single is None:
                    single = self._single = self._make_single()
                    self._check = finite_check(dict(zip(self._names, single.inputs, strict=True)))
                for buffer, array in zip(single.inputs, arrays, strict=True):
                    buffer[...] = array
                if self._check_finite:
                    self._check()
                values, exit_index = single.run()
                return [value.copy() for value in values], exit_index, given
        self._require_finite(arrays)
        with self._lock:
            if self._batch is None:
                self._batch = BatchExecutor(self._flow, self.engine)
            outputs, exits = self._batch.run(arrays, rows)
        return outputs, exits, given

    def _answer_on_device(self, values: list[Any], rows: int, given: Given) -> _Answer:
        if given != "device":
            self._require_finite(values)
        with self._lock:
            if self._device is None:
                self._device = self._make_device()
            run = self._device.run_device if given == "device" else self._device.run
            outputs, exits = run(values, rows)
        return outputs, exits, given

    def _require_finite(self, arrays: Sequence[Array]) -> None:
        if self._check_finite:
            for name, array in zip(self._names, arrays, strict=True):
                require_finite(name, array)

    def _make_device(self) -> DeviceExecutor:
        from exitcompiler.runtime.cuda_executor import DeviceExecutor

        # Without a reference to this model: the device's memory is freed as soon as nobody has it any more.
        engines = partial(self._engines.device_block, self._point)
        backend = cast("DeviceBackend", self.backend)
        return DeviceExecutor(self._flow, engines, backend.driver, buckets=backend.buckets)

    def _make_single(self) -> SingleRowExecutor | OneFileExecutor:
        if self.execution == "single":
            return OneFileExecutor(self._engines.one_file(self._flow))
        return SingleRowExecutor(self._flow, self.engine)

    def engine(self, block: BlockInterface, static_batch: int | None) -> Engine:
        """The engine of one of its blocks, on the host's arrays, for one batch size or for any (None)."""
        return self._engines.block(self._point, block, static_batch)

    def _wrap(self, logits: Any, given: Given) -> Any:
        value = as_tensor(logits) if given == "torch" else logits
        if self._structure.kind == "dict":
            return {self._structure.key: value}
        return (value,) if self._structure.kind == "tuple" else value

    def explain(self) -> str:
        """What the compiler kept and pruned, and why, as text.

        Where this operating point is not the one that was measured and certified, it says so.
        """
        from exitcompiler.runtime.explain import explain

        if self.manifest.part is not None:
            return describe_part(self.manifest, self.manifest.part)
        return explain(self.artifact.report, self._point)

    def report(self, path: str | PathLike[str]) -> None:
        """Write the report as one self-contained HTML file.

        Where this operating point is not the one that was measured and certified, it says so.

        Args:
            path: Where to.

        Raises:
            InputError: The file cannot be written.
            ExitCompilerError: jinja2 or matplotlib is not installed; or this is a part of a split program.
        """
        from exitcompiler.report import write_report

        if self.manifest.part is not None:
            raise InputError(
                "a part of a split program has no report", where="report", remedy="use the one of the whole"
            )
        write_report(self.artifact.report, self._point.control_flow, path, point=self._point)

    def save(self, path: str | PathLike[str], *, torch: bool | None = None, overwrite: bool = True) -> None:
        """Write the artifact, with this operating point selected. An old one stays whole until the end.

        Args:
            path: A folder to make; ending in ``.zip``: one zip file.
            torch: Also store the torch graphs of blocks; None: if it was compiled for a backend that runs
                them.
            overwrite: Replace an artifact that is there.

        Raises:
            ArtifactError: It cannot be written, or the path holds something else.
            LoweringError: With ``torch``: a block holds what such a graph cannot.
        """
        from exitcompiler.artifact import save_artifact

        save_artifact(self.selected_artifact(), path, torch=torch, overwrite=overwrite)

    def __repr__(self) -> str:
        threads = f", {self.backend.threads} thread{'s' if self.backend.threads > 1 else ''}"
        return (
            f"CompiledModel({self._point.name!r}: exits {list(self.exits)}, "
            f"{self.backend.name} {self.backend.precision}{'' if self.backend.on_device else threads})"
        )
