"""Trains a network and its exits together, and keeps checkpoints on the way."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Final

import torch
from torch import Tensor, nn

from exitcompiler.data import Extent, Inputs, Labels, TrainingData
from exitcompiler.errors import CalibrationError, TrainingError
from exitcompiler.finetuning.checkpoints import FILE, Checkpoint, read_checkpoint, write_checkpoint
from exitcompiler.finetuning.devices import device_name, memory_errors, training_device, training_dtype
from exitcompiler.finetuning.joint_network import JointNetwork, frozen_copy
from exitcompiler.finetuning.losses import exit_losses
from exitcompiler.finetuning.mixing import Target, mix_rows
from exitcompiler.finetuning.options import FineTune
from exitcompiler.optimizers import MuonAdamW, OptimizerState
from exitcompiler.program import Program
from exitcompiler.progress import Step
from exitcompiler.scores import HeadKey
from exitcompiler.training import for_speed

__all__ = ["Tuned", "train_jointly"]

logger = logging.getLogger(__name__)

FULL_PASS: Final = 0.95
"""A pass with fewer of the batches that were counted is told: the rates' cycle is not gone through."""


@dataclass(frozen=True)
class Tuned:
    """What fine-tuning came to.

    Args:
        program: The network with its new weights, one block.
        heads: (exit, kind) -> trained module.
        history: Mean loss of every exit, in order, and of the network's own end, per pass.
        seconds: Training time of this call; less than all of it where it went on from a checkpoint.
        resumed_at: How many passes were complete before this call.
        options: How it was trained.
        notes: What was given to be kept with checkpoints.
        device: What it was trained on, over all calls; None: not known.
        precision: What was multiplied in, likewise.
    """

    program: Program
    heads: Mapping[HeadKey, nn.Module]
    history: Sequence[Sequence[float]]
    seconds: float
    resumed_at: int
    options: FineTune
    notes: Mapping[str, Any]
    device: str | None = None
    precision: str | None = None


def train_jointly(
    program: Program,
    heads: Mapping[HeadKey, nn.Module],
    reads: Mapping[HeadKey, str],
    data: TrainingData,
    extent: Extent,
    options: FineTune,
    *,
    seed: int,
    step: Step,
    notes: Mapping[str, Any] | None = None,
) -> Tuned:
    """Train the network and its heads as one; neither the program nor the heads given are changed.

    Args:
        program: The captured network, one block: the start, and the teacher.
        heads: (exit, kind) -> module from cut value to logits, new.
        reads: (exit, kind) -> name of the cut value.
        data: Where rows come from; it checks them (``TrainingData.for_model``).
        extent: Of one pass of ``data`` in batches of ``options.batch_size``.
        options: How to train.
        seed: Of the order of rows and of mixing.
        step: Progress, one unit a batch.
        notes: Kept with checkpoints: see ``Checkpoint``.

    Raises:
        CalibrationError: A batch cannot be used, or none has two rows.
        TrainingError: The loss is not finite, memory is full, or a checkpoint cannot be used.
    """
    with memory_errors(options, lambda: "fine-tuning"):
        run = _Run.start(program, heads, reads, data, extent, options, seed, dict(notes or {}))
    resumed_at = run.position.epoch
    step.advance(run.position.epoch * extent.batches + run.position.batches)
    started = time.monotonic()
    with _notes_on_interruption(options), memory_errors(options, run.where):
        run.train(step)
    network = run.network.eval()
    network.move_to(torch.device("cpu"))
    tuned = dict(zip(network.keys, network.heads, strict=True))
    seconds = time.monotonic() - started
    return Tuned(
        network.tuned_program(), tuned, run.position.history, seconds, resumed_at, options, run.notes,
        run.notes.get("device"), run.notes.get("precision"),
    )  # fmt: skip


@dataclass
class _Position:
    """How far a training has come."""

    epoch: int = 0
    batches: int = 0
    steps: int = 0
    history: list[list[float]] = field(default_factory=list)
    sums: list[float] = field(default_factory=list)
    trained: int = 0
    """Batches of the pass that had two rows or more: all but perhaps the last one."""


@dataclass
class _Run:
    """One training: what it works on, and where it stands."""

    network: JointNetwork
    teacher: nn.Module | None
    data: TrainingData
    extent: Extent
    options: FineTune
    optimizer: MuonAdamW
    device: torch.device
    dtype: torch.dtype
    order: torch.Generator
    mixing: torch.Generator
    name: str
    notes: dict[str, Any]
    finite: frozenset[str]
    """Tensors of the network that were finite before, and have to stay so; a mask, say, is not."""
    position: _Position

    @classmethod
    def start(
        cls,
        program: Program,
        heads: Mapping[HeadKey, nn.Module],
        reads: Mapping[HeadKey, str],
        data: TrainingData,
        extent: Extent,
        options: FineTune,
        seed: int,
        notes: dict[str, Any],
    ) -> _Run:
        """A training from the start, or from its checkpoint."""
        device = training_device(options.device)
        network = JointNetwork(program, heads, reads, freeze_batchnorm=options.freeze_batchnorm)
        name = _name_of_run(network, extent, options, seed)
        finite = frozenset(path for path, tensor in network.state_dict().items() if _is_finite(tensor))
        network.train().move_to(device)
        teacher = None
        if options.teacher > 0.0 or not extent.labelled:
            teacher = frozen_copy(program, device)
        steps = options.epochs * -(-extent.batches // options.accumulate)
        optimizer = MuonAdamW(
            network.parameter_groups(
                lr=options.lr, adamw_lr=options.adamw_lr, head_lr=options.head_lr,
                head_adamw_lr=options.head_adamw_lr, weight_decay=options.weight_decay,
            ), steps,
        )  # fmt: skip
        order = torch.Generator().manual_seed(seed)
        mixing = torch.Generator().manual_seed(seed + 1)
        run = cls(
            network, teacher, data, extent, options, optimizer, device, training_dtype(device, options),
            order, mixing, name, notes, finite, _Position(sums=[0.0] * (len(heads) + 1)),
        )  # fmt: skip
        found = None if options.folder is None else read_checkpoint(options.folder, name)
        if found is not None:
            run.restore(found)
            logger.info("going on after %d complete passes, from %s", found.epoch, options.folder)
        if run.position.epoch < options.epochs:
            run.note_machine()
        if found is None:
            run.save(order.get_state(), torch.get_rng_state())
        return run

    def note_machine(self) -> None:
        """Keep with the checkpoints what this call trains on, behind what earlier ones did."""
        now = {"device": device_name(self.device), "precision": str(self.dtype).removeprefix("torch.")}
        for name, value in now.items():
            before = self.notes.get(name)
            told = before is not None and str(before).rpartition(", then ")[2] == value
            self.notes[name] = before if told else value if before is None else f"{before}, then {value}"

    def where(self) -> str:
        """For messages: the pass and batch that it stands at."""
        epoch, batches = self.position.epoch, self.position.batches
        if epoch and not batches:
            return f"fine-tuning, end of pass {epoch}"
        return f"fine-tuning, pass {epoch + 1}, batch {batches}"

    def train(self, step: Step) -> None:
        """All passes that are left."""
        epochs, position = self.options.epochs, self.position
        while position.epoch < epochs:
            began, before = time.monotonic(), position.batches
            self._pass(step)
            in_all = position.batches
            per_batch = (time.monotonic() - began) / max(in_all - before, 1)
            position.epoch += 1
            done = max(position.trained, 1)
            position.history.append([total / done for total in position.sums])
            position.sums = [0.0] * len(position.sums)
            position.batches = position.trained = 0
            self.save(self.order.get_state(), torch.get_rng_state())
            shown = ", ".join(f"{loss:.3f}" for loss in position.history[-1])
            left_min = math.ceil((epochs - position.epoch) * in_all * per_batch / 60)
            logger.info(
                "pass %d of %d: losses %s; about %d min left", position.epoch, epochs, shown, left_min
            )
            if in_all < FULL_PASS * self.extent.batches and position.epoch == 1:
                logger.warning(
                    "the first pass had %d batches, and %d were counted (the loader's length, in rows of its "
                    "first batch): the cycle of learning rates will end early, at a high rate",
                    in_all, self.extent.batches,
                )  # fmt: skip

    def _pass(self, step: Step) -> None:
        """The rest of one pass over the data."""
        position, options = self.position, self.options
        # Where the pass began: to go on in the middle of it the same rows are drawn again, and skipped.
        began = self.order.get_state(), torch.get_rng_state()
        written = time.monotonic()
        pending, note = False, None
        drawn = self.data.epoch(options.batch_size, self.order)
        for inputs, labels in islice(drawn, position.batches, self.extent.batches):
            position.batches += 1
            if len(next(iter(inputs.values()))) > 1:  # batch norm needs two rows
                losses = self._backward(inputs, labels)
                position.sums = [a + b for a, b in zip(position.sums, losses, strict=True)]
                position.trained += 1
                pending = True
                note = ", ".join(f"{loss:.2f}" for loss in losses)
                note = f"pass {position.epoch + 1}/{options.epochs}, losses {note}"
                if position.batches % options.accumulate == 0:
                    self._step()
                    pending = False
                    if time.monotonic() - written > 60 * options.checkpoint_minutes:
                        self.save(*began)
                        written = time.monotonic()
            step.advance(note=note)
        if pending:
            self._step()
        if position.steps == 0:
            raise CalibrationError(
                "no batch of two rows or more came",
                where="train_data",
                remedy="give more rows, or a loader that can be gone through several times",
            )

    def _step(self) -> None:
        self.optimizer.step()
        self.position.steps += 1

    def _backward(self, inputs: Inputs, labels: Labels | None) -> list[float]:
        """Run a batch, add up gradients, give the loss of each exit."""
        options = self.options
        placed = {name: for_speed(x).to(self.device, non_blocking=True) for name, x in inputs.items()}
        if (labels is not None) != self.extent.labelled:
            raise CalibrationError("some passes have labels and some have not", where="train_data")
        if labels is None:
            target = Target(self._taught(placed).argmax(dim=1))
        else:
            target = Target(torch.from_numpy(labels).to(self.device))
        if options.mixup and torch.rand((), generator=self.mixing) < options.mixup:
            placed, target = mix_rows(placed, target.labels, self.mixing)
        teacher = self._taught(placed) if options.teacher else None
        with self._autocast():
            logits = self.network(*placed.values())
        losses = exit_losses([answer.float() for answer in logits], target, teacher, options)
        (losses.sum() / options.accumulate).backward()  # type: ignore[no-untyped-call]
        found: list[float] = losses.detach().tolist()
        if not all(map(math.isfinite, found)):
            names = [*("/".join(key) for key in self.network.keys), "the network's end"]
            bad = [name for name, loss in zip(names, found, strict=True) if not math.isfinite(loss)]
            raise self._diverged(f"the loss is not finite at {', '.join(bad)}")
        return found

    @torch.no_grad()
    def _taught(self, inputs: Inputs) -> Tensor:
        """The original network's logits."""
        assert self.teacher is not None
        with self._autocast():
            (logits,) = self.teacher(*inputs.values())
        answer: Tensor = logits.float()
        return answer

    def _autocast(self) -> torch.autocast | nullcontext[None]:
        reduced = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16) if reduced else nullcontext()

    def _diverged(self, what: str) -> TrainingError:
        remedy = "lower lr and adamw_lr, turn mixed_precision off, or look for extreme values in the rows"
        folder = self.options.folder
        if folder is not None and (folder / FILE).is_file():
            what += f"; the checkpoint in {folder} is of before"
            remedy += "; and give another checkpoint folder: that one goes with the present options and rows"
        return TrainingError(what, where=self.where(), remedy=remedy)

    def save(self, order: Tensor, drawing: Tensor) -> None:
        """Write a checkpoint, if one is wanted.

        Args:
            order: State of the generator of the order of rows, at the start of the pass.
            drawing: State of torch's own generator then, which a user's loader may draw from.

        Raises:
            TrainingError: The weights are not finite, or it cannot be written.
        """
        state = self.network.state_dict()
        if not all(_is_finite(state[path]) for path in self.finite):  # and must not be kept
            raise self._diverged("weights or statistics are not finite any more")
        if self.options.folder is None:
            return
        kept = self.optimizer.state()
        tensors = {f"network.{path}": tensor for path, tensor in state.items()}
        tensors |= {f"optimizer.{path}": tensor for path, tensor in kept.tensors.items()}
        tensors |= {"rng.order": order, "rng.drawing": drawing, "rng.mixing": self.mixing.get_state()}
        position = self.position
        write_checkpoint(
            self.options.folder,
            Checkpoint(
                self.name, position.epoch, position.batches, position.steps, position.history,
                position.sums, kept.numbers, self.notes, tensors,
            ),
        )  # fmt: skip

    def restore(self, found: Checkpoint) -> None:
        """Go on from a checkpoint."""

        def part(name: str) -> dict[str, Tensor]:
            return {p.removeprefix(name): t for p, t in found.tensors.items() if p.startswith(name)}

        try:
            self.network.load_state_dict(part("network."))
            self.optimizer.restore(OptimizerState(part("optimizer."), found.numbers))
            self.order.set_state(found.tensors["rng.order"])
            torch.set_rng_state(found.tensors["rng.drawing"])
            self.mixing.set_state(found.tensors["rng.mixing"])
        except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"the checkpoint does not fit this version: {error}",
                where=str(self.options.folder),
                remedy="train anew in another folder",
            ) from error
        self.notes |= {name: found.notes[name] for name in ("device", "precision") if name in found.notes}
        self.position = _Position(
            found.epoch, found.batches, found.steps, found.history, found.sums, trained=found.batches
        )


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def _name_of_run(network: JointNetwork, extent: Extent, options: FineTune, seed: int) -> str:
    """A hash of all that decides what a training comes to, but for the rows themselves."""
    said = {**options.as_dict(), "seed": seed, "exits": network.keys, "values": network.values}
    said |= {"rows": extent.rows, "batches": extent.batches, "labelled": extent.labelled}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for path, tensor in network.state_dict().items():
        digest.update(f"{path} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextmanager
def _notes_on_interruption(options: FineTune) -> Iterator[None]:
    """Say, where Ctrl-C stops a training, what is kept and how to go on."""
    try:
        yield
    except KeyboardInterrupt as interruption:
        if options.folder is None:
            said = "nothing is kept: give a checkpoint folder to be able to go on next time"
        else:
            said = f"the last checkpoint is in {options.folder}: run the same again to go on from there"
        interruption.add_note(f"fine-tuning was stopped; {said}")
        raise
