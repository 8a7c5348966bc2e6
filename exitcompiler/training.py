"""Fits exit heads on a frozen backbone: one stream of the data trains all of them together.

Nothing is cached, so memory stays bounded however much data there is, and a loader that augments
gives fresh rows in every epoch.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from typing import Final

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Inputs, Labels, TrainingData
from exitcompiler.errors import CalibrationError
from exitcompiler.fx_utils import extract_body
from exitcompiler.heads import classifier_weights
from exitcompiler.optimizers import MuonAdamW, ParameterGroup
from exitcompiler.program import Program
from exitcompiler.progress import Step
from exitcompiler.scores import HeadKey

__all__ = [
    "FeatureStream",
    "HeadRecipe",
    "for_speed",
    "head_group",
    "supports_bfloat16",
    "train_at_cuts",
    "train_heads",
]

logger = logging.getLogger(__name__)

MOST_EPOCHS: Final = 16


@dataclass(frozen=True)
class HeadRecipe:
    """How heads are trained.

    Muon for convolutions and hidden layers, AdamW for the rest, one cycle of the learning rate, label
    smoothing: what did best in trials on ResNet-56 (docs/heads.md). Distillation from the backbone
    brought nothing there, since on its own training images its softmax is almost the label.

    Args:
        epochs: Passes over the training data; None: as many as ``row_budget`` allows, 2 to 16.
        row_budget: How many rows to go through in all, counting each once per epoch.
        batch_size: Of data in memory; a loader's own batches are joined until they have as many rows.
        muon_lr: Peak learning rate of convolutions and hidden layers.
        adamw_lr: Peak learning rate of all other parameters.
        weight_decay: Of convolutions and hidden layers.
        label_smoothing: Of the cross entropy.
        budget_share: What one deep head may cost, as a share of the backbone's operations.
    """

    epochs: int | None = None
    row_budget: int = 300_000
    batch_size: int = 128
    muon_lr: float = 0.05
    adamw_lr: float = 4e-3
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    budget_share: float = 0.09

    def epochs_for(self, rows: int) -> int:
        """Passes over ``rows`` rows of training data."""
        if self.epochs is not None:
            return self.epochs
        return min(MOST_EPOCHS, max(2, round(self.row_budget / rows)))


@dataclass(frozen=True)
class FeatureStream:
    """Runs the backbone up to the deepest value asked for, and hands out the values at the cuts.

    Args:
        body: From the model's inputs to the values.
        values: Their names, in the body's order.
        reduced: Whether to compute in bfloat16, where the processor is faster with it.
    """

    body: fx.GraphModule
    values: tuple[str, ...]
    reduced: bool

    @classmethod
    def of(cls, program: Program, values: Sequence[str]) -> FeatureStream:
        """The stream of some values of a one-block program."""
        block = program.entry
        body = extract_body(block.body, list(block.params), list(values))
        return cls(body, tuple(values), reduced=supports_bfloat16())

    @torch.no_grad()
    def __call__(self, inputs: Inputs) -> dict[str, Tensor]:
        """The values for a batch, as float32 or bfloat16."""
        names = [node.name for node in self.body.graph.nodes if node.op == "placeholder"]
        with self.autocast():
            outputs = self.body(*(for_speed(inputs[name]) for name in names))
        return dict(zip(self.values, outputs, strict=True))

    def autocast(self) -> torch.autocast | nullcontext[None]:
        """The context in which heads are to be trained on these values."""
        return torch.autocast("cpu", torch.bfloat16) if self.reduced else nullcontext()


def supports_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 faster than float32."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def for_speed(tensor: Tensor) -> Tensor:
    """The same values in the layout that convolutions are fastest on."""
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def head_group(
    heads: Sequence[nn.Module], muon_lr: float, adamw_lr: float, weight_decay: float
) -> ParameterGroup:
    """The parameters of exit heads: all matrices but the classifiers' are hidden ones."""
    parameters = [parameter for head in heads for parameter in head.parameters()]
    classifiers = {id(weight) for head in heads for weight in classifier_weights(head)}
    matrices = [p for p in parameters if p.ndim > 1 and id(p) not in classifiers]
    chosen = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in chosen]
    return ParameterGroup(matrices, others, muon_lr, adamw_lr, weight_decay)


def train_heads(
    stream: FeatureStream,
    heads: Mapping[HeadKey, nn.Module],
    reads: Mapping[HeadKey, str],
    data: TrainingData,
    *,
    epochs: int,
    batches: int,
    recipe: HeadRecipe,
    seed: int,
    step: Step,
    target: str | None = None,
) -> None:
    """Train all heads on one stream of the frozen backbone, in place.

    A batch of a single row, which the last of an epoch may be, is left out: batch norm needs two.

    Args:
        stream: Gives every value in ``reads``, and ``target`` where it is given.
        heads: (exit, kind) -> module from cut value to logits.
        reads: (exit, kind) -> name of the cut value.
        data: Where rows come from; it checks them (``TrainingData.for_model``).
        epochs: Passes over the data.
        batches: How many batches an epoch has; what a loader gives beyond them is not drawn.
        recipe: How to train.
        seed: Of the order of rows.
        step: Progress, one unit a batch.
        target: The backbone's logits, where there are no labels: heads learn its answers.

    Raises:
        CalibrationError: A batch cannot be used, labels are there in one pass and not in another, the loss
            is not finite, or no batch has two rows.
    """
    generator = torch.Generator().manual_seed(seed)
    group = head_group(list(heads.values()), recipe.muon_lr, recipe.adamw_lr, recipe.weight_decay)
    optimizer = MuonAdamW([group], epochs * batches)
    for head in heads.values():
        head.train()
    trained_rows = 0
    for epoch in range(epochs):
        for inputs, labels in islice(data.epoch(recipe.batch_size, generator), batches):
            rows = len(next(iter(inputs.values())))
            if rows < 2:
                continue
            values = stream(inputs)
            targets = _targets(labels, None if target is None else values[target])
            loss = _backward(stream, heads, reads, values, targets, recipe)
            optimizer.step()
            trained_rows += rows
            step.advance(note=f"epoch {epoch + 1}/{epochs}, loss {loss:.3f}")
    for head in heads.values():
        head.eval()
    if trained_rows == 0:
        raise CalibrationError(
            "no batch of two rows or more came",
            where="train_data",
            remedy="give more rows, or a loader that can be gone through several times",
        )
    logger.info("trained %d heads for %d epochs on %d rows in all", len(heads), epochs, trained_rows)


def train_at_cuts(
    program: Program,
    cuts: Sequence[CutPoint],
    heads: Mapping[HeadKey, nn.Module],
    data: TrainingData,
    *,
    epochs: int,
    batches: int,
    recipe: HeadRecipe,
    seed: int,
    step: Step,
    target: str | None = None,
) -> None:
    """``train_heads`` on a one-block program, for heads that stand at cuts; its arguments and errors."""
    value_of = {cut.name: cut.value for cut in cuts}
    stream = FeatureStream.of(program, [*value_of.values(), *([target] if target else [])])
    reads = {key: value_of[key[0]] for key in heads}
    train_heads(
        stream, heads, reads, data,
        epochs=epochs, batches=batches, recipe=recipe, seed=seed, step=step, target=target,
    )  # fmt: skip


def _backward(
    stream: FeatureStream,
    heads: Mapping[HeadKey, nn.Module],
    reads: Mapping[HeadKey, str],
    values: Mapping[str, Tensor],
    labels: Tensor,
    recipe: HeadRecipe,
) -> float:
    """Run every head, add up gradients, give the mean of the losses."""
    total = 0.0
    for key, head in heads.items():
        with stream.autocast():
            logits = head(values[reads[key]])
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.label_smoothing)
        loss.backward()  # type: ignore[no-untyped-call]
        total += loss.item()
    if not math.isfinite(total):
        raise CalibrationError(
            "the loss of the exit heads is not finite",
            where="fitting heads",
            remedy="look for extreme values in the training inputs, or lower the recipe's learning rates",
        )
    return total / len(heads)


def _targets(labels: Labels | None, backbone_logits: Tensor | None) -> Tensor:
    if (labels is None) != (backbone_logits is not None):
        raise CalibrationError("some passes have labels and some have not", where="train_data")
    if labels is not None:
        return torch.from_numpy(labels)
    assert backbone_logits is not None
    return backbone_logits.argmax(dim=1)
