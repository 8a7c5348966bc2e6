"""``exitcompiler.cascade``: from several trained networks to one program that chooses among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx
from torch import nn
from torch.export import ExportedProgram

from exitcompiler.calibration import peek
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.cascade_tunings import Tuning, listed_tunings, named_tunings, training_sources
from exitcompiler.compiler import Details, measure, references_of
from exitcompiler.data import Rows
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines, typed_as
from exitcompiler.errors import InputError
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.float_layers import settle
from exitcompiler.input_transforms import Transform
from exitcompiler.naming import OWN
from exitcompiler.network_order import order_networks, topology_edges
from exitcompiler.networks import Network, read_networks
from exitcompiler.preparation import read_and_split, training_data
from exitcompiler.progress import Reporter, reporting
from exitcompiler.quantization import Quantizer
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scoring import float_logits, plain_logits
from exitcompiler.selection import select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import Target, candidate_backends, choose_target
from exitcompiler.training import HeadRecipe

__all__ = ["CascadeOptions", "cascade", "cascade_in_detail"]

logger = logging.getLogger(__name__)

Edges: TypeAlias = "nx.DiGraph[Any] | Iterable[tuple[int | str, int | str]]"


def cascade(
    networks: Sequence[nn.Module | ExportedProgram | str | PathLike[str]],
    calib_data: Any,
    *,
    edges: Edges | None = None,
    names: Sequence[str] | None = None,
    transforms: Sequence[Transform | None] | None = None,
    train_data: Any = None,
    early_exits: bool = False,
    max_accuracy_drop: float | None = None,
    latency_budget_ms: float | None = None,
    backend: str = "auto",
    precision: str | Sequence[str] = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    seed: int = 0,
    logits: str | int | None = None,
    max_exits: int = 1,
    recipe: HeadRecipe | None = None,
    finetune: Tuning = None,
    dump: str | PathLike[str] | None = None,
    progress: bool | None = None,
) -> CompiledModel:
    """Make one program of several trained classifiers: cheap first, expensive only when needed.

    Network selection of Bolukbasi et al. 2017 (section 4): after each network a learned policy answers,
    or sends the row on to any later network that the topology allows. Beyond the paper a network may
    answer together with those that ran before it, gates may look at the confidences of these and at how
    far they agree, and networks may have exits inside; all gates are learned in one bottom-up pass.

    Args:
        networks: Trained modules; or exported programs, or paths of ``.pt2`` files, with a dynamic batch.
            From cheap to expensive. The last one, in topological order, is the reference: accuracy drop
            and speed-up are told against it alone.
        calib_data: Held-out rows, a few thousand, that no network was trained on; forms as for ``compile``.
        edges: Which network may follow which: a networkx DiGraph, or pairs, of names or positions. By
            default every later one may follow every earlier one, so that networks can be jumped over.
        names: One per network; by default the class's or the file's name, numbered where it comes twice.
        transforms: Per network a function or module from the cascade's input tensors to its own (another
            size, another normalisation), or None; captured into the program.
        train_data: Rows to fit exit heads on, with ``early_exits``; with ``finetune`` networks are trained on
            them as well.
        early_exits: Let every network have exits of its own.
        max_accuracy_drop: How much accuracy may be lost against the reference, net, 0 to 1; 0.01 (one
            point) by default.
        latency_budget_ms: Instead: the mean latency of a call to keep, in milliseconds.
        backend: As for ``compile``.
        precision: As for ``compile``; or one for each network, ``"int8"`` or ``"fp32"``: the same network may
            come twice, first in int8 and then, for the doubtful rows, in float32.
        batch_size: Rows per call that costs are measured at; any size runs.
        threads: Threads per call; None: as many as this process may use.
        seed: Of everything that is random.
        logits: Which output holds the logits, for networks with several: its key or its index.
        max_exits: How many places in each network get deep heads, with ``early_exits``.
        recipe: How exit heads are trained.
        finetune: Train networks together with their exits, with ``early_exits``: one for each, None where a
            network stays as it is; or one for all, whose checkpoints then have a folder for each network.
            Each is trained on ``train_data``, or on its own ``FineTune(train_data=...)``; where all have
            their own, ``train_data`` is not given. Accuracy drops still count from the reference as it
            is given.
        dump: A folder for the program's text before and after every pass that changes it.
        progress: Show progress bars; None: on a terminal only.

    Returns:
        The compiled model. Where choosing does not pay it is the reference network alone, and
        ``explain()`` says why.

    Raises:
        UnsupportedModelError: A network cannot be captured; names it, the cause and a way out.
        CalibrationError: The data cannot be used.
        InputError: An option makes no sense, networks do not fit together (classes, inputs), edges make
            a cycle or leave a network out, or no operating point keeps the limit.
        BackendUnavailableError: A backend was named that is not installed.
        LoweringError: A block cannot be lowered, or its outputs differ from torch's.
        TrainingError: Fine-tuning diverged, or its checkpoint cannot be used.
    """
    settings = Settings(
        max_accuracy_drop=max_accuracy_drop,
        latency_budget_ms=latency_budget_ms,
        backend=backend,
        precision=_overall(precision, len(networks)),
        batch_size=batch_size,
        threads=threads,
        seed=seed,
        max_exits=max_exits,
        recipe=HeadRecipe() if recipe is None else recipe,
        dump=None if dump is None else Path(dump),
    )
    if not early_exits and any(given is not None for given in (train_data, recipe, finetune)):
        raise InputError(
            "train_data, recipe and finetune are for exits, and networks get none",
            remedy="early_exits=True, or leave them out",
        )
    precisions = None if isinstance(precision, str) else tuple(precision)
    options = CascadeOptions(edges, names, transforms, logits, early_exits, finetune, precisions)
    return cascade_in_detail(networks, calib_data, train_data, settings, options, progress).compiled


@dataclass(frozen=True)
class CascadeOptions:
    """The options that only ``cascade`` has; see there."""

    edges: Edges | None = None
    names: Sequence[str] | None = None
    transforms: Sequence[Transform | None] | None = None
    logits: str | int | None = None
    early_exits: bool = False
    finetune: Tuning = None
    precisions: Sequence[str] | None = None


def cascade_in_detail(
    networks: Sequence[nn.Module | ExportedProgram | str | PathLike[str]],
    calib_data: Any,
    train_data: Any,
    settings: Settings,
    options: CascadeOptions,
    progress: bool | None = None,
) -> Details:
    """What ``cascade`` does, with all that it found on the way.

    Args and errors are those of ``cascade``. ``Details.program`` is the reference network's.
    """
    backends = candidate_backends(settings)
    with reporting(progress) as reporter:
        return _Cascade(settings, options, backends, reporter).run(networks, calib_data, train_data)


@dataclass
class _Cascade:
    """One run: what was asked, and what it uses on the way."""

    settings: Settings
    options: CascadeOptions
    backends: list[Backend]
    reporter: Reporter

    def run(self, models: Sequence[Any], calib_data: Any, train_data: Any) -> Details:
        started = time.monotonic()
        settings, reporter = self.settings, self.reporter
        listed = listed_tunings(self.options.finetune, len(models))
        data_of = training_sources(train_data, calib_data, listed)
        calib_data, example = peek(calib_data)
        networks, edges, given = self._capture(models, example)
        reference = networks[-1]
        tunings = named_tunings(self.options.finetune, given)
        sources = dict(zip(given, data_of, strict=True))
        fits_heads = self.options.early_exits and any(source is None for source in data_of)
        rows, split = read_and_split(calib_data, reference.program, settings, with_training=not fits_heads)
        trained_on = {
            name: training_data(sources[name], rows, split, reference.program, tunings[name])
            for name in (given if self.options.early_exits else ())
        }
        findings = CascadeFindings(networks, edges, settings, split)
        findings.asked_to_tune(tunings)
        findings.seconds = reporter.seconds
        learn = rows.take(split.learn)
        precisions = dict(
            zip(given, self.options.precisions or [settings.precision] * len(given), strict=True)
        )
        required = precisions[reference.name] != "fp32"
        target = choose_target(reference.program, learn, self.backends, settings, reporter, required=required)
        engines = target.engines
        findings.chose_target(target)
        engines_of = self._engines_of(networks, precisions, target, learn, findings)
        fitted: dict[str, Fitted] = {}
        for network in networks if self.options.early_exits else ():
            name, own = network.name, replace(settings, finetune=tunings[network.name])
            fitted[name] = fit_exits(
                network.program, trained_on[name], learn, engines_of[name], own, reporter
            )
            findings.fitted_network(name, fitted[name])
        uncast = cascade_program([_member(network, fitted, engines_of) for network in networks], edges)
        candidates = uncast if _is_int8(engines) else engines.typed_candidates(uncast)
        wholes = [engines_of[network.name].typed(network.program) for network in networks]
        references = references_of(target, wholes[-1], learn, tuned=_is_tuned(reference, fitted))
        table, costs = measure(candidates, wholes, learn, target, settings, reporter, references)
        for network, whole in zip(networks, wholes, strict=True):
            if _is_tuned(network, fitted):
                before = table.plain_correct  # the table has no answers of others as they were given
                if network is not reference:
                    with reporter.step(f"scoring {network.name} as it was given"):
                        before = plain_logits(whole, engines, learn).argmax(axis=1) == table.targets
                after = table.correct((network.name, OWN))
                findings.tuned_network(network.name, fitted[network.name], after, before)
        selection = select_points(candidates, table, costs, engines, learn, settings, reporter)
        with reporter.step("comparing with parts of the cascade"):
            findings.selected(selection, table, costs)
        delivery = Delivery(
            reference.program, target, reference.structure, rows.take(split.certify), settings, findings,
            reporter, uncast,
        )  # fmt: skip
        compiled = delivery.of_selection(selection)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(
            compiled, reference.program, engines, split, candidates, table, costs, selection,
            tuple(fitted.values()),
        )  # fmt: skip

    def _engines_of(
        self,
        networks: Sequence[Network],
        precisions: Mapping[str, str],
        target: Target,
        learn: Rows,
        findings: CascadeFindings,
    ) -> dict[str, Engines]:
        """The engines of each network: one that is quantised is so in its own way."""
        engines = target.engines
        if not _is_int8(engines):
            return dict.fromkeys((network.name for network in networks), engines)
        found = {}
        for network in networks:
            found[network.name] = Engines(engines.backend, engines.lowerer)
            if precisions[network.name] == "fp32":
                continue
            if network is networks[-1]:
                found[network.name] = engines
                continue
            with self.reporter.step(f"quantising {network.name}") as step:
                trial = replace(found[network.name], quantizer=Quantizer(learn))
                exact = float_logits(network.program, learn)
                limit = self.settings.plain_limit
                settled = settle(network.program, trial, learn, exact, limit, step.advance)
            findings.quantized_network(network.name, settled)
            found[network.name] = settled.engines
        return found

    def _capture(
        self, models: Sequence[Any], example: Any
    ) -> tuple[tuple[Network, ...], frozenset[tuple[int, int]], list[str]]:
        """The networks in topological order, their edges by position in that; names as they were given."""
        options = self.options
        with self.reporter.step(f"capturing {len(models)} networks"):
            networks = read_networks(
                models, example, names=options.names, transforms=options.transforms, logits=options.logits
            )
        names = [network.name for network in networks]
        order = order_networks(topology_edges(options.edges, names), names)
        return tuple(networks[position] for position in order.order), order.edges, names


def _member(network: Network, fitted: Mapping[str, Fitted], engines_of: Mapping[str, Engines]) -> Member:
    """A network with its exits, where it has some; quantised, if it is to be.

    Other precisions are those of all networks, and are given to the cascade as a whole.
    """
    engines = engines_of[network.name]
    found = fitted[network.name].candidates if network.name in fitted else None
    if found is None:
        typed = engines.typed(network.program) if _is_int8(engines) else network.program
        return Member(replace(network, program=typed))
    found = engines.typed_candidates(found) if _is_int8(engines) else found
    blocks = {exit_name: found.block_of[exit_name] for exit_name in found.exits}
    return Member(network, found.program, blocks, found.heads)


def _is_int8(engines: Engines) -> bool:
    return typed_as(engines.backend) == "int8"


def _overall(precision: str | Sequence[str], count: int) -> str:
    """The precision of a cascade: of several, int8 if any network is.

    Raises:
        InputError: There is not one for each network, or one is neither int8 nor fp32.
    """
    if isinstance(precision, str) and precision != "auto":
        return precision
    if isinstance(precision, str):
        raise InputError(
            "a cascade has no precision 'auto'",
            where="precision",
            remedy="give one for all networks, or one for each: precision=['int8', 'fp32']",
        )
    if len(precision) != count or not set(precision) <= {"int8", "fp32"}:
        raise InputError(
            f"precision={list(precision)!r} for {count} networks",
            where="precision",
            remedy="give one for all; or one for each network, 'int8' or 'fp32'",
        )
    return "int8" if "int8" in precision else "fp32"


def _is_tuned(network: Network, fitted: Mapping[str, Fitted]) -> bool:
    return network.name in fitted and fitted[network.name].tuned is not None
