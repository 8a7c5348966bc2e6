"""What several networks say together, in numpy: what ``exitcompiler.committee`` computes in the graph."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["agreement_features", "joint_logits"]


def joint_logits(logits: Sequence[NDArray[np.floating]]) -> NDArray[np.float32]:
    """Logits whose softmax is the mean of the softmax probabilities of several networks.

    ``log((1/m) sum_i softmax(logits_i))``, by the log-softmax of each, so that nothing becomes infinite
    where a probability underflows to zero.

    Args:
        logits: Per network ``[n, C]``; one network at least.

    Returns:
        ``float32[n, C]``.
    """
    log_p = np.stack([_log_softmax(scores) for scores in logits])
    top = log_p.max(axis=0)
    total = top + np.log(np.exp(log_p - top).sum(axis=0)) - math.log(len(log_p))
    return np.asarray(total, np.float32)


def agreement_features(
    this_logits: NDArray[np.floating], other_logits: NDArray[np.floating]
) -> NDArray[np.float32]:
    """How far a network and an earlier one agree.

    With ``p``, ``q`` the softmax of this network and of the other: ``(q[argmax p], p[argmax q],
    sum_c p[c] q[c])``; of equally likely classes the first counts.

    Args:
        this_logits: ``[n, C]``.
        other_logits: ``[n, C]``.

    Returns:
        ``float32[n, 3]``, in 0..1.
    """
    p, q = np.exp(_log_softmax(this_logits)), np.exp(_log_softmax(other_logits))
    rows = np.arange(len(p))
    of_this, of_other = this_logits.argmax(axis=1), other_logits.argmax(axis=1)
    features = (q[rows, of_this], p[rows, of_other], (p * q).sum(axis=1))
    return np.stack(features, axis=1).astype(np.float32)


def _log_softmax(logits: NDArray[np.floating]) -> NDArray[np.float64]:
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True)))
