"""``precision="auto"``: float32, int8, exits in either, and int8 first with float32 for the doubtful.

All come from one capture and one training of heads, run on one backend, and are timed in turns at the end.
The network twice, in int8 and in float32, is a cascade out of one model, without any training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from exitcompiler.candidates import Candidates
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.compiler import Details, measure, no_place, references_of
from exitcompiler.costs import CostModel
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines
from exitcompiler.errors import (
    BackendUnavailableError,
    CalibrationError,
    ExitCompilerError,
    InputError,
    LoweringError,
    PassError,
)
from exitcompiler.findings import Findings
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.networks import Network, ending_in
from exitcompiler.preparation import Prepared, prepare
from exitcompiler.profile import programs_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import ScoreTable
from exitcompiler.selection import Selection, select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import Target, candidate_backends, choose_target

__all__ = ["compile_auto"]

logger = logging.getLogger(__name__)

FLOAT: Final = "fp32"
INT8: Final = "int8"
IN_FLOAT: Final = "exits in fp32"
IN_INT8: Final = "exits in int8"
MIXED: Final = "int8, then fp32"

_REFUSALS: Final = (CalibrationError, InputError, LoweringError, PassError)
"""What keeps one way from being had, and is no reason to give up the others."""


@dataclass(frozen=True)
class _Learned:
    """Exits, or a cascade, in one precision or two, with its gates.

    Args:
        findings: What is reported of it.
        candidates: What there was to choose from.
        table: Scores on the learning rows.
        costs: Measured times.
        selection: What was learned.
    """

    findings: Findings
    candidates: Candidates
    table: ScoreTable
    costs: CostModel
    selection: Selection


@dataclass
class _Comparison:
    """What is known of every way, by name, in the order of the table.

    Args:
        drops: Accuracy drop against float32, estimated.
        mean_us: Mean time of a row.
        refused: Why one cannot be had.
    """

    drops: dict[str, float] = field(default_factory=dict)
    mean_us: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def rows(self, kept: list[str], chosen: str, batch_size: int) -> list[dict[str, Any]]:
        """The table, for the report."""
        rows: list[dict[str, Any]] = []
        for name in (FLOAT, INT8, IN_FLOAT, IN_INT8, MIXED):
            row: dict[str, Any] = {"name": name, "kept": name in kept, "chosen": name == chosen}
            if name in self.mean_us:
                row["accuracy_drop"] = float(self.drops[name])
                row["mean_latency_ms"] = self.mean_us[name] * batch_size / 1000.0
            if name in self.refused:
                row["refused"] = self.refused[name]
            if len(row) > 3:
                rows.append(row)
        return rows


def compile_auto(
    model: Any,
    calib_data: Any,
    train_data: Any,
    settings: Settings,
    logits: str | int | None = None,
    progress: bool | None = None,
) -> Details:
    """The best of what there is in float32 and int8; arguments and errors are those of ``compile``.

    Where something cannot be had (no backend runs int8, the quantiser or the accuracy does not bear it,
    nothing keeps the limit), that is said, and the rest is tried.
    """
    with reporting(progress) as reporter:
        return _Auto(settings, reporter).run(model, calib_data, train_data, logits)


@dataclass
class _Auto:
    """One run: what was asked, what it uses on the way, and what it has found."""

    settings: Settings
    reporter: Reporter
    comparison: _Comparison = field(default_factory=_Comparison)

    def run(self, model: Any, calib_data: Any, train_data: Any, logits: str | int | None) -> Details:
        started = time.monotonic()
        settings, reporter = self.settings, self.reporter
        given = prepare(model, calib_data, train_data, settings, logits, reporter)
        target = self._target(given)
        fitted = fit_exits(given.program, given.data, given.rows, target.engines, settings, reporter)
        learned = self._learn_all(given, target, fitted)
        self._time(given, target, learned)
        compiled, best = self._deliver(given, target, fitted, learned)
        logger.info("compiled in %.1f s: %s", time.monotonic() - started, best)
        details = Details(compiled, given.program, target.engines, given.split, fitted=(fitted,))
        if best not in learned:
            return details
        found = learned[best]
        return replace(
            details, candidates=found.candidates, table=found.table, costs=found.costs,
            selection=found.selection,
        )  # fmt: skip

    def _target(self, given: Prepared) -> Target:
        """The network in int8, or, where that cannot be had, in float32."""
        try:
            backends = candidate_backends(replace(self.settings, precision=INT8))
            return choose_target(given.program, given.learn, backends, self.settings, self.reporter)
        except (BackendUnavailableError, CalibrationError, LoweringError) as error:
            self._refuse(INT8, error)
            backends = candidate_backends(replace(self.settings, precision=FLOAT))
            return choose_target(given.program, given.learn, backends, self.settings, self.reporter)

    def _refuse(self, name: str, error: ExitCompilerError) -> None:
        logger.warning("%s is left out: %s", name, error)
        self.comparison.refused[name] = error.what

    def _learn_all(self, given: Prepared, target: Target, fitted: Fitted) -> dict[str, _Learned]:
        learned: dict[str, _Learned] = {}
        for name, make in self._ways(given, target, fitted):
            try:
                learned[name] = make()
            except _REFUSALS as error:
                self._refuse(name, error)
                continue
            if learned[name].selection.chosen.point.policy.is_plain:
                reason = "nothing pays within the limit: every gate came out as 'always go on'"
                self.comparison.refused[name] = reason
        return learned

    def _ways(
        self, given: Prepared, target: Target, fitted: Fitted
    ) -> Iterator[tuple[str, Callable[[], _Learned]]]:
        """Everything but the network alone."""
        in_float = fitted.candidates
        if in_float is not None:
            yield IN_FLOAT, lambda: self._exits(given, target, fitted, in_float, given.program)
        if target.settled is None:
            return
        if in_float is not None:
            yield (
                IN_INT8,
                lambda: self._exits(
                    given, target, fitted, target.engines.typed_candidates(in_float), target.whole
                ),
            )
        yield MIXED, lambda: self._both(given, target, fitted)

    def _exits(
        self, given: Prepared, target: Target, fitted: Fitted, candidates: Candidates, whole: Program
    ) -> _Learned:
        """The network with exits, in one precision."""
        findings = self._findings(given)
        findings.fitted(fitted)
        references = references_of(target, whole, given.learn, tuned=fitted.tuned is not None)
        table, costs = measure(
            candidates, [whole], given.learn, target, self.settings, self.reporter, references
        )
        if fitted.tuned is not None:
            findings.tuned(fitted, table.backbone_correct, table.plain_correct)
        return self._learned(given, target, findings, candidates, table, costs)

    def _both(self, given: Prepared, target: Target, fitted: Fitted) -> _Learned:
        """The network in int8, with exits if it has some, and then in float32 as it was given."""
        networks = [Network(name, ending_in(given.program, name), given.structure) for name in (INT8, FLOAT)]
        first = Member(replace(networks[0], program=ending_in(target.whole, INT8)))
        if fitted.candidates is not None:
            chain = target.engines.typed_candidates(fitted.candidates)
            blocks = {name: chain.block_of[name] for name in chain.exits}
            first = Member(networks[0], chain.program, blocks, chain.heads)
        edges = frozenset({(0, 1)})
        candidates = cascade_program([first, Member(networks[1])], edges)
        findings = CascadeFindings(networks, edges, self.settings, given.split)
        findings.fitted_network(INT8, fitted)
        # The reference is the network as it was given, whatever comes before it.
        references = references_of(target, given.program, given.learn, tuned=False)
        wholes = [target.whole, given.program]
        table, costs = measure(
            candidates, wholes, given.learn, target, self.settings, self.reporter, references
        )
        return self._learned(given, target, findings, candidates, table, costs)

    def _learned(
        self,
        given: Prepared,
        target: Target,
        findings: Findings,
        candidates: Candidates,
        table: ScoreTable,
        costs: CostModel,
    ) -> _Learned:
        selection = select_points(
            candidates, table, costs, target.engines, given.learn, self.settings, self.reporter
        )
        findings.selected(selection, table, costs)
        return _Learned(findings, candidates, table, costs, selection)

    def _time(self, given: Prepared, target: Target, learned: Mapping[str, _Learned]) -> None:
        """All that was built, and the network alone, in turns."""
        found, programs = self.comparison, {FLOAT: given.program}
        found.drops[FLOAT] = 0.0
        if target.settled is not None:
            programs[INT8], found.drops[INT8] = target.whole, target.settled.trial.drop.value
        for name, one in learned.items():
            if name not in found.refused:
                programs[name] = one.selection.chosen.program
                found.drops[name] = one.selection.chosen.point.accuracy_drop
        with self.reporter.step("comparing precisions"):
            times = programs_times_us(
                [program.blocks for program in programs.values()], target.engines, given.learn,
                self.settings.batch_size,
            )  # fmt: skip
        for name, part in zip(programs, times, strict=True):
            built = learned[name].selection.chosen if name in learned else None
            found.mean_us[name] = part[0] if built is None else built.retimed(part).mean_us

    def _kept(self) -> list[str]:
        """Those that keep the limit, the best first.

        Raises:
            InputError: None keeps the latency budget; says what the fastest takes.
        """
        drops, mean_us, settings = self.comparison.drops, self.comparison.mean_us, self.settings
        if settings.budget_us is None:
            assert settings.drop_limit is not None
            limits = {INT8: settings.plain_limit}
            kept = [n for n, drop in drops.items() if drop <= limits.get(n, settings.drop_limit)]
            return sorted(kept, key=mean_us.__getitem__)
        kept = [name for name, time_us in mean_us.items() if time_us <= settings.budget_us]
        if not kept:
            fastest_ms = min(mean_us.values()) * settings.batch_size / 1000.0
            raise InputError(
                f"nothing keeps a mean latency of {settings.latency_budget_ms} ms, neither in float32 nor in "
                f"int8; the fastest that was built takes {fastest_ms:.3f} ms",
                remedy="raise the budget",
            )
        return sorted(kept, key=lambda name: (drops[name], mean_us[name]))

    def _deliver(
        self, given: Prepared, target: Target, fitted: Fitted, learned: Mapping[str, _Learned]
    ) -> tuple[CompiledModel, str]:
        """The best one that holds when it is checked and measured, and its name.

        Raises:
            LoweringError: Of none the outputs agree with torch's.
        """
        kept, compiled, failed = self._kept(), None, None
        for best in kept:
            findings = learned[best].findings if best in learned else self._findings(given)
            if best not in learned:
                findings.fitted(fitted)
            findings.seconds = self.reporter.seconds
            chosen = self._delivered(best, given, target)
            findings.chose_target(target)
            findings.compared_precisions(self.comparison.rows(kept, best, self.settings.batch_size))
            delivery = Delivery(
                given.program, chosen, given.structure, given.fresh, self.settings, findings, self.reporter,
                fitted.candidates,
            )  # fmt: skip
            if best not in learned:
                nowhere = fitted.candidates is None and not learned
                return delivery.of_plain(no_place(fitted.places) if nowhere else _PLAIN_IS_BEST), best
            try:
                compiled = delivery.of_selection(learned[best].selection)
            except LoweringError as error:
                self._refuse(best, error)
                failed = error
                continue
            refused = compiled.artifact.report["refused"]
            if not refused:
                return compiled, best
            self.comparison.refused[best] = str(refused)
        if compiled is None:
            assert failed is not None
            raise failed
        # Under a latency budget the network alone need not be among those that keep it.
        return compiled, FLOAT if compiled.artifact.manifest.precision == FLOAT else INT8

    def _delivered(self, best: str, given: Prepared, target: Target) -> Target:
        """What it is delivered for: what comes back, if that is the network alone, is what was chosen."""
        if target.settled is None:
            return target
        mean_us = self.comparison.mean_us
        if best == INT8:
            return replace(target, plain=target.whole, plain_us=mean_us[INT8])
        if best != FLOAT and not (best == IN_FLOAT and target.plain is given.program):
            return target
        old = target.engines
        backend = create_backend(old.backend.name, precision=FLOAT, threads=old.backend.threads)
        engines = Engines(backend, old.lowerer)
        return Target(engines, target.times_us, given.program, given.program, mean_us[FLOAT])

    def _findings(self, given: Prepared) -> Findings:
        return Findings(given.name, given.program, self.settings, given.split)


_PLAIN_IS_BEST: Final = "nothing with exits is faster, within the limit, than the network without them"
