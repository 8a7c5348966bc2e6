"""What the exits of a program are trained to minimise together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from exitcompiler.finetuning.mixing import Target
from exitcompiler.finetuning.options import FineTune

__all__ = ["exit_losses", "survival_weights"]


def exit_losses(
    logits: Sequence[Tensor], target: Target, teacher: Tensor | None, options: FineTune
) -> Tensor:
    """The weighted loss of every exit and of the network's own end.

    Args:
        logits: ``float32[batch, classes]`` of every exit in order, the network's own last.
        target: What the rows should be answered with.
        teacher: The original network's logits, where the options ask for them.
        options: The weights; their docstring has the formula.

    Returns:
        ``float32[exits + 1]``; the sum is what is minimised.
    """
    last = logits[-1].detach()
    weights = survival_weights(logits, options.focus)
    losses = []
    for number, (answer, rows) in enumerate(zip(logits, weights, strict=True)):
        is_last = number == len(logits) - 1
        loss = (1.0 - options.teacher) * target.cross_entropy(answer, options.label_smoothing)
        if teacher is not None:
            loss = loss + options.teacher * _distilled(answer, teacher, options.temperature)
        if options.self_distillation and not is_last:
            loss = loss + options.self_distillation * _distilled(answer, last, options.temperature)
        losses.append((options.last_weight if is_last else 1.0) * (rows * loss).mean())
    return torch.stack(losses)


def survival_weights(logits: Sequence[Tensor], focus: float) -> list[Tensor]:
    """How much each row counts at each exit: less where an earlier exit is sure and it will have left.

    Args:
        logits: ``[batch, classes]`` of every exit in order, the network's own last.
        focus: 0: all rows count alike.

    Returns:
        Per exit ``[batch]``, with a mean of 1; no gradient flows through them.
    """
    if focus == 0.0:
        return [torch.ones_like(answer[:, 0]) for answer in logits]
    surest = torch.zeros_like(logits[0][:, 0])
    weights = []
    for answer in logits:
        raw = 1.0 - focus * surest
        weights.append(raw / raw.mean().clamp_min(1e-6))
        surest = torch.maximum(surest, answer.detach().softmax(dim=1).amax(dim=1))
    return weights


def _distilled(answer: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(teacher || answer)`` per row, both at temperature T (Hinton et al. 2015, section 2)."""
    log_q = F.log_softmax(answer / temperature, dim=1)
    log_p = F.log_softmax(teacher / temperature, dim=1)
    return temperature**2 * F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(dim=1)
