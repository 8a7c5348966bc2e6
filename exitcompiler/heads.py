"""Exit heads: the small classifiers that answer at a cut point.

Two kinds stand at an exit, as in Bolukbasi et al. 2017, section 3: a linear classifier on pooled
features, and a deep one. Both give logits and the three confidence features that gates read.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from exitcompiler.controlflow import BATCH, ValueSpec
from exitcompiler.export import trace_body
from exitcompiler.naming import head_exit, value_name
from exitcompiler.program import ExitHead
from exitcompiler.scores import FEATURES, HeadKey

__all__ = [
    "Confidence",
    "ConvHead",
    "LinearHead",
    "TokenHead",
    "classifier_weights",
    "deep_head",
    "head_flops",
    "lower_head",
    "pool",
]

WORKING_MAP: Final = 8
"""A feature map is reduced until it is at most this wide; most of a head's work is done there."""


class Confidence(nn.Module):
    """A head with its confidence features: what ``scores.softmax_confidence`` computes, in the graph."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Answer.

        Args:
            features: The cut value, ``[batch, ...]``.

        Returns:
            Logits ``[batch, classes]`` and ``[batch, 3]``: max probability, margin, entropy over log C.
        """
        logits = self.head(features)
        log_p = F.log_softmax(logits, dim=1)
        p = log_p.exp()
        first = p.amax(dim=1, keepdim=True)  # alone, where a gate weighs nothing else
        second = p.topk(2, dim=1).values[:, 1:]
        entropy = (p * log_p).sum(dim=1, keepdim=True) * (-1.0 / math.log(logits.shape[1]))
        return logits, torch.cat([first, first - second, entropy], dim=1)


def pool(features: Tensor) -> Tensor:
    """Pooled features of any cut value: ``[batch, channels]``.

    A feature map is averaged over its pixels; of tokens, the average and the first one (which is the
    class token where there is one) stand side by side; a vector stays.

    Padded tokens count like all others, since a cut value carries no mask. Three dimensions are always
    read as tokens: of a 1-D convolution's ``[batch, C, L]`` the channels are averaged, not the positions.

    Args:
        features: ``[batch, C, H, W]``, ``[batch, H, W, C]`` (recognised by H = W), ``[batch, S, D]`` or
            ``[batch, D]``.
    """
    if features.ndim == 2:
        return features
    if features.ndim == 3:
        return torch.cat([features.mean(dim=1), features[:, 0]], dim=1)
    if features.ndim == 4:
        return features.mean(dim=(1, 2) if _channels_last(features.shape) else (2, 3))
    return features.flatten(2).mean(dim=2)


def _channels_last(shape: torch.Size | tuple[int | str, ...]) -> bool:
    return shape[1] == shape[2] != shape[3]


class LinearHead(nn.Module):
    """Pooled features, standardised, and one linear layer (Bolukbasi et al. 2017, section 3)."""

    def __init__(self, spec: ValueSpec, classes: int) -> None:
        super().__init__()
        width = pool(_zeros(spec)).shape[1]
        self.norm = nn.BatchNorm1d(width)
        self.linear = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        logits = self.linear(self.norm(pool(features)))
        assert isinstance(logits, Tensor)
        return logits


class TokenHead(nn.Module):
    """Pooled tokens (or a vector) and a multilayer perceptron."""

    def __init__(self, spec: ValueSpec, classes: int, *, width: int = 256) -> None:
        super().__init__()
        features = pool(_zeros(spec)).shape[1]
        width = min(width, 2 * features)
        self.layers = nn.Sequential(
            nn.BatchNorm1d(features),
            nn.Linear(features, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.GELU(),
        )
        self.linear = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        logits = self.linear(self.layers(pool(features)))
        assert isinstance(logits, Tensor)
        return logits


class _ConvBlock(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.block = _ConvBlock(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.as_tensor(self.block(x))


class ConvHead(nn.Module):
    """A narrow convolutional network on a feature map: strided convolutions with residual ones between.

    Strided convolutions double the width until the map is at most 8 wide; there the residual ones
    stand; one more halves the map, and its average is classified::

        16x32x32:  conv 32/2, residual, conv 64/2, 2 residuals, conv 128/2, average, linear

    In trials on ResNet-56 narrow and deep beat wide and shallow at equal cost (docs/heads.md).

    Args:
        spec: ``float32[batch, C, H, W]`` or ``[batch, H, W, C]``.
        classes: How many.
        width: Channels of the first convolution.
        residuals: Residual convolutions at the last map but one.
    """

    def __init__(self, spec: ValueSpec, classes: int, *, width: int, residuals: int) -> None:
        super().__init__()
        self.channels_last = _channels_last(spec.shape)
        sizes = [int(size) for size in spec.shape[1:]]
        channels, side = (sizes[2], sizes[0]) if self.channels_last else (sizes[0], min(sizes[1:]))
        layers: list[nn.Module] = []
        if side <= WORKING_MAP:
            layers.append(_ConvBlock(channels, width, 1))
            channels = width
        while side > WORKING_MAP:
            layers.append(_ConvBlock(channels, width, 2))
            side, channels = -(-side // 2), width
            if side > WORKING_MAP:
                layers.append(_Residual(width))
                width *= 2
        layers.extend(_Residual(channels) for _ in range(residuals))
        layers.append(_ConvBlock(channels, 2 * channels, 2 if side > 1 else 1))
        self.layers = nn.Sequential(*layers)
        self.linear = nn.Linear(2 * channels, classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits ``[batch, classes]``."""
        if self.channels_last:
            features = features.permute(0, 3, 1, 2)
        logits = self.linear(self.layers(features).mean(dim=(2, 3)))
        assert isinstance(logits, Tensor)
        return logits


WIDTHS: Final = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
RESIDUALS: Final = (1, 2, 3)
TOKEN_WIDTHS: Final = (256, 192, 128, 96, 64, 48, 32, 24, 16)
NEARLY: Final = 0.85


def deep_head(spec: ValueSpec, classes: int, *, budget_flops: float) -> nn.Module:
    """The deep head for a cut value: convolutions for feature maps, a perceptron for all else.

    Args:
        spec: Type of the cut value.
        classes: How many.
        budget_flops: What the head may cost for one row; the largest that fits is taken, the smallest
            there is where none fits.
    """
    if not _is_map(spec):
        return _token_head(spec, classes, budget_flops)
    heads = [
        ConvHead(spec, classes, width=width, residuals=residuals)
        for width in WIDTHS
        for residuals in RESIDUALS
    ]
    sized = [(head_flops(head, spec), head) for head in heads]
    fitting = [(flops, head) for flops, head in sized if flops <= budget_flops] or sized[:1]
    # Among heads of about the largest size that fits, the narrowest is the deepest.
    enough = NEARLY * max(flops for flops, _ in fitting)
    return next(head for flops, head in fitting if flops >= enough)


def _token_head(spec: ValueSpec, classes: int, budget_flops: float) -> TokenHead:
    """The widest that fits, or the narrowest."""
    for width in TOKEN_WIDTHS:
        head = TokenHead(spec, classes, width=width)
        if head_flops(head, spec) <= budget_flops:
            break
    return head


def classifier_weights(head: nn.Module) -> list[Tensor]:
    """The weights of a head's last layer, which an optimiser may want to treat apart."""
    return [head.linear.weight] if isinstance(head.linear, nn.Linear) else []


def _is_map(spec: ValueSpec) -> bool:
    return len(spec.shape) == 4 and min(int(size) for size in spec.shape[1:]) > 1


def head_flops(head: nn.Module, spec: ValueSpec) -> int:
    """Floating-point operations of a head for one row."""
    total = 0

    def count(layer: nn.Module, _: object, output: Tensor) -> None:
        nonlocal total
        weight = layer.weight
        assert isinstance(weight, Tensor)
        total += 2 * output.numel() * weight[0].numel()

    layers = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    training = head.training
    with torch.no_grad():
        head.eval()(_zeros(spec))
    head.train(training)
    for hook in hooks:
        hook.remove()
    return total


def _zeros(spec: ValueSpec) -> Tensor:
    return torch.zeros([1, *(int(size) for size in spec.shape[1:])])


def lower_head(key: HeadKey, module: nn.Module, value: str, spec: ValueSpec, classes: int) -> ExitHead:
    """A trained head as a graph that insert-exits can attach.

    Args:
        key: Exit name and kind.
        module: Cut value -> logits.
        value: Name of the cut value.
        spec: Its type.
        classes: How many.

    Raises:
        UnsupportedModelError: The module cannot be exported.
    """
    logits, confidence = value_name(*key, "logits"), value_name(*key, "confidence")
    body = trace_body(Confidence(module), {value: spec}, [logits, confidence])
    results = {
        logits: ValueSpec((BATCH, classes), "float32"),
        confidence: ValueSpec((BATCH, FEATURES), "float32"),
    }
    return ExitHead(head_exit(*key), body, results, (logits,))
