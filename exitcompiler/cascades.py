"""``exitcompiler.cascade``: from several trained networks to one program that chooses among them."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx
from torch import nn
from torch.export import ExportedProgram

from exitcompiler.calibration import peek
from exitcompiler.candidates import cast_candidates
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.compiler import Details, measure, read_and_split, training_data
from exitcompiler.data import Rows, TrainingData
from exitcompiler.delivery import Delivery
from exitcompiler.engines import Engines, lowerer_for, typed_as
from exitcompiler.errors import InputError
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.input_transforms import Transform
from exitcompiler.network_order import order_networks, topology_edges
from exitcompiler.networks import Network, read_networks
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.selection import select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import candidate_backends, fastest_plain
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
    precision: str = "fp32",
    batch_size: int = 1,
    threads: int | None = None,
    seed: int = 0,
    logits: str | int | None = None,
    max_exits: int = 1,
    recipe: HeadRecipe | None = None,
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
        train_data: Rows to fit exit heads on, with ``early_exits``.
        early_exits: Let every network have exits of its own.
        max_accuracy_drop: How much accuracy may be lost against the reference, net, 0 to 1; 0.01 (one
            point) by default.
        latency_budget_ms: Instead: the mean latency of a call to keep, in milliseconds.
        backend: As for ``compile``.
        precision: As for ``compile``.
        batch_size: Rows per call that costs are measured at; any size runs.
        threads: Threads per call; None: as many as this process may use.
        seed: Of everything that is random.
        logits: Which output holds the logits, for networks with several: its key or its index.
        max_exits: How many places in each network get deep heads, with ``early_exits``.
        recipe: How exit heads are trained.
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
    if not early_exits and (train_data is not None or recipe is not None):
        raise InputError(
            "train_data and recipe are for exit heads, and networks get none",
            remedy="early_exits=True, or leave them out",
        )
    options = CascadeOptions(edges, names, transforms, logits, early_exits)
    return cascade_in_detail(networks, calib_data, train_data, settings, options, progress).compiled


@dataclass(frozen=True)
class CascadeOptions:
    """The options that only ``cascade`` has; see there."""

    edges: Edges | None = None
    names: Sequence[str] | None = None
    transforms: Sequence[Transform | None] | None = None
    logits: str | int | None = None
    early_exits: bool = False


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
        calib_data, example = peek(calib_data)
        networks, edges = self._capture(models, example)
        wholes = [network.program for network in networks]
        reference = networks[-1]
        fits_heads = self.options.early_exits and train_data is None
        rows, split = read_and_split(calib_data, reference.program, settings, with_training=not fits_heads)
        findings = CascadeFindings(networks, edges, settings, split)
        findings.seconds = reporter.seconds
        with reporter.step("lowering the reference network"):
            engines, times_us = fastest_plain(
                reference.program, rows, self.backends, lowerer_for(self.backends), settings.batch_size
            )
        plain_us = times_us[engines.backend.name]
        findings.chose_backend(engines.backend.name, times_us)
        data = None
        if self.options.early_exits:
            data = training_data(train_data, rows, split, reference.program)
        learn = rows.take(split.learn)
        members = [self._member(network, data, engines, findings, learn) for network in networks]
        uncast = cascade_program(members, edges)
        candidates = cast_candidates(uncast, typed_as(engines.backend))
        wholes = [engines.typed(whole) for whole in wholes]
        table, costs = measure(candidates, wholes, learn, engines, settings, reporter)
        selection = select_points(candidates, table, costs, engines, learn, settings, reporter)
        with reporter.step("comparing with parts of the cascade"):
            findings.selected(selection, table, costs)
        delivery = Delivery(
            reference.program, plain_us, reference.structure, engines, rows.take(split.certify), settings,
            findings, reporter, uncast,
        )  # fmt: skip
        compiled = delivery.of_selection(selection)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(compiled, reference.program, engines, split, candidates, table, costs, selection)

    def _capture(
        self, models: Sequence[Any], example: Any
    ) -> tuple[tuple[Network, ...], frozenset[tuple[int, int]]]:
        """The networks in topological order, and their edges by position in that."""
        options = self.options
        with self.reporter.step(f"capturing {len(models)} networks"):
            networks = read_networks(
                models, example, names=options.names, transforms=options.transforms, logits=options.logits
            )
        names = [network.name for network in networks]
        order = order_networks(topology_edges(options.edges, names), names)
        return tuple(networks[position] for position in order.order), order.edges

    def _member(
        self,
        network: Network,
        data: TrainingData | None,
        engines: Engines,
        findings: CascadeFindings,
        sample: Rows,
    ) -> Member:
        """A network with its exits, where it shall have some."""
        if data is None:
            return Member(network)
        fitted: Fitted = fit_exits(network.program, data, sample, engines, self.settings, self.reporter)
        findings.fitted_network(network.name, fitted)
        if fitted.candidates is None:
            return Member(network)
        found = fitted.candidates
        blocks = {exit_name: found.block_of[exit_name] for exit_name in found.exits}
        return Member(network, found.program, blocks, found.heads)
