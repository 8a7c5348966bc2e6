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
from typing import Any

import torch
from torch import Tensor, nn

from exitcompiler.data import Extent, Inputs, Labels, TrainingData
from exitcompiler.errors import CalibrationError, TrainingError
from exitcompiler.finetuning.checkpoints import FILE, Checkpoint, read_checkpoint, write_checkpoint
from exitcompiler.finetuning.joint_network import JointNetwork, frozen_copy
from exitcompiler.finetuning.losses import exit_losses
from exitcompiler.finetuning.mixing import Target, mix_rows
from exitcompiler.finetuning.options import FineTune
from exitcompiler.optimizers import MuonAdamW, OptimizerState
from exitcompiler.program import Program
from exitcompiler.progress import Step
from exitcompiler.scores import HeadKey
from exitcompiler.training import for_speed, supports_bfloat16

__all__ = ["Tuned", "train_jointly", "training_device"]

logger = logging.getLogger(__name__)


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
    """

    program: Program
    heads: Mapping[HeadKey, nn.Module]
    history: Sequence[Sequence[float]]
    seconds: float
    resumed_at: int
    options: FineTune
    notes: Mapping[str, Any]


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
        TrainingError: The loss is not finite, or a checkpoint cannot be used.
    """
    run = _Run.start(program, heads, reads, data, extent, options, seed, dict(notes or {}))
    resumed_at = run.position.epoch
    step.advance(run.position.epoch * extent.batches + run.position.batches)
    started = time.monotonic()
    with _notes_on_interruption(options):
        run.train(step)
    network = run.network.cpu().eval()
    tuned = dict(zip(network.keys, network.heads, strict=True))
    seconds = time.monotonic() - started
    return Tuned(
        network.tuned_program(), tuned, run.position.history, seconds, resumed_at, options, run.notes
    )


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
    order: torch.Generator
    mixing: torch.Generator
    name: str
    notes: dict[str, Any]
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
        network.to(device).train()
        teacher = None
        if options.teacher > 0.0 or not extent.labelled:
            teacher = frozen_copy(program).to(device)
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
            network, teacher, data, extent, options, optimizer, device, order, mixing, name, notes,
            _Position(sums=[0.0] * (len(heads) + 1)),
        )  # fmt: skip
        found = None if options.folder is None else read_checkpoint(options.folder, name)
        if found is None:
            run.save(order.get_state(), torch.get_rng_state())
        else:
            run.restore(found)
            logger.info("going on after %d complete passes, from %s", found.epoch, options.folder)
        return run

    def train(self, step: Step) -> None:
        """All passes that are left."""
        epochs = self.options.epochs
        while self.position.epoch < epochs:
            self._pass(step)
            self.position.epoch += 1
            done = max(self.position.trained, 1)
            self.position.history.append([total / done for total in self.position.sums])
            self.position.sums = [0.0] * len(self.position.sums)
            self.position.batches = self.position.trained = 0
            self.save(self.order.get_state(), torch.get_rng_state())
            shown = ", ".join(f"{loss:.3f}" for loss in self.position.history[-1])
            logger.info("pass %d of %d: losses %s", self.position.epoch, epochs, shown)

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
        reduced = self.options.mixed_precision and _multiplies_bfloat16(self.device)
        return torch.autocast(self.device.type, torch.bfloat16) if reduced else nullcontext()

    def _diverged(self, what: str) -> TrainingError:
        position = self.position
        kept = ""
        if self.options.folder is not None and (self.options.folder / FILE).is_file():
            kept = f"; the checkpoint in {self.options.folder} is of before"
        return TrainingError(
            f"{what}{kept}",
            where=f"fine-tuning, pass {position.epoch + 1}, batch {position.batches}",
            remedy="lower lr and adamw_lr, turn mixed_precision off, or look for extreme values in the rows",
        )

    def save(self, order: Tensor, drawing: Tensor) -> None:
        """Write a checkpoint, if one is wanted.

        Args:
            order: State of the generator of the order of rows, at the start of the pass.
            drawing: State of torch's own generator then, which a user's loader may draw from.

        Raises:
            TrainingError: The weights are not finite, or it cannot be written.
        """
        if not all(bool(parameter.isfinite().all()) for parameter in self.network.parameters()):
            raise self._diverged("the weights are not finite any more")  # and must not be kept
        if self.options.folder is None:
            return
        kept = self.optimizer.state()
        tensors = {f"network.{path}": tensor for path, tensor in self.network.state_dict().items()}
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
        except (IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise TrainingError(
                f"the checkpoint does not fit this version: {error}",
                where=str(self.options.folder),
                remedy="train anew in another folder",
            ) from error
        self.position = _Position(
            found.epoch, found.batches, found.steps, found.history, found.sums, trained=found.batches
        )


def training_device(name: str) -> torch.device:
    """What to train on: a device by its name, or with ``"auto"`` a GPU where there is one.

    Raises:
        TrainingError: It is not there, or cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise TrainingError(
            f"the device {name!r} cannot be used: {error}", where="FineTune", remedy="device='cpu' or 'auto'"
        ) from None
    return device


def _multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and supports_bfloat16()


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
        elif (options.folder / FILE).is_file():
            said = f"the last checkpoint is in {options.folder}: run the same again to go on from there"
        else:
            said = "the first checkpoint was not written yet"
        said = f"fine-tuning was stopped; {said}"
        interruption.add_note(said)
        raise
