"""``exitcompiler.compile``: from a trained network and a calibration set to a program with exits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Final

from torch import nn
from torch.export import ExportedProgram

from exitcompiler.calibration import peek, require_apart, require_fit, require_rows, require_unseen
from exitcompiler.candidates import Candidates, cast_candidates
from exitcompiler.capture import capture
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows, RowSplit, TrainingData, read_rows, read_training_data, split_rows
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines, lowerer_for, typed_as
from exitcompiler.errors import InputError
from exitcompiler.findings import Findings
from exitcompiler.finetuning.checkpoints import require_writable_folder
from exitcompiler.finetuning.devices import training_device
from exitcompiler.finetuning.mixing import require_mixable
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.placement import Place
from exitcompiler.profile import measure_costs
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import plain_logits, score_rows
from exitcompiler.selection import Selection, select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import candidate_backends, fastest_plain
from exitcompiler.training import HeadRecipe

__all__ = [
    "Details",
    "compile",
    "compile_in_detail",
    "measure",
    "model_name",
    "read_and_split",
    "require_training_device",
    "training_data",
    "training_source",
]

logger = logging.getLogger(__name__)

FEWEST_ROWS: Final = 300
"""Fewer calibration rows cannot be split into parts that say anything."""

FIT_SHARE: Final = 0.4
CERTIFY_SHARE: Final = 0.2


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
    finetune: FineTune | None = None,
    dump: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> CompiledModel:
    """Give a trained classifier early exits that really skip the work.

    Captures the model, trains exit heads on the frozen network (or both together, with ``finetune``),
    learns where and when to leave on measured times, prunes what does not pay, and lowers what remains.
    The model itself is not changed.

    Args:
        model: A trained module; or an exported program, or the path of a ``.pt2`` file, with a dynamic
            batch.
        calib_data: Held-out rows, a few thousand, that the model was not trained on: a pair (inputs,
            labels) of arrays or tensors, a DataLoader or any iterable of (x, y) batches, or of x alone:
            without labels the target is agreement with the model. Several inputs: a dict by name.
        train_data: Rows to fit heads on, in the same forms; the model's own training rows will do. By
            default a share of ``calib_data`` is used. With ``finetune`` the network is trained on them as
            well, and they are needed.
        max_accuracy_drop: How much accuracy may be lost against the model as it is given, net, 0 to 1;
            0.01 (one point) by default.
        latency_budget_ms: Instead: the mean latency of a call to keep, in milliseconds.
        backend: ``"onnxruntime"``, ``"openvino"``, ``"torch"``; on a GPU ``"cuda"`` or ``"tensorrt"``; or
            ``"auto"``: the one for CPUs that runs the plain model fastest here.
        precision: ``"fp32"``; ``"fp16"`` or ``"bf16"`` where the backend has it, gates being learned on its
            scores.
        batch_size: Rows per call that costs are measured at; any size runs.
        threads: Threads per call; None: as many as this process may use.
        seed: Of everything that is random.
        logits: Which output holds the logits, for a model with several: its key or its index.
        max_exits: How many places get deep heads before gates decide.
        recipe: How heads are trained on the frozen network.
        finetune: Train the network and its exits together instead, on ``train_data``, or on
            ``FineTune(train_data=...)``; not both are given.
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
        TrainingError: Fine-tuning diverged, or its checkpoint cannot be used.
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
        finetune=finetune,
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
        fitted: Per network what was trained; none where networks have no exits.
    """

    compiled: CompiledModel
    program: Program
    engines: Engines
    split: RowSplit
    candidates: Candidates | None = None
    table: ScoreTable | None = None
    costs: CostModel | None = None
    selection: Selection | None = None
    fitted: Sequence[Fitted] = ()


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
    backends = candidate_backends(settings)
    with reporting(progress) as reporter:
        return _Compilation(settings, backends, reporter).run(model, calib_data, train_data, logits)


@dataclass
class _Compilation:
    """One run of the compiler: what it was asked, and what it uses on the way."""

    settings: Settings
    backends: list[Backend]
    reporter: Reporter

    def run(self, model: Any, calib_data: Any, train_data: Any, logits: str | int | None) -> Details:
        started = time.monotonic()
        settings, reporter = self.settings, self.reporter
        train_data = training_source(train_data, settings.finetune)
        require_training_device(settings.finetune)
        if settings.finetune is not None:
            require_apart(calib_data, train_data)
        calib_data, example = peek(calib_data)
        with reporter.step("capturing the model"):
            captured = capture(model, example, logits=logits)
        program = captured.program
        rows, split = read_and_split(calib_data, program, settings, with_training=train_data is not None)
        data = training_data(train_data, rows, split, program, settings.finetune)
        findings = Findings(model_name(model), program, settings, split)
        findings.seconds = reporter.seconds
        with reporter.step("lowering the plain model"):
            lowerer = lowerer_for(self.backends)
            engines, times_us = fastest_plain(program, rows, self.backends, lowerer, settings.batch_size)
        plain_us = times_us[engines.backend.name]
        findings.chose_backend(engines.backend.name, times_us)
        fitted = fit_exits(program, data, rows, engines, settings, reporter)
        findings.fitted(fitted)
        delivery = Delivery(
            program,
            plain_us,
            captured.structure,
            engines,
            rows.take(split.certify),
            settings,
            findings,
            reporter,
            fitted.candidates,
        )
        if fitted.candidates is None:
            plain = delivery.of_plain(_no_place(fitted.places))
            return Details(plain, program, engines, split, fitted=(fitted,))
        learn = rows.take(split.learn)
        candidates = cast_candidates(fitted.candidates, typed_as(engines.backend))
        whole = engines.typed(program)
        original = None if fitted.tuned is None else whole
        table, costs = measure(candidates, [whole], learn, engines, settings, reporter, original)
        if fitted.tuned is not None:
            findings.tuned(fitted, table.backbone_correct, table.reference_correct)
        selection = select_points(candidates, table, costs, engines, learn, settings, reporter)
        findings.selected(selection, table, costs)
        compiled = delivery.of_selection(selection)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(compiled, program, engines, split, candidates, table, costs, selection, (fitted,))


def read_and_split(
    calib_data: Any, program: Program, settings: Settings, *, with_training: bool
) -> tuple[Rows, RowSplit]:
    """Calibration data as rows, checked against a program, and what each of them is for.

    Args:
        calib_data: As a user gives it.
        program: Its inputs and classes.
        settings: Seed and batch size.
        with_training: Whether heads are fitted on training data given apart.

    Raises:
        CalibrationError: The data cannot be used.
    """
    rows = read_rows(calib_data, list(program.inputs), minimum=FEWEST_ROWS)
    require_fit(rows, program)
    split = split_rows(
        len(rows), fit=0.0 if with_training else FIT_SHARE, certify=CERTIFY_SHARE, seed=settings.seed
    )
    require_rows(split, with_training=with_training, batch_size=settings.batch_size)
    return rows, split


def training_data(
    train_data: Any, rows: Rows, split: RowSplit, program: Program, finetune: FineTune | None
) -> TrainingData:
    """What heads, or the network with them, are trained on: the data given, or calibration rows set aside.

    Raises:
        CalibrationError: The data cannot be used; or a network would be tuned on its calibration rows.
        InputError: Inputs cannot be mixed.
        TrainingError: Checkpoints cannot be written.
    """
    if finetune is not None:  # what can be told now need not wait for hours
        if finetune.mixup:
            require_mixable({name: spec.dtype for name, spec in program.inputs.items()})
        if finetune.folder is not None:
            require_writable_folder(finetune.folder)
    if train_data is None:
        data = TrainingData(rows.take(split.fit), tuple(program.inputs))
    else:
        data = read_training_data(train_data, list(program.inputs), minimum=100)
    data = data.for_model(program)
    if finetune is not None:
        require_unseen(rows, data)
    return data


def training_source(train_data: Any, finetune: FineTune | None) -> Any:
    """What is trained on: the call's training data, or fine-tuning's own.

    Args:
        train_data: As given to the call; None: nothing.
        finetune: Perhaps with data of its own; None: heads alone are trained.

    Returns:
        The data as a user gives it; None: there is none, and none is needed.

    Raises:
        InputError: There are both; or there is neither, and calibration rows are too few, and too
            precious, to fine-tune on.
    """
    own = None if finetune is None else finetune.train_data
    if own is not None and train_data is not None:
        raise InputError(
            "training data are given twice, by train_data= and by FineTune(train_data=...)",
            where="finetune",
            remedy="give one of them: heads and network are trained on the same rows",
        )
    if finetune is not None and own is None and train_data is None:
        raise InputError(
            "fine-tuning needs training data, and none is given",
            where="finetune",
            remedy="give train_data=..., the rows that the network was trained on",
        )
    return train_data if own is None else own


def require_training_device(finetune: FineTune | None) -> None:
    """See that there is what a network is to be trained on, before anything slow.

    Raises:
        TrainingError: The device cannot be used.
    """
    if finetune is not None:
        training_device(finetune.device)


def measure(
    candidates: Candidates,
    wholes: Sequence[Program],
    learn: Rows,
    engines: Engines,
    settings: Settings,
    reporter: Reporter,
    original: Program | None = None,
) -> tuple[ScoreTable, CostModel]:
    """Scores on the learning rows, and measured times, of all candidates.

    Args:
        candidates: Sites and heads.
        wholes: Every network in one block, for its time.
        learn: The learning rows.
        engines: Of the target.
        settings: Batch size.
        reporter: Progress.
        original: The reference network before it was fine-tuned, one block; None: it was not.
    """
    with reporter.step("lowering segments and heads"):
        costs = measure_costs(candidates, wholes, engines, learn, settings.batch_size)
    with reporter.step("scoring calibration rows", len(learn) * (1 if original is None else 2)) as step:
        before = None
        if original is not None:
            before = plain_logits(original, engines, learn)
            step.advance(len(learn))
        return score_rows(candidates, engines, learn, step, before), costs


def model_name(model: Any) -> str:
    """What to call a model: its class, or the name of its file."""
    return Path(model).stem if isinstance(model, str | PathLike) else type(model).__name__


def _no_place(places: Sequence[Place]) -> str:
    if not places:
        return "the network has no place where it could be cut and an exit be put"
    return "at none of the places where the network can be cut did a linear probe know enough to go on"
