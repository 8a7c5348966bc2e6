"""``exitcompiler.compile``: from a trained network and a calibration set to a program with exits."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from exitcompiler.candidates import Candidates
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows, RowSplit
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines
from exitcompiler.findings import Findings
from exitcompiler.finetuning.options import FineTune
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.placement import Place
from exitcompiler.preparation import prepare
from exitcompiler.profile import measure_costs
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import References, plain_logits, score_rows
from exitcompiler.selection import Selection, select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import Target, candidate_backends, choose_target
from exitcompiler.training import HeadRecipe

__all__ = [
    "Details",
    "compile",
    "compile_in_detail",
    "measure",
    "no_place",
    "references_of",
]

logger = logging.getLogger(__name__)


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
        precision: ``"fp32"``; or ``"int8"``, ``"bf16"``, ``"fp16"`` where the backend has it: scores, times
            and the plain engine to beat are of that precision; accuracy drops count from float32. Or
            ``"auto"``: the fastest, within the limit, of the network in float32 and in int8, with exits and
            without, and in int8 with float32 for the doubtful rows.
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
    if settings.precision == "auto":
        from exitcompiler.auto_precision import compile_auto

        return compile_auto(model, calib_data, train_data, settings, logits, progress)
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
        given = prepare(model, calib_data, train_data, settings, logits, reporter)
        program, split, learn = given.program, given.split, given.learn
        findings = Findings(given.name, program, settings, split)
        findings.seconds = reporter.seconds
        target = choose_target(program, learn, self.backends, settings, reporter)
        engines = target.engines
        findings.chose_target(target)
        fitted = fit_exits(program, given.data, given.rows, engines, settings, reporter)
        findings.fitted(fitted)
        delivery = Delivery(
            program, target, given.structure, given.fresh, settings, findings, reporter, fitted.candidates
        )
        if fitted.candidates is None:
            plain = delivery.of_plain(no_place(fitted.places))
            return Details(plain, program, engines, split, fitted=(fitted,))
        candidates = engines.typed_candidates(fitted.candidates)
        references = references_of(target, target.whole, learn, tuned=fitted.tuned is not None)
        table, costs = measure(candidates, [target.whole], learn, target, settings, reporter, references)
        if fitted.tuned is not None:
            findings.tuned(fitted, table.backbone_correct, table.plain_correct)
        selection = select_points(candidates, table, costs, engines, learn, settings, reporter)
        findings.selected(selection, table, costs)
        compiled = delivery.of_selection(selection)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(compiled, program, engines, split, candidates, table, costs, selection, (fitted,))


def measure(
    candidates: Candidates,
    wholes: Sequence[Program],
    learn: Rows,
    target: Target,
    settings: Settings,
    reporter: Reporter,
    references: References,
) -> tuple[ScoreTable, CostModel]:
    """Scores on the learning rows, and measured times, of all candidates.

    Args:
        candidates: Sites and heads.
        wholes: Every network in one block, for its time.
        learn: The learning rows.
        target: What they run on, and are compared with.
        settings: Batch size.
        reporter: Progress.
        references: What else answers are compared with.
    """
    with reporter.step("lowering segments and heads"):
        costs = measure_costs(candidates, wholes, target.engines, learn, settings.batch_size)
    with reporter.step("scoring calibration rows", len(learn)) as step:
        return score_rows(candidates, target.engines, learn, step, references), costs


def references_of(target: Target, whole: Program, learn: Rows, *, tuned: bool) -> References:
    """What the candidates' answers are compared with.

    Args:
        target: Of the network as it was given.
        whole: That network as it ends the candidates, but not tuned: in float32, or as ``target`` has it.
        learn: The learning rows, which the target was chosen on.
        tuned: Whether the candidates' own end is another one.
    """
    if tuned and target.original is None:
        return References(plain_logits(whole, target.engines, learn))
    return References(target.original, target.whole_logits if whole is target.whole else None)


def no_place(places: Sequence[Place]) -> str:
    """Why a network gets no exits."""
    if not places:
        return "the network has no place where it could be cut and an exit be put"
    return "at none of the places where the network can be cut did a linear probe know enough to go on"
