"""From a selection to what is handed over: packaged, checked, measured; or the plain engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np

from exitcompiler.candidates import Candidates, build_program
from exitcompiler.certify import answers_of, certify, check_one_file, check_parity, measure_speedup
from exitcompiler.controlflow import OutputStructure
from exitcompiler.data import Rows
from exitcompiler.engines import Engines, typed_as
from exitcompiler.findings import Findings
from exitcompiler.packaging import pack, point_name
from exitcompiler.program import Program
from exitcompiler.progress import Reporter
from exitcompiler.quantized_body import is_quantized
from exitcompiler.runtime.backends import Array
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.manifest import Artifact, Execution
from exitcompiler.scoring import float_logits
from exitcompiler.selection import Built, Selection
from exitcompiler.settings import Settings
from exitcompiler.targets import Target

__all__ = ["Delivery"]

WORTHWHILE: Final = 1.02
"""The lower end of the measured speed-up has to be above this, else the plain engine is the result."""

SPEEDUP_REPEATS: Final = 1500


@dataclass(frozen=True)
class Delivery:
    """What the last steps of a compilation work with.

    Args:
        original: The untouched backbone, or in a cascade the reference network, in float32: what accuracy
            is compared with.
        target: What is compiled for, and the plain engine that speed is compared with.
        structure: How the model hands over its logits.
        fresh: Rows that nothing was chosen on.
        settings: What was asked for.
        findings: What is reported.
        reporter: Progress.
        uncast: The candidates in float32, if there are any: what the outputs of exits are compared with.
    """

    original: Program
    target: Target
    structure: OutputStructure
    fresh: Rows
    settings: Settings
    findings: Findings
    reporter: Reporter
    uncast: Candidates | None = None

    @property
    def engines(self) -> Engines:
        """Of the backend that was chosen."""
        return self.target.engines

    def of_selection(self, selection: Selection) -> CompiledModel:
        """Package, check, measure; the plain engine where exits do not pay.

        Raises:
            LoweringError: A block cannot be lowered, or its outputs differ from torch's.
        """
        chosen = selection.chosen
        if chosen.point.policy.is_plain:
            return self.of_plain("nothing pays within the limit: every gate came out as 'always go on'")
        with self.reporter.step("packaging"):
            artifact = pack(
                [chosen, *selection.shipped],
                self.target.plain,
                self.target.plain_us,
                selection.frontier.plain.estimate,
                self.structure,
                self.engines.backend,
                self.engines.lowerer,
                self.settings,
            )
        compiled = CompiledModel(artifact, self.engines.backend)
        with self.reporter.step("checking outputs against torch"):
            self.findings.parity = self._check_points(compiled, selection)
        with self.reporter.step("measuring against the plain engine"):
            execution = self._faster_execution(compiled, self._precision_of(chosen.program))
            compiled = compiled.with_artifact(_with_execution(artifact, execution))
            latency = measure_speedup(
                compiled, compiled.plain, self.fresh, self.settings.batch_size,
                repeats=SPEEDUP_REPEATS, seed=self.settings.seed,
            )  # fmt: skip
        self.findings.measured(latency, execution, compiled)
        if latency["speedup"]["lower"] <= WORTHWHILE:
            return self.of_plain(
                f"the program does not pay: measured speed-up {latency['speedup']['value']:.3f} "
                f"(95 % interval from {latency['speedup']['lower']:.3f}), more than {WORTHWHILE} is asked for"
            )
        with self.reporter.step("certifying"):
            certificate, seen = certify(
                compiled, self._reference_answers(compiled), self.fresh, self.settings.drop_limit
            )
        self.findings.certified(certificate, seen)
        return self._complete(compiled, certificate)

    def of_plain(self, reason: str) -> CompiledModel:
        """The untouched backbone as the result, and why."""
        self.findings.refuse(reason)
        plain_us = self.target.plain_us
        if self.settings.budget_us is not None and plain_us > self.settings.budget_us:
            self.findings.note(
                f"the plain engine takes {plain_us * self.settings.batch_size / 1000:.3f} ms, more than "
                f"the budget of {self.settings.latency_budget_ms} ms"
            )
        artifact = pack(
            [], self.target.plain, plain_us, None, self.structure, self.engines.backend,
            self.engines.lowerer, self.settings,
        )  # fmt: skip
        compiled = CompiledModel(artifact, self.engines.backend)
        like = self.target.plain if typed_as(self.engines.backend) == "int8" else self.original
        self.findings.parity = check_parity(compiled, like, self.fresh, self._precision_of(like))
        reference = self._reference_answers(compiled)
        certificate, seen = certify(compiled, reference, self.fresh, self.settings.drop_limit)
        accuracy, before = certificate["accuracy"], certificate["backbone_accuracy"]
        excess = certificate["errors"] / certificate["rows"]
        compiled = compiled.with_artifact(_with_plain_accuracy(artifact, accuracy, before - accuracy, excess))
        if self.target.plain_precision == "fp32":
            return self._complete(compiled, None)
        # It is not the network that was given, so it has something to certify.
        self.findings.certified(certificate, seen)
        return self._complete(compiled, certificate)

    def _reference_answers(self, compiled: CompiledModel) -> Array:
        """The class that the original network gives every fresh row."""
        if self.engines.backend.precision == "fp32":
            return answers_of(compiled.plain, self.fresh)[0]
        return np.asarray(float_logits(self.original, self.fresh).argmax(axis=1))

    def _check_points(self, compiled: CompiledModel, selection: Selection) -> float:
        """Parity of every shipped point; many rows for the chosen one, a few for the others."""
        chosen = selection.chosen
        worst = check_parity(
            compiled, self._in_float32(chosen), self.fresh, self._precision_of(chosen.program)
        )
        for built in selection.shipped:
            other = compiled.select(name=point_name(built.point.accuracy_drop))
            wanted, precision = self._in_float32(built), self._precision_of(built.program)
            worst = max(worst, check_parity(other, wanted, self.fresh, precision, count=2))
        return worst

    def _precision_of(self, program: Program) -> str:
        """What a program computes in: one for a backend of precision int8 may be in float32 all the same."""
        precision = self.engines.backend.precision
        if precision != "int8" or any(is_quantized(block.body) for block in program.blocks):
            return precision
        return "fp32"

    def _in_float32(self, built: Built) -> Program:
        """The program of an operating point as it was before it was cast.

        What is quantised is compared with itself, as torch runs it.
        """
        if self.uncast is None or typed_as(self.engines.backend) in ("fp32", "int8"):
            return built.program
        return build_program(self.uncast, built.point.policy)

    def _faster_execution(self, compiled: CompiledModel, precision: str) -> Execution:
        """An engine per block, unless one engine of the one-file model is measurably faster for one row."""
        if compiled.backend.form == "torch" or compiled.backend.on_device:
            return "blocks"
        one_file = compiled.with_artifact(_with_execution(compiled.artifact, "single"))
        check_one_file(one_file, compiled, self.fresh, precision)
        times = measure_speedup(one_file, compiled, self.fresh, 1, repeats=400, seed=self.settings.seed)
        single, blocks = times["program"]["mean_ms"], times["plain"]["mean_ms"]
        self.findings.note(
            f"one row: an engine per block takes {blocks:.4f} ms, one engine of model.onnx {single:.4f} ms"
        )
        return "single" if times["speedup"]["lower"] > 1.0 else "blocks"

    def _complete(self, compiled: CompiledModel, certificate: Mapping[str, Any] | None) -> CompiledModel:
        """The same model with its report and certificate."""
        manifest = replace(compiled.artifact.manifest, certificate=certificate)
        self.findings.delivered(manifest.precision, self.target)
        artifact = replace(compiled.artifact, manifest=manifest, report=self.findings.report())
        return compiled.with_artifact(artifact, notes=self.findings.notes)


def _with_plain_accuracy(artifact: Artifact, accuracy: float, drop: float, excess: float) -> Artifact:
    (point,) = artifact.manifest.operating_points
    seen = replace(point.estimate, accuracy=accuracy, accuracy_drop=drop, excess_error=excess)
    measured = replace(point, estimate=seen)
    return replace(artifact, manifest=replace(artifact.manifest, operating_points=(measured,)))


def _with_execution(artifact: Artifact, execution: Execution) -> Artifact:
    points = artifact.manifest.operating_points
    changed = (replace(points[0], execution=execution), *points[1:])
    return replace(artifact, manifest=replace(artifact.manifest, operating_points=changed))
