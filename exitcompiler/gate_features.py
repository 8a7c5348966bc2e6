"""What gates are learned from: the loss of leaving at each head, and directions to score rows by."""

from __future__ import annotations

from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression, Ridge

from exitcompiler.gate_search import Action, Direction, Plane
from exitcompiler.scores import FEATURES, BoolArray, HeadKey, ScoreTable

__all__ = [
    "Loss",
    "cost_plane",
    "loss_direction",
    "losses",
    "max_probability",
    "smoothed_losses",
    "weighted_direction",
]

Loss: TypeAlias = Literal["excess", "net"]
"""What leaving may cost: being wrong where the backbone is right, or that less the reverse."""

Float64Array: TypeAlias = NDArray[np.float64]

STRENGTH: Final = 0.1
"""Inverse L2 penalty on standardised features: confidences are nearly collinear."""

FEWEST: Final = 10
"""A regression needs this many rows of every kind; with fewer the max probability has to do."""

WORSE, EQUAL, BETTER = 0, 1, 2


def losses(table: ScoreTable, loss: Loss) -> dict[HeadKey, Float64Array]:
    """The loss of leaving at each head, row by row.

    ``excess``: ``(L(head) - L(backbone))_+`` of Bolukbasi et al. 2017, section 3; ``net``: the same
    without the positive part, so that its mean is the accuracy drop.

    Returns:
        (exit, head) -> ``float64[n]`` of -1, 0 and 1.
    """
    backbone = table.backbone_correct.astype(np.float64)
    net = {key: backbone - table.correct(key) for key in table.heads}
    return {key: np.maximum(value, 0.0) for key, value in net.items()} if loss == "excess" else net


def smoothed_losses(table: ScoreTable, loss: Loss) -> dict[HeadKey, Float64Array]:
    """The expected loss of leaving at each head, given all that the networks say of the row.

    Where a head agrees with the backbone the loss is zero, whatever the label. Where they disagree
    the label decides between worse, equal and better, and a multinomial regression on both networks'
    log odds for both classes, over all heads together with an intercept for each, tells how likely each
    is. Putting this expectation for the realised loss (Rao-Blackwell) keeps every head's mean and takes
    away most of the noise that an exact search would fit: a few dozen rows decide where a threshold lies.

    Without labels the backbone's answer is the target and nothing is left to expect.

    Returns:
        (exit, head) -> ``float64[n]`` in -1..1.
    """
    realised = losses(table, loss)
    if table.labels is None:
        return realised
    differs = {key: head.prediction != table.backbone_prediction for key, head in table.heads.items()}
    evidence = {key: _disagreement_features(table, key) for key in table.heads}
    outcome = {
        key: np.where(table.backbone_correct, WORSE, np.where(table.correct(key), BETTER, EQUAL))
        for key in table.heads
    }
    features = np.concatenate([evidence[key][differs[key]] for key in table.heads])
    target = np.concatenate([outcome[key][differs[key]] for key in table.heads])
    if np.unique(target).size < 2 or np.bincount(target).max() > target.size - FEWEST:
        return realised
    mean, scale = _standard(features)
    model = LogisticRegression(max_iter=300).fit((features - mean) / scale, target)
    gain = {WORSE: 1.0, EQUAL: 0.0, BETTER: 0.0 if loss == "excess" else -1.0}
    worth = np.array([gain[int(label)] for label in model.classes_])
    expected = {}
    for key in table.heads:
        # scikit-learn folds two classes into one column of coefficients, so ask for probabilities.
        likely = model.predict_proba((evidence[key] - mean) / scale) @ worth
        expected[key] = np.where(differs[key], likely, 0.0)
    return expected


def _disagreement_features(table: ScoreTable, key: HeadKey) -> Float64Array:
    rows = np.arange(table.rows)
    classes = (table.backbone_prediction, table.heads[key].prediction)
    columns = []
    for logits in (table.backbone_logits, table.heads[key].logits):
        p = _softmax(logits)
        columns += [np.log((p[rows, label] + 1e-4) / (1.0 - p[rows, label] + 1e-4)) for label in classes]
    # Without it a committee would be taken for as often wrong as the networks in it.
    columns += [np.full(table.rows, float(key == other)) for other in table.heads]
    return np.stack(columns, axis=1)


def _softmax(logits: NDArray[np.floating]) -> Float64Array:
    shifted = logits.astype(np.float64)
    exp = np.exp(shifted - shifted.max(axis=1, keepdims=True))
    return np.asarray(exp / exp.sum(axis=1, keepdims=True))


def _standard(features: Float64Array) -> tuple[Float64Array, Float64Array]:
    return features.mean(axis=0), features.std(axis=0) + 1e-6


def max_probability(table: ScoreTable, key: HeadKey) -> Direction:
    """A head's own max probability: what a plain threshold cuts."""
    return Direction.of(table, (key,), np.eye(FEATURES)[0])


def loss_direction(table: ScoreTable, key: HeadKey, expected: Float64Array) -> Direction | None:
    """The direction in which a head's expected loss falls, on all rows.

    A logistic regression with the expected loss as a soft label. It depends neither on the
    trade-off nor on the other gates.

    Args:
        table: The rows.
        key: The head.
        expected: ``float64[n]``: the excess loss of leaving, in 0..1.

    Returns:
        None where too few rows could lose anything.
    """
    harm = np.clip(expected, 0.0, 1.0)
    if min(harm.sum(), (1.0 - harm).sum()) < FEWEST:
        return None
    features = table.features((key,)).astype(np.float64)
    mean, scale = _standard(features)
    standard = (features - mean) / scale
    weight = _coefficients(
        np.concatenate([standard, standard]),
        np.repeat([True, False], table.rows),
        np.concatenate([1.0 - harm, harm]),
    )
    return Direction.of(table, (key,), weight / scale)


def weighted_direction(
    table: ScoreTable, reads: tuple[HeadKey, ...], gain_us: Float64Array, arrives: BoolArray
) -> Direction | None:
    """The gate of Bolukbasi et al. 2017, section 3: weighted logistic regression on cost to go.

    The label says whether leaving gains, the weight is how much is at stake; on the rows that arrive.

    Args:
        table: The rows.
        reads: Whose confidences to score, the answering head first.
        gain_us: ``float64[n]``: cost to go of the frozen suffix, less that of leaving here (d_k).
        arrives: ``bool[n]``.

    Returns:
        None where too few rows should leave, or too few should not.
    """
    rows = np.flatnonzero(arrives & (gain_us != 0.0))
    label = gain_us[rows] >= 0.0
    if min(int(label.sum()), int((~label).sum())) < FEWEST:
        return None
    features = table.features(reads)[rows].astype(np.float64)
    mean, scale = _standard(features)
    stake = np.abs(gain_us[rows])
    return Direction.of(table, reads, _coefficients((features - mean) / scale, label, stake) / scale)


def cost_plane(
    table: ScoreTable,
    actions: tuple[Action, ...],
    reads: tuple[HeadKey, ...],
    action_us: Float64Array,
    arrives: BoolArray,
) -> Plane:
    """Cost-sensitive classification among several actions: regress the cost of each, take the least.

    How Bolukbasi et al. 2017 learn a node with more than two actions is not known; this is the plain
    reduction to regression (ridge, on standardised features), whose biases are then searched.

    Args:
        table: The rows.
        actions: Three or more.
        reads: Whose confidences to score, one of the site's own first.
        action_us: ``float64[n, actions]``: what each action costs each row.
        arrives: ``bool[n]``: the rows to learn on.
    """
    features = table.features(reads).astype(np.float64)
    mean, scale = _standard(features[arrives])
    model = Ridge(alpha=1.0 / STRENGTH).fit((features[arrives] - mean) / scale, action_us[arrives])
    weight = -model.coef_ / scale
    bias = -model.intercept_ - weight @ mean
    return Plane(actions, reads, weight, bias, features @ weight.T + bias)


def _coefficients(features: Float64Array, label: BoolArray, weight: Float64Array) -> Float64Array:
    model = LogisticRegression(C=STRENGTH, max_iter=200)
    model.fit(features, label, sample_weight=weight / weight.mean())
    return np.asarray(model.coef_[0], np.float64)
