"""Programs with exits for the GPU benchmark: random weights, and gates that let a chosen share of rows leave.

Latency does not ask whether answers are right, so nothing is trained here and no data is needed. What it
does ask for is real: a network that is captured, cut and lowered as the compiler does it, heads that are
computed, gates that read their scores, and rows that differ, so that they take different ways.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from cifar import CifarResNet
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exitcompiler.capture import capture
from exitcompiler.controlflow import Branch, Edge, LinearGate, Return, successors
from exitcompiler.cut_points import CutPoint
from exitcompiler.heads import LinearHead, lower_head
from exitcompiler.naming import LINEAR, head_exit, value_name
from exitcompiler.passes.eliminate_dead_code import eliminate_dead_code
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.insert_exits import insert_exits
from exitcompiler.passes.merge_blocks import merge_blocks
from exitcompiler.passes.set_gates import BranchSetting, set_gates
from exitcompiler.passes.split_block import block_name, split_block
from exitcompiler.program import ExitHead, Program
from exitcompiler.verify import verify

__all__ = [
    "MODELS",
    "PLACES",
    "SHARES",
    "ImageResNet",
    "Recipe",
    "Workload",
    "build_workload",
    "choose_cuts",
    "rows_like_images",
    "settle",
    "thresholds",
    "untrained_head",
]

SHARES: Final = (0.5, 0.25)
"""Of all rows, how many leave at each exit; the others go to the end."""
PLACES: Final = (1 / 3, 2 / 3)
"""Of the network's FLOPs, how many lie before each exit, about."""
_SPREAD: Final = 0.8
"""Standard deviation of a head's logits over the logarithm of its classes: not all confidences are then
low, nor all high."""


class _Bottleneck(nn.Module):
    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            convolution = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(convolution, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


class ImageResNet(nn.Module):
    """A residual network for 224x224 images (He et al. 2016, table 1): by default the one of 50 layers.

    Args:
        blocks: Of each stage.
        width: Channels of the stem.
        classes: How many.
    """

    def __init__(self, blocks: Sequence[int] = (3, 4, 6, 3), width: int = 64, classes: int = 1000) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages, inputs = [], width
        for stage, count in enumerate(blocks):
            inner, layers = width * 2**stage, []
            for index in range(count):
                layers.append(_Bottleneck(inputs, inner, 2 if stage and not index else 1))
                inputs = 4 * inner
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.linear = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, classes]`` of images ``[batch, 3, height, width]``."""
        x = F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1)
        logits = self.linear(self.stages(x).mean(dim=(2, 3)))
        assert isinstance(logits, Tensor)
        return logits


@dataclass(frozen=True)
class Recipe:
    """A network of the benchmark.

    Args:
        network: Makes a new one; its weights depend on torch's seed.
        side: Of its images, in pixels.
        rows: How many are made.
        classes: How many.
    """

    network: Callable[[], nn.Module]
    side: int
    rows: int
    classes: int


MODELS: Final = {
    "resnet56": Recipe(partial(CifarResNet, 9), side=32, rows=256, classes=10),
    "resnet50": Recipe(ImageResNet, side=224, rows=64, classes=1000),
}


@dataclass(frozen=True)
class Workload:
    """What is measured.

    Args:
        network: In eval mode, on the CPU.
        whole: It, captured: a program of one block.
        program: It with exits and gates.
        x: Rows, ``float32 [n, 3, height, width]``.
        exit_index: Where each leaves, by scores computed in batches on the CPU: ``int64 [n]``.
    """

    network: nn.Module
    whole: Program
    program: Program
    x: npt.NDArray[np.float32]
    exit_index: npt.NDArray[np.int64]


@torch.no_grad()
def build_workload(
    network: nn.Module,
    x: Tensor,
    classes: int,
    *,
    shares: Sequence[float] = SHARES,
    places: Sequence[float] = PLACES,
    seed: int = 0,
) -> Workload:
    """Capture a network and give it exits that the given shares of the given rows leave at.

    Args:
        network: Untrained will do; its batch-norm statistics are set to those of ``x``.
        x: ``float32 [n, 3, height, width]``.
        classes: How many.
        shares: Of all rows, how many leave at each exit.
        places: Of the FLOPs, how many lie before each exit.
        seed: Of the heads' weights.
    """
    settle(network, x)
    whole = capture(network, x[:4]).program
    cuts = choose_cuts(find_cut_points(whole), places)
    torch.manual_seed(seed)
    features = _cut_values(split_block(whole, cuts), [cut.value for cut in cuts], x)
    heads = [
        (untrained_head(cut, feature, classes), cut) for cut, feature in zip(cuts, features, strict=True)
    ]
    scores = np.stack(
        [
            head.body(feature)[1][:, 0].numpy()  # the highest probability
            for (head, _), feature in zip(heads, features, strict=True)
        ]
    )
    limits, exit_index = thresholds(scores, shares)
    program = insert_exits(split_block(whole, cuts), {block_name(cut.name): [head] for head, cut in heads})
    gates = {
        block_name(cut.name): _leave_above(limit, cut, program)
        for cut, limit in zip(cuts, limits, strict=True)
    }
    program = merge_blocks(eliminate_dead_code(set_gates(program, gates)))
    verify(program)
    return Workload(network, whole, program, x.numpy(), exit_index)


def choose_cuts(found: Sequence[CutPoint], places: Sequence[float]) -> list[CutPoint]:
    """For every place the cut that is nearest to it, each cut once.

    Args:
        found: At least as many as there are places.
        places: Shares of the FLOPs, rising.
    """
    free = list(found)
    chosen = []
    for place in places:
        chosen.append(min(free, key=lambda cut: abs(cut.flops_share - place)))
        free.remove(chosen[-1])
    return sorted(chosen, key=lambda cut: cut.flops_share)


def thresholds(
    scores: npt.NDArray[Any], shares: Sequence[float]
) -> tuple[list[float], npt.NDArray[np.int64]]:
    """For every exit the limit above which the given share of all rows leaves there.

    A limit lies half-way between the scores of two rows, so that rounding makes no row change its mind.

    Args:
        scores: ``[exits, rows]``.
        shares: Of all rows, for each exit; together below 1.

    Returns:
        The limits, and where each row leaves: ``int64 [rows]``, ``len(shares)`` for the end.
    """
    rows = scores.shape[1]
    exit_index = np.full(rows, len(shares), np.int64)
    limits = []
    for index, share in enumerate(shares):
        here = np.flatnonzero(exit_index == len(shares))
        ranked = here[np.argsort(-scores[index, here], kind="stable")]
        leave = round(share * rows)
        above, below = scores[index, ranked[leave - 1]], scores[index, ranked[leave]]
        limits.append(float((float(above) + float(below)) / 2))
        exit_index[ranked[:leave]] = index
    return limits, exit_index


def rows_like_images(count: int, side: int, seed: int = 0) -> Tensor:
    """Smooth random pictures whose contrast and colour differ: ``float32 [count, 3, side, side]``."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 8, 8, generator=generator)
    smooth = F.interpolate(coarse, size=(side, side), mode="bilinear")
    noise = torch.randn(count, 3, side, side, generator=generator)
    contrast = torch.empty(count, 1, 1, 1).uniform_(0.3, 2.0, generator=generator)
    colour = torch.randn(count, 3, 1, 1, generator=generator)
    return contrast * smooth + 0.3 * noise + 0.5 * colour


def settle(network: nn.Module, x: Tensor) -> None:
    """Set batch-norm statistics to those of the rows, so that values stay of order one; then eval mode."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    network.train()
    with torch.no_grad():
        network(x[:32])
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    network.eval()


def untrained_head(cut: CutPoint, feature: Tensor, classes: int) -> ExitHead:
    """An untrained linear head whose logits are spread as those of a trained one are.

    Args:
        cut: Where it stands.
        feature: The value there, for some rows.
        classes: How many.
    """
    head = LinearHead(cut.spec, classes)
    settle(head, feature)
    scale = _SPREAD * math.log(classes) / max(float(head(feature).std()), 1e-6)
    head.linear.weight.mul_(scale)
    head.linear.bias.mul_(scale)
    return lower_head((cut.name, LINEAR), head, cut.value, cut.spec, classes)


def _cut_values(chain: Program, names: Sequence[str], x: Tensor, rows: int = 32) -> list[Tensor]:
    """The values at the cuts, for all rows, computed a few rows at a time."""
    parts: list[list[Tensor]] = [[] for _ in names]
    for start in range(0, len(x), rows):
        values = dict(zip(chain.inputs, [x[start : start + rows]], strict=True))
        for block in chain.blocks:
            values |= block.run(values)
        for part, name in zip(parts, names, strict=True):
            part.append(values[name])
    return [torch.cat(part) for part in parts]


def _leave_above(limit: float, cut: CutPoint, program: Program) -> BranchSetting:
    """A gate that lets rows leave whose highest probability is not below a limit."""
    reads = (value_name(cut.name, LINEAR, "confidence"),)
    gate = LinearGate(reads, ((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (-limit, 0.0))
    onward = _next_block(program, block_name(cut.name))
    return BranchSetting(gate, (head_exit(cut.name, LINEAR), onward), cut.name)


def _next_block(program: Program, name: str) -> str:
    terminator = program.block(name).terminator
    assert isinstance(terminator, Branch)
    (way,) = (way for way in successors(terminator) if not isinstance(way, Return))
    assert isinstance(way, Edge)
    return way.target
