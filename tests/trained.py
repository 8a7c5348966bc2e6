"""Small networks that are really trained, on images that are easy or hard by a known amount."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

CLASSES = 4
SIDE = 16


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.norm(self.conv(x)))


class SmallResNet(nn.Module):
    """Nine convolutions on 16x16 images."""

    def __init__(self, width: int = 16, blocks: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(width) for _ in range(blocks)))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        """Logits ``[batch, 4]`` of ``[batch, 1, 16, 16]``."""
        logits = self.head(self.blocks(F.relu(self.stem(image))).mean(dim=(2, 3)))
        assert isinstance(logits, Tensor)
        return logits


def stripes(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Stripes in four directions under noise whose strength varies from row to row.

    Returns:
        ``float32 [count, 1, 16, 16]`` and ``int64 [count]``.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    row, column = np.mgrid[0:SIDE, 0:SIDE]
    angle = labels[:, None, None] * np.pi / CLASSES
    phase = rng.uniform(0, 2 * np.pi, (count, 1, 1))
    wave = np.sin(1.2 * (np.cos(angle) * row + np.sin(angle) * column) + phase)
    noise = rng.normal(size=(count, SIDE, SIDE)) * rng.uniform(0.3, 3.0, (count, 1, 1))
    return (wave + noise).astype(np.float32)[:, None], labels.astype(np.int64)


@functools.cache
def trained_network() -> SmallResNet:
    """The network after four short epochs, the same in every test."""
    return _trained(16, 8, rate=8e-3)


@functools.cache
def trained_family() -> tuple[SmallResNet, ...]:
    """Three networks for the same images, cheap to expensive, each better than the one before it."""
    return _trained(4, 1, rate=2e-2), _trained(8, 2, rate=1e-2), trained_network()


@torch.enable_grad()
def _trained(width: int, blocks: int, rate: float) -> SmallResNet:
    torch.manual_seed(0)
    model = SmallResNet(width, blocks)
    x, y = (torch.from_numpy(part) for part in stripes(3000, seed=1))
    starts = [*range(0, 3000, 60)] * 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=len(starts))
    for start in starts:
        loss = F.cross_entropy(model(x[start : start + 60]), y[start : start + 60])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    return model.eval()
