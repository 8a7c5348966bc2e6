"""The losses: against the formula in ``FineTune``'s docstring, computed with numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from joint_samples import as_floats
from torch import Tensor

from exitcompiler.finetuning.losses import exit_losses, survival_weights
from exitcompiler.finetuning.mixing import Target
from exitcompiler.finetuning.options import FineTune

SHARE = st.floats(0.0, 1.0)


def _logits(exits: int, rows: int, classes: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [3 * torch.randn(rows, classes, generator=generator) for _ in range(exits + 1)]


def _softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    powers = np.exp(logits / temperature - (logits / temperature).max(axis=1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=1, keepdims=True))


def _cross_entropy(logits: np.ndarray, labels: np.ndarray, smoothing: float) -> np.ndarray:
    wanted = (1 - smoothing) * np.eye(logits.shape[1])[labels] + smoothing / logits.shape[1]
    return np.asarray(-(wanted * np.log(_softmax(logits))).sum(axis=1))


def _distilled(logits: np.ndarray, teacher: np.ndarray, temperature: float) -> np.ndarray:
    p, q = _softmax(teacher, temperature), _softmax(logits, temperature)
    return np.asarray(temperature**2 * (p * (np.log(p) - np.log(q))).sum(axis=1))


def _expected(
    logits: list[np.ndarray], labels: np.ndarray, teacher: np.ndarray, options: FineTune
) -> list[float]:
    found, surest = [], np.zeros(len(labels))
    for number, answer in enumerate(logits):
        last = number == len(logits) - 1
        loss = (1 - options.teacher) * _cross_entropy(answer, labels, options.label_smoothing)
        loss += options.teacher * _distilled(answer, teacher, options.temperature)
        if not last:
            loss += options.self_distillation * _distilled(answer, logits[-1], options.temperature)
        weight = 1 - options.focus * surest
        loss = loss * weight / weight.mean()
        found.append((options.last_weight if last else 1.0) * float(loss.mean()))
        surest = np.maximum(surest, _softmax(answer).max(axis=1))
    return found


@given(
    exits=st.integers(0, 3), rows=st.integers(1, 6), classes=st.integers(2, 5), seed=st.integers(0, 1000),
    teacher=SHARE, self_distillation=SHARE, label_smoothing=SHARE, focus=st.floats(0.0, 0.95),
    temperature=st.floats(0.5, 4.0), last_weight=st.floats(0.0, 3.0),
)  # fmt: skip
def test_the_losses_are_those_of_the_formula(
    exits: int, rows: int, classes: int, seed: int, **options: float
) -> None:
    tuning = FineTune(**options)  # type: ignore[arg-type]
    *logits, teacher = _logits(exits + 1, rows, classes, seed)
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, rows))
    found = exit_losses(logits, Target(labels), teacher, tuning)
    expected = _expected([as_floats(x) for x in logits], labels.numpy(), as_floats(teacher), tuning)
    assert found.shape == (exits + 1,)
    np.testing.assert_allclose(as_floats(found), expected, rtol=2e-4, atol=2e-5)


def test_a_mixture_is_answered_with_both_classes() -> None:
    (logits,) = _logits(0, 3, 4, seed=1)
    labels, others = torch.tensor([0, 1, 2]), torch.tensor([3, 3, 2])
    found = Target(labels, others, 0.75).cross_entropy(logits, 0.1)
    parts = [_cross_entropy(as_floats(logits), y.numpy(), 0.1) for y in (labels, others)]
    np.testing.assert_allclose(as_floats(found), 0.75 * parts[0] + 0.25 * parts[1], rtol=1e-5)


def test_exits_learn_from_the_end_and_the_end_not_from_them() -> None:
    logits = [answer.requires_grad_() for answer in _logits(1, 4, 3, seed=2)]
    options = FineTune(teacher=0.0, self_distillation=1.0, last_weight=0.0)
    exit_losses(logits, Target(torch.tensor([0, 1, 2, 0])), None, options).sum().backward()
    exit_gradient, end_gradient = (answer.grad for answer in logits)
    assert exit_gradient is not None
    assert end_gradient is not None
    assert exit_gradient.abs().sum() > 0
    assert end_gradient.abs().sum() == 0


def test_without_focus_all_rows_count_alike() -> None:
    for weights in survival_weights(_logits(3, 5, 4, seed=0), 0.0):
        assert weights.tolist() == [1.0] * 5


@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 1000), st.floats(0.01, 1.0))
def test_weights_have_a_mean_of_one_and_fall_where_an_earlier_exit_is_sure(
    exits: int, rows: int, seed: int, focus: float
) -> None:
    logits = [answer.requires_grad_() for answer in _logits(exits, rows, 3, seed)]
    weights = survival_weights(logits, focus)
    assert weights[0].tolist() == [1.0] * rows
    for number, found in enumerate(weights):
        assert not found.requires_grad
        assert float(found.mean()) == pytest.approx(1.0, abs=1e-4)
        surest = np.zeros(rows)
        for answer in logits[:number]:
            surest = np.maximum(surest, _softmax(as_floats(answer)).max(axis=1))
        by_sureness = found.numpy()[np.argsort(surest)]
        assert (np.diff(by_sureness) <= 1e-5).all()


def test_rows_that_all_leave_earlier_do_no_harm() -> None:
    certain = torch.tensor([[1e4, 0.0], [0.0, 1e4]])
    for weights in survival_weights([certain, certain], 1.0):
        assert weights.isfinite().all()
