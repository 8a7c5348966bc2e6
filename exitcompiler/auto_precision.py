"""``precision="auto"``: float32, int8, exits in either, and int8 first with float32 for the doubtful.

All come from one capture and one training of heads, run on one backend, and are timed in turns at the end.
The network twice, in int8 and in float32, is a cascade out of one model, without any training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from exitcompiler.candidates import Candidates
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.compiler import Details, measure, no_place, references_of
from exitcompiler.costs import CostModel
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines
from exitcompiler.errors import BackendUnavailableError, CalibrationError, InputError, LoweringError
from exitcompiler.findings import Findings
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.networks import Network, ending_in
from exitcompiler.preparation import Prepared, prepare
from exitcompiler.profile import programs_times_us
from exitcompiler.program import Program
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.scores import ScoreTable
from exitcompiler.selection import Selection, select_points
from exitcompiler.settings import DEFAULT_DROP, Settings
from exitcompiler.targets import Target, candidate_backends, choose_target

__all__ = ["compile_auto"]

logger = logging.getLogger(__name__)

FLOAT: Final = "fp32"
INT8: Final = "int8"
WITH_EXITS: Final = "exits in {}"
MIXED: Final = "int8, then fp32"


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


def compile_auto(
    model: Any,
    calib_data: Any,
    train_data: Any,
    settings: Settings,
    logits: str | int | None = None,
    progress: bool | None = None,
) -> Details:
    """The best of what there is in float32 and int8; arguments and errors are those of ``compile``.

    Where int8 cannot be had (no backend runs it, the quantiser or the accuracy does not bear it), that is
    said, and the rest is tried.
    """
    with reporting(progress) as reporter:
        return _Auto(settings, reporter).run(model, calib_data, train_data, logits)


@dataclass
class _Auto:
    """One run: what was asked, and what it uses on the way."""

    settings: Settings
    reporter: Reporter

    def run(self, model: Any, calib_data: Any, train_data: Any, logits: str | int | None) -> Details:
        started = time.monotonic()
        settings, reporter = self.settings, self.reporter
        given = prepare(model, calib_data, train_data, settings, logits, reporter)
        target, refused = self._target(given)
        fitted = fit_exits(given.program, given.data, given.rows, target.engines, settings, reporter)
        learned = self._learn_all(given, target, fitted)
        rows, best = self._compare(given, target, learned, refused)
        found = learned.get(best)
        findings = self._findings(given) if found is None else found.findings
        if found is None:
            findings.fitted(fitted)
        findings.seconds = reporter.seconds
        findings.chose_target(target)
        findings.compared_precisions(rows)
        delivery = Delivery(
            given.program, self._target_of(best, given, target), given.structure, given.fresh, settings,
            findings, reporter, fitted.candidates,
        )  # fmt: skip
        compiled = (
            delivery.of_plain(no_place(fitted.places) if fitted.candidates is None else _PLAIN_IS_BEST)
            if found is None
            else delivery.of_selection(found.selection)
        )
        logger.info("compiled in %.1f s", time.monotonic() - started)
        details = Details(compiled, given.program, target.engines, given.split, fitted=(fitted,))
        if found is None:
            return details
        return replace(
            details, candidates=found.candidates, table=found.table, costs=found.costs,
            selection=found.selection,
        )  # fmt: skip

    def _target(self, given: Prepared) -> tuple[Target, str | None]:
        """The network in int8, or, where that cannot be had, in float32, and why."""
        try:
            backends = candidate_backends(replace(self.settings, precision=INT8))
            return choose_target(given.program, given.learn, backends, self.settings, self.reporter), None
        except (BackendUnavailableError, CalibrationError, LoweringError) as error:
            logger.warning("int8 is left out: %s", error)
            backends = candidate_backends(replace(self.settings, precision=FLOAT))
            target = choose_target(given.program, given.learn, backends, self.settings, self.reporter)
            return target, error.what

    def _learn_all(self, given: Prepared, target: Target, fitted: Fitted) -> dict[str, _Learned]:
        if fitted.candidates is None:
            return {}
        engines, tuned = target.engines, fitted.tuned is not None
        in_float = fitted.candidates
        learned: dict[str, _Learned] = {}
        kinds: dict[str, tuple[Candidates, list[Program], Findings]] = {}
        float_findings = self._findings(given)
        kinds[WITH_EXITS.format(FLOAT)] = in_float, [given.program], float_findings
        if target.settled is not None:
            quantized = engines.typed_candidates(in_float)
            kinds[WITH_EXITS.format(INT8)] = quantized, [target.whole], self._findings(given)
            networks = [
                Network(name, ending_in(given.program, name), given.structure) for name in (INT8, FLOAT)
            ]
            blocks = {name: quantized.block_of[name] for name in quantized.exits}
            members = [Member(networks[0], quantized.program, blocks, quantized.heads), Member(networks[1])]
            edges = frozenset({(0, 1)})
            of_both = CascadeFindings(networks, edges, self.settings, given.split)
            of_both.fitted_network(INT8, fitted)
            kinds[MIXED] = cascade_program(members, edges), [target.whole, given.program], of_both
        for name, (candidates, wholes, findings) in kinds.items():
            found = self._learn(given, target, candidates, wholes, tuned=tuned)
            if found is None:
                continue
            table, costs, selection = found
            if not isinstance(findings, CascadeFindings):
                findings.fitted(fitted)
            if tuned:
                findings.tuned(fitted, table.backbone_correct, table.reference_correct)
            findings.selected(selection, table, costs)
            learned[name] = _Learned(findings, candidates, table, costs, selection)
        return learned

    def _learn(
        self, given: Prepared, target: Target, candidates: Candidates, wholes: list[Program], *, tuned: bool
    ) -> tuple[ScoreTable, CostModel, Selection] | None:
        """Scores, times and gates; None: nothing keeps the limit."""
        learn, settings, reporter = given.learn, self.settings, self.reporter
        references = references_of(target, learn, tuned=tuned)
        table, costs = measure(candidates, wholes, learn, target, settings, reporter, references)
        try:
            selection = select_points(candidates, table, costs, target.engines, learn, settings, reporter)
        except InputError as error:
            logger.info("%s", error)
            return None
        return table, costs, selection

    def _compare(
        self, given: Prepared, target: Target, learned: Mapping[str, _Learned], refused: str | None
    ) -> tuple[list[dict[str, Any]], str]:
        """All that was tried, timed in turns, and the name of the fastest that keeps the limit."""
        programs: dict[str, Program] = {FLOAT: given.program}
        drops = {FLOAT: 0.0}
        if target.settled is not None:
            programs[INT8], drops[INT8] = target.whole, target.settled.trial.drop.value
        for name, found in learned.items():
            chosen = found.selection.chosen
            if not chosen.point.policy.is_plain:
                programs[name], drops[name] = chosen.program, chosen.point.accuracy_drop
        with self.reporter.step("comparing precisions"):
            times = programs_times_us(
                [program.blocks for program in programs.values()], target.engines, given.learn,
                self.settings.batch_size,
            )  # fmt: skip
        mean_us = {
            name: learned[name].selection.chosen.retimed(part).mean_us if name in learned else part[0]
            for name, part in zip(programs, times, strict=True)
        }
        kept, best = self._best(drops, mean_us)
        rows = [
            {
                "name": name,
                "accuracy_drop": float(drops[name]),
                "mean_latency_ms": mean_us[name] * self.settings.batch_size / 1000.0,
                "kept": name in kept,
                "chosen": name == best,
            }
            for name in programs
        ]
        if refused is not None:
            rows.append({"name": INT8, "refused": refused, "kept": False, "chosen": False})
        return rows, best

    def _best(self, drops: Mapping[str, float], mean_us: Mapping[str, float]) -> tuple[list[str], str]:
        """Those that keep the limit, and the fastest of them; under a latency budget, the most accurate.

        Raises:
            InputError: None keeps the budget; says what the fastest takes.
        """
        settings = self.settings
        if settings.budget_us is None:
            limit = DEFAULT_DROP if settings.drop_limit is None else settings.drop_limit
            kept = [name for name, drop in drops.items() if drop <= limit]
            return kept, min(kept, key=mean_us.__getitem__)
        kept = [name for name, time_us in mean_us.items() if time_us <= settings.budget_us]
        if not kept:
            fastest_ms = min(mean_us.values()) * settings.batch_size / 1000.0
            raise InputError(
                f"nothing keeps a mean latency of {settings.latency_budget_ms} ms, neither in float32 nor "
                f"in int8; the fastest that was built takes {fastest_ms:.3f} ms",
                remedy="raise the budget",
            )
        return kept, min(kept, key=lambda name: (drops[name], mean_us[name]))

    def _target_of(self, best: str, given: Prepared, target: Target) -> Target:
        """What the best one is delivered for: float32 alone where no int8 is in it, or beside it."""
        if target.settled is None or best in (INT8, WITH_EXITS.format(INT8), MIXED):
            return target
        if target.plain is target.whole:  # it is compared with the network in int8
            return target
        old = target.engines
        backend = create_backend(old.backend.name, precision=FLOAT, threads=old.backend.threads)
        engines = Engines(backend, old.lowerer)
        return Target(engines, target.times_us, given.program, given.program, target.plain_us)

    def _findings(self, given: Prepared) -> Findings:
        return Findings(given.name, given.program, self.settings, given.split)


_PLAIN_IS_BEST: Final = "nothing with exits is faster, within the limit, than the network without them"
