"""``exitcompiler.compile``: from a trained network and a calibration set to a program with exits."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.export import ExportedProgram

from exitcompiler.calibration import peek, require_fit, require_rows
from exitcompiler.candidates import Candidates
from exitcompiler.capture import Captured, capture
from exitcompiler.certify import answers_of, certify, check_one_file, check_parity, measure_speedup
from exitcompiler.data import Rows, RowSplit, TrainingData, read_rows, read_training_data, split_rows
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.errors import BackendUnavailableError
from exitcompiler.findings import Findings
from exitcompiler.fitting import fit_exits
from exitcompiler.packaging import pack, point_name
from exitcompiler.placement import Place
from exitcompiler.policies import CostModel
from exitcompiler.profile import block_times_us, measure_costs
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import Backend, available_backends, create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.manifest import Artifact, Execution
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import score_rows
from exitcompiler.selection import Selection, select_points
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

__all__ = ["Details", "compile", "compile_in_detail"]

logger = logging.getLogger(__name__)

FEWEST_ROWS: Final = 300
"""Fewer calibration rows cannot be split into parts that say anything."""

FIT_SHARE: Final = 0.4
CERTIFY_SHARE: Final = 0.2
WORTHWHILE: Final = 1.02
"""The lower end of the measured speed-up has to be above this, else the plain engine is the result."""

SPEEDUP_REPEATS: Final = 1500


def compile(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    calib_data: Any,
    *,
    train_data: Any = None,
    max_accuracy_drop: float | None = None,
    latency_budget_ms: float | None = None,
    backend: str = "auto",
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    seed: int = 0,
    logits: str | int | None = None,
    max_exits: int = 3,
    recipe: HeadRecipe | None = None,
    dump: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> CompiledModel:
    """Give a trained classifier early exits that really skip the work.

    Captures the model, trains exit heads on the frozen network, learns where and when to leave on
    measured times, prunes what does not pay, and lowers what remains. The model itself is not changed.

    Args:
        model: A trained module; or an exported program, or the path of a ``.pt2`` file, with a dynamic
            batch.
        calib_data: Held-out rows, a few thousand, that the model was not trained on: a pair (inputs,
            labels) of arrays or tensors, a DataLoader or any iterable of (x, y) batches, or of x alone:
            without labels the target is agreement with the model. Several inputs: a dict by name.
        train_data: Rows to fit heads on, in the same forms; the model's own training rows will do. By
            default a share of ``calib_data`` is used.
        max_accuracy_drop: How much accuracy may be lost, net, 0 to 1; 0.01 (one point) by default.
        latency_budget_ms: Instead: the mean latency of a call to keep, in milliseconds.
        backend: ``"onnxruntime"``, ``"openvino"``, ``"torch"``, or ``"auto"``: the one that runs the
            plain model fastest here.
        precision: ``"fp32"``; ``"bf16"`` where the backend has it, gates being learned on its scores.
        batch_size: Rows per call that costs are measured at; any size runs.
        threads: Threads per call; None: as many as this process may use.
        seed: Of everything that is random.
        logits: Which output holds the logits, for a model with several: its key or its index.
        max_exits: How many places get deep heads before gates decide.
        recipe: How heads are trained.
        dump: A folder for the program's text before and after every pass that changes it.
        progress: Show progress bars; None: on a terminal only.

    Returns:
        The compiled model. Where exits do not pay it is the plain engine, and ``explain()`` says why.

    Raises:
        UnsupportedModelError: The model cannot be captured; names the cause and a way out.
        CalibrationError: The data cannot be used.
        InputError: An option makes no sense, or no operating point keeps the limit.
        BackendUnavailableError: A backend was named that is not installed.
        LoweringError: A block cannot be lowered, or its outputs differ from torch's.
    """
    settings = Settings(
        max_accuracy_drop=max_accuracy_drop,
        latency_budget_ms=latency_budget_ms,
        backend=backend,
        precision=precision,
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        max_exits=max_exits,
        recipe=HeadRecipe() if recipe is None else recipe,
        dump=None if dump is None else Path(dump),
    )
    return compile_in_detail(model, calib_data, train_data, settings, logits, progress).compiled


@dataclass(frozen=True)
class Details:
    """A compiled model and everything it was made from, for benchmarks and for looking inside.

    Args:
        compiled: What ``compile`` returns.
        program: The captured backbone.
        engines: Of the backend that was chosen.
        split: Row numbers of the calibration data, by use.
        candidates: The chain and all trained heads; None where the network has no place for an exit.
        table: Scores on the learning rows.
        costs: Measured times.
        selection: What was learned.
    """

    compiled: CompiledModel
    program: Program
    engines: Engines
    split: RowSplit
    candidates: Candidates | None = None
    table: ScoreTable | None = None
    costs: CostModel | None = None
    selection: Selection | None = None


def compile_in_detail(
    model: nn.Module | ExportedProgram | str | PathLike[str],
    calib_data: Any,
    train_data: Any,
    settings: Settings,
    logits: str | int | None = None,
    progress: bool | None = None,
) -> Details:
    """What ``compile`` does, with all that it found on the way.

    Args and errors are those of ``compile``; its options come as ``settings``.
    """
    backends = _candidate_backends(settings)
    with reporting(progress) as reporter:
        return _Compilation(settings, backends, reporter).run(model, calib_data, train_data, logits)


def _candidate_backends(settings: Settings) -> list[Backend]:
    """The backend asked for; under "auto" all that are installed and have the precision, but torch."""
    if settings.backend != "auto":
        return [create_backend(settings.backend, precision=settings.precision, threads=settings.threads)]
    found: list[Backend] = []
    for name in available_backends():
        if name == "torch":  # the reference: it would win only where nothing is installed
            continue
        try:
            found.append(create_backend(name, precision=settings.precision, threads=settings.threads))
        except BackendUnavailableError as error:
            logger.info("%s", error)
    if not found:
        raise BackendUnavailableError(
            f"no backend for precision {settings.precision!r} is installed",
            remedy="pip install 'exitcompiler[cpu]'",
        )
    return found


@dataclass
class _Compilation:
    """One run of the compiler: what it was asked, and what it uses on the way."""

    settings: Settings
    backends: list[Backend]
    reporter: Reporter

    def run(self, model: Any, calib_data: Any, train_data: Any, logits: str | int | None) -> Details:
        started = time.monotonic()
        calib_data, example = peek(calib_data)
        with self.reporter.step("capturing the model"):
            captured = capture(model, example, logits=logits)
        program = captured.program
        rows = read_rows(calib_data, list(program.inputs), minimum=FEWEST_ROWS)
        require_fit(rows, program)
        split = split_rows(
            len(rows),
            fit=0.0 if train_data is not None else FIT_SHARE,
            certify=CERTIFY_SHARE,
            seed=self.settings.seed,
        )
        require_rows(split, with_training=train_data is not None, batch_size=self.settings.batch_size)
        data = self._training_data(train_data, rows, split, program).for_model(program)
        findings = Findings(_name_of(model), program, self.settings, split)
        findings.seconds = self.reporter.seconds
        lowerer = Lowerer()
        with self.reporter.step("lowering the plain model"):
            engines, plain_us = self._fastest_plain(program, rows, lowerer, findings)
        fitted = fit_exits(program, data, rows, engines, self.settings, self.reporter)
        findings.fitted(fitted)
        if fitted.candidates is None:
            findings.refuse(_no_place(fitted.places))
            compiled = self._plain(captured, plain_us, engines, findings, rows, split)
            return Details(compiled, program, engines, split)
        learn = rows.take(split.learn)
        table, costs = self._measure(fitted.candidates, program, learn, engines)
        selection = select_points(
            fitted.candidates, table, costs, engines, learn, self.settings, self.reporter
        )
        findings.selected(selection, table, costs)
        compiled = self._finish(captured, selection, plain_us, engines, findings, rows, split)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(compiled, program, engines, split, fitted.candidates, table, costs, selection)

    def _training_data(self, train_data: Any, rows: Rows, split: RowSplit, program: Program) -> TrainingData:
        if train_data is None:
            return TrainingData(rows.take(split.fit), tuple(program.inputs))
        return read_training_data(train_data, list(program.inputs), minimum=100)

    def _fastest_plain(
        self, program: Program, rows: Rows, lowerer: Lowerer, findings: Findings
    ) -> tuple[Engines, float]:
        """The engines of the backend that runs the plain model fastest, and its time per row."""
        times: dict[str, float] = {}
        engines: dict[str, Engines] = {}
        for backend in self.backends:
            engines[backend.name] = Engines(backend, lowerer)
            (times[backend.name],) = block_times_us(
                program.blocks, engines[backend.name], rows, self.settings.batch_size, repeats=60
            )
        fastest = min(times, key=lambda name: times[name])
        findings.chose_backend(fastest, times)
        return engines[fastest], times[fastest]

    def _measure(
        self, candidates: Candidates, program: Program, learn: Rows, engines: Engines
    ) -> tuple[ScoreTable, CostModel]:
        with self.reporter.step("lowering segments and heads"):
            costs = measure_costs(candidates, program, engines, learn, self.settings.batch_size)
        with self.reporter.step("scoring calibration rows", len(learn)) as step:
            return score_rows(candidates, engines, learn, step), costs

    def _finish(
        self,
        captured: Captured,
        selection: Selection,
        plain_us: float,
        engines: Engines,
        findings: Findings,
        rows: Rows,
        split: RowSplit,
    ) -> CompiledModel:
        """Package, check, measure; the plain engine where exits do not pay."""
        chosen = selection.chosen
        if not chosen.point.policy.kept:
            findings.refuse("no exit pays within the limit: every gate came out as 'always go on'")
            return self._plain(captured, plain_us, engines, findings, rows, split)
        with self.reporter.step("packaging"):
            artifact = pack(
                [chosen, *selection.shipped],
                captured.program,
                plain_us,
                chosen.point.estimate.backbone_accuracy,
                captured.structure,
                engines.backend,
                engines.lowerer,
                self.settings,
            )
        # From here on nothing that the gates have seen is used.
        fresh = rows.take(split.certify)
        compiled = CompiledModel(artifact, engines.backend)
        with self.reporter.step("checking outputs against torch"):
            findings.parity = self._check_points(compiled, selection, fresh)
        with self.reporter.step("measuring against the plain engine"):
            execution = self._faster_execution(compiled, fresh, findings)
            compiled = compiled.with_artifact(_with_execution(artifact, execution))
            latency = measure_speedup(
                compiled, compiled.plain, fresh, self.settings.batch_size,
                repeats=SPEEDUP_REPEATS, seed=self.settings.seed,
            )  # fmt: skip
        findings.measured(latency, execution, compiled)
        if latency["speedup"]["lower"] <= WORTHWHILE:
            findings.refuse(
                f"exits do not pay: measured speed-up {latency['speedup']['value']:.3f} "
                f"(95 % interval from {latency['speedup']['lower']:.3f}), more than {WORTHWHILE} is asked for"
            )
            return self._plain(captured, plain_us, engines, findings, rows, split)
        with self.reporter.step("certifying"):
            certificate, seen = certify(compiled, compiled.plain, fresh, self.settings.drop_limit)
        findings.certified(certificate, seen)
        return _complete(compiled, findings, certificate)

    def _check_points(self, compiled: CompiledModel, selection: Selection, rows: Rows) -> float:
        """Parity of every shipped point; many rows for the chosen one, a few for the others."""
        precision = self.settings.precision
        worst = check_parity(compiled, selection.chosen.program, rows, precision)
        for built in selection.shipped:
            other = compiled.select(name=point_name(built.point.accuracy_drop))
            worst = max(worst, check_parity(other, built.program, rows, precision, count=2))
        return worst

    def _faster_execution(self, compiled: CompiledModel, rows: Rows, findings: Findings) -> Execution:
        """An engine per block or one engine of the one-file model: whichever measures faster for one row."""
        if compiled.backend.name == "torch":
            return "blocks"
        one_file = compiled.with_artifact(_with_execution(compiled.artifact, "single"))
        check_one_file(one_file, compiled, rows, self.settings.precision)
        times = measure_speedup(one_file, compiled, rows, 1, repeats=400, seed=self.settings.seed)
        single, blocks = times["program"]["mean_ms"], times["plain"]["mean_ms"]
        findings.note(
            f"one row: an engine per block takes {blocks:.4f} ms, one engine of model.onnx {single:.4f} ms"
        )
        return "single" if single < blocks else "blocks"

    def _plain(
        self,
        captured: Captured,
        plain_us: float,
        engines: Engines,
        findings: Findings,
        rows: Rows,
        split: RowSplit,
    ) -> CompiledModel:
        """The untouched backbone as the result."""
        if self.settings.budget_us is not None and plain_us > self.settings.budget_us:
            findings.note(
                f"the plain engine takes {plain_us * self.settings.batch_size / 1000:.3f} ms, more than the "
                f"budget of {self.settings.latency_budget_ms} ms"
            )
        fresh = rows.take(split.certify)
        artifact = pack(
            [], captured.program, plain_us, 1.0, captured.structure, engines.backend, engines.lowerer,
            self.settings,
        )  # fmt: skip
        compiled = CompiledModel(artifact, engines.backend)
        findings.parity = check_parity(compiled, captured.program, fresh, self.settings.precision)
        if fresh.labels is not None:
            accuracy = float((answers_of(compiled, fresh)[0] == fresh.labels).mean())
            compiled = compiled.with_artifact(_with_plain_accuracy(artifact, accuracy))
        return _complete(compiled, findings, None)


def _with_plain_accuracy(artifact: Artifact, accuracy: float) -> Artifact:
    (point,) = artifact.manifest.operating_points
    measured = replace(point, estimate=replace(point.estimate, accuracy=accuracy))
    return replace(artifact, manifest=replace(artifact.manifest, operating_points=(measured,)))


def _name_of(model: Any) -> str:
    return Path(model).stem if isinstance(model, str | PathLike) else type(model).__name__


def _no_place(places: Sequence[Place]) -> str:
    if not places:
        return "the network has no place where it could be cut and an exit be put"
    return "at none of the places where the network can be cut did a linear probe know enough to go on"


def _with_execution(artifact: Artifact, execution: Execution) -> Artifact:
    points = artifact.manifest.operating_points
    changed = (replace(points[0], execution=execution), *points[1:])
    return replace(artifact, manifest=replace(artifact.manifest, operating_points=changed))


def _complete(
    compiled: CompiledModel, findings: Findings, certificate: Mapping[str, Any] | None
) -> CompiledModel:
    """The same model with its report and certificate."""
    manifest = replace(compiled.artifact.manifest, certificate=certificate)
    artifact = replace(compiled.artifact, manifest=manifest, report=findings.report())
    return compiled.with_artifact(artifact, notes=findings.notes)
