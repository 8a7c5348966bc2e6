"""CIFAR-10 and its ResNets, for the benchmarks: data, weights, and the split that figures refer to.

The networks are those of He et al. 2016, "Deep Residual Learning", section 4.2, with option-A
shortcuts; weights as trained by akamaster/pytorch_resnet_cifar10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

__all__ = ["AugmentedImages", "CifarResNet", "Split", "images", "load_resnet", "load_split"]

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
TRAINING_ROWS = 30_000
DEVELOPMENT = slice(0, 5000)
FINAL = slice(5000, 10_000)


class _Shortcut(nn.Module):
    """Option A: every second pixel, new channels zero, half of them on either side."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = _Shortcut(outputs // 4) if stride == 2 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """A CIFAR ResNet of ``6 * blocks + 2`` layers.

    Args:
        blocks: Per stage: 3, 5, 7, 9 for ResNet-20, 32, 44, 56.
    """

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(_Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = nn.Sequential(*(_Block(32 if i else 16, 32, 1 if i else 2) for i in range(blocks)))
        self.layer3 = nn.Sequential(*(_Block(64 if i else 32, 64, 1 if i else 2) for i in range(blocks)))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[batch, 10]`` for normalised images ``[batch, 3, 32, 32]``."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits = self.linear(x.mean(dim=(2, 3)))
        assert isinstance(logits, Tensor)
        return logits


def load_resnet(weights: Path, depth: int) -> CifarResNet:
    """A trained network.

    Args:
        weights: The folder that holds ``resnet<depth>.safetensors``.
        depth: 20, 32, 44 or 56.
    """
    from safetensors.torch import load_file  # who defines a network only does not need it

    model = CifarResNet((depth - 2) // 6)
    model.load_state_dict(load_file(weights / f"resnet{depth}.safetensors"))
    return model.eval()


def images(pixels: np.ndarray) -> np.ndarray:
    """Normalised images ``float32 [n, 3, 32, 32]`` of pixels ``uint8 [n, 32, 32, 3]``."""
    scaled = pixels.astype(np.float32) / 255.0
    return np.ascontiguousarray(((scaled - MEAN) / STD).transpose(0, 3, 1, 2), dtype=np.float32)


class AugmentedImages:
    """Training batches with the usual augmentation: pad by 4, crop, flip; new in every pass.

    Args:
        pixels: ``uint8 [n, 32, 32, 3]``.
        labels: ``int64 [n]``.
        batch_size: Rows per batch; a last, smaller batch is left out.
        seed: Of order, crops and flips; None: they are drawn by torch's own generator, whose state a
            checkpoint of a training keeps.
    """

    def __init__(
        self, pixels: np.ndarray, labels: np.ndarray, batch_size: int = 128, seed: int | None = 0
    ) -> None:
        self._images = torch.from_numpy(images(pixels))
        self._labels = torch.from_numpy(labels)
        self._batch_size = batch_size
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __len__(self) -> int:
        return len(self._labels) // self._batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self._labels), generator=self._generator)
        # What the network saw beyond the border in its own training: black, that is -mean/std.
        border = (-torch.tensor(MEAN) / torch.tensor(STD)).view(1, 3, 1, 1)
        for start in range(0, len(self) * self._batch_size, self._batch_size):
            rows = order[start : start + self._batch_size]
            batch = F.pad(self._images[rows] - border, (4, 4, 4, 4)) + border
            yield self._crop(batch), self._labels[rows]

    def _crop(self, padded: Tensor) -> Tensor:
        count = len(padded)
        top, left = torch.randint(0, 9, (2, count), generator=self._generator)
        flip = torch.rand(count, generator=self._generator) < 0.5
        column = torch.arange(32).expand(count, 32)
        column = torch.where(flip[:, None], 31 - column, column) + left[:, None]
        row = torch.arange(32)[None, :] + top[:, None]
        picked = padded[torch.arange(count)[:, None, None], :, row[:, :, None], column[:, None, :]]
        return picked.permute(0, 3, 1, 2).contiguous()


@dataclass(frozen=True)
class Split:
    """Rows by what they may be used for.

    Args:
        train_pixels: ``uint8 [n, 32, 32, 3]``, for heads, and for whole networks where these are tuned.
        train_labels: ``int64 [n]``.
        x: Development rows of the test set, ``float32 [5000, 3, 32, 32]``: gates are learned here.
        y: Their labels.
        final_x: The other test rows: every reported figure is from them.
        final_y: Their labels.
    """

    train_pixels: np.ndarray
    train_labels: np.ndarray
    x: np.ndarray
    y: np.ndarray
    final_x: np.ndarray
    final_y: np.ndarray


def load_split(data: Path, training_rows: int = TRAINING_ROWS) -> Split:
    """Read ``cifar10_train.npz`` and ``cifar10_test.npz``, each with ``x`` uint8 and ``y`` int64.

    Args:
        data: The folder that holds them.
        training_rows: How many of the 50,000 training images, the first ones.
    """
    with np.load(data / "cifar10_train.npz", allow_pickle=False) as train:
        pixels, labels = train["x"][:training_rows], train["y"][:training_rows]
    with np.load(data / "cifar10_test.npz", allow_pickle=False) as test:
        x, y = images(test["x"]), test["y"]
    return Split(pixels, labels, x[DEVELOPMENT], y[DEVELOPMENT], x[FINAL], y[FINAL])
