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

from exitcompiler.calibration import peek, require_apart
from exitcompiler.candidates import cast_candidates
from exitcompiler.cascade_findings import CascadeFindings
from exitcompiler.cascade_program import Member, cascade_program
from exitcompiler.compiler import (
    Details,
    measure,
    read_and_split,
    require_training_device,
    training_data,
    training_source,
)
from exitcompiler.delivery import Delivery
from exitcompiler.engines import lowerer_for, typed_as
from exitcompiler.errors import InputError
from exitcompiler.finetuning.options import FineTune, require_finetune
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.input_transforms import Transform
from exitcompiler.naming import OWN
from exitcompiler.network_order import order_networks, topology_edges
from exitcompiler.networks import Network, read_networks
from exitcompiler.progress import Reporter, reporting
from exitcompiler.runtime.backends import Backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scoring import plain_logits
from exitcompiler.selection import select_points
from exitcompiler.settings import Settings
from exitcompiler.targets import candidate_backends, fastest_plain
from exitcompiler.training import HeadRecipe

__all__ = ["CascadeOptions", "cascade", "cascade_in_detail"]

logger = logging.getLogger(__name__)

Edges: TypeAlias = "nx.DiGraph[Any] | Iterable[tuple[int | str, int | str]]"
Tuning: TypeAlias = FineTune | Sequence[FineTune | None] | None


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
        precision: As for ``compile``.
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
        precision=precision,
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
    options = CascadeOptions(edges, names, transforms, logits, early_exits, finetune)
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
        listed = _listed(self.options.finetune, len(models))
        data_of = _sources(train_data, calib_data, listed)
        calib_data, example = peek(calib_data)
        networks, edges, given = self._capture(models, example)
        wholes = [network.program for network in networks]
        reference = networks[-1]
        tunings = _tunings(self.options.finetune, given)
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
        with reporter.step("lowering the reference network"):
            engines, times_us = fastest_plain(
                reference.program, rows, self.backends, lowerer_for(self.backends), settings.batch_size
            )
        plain_us = times_us[engines.backend.name]
        findings.chose_backend(engines.backend.name, times_us)
        learn = rows.take(split.learn)
        fitted: dict[str, Fitted] = {}
        for network in networks if self.options.early_exits else ():
            data, own = trained_on[network.name], replace(settings, finetune=tunings[network.name])
            fitted[network.name] = fit_exits(network.program, data, learn, engines, own, reporter)
            findings.fitted_network(network.name, fitted[network.name])
        uncast = cascade_program([_member(network, fitted) for network in networks], edges)
        candidates = cast_candidates(uncast, typed_as(engines.backend))
        wholes = [engines.typed(whole) for whole in wholes]
        original = wholes[-1] if _is_tuned(reference, fitted) else None
        table, costs = measure(candidates, wholes, learn, engines, settings, reporter, original)
        for network, whole in zip(networks, wholes, strict=True):
            if _is_tuned(network, fitted):
                before = table.reference_correct  # the table has no answers of others as they were given
                if network is not reference:
                    with reporter.step(f"scoring {network.name} as it was given"):
                        before = plain_logits(whole, engines, learn).argmax(axis=1) == table.targets
                after = table.correct((network.name, OWN))
                findings.tuned_network(network.name, fitted[network.name], after, before)
        selection = select_points(candidates, table, costs, engines, learn, settings, reporter)
        with reporter.step("comparing with parts of the cascade"):
            findings.selected(selection, table, costs)
        delivery = Delivery(
            reference.program, plain_us, reference.structure, engines, rows.take(split.certify), settings,
            findings, reporter, uncast,
        )  # fmt: skip
        compiled = delivery.of_selection(selection)
        logger.info("compiled in %.1f s", time.monotonic() - started)
        return Details(
            compiled, reference.program, engines, split, candidates, table, costs, selection,
            tuple(fitted.values()),
        )  # fmt: skip

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


def _member(network: Network, fitted: Mapping[str, Fitted]) -> Member:
    """A network with its exits, where it has some."""
    found = fitted[network.name].candidates if network.name in fitted else None
    if found is None:
        return Member(network)
    blocks = {exit_name: found.block_of[exit_name] for exit_name in found.exits}
    return Member(network, found.program, blocks, found.heads)


def _is_tuned(network: Network, fitted: Mapping[str, Fitted]) -> bool:
    return network.name in fitted and fitted[network.name].tuned is not None


def _listed(finetune: Tuning, count: int) -> list[FineTune | None]:
    """How each network is tuned, in the order that they were given in; None: not at all.

    Args:
        finetune: As the user gave it.
        count: Of networks.

    Raises:
        InputError: It is no ``FineTune``; there is not one for each; or two have one checkpoint folder,
            where the second would find, after hours, the training of the first.
    """
    if not isinstance(finetune, Sequence) or isinstance(finetune, str | bytes):
        require_finetune(finetune)
        return [finetune] * count
    for tuning in finetune:
        require_finetune(tuning)
    if len(finetune) != count:
        raise InputError(
            f"finetune has {len(finetune)} entries for {count} networks",
            where="finetune",
            remedy="give one for each, None where a network stays as it is; or one FineTune for all",
        )
    folders = [tuning.folder.resolve() for tuning in finetune if tuning is not None and tuning.folder]
    twice = sorted({str(folder) for folder in folders if folders.count(folder) > 1})
    if twice:
        raise InputError(
            f"several networks have the same checkpoint folder: {', '.join(twice)}",
            where="finetune",
            remedy="give another folder for each; or one FineTune for all, which makes a folder for each",
        )
    return list(finetune)


def _tunings(finetune: Tuning, names: Sequence[str]) -> dict[str, FineTune | None]:
    """How each network is tuned, by name; of one for all each gets a checkpoint folder of its own.

    Args:
        finetune: As the user gave it.
        names: Of the networks, in the order that they were given in.

    Raises:
        InputError: As ``_listed``.
    """
    tunings = dict(zip(names, _listed(finetune, len(names)), strict=True))
    if isinstance(finetune, FineTune) and finetune.folder is not None:
        return {name: replace(finetune, checkpoint=finetune.folder / name) for name in names}
    return tunings


def _sources(train_data: Any, calib_data: Any, tunings: Sequence[FineTune | None]) -> list[Any]:
    """What each network, or its heads alone, are trained on; None: nothing is given.

    Args:
        train_data: As the user gave it: for all that have no data of their own.
        calib_data: As the user gave it.
        tunings: How each network is tuned.

    Raises:
        InputError: One that is tuned has no data; or ``train_data`` is for none, as all have their own.
        CalibrationError: A network would be tuned on calibration data.
        TrainingError: A device to train on cannot be used.
    """
    own = [tuning is not None and tuning.train_data is not None for tuning in tunings]
    sources = [
        training_source(None if has and not all(own) else train_data, tuning)
        for tuning, has in zip(tunings, own, strict=True)
    ]
    for tuning, source in zip(tunings, sources, strict=True):
        require_training_device(tuning)
        if tuning is not None:
            require_apart(calib_data, source)
    return sources
