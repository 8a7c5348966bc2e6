"""Rows are gathered from data of every form, and answered by both programs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fake_compiled import FakeCompiled, FakeResult

from exitcompiler.budgets.answering import answer, gather_rows
from exitcompiler.budgets.figures import Answered
from exitcompiler.errors import CalibrationError, InputError

X = np.array([[0.9, 0.1], [0.2, 0.7], [0.6, 0.8], [0.4, 0.3], [0.1, 0.0]], np.float32)
Y = np.array([0, 1, 0, 0, 1])


class Flipped(FakeCompiled):
    """Answers the other class where a row leaves early."""

    def run(self, x: Any) -> FakeResult:
        found = super().run(x)
        early = found.exit_index == 0
        return FakeResult(
            np.where(early[:, None], found.outputs[:, ::-1], found.outputs),
            found.exit_index,
            found.confidence,
        )


def test_every_form_of_data_gives_the_same_rows() -> None:
    def batches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for start in range(0, 5, 2):
            yield X[start : start + 2], Y[start : start + 2]

    whole = gather_rows((X, Y))
    parts = gather_rows(batches())
    assert (whole.rows, parts.rows) == (5, 5)
    assert whole.fingerprint == parts.fingerprint
    np.testing.assert_array_equal(parts.inputs, X)
    np.testing.assert_array_equal(parts.labels, Y)
    assert gather_rows((X[:3], Y[:3])).fingerprint == gather_rows(batches(), 3).fingerprint
    assert gather_rows((X, Y), 99).fingerprint == whole.fingerprint
    assert gather_rows(np.asfortranarray(X)).fingerprint == gather_rows(X).fingerprint


def test_no_more_is_read_than_wanted() -> None:
    def endless() -> Iterator[np.ndarray]:
        while True:
            yield X

    assert gather_rows(endless(), 12).rows == 12


@pytest.mark.parametrize(
    "other",
    [
        X,
        (X, Y[::-1].copy()),
        (X[::-1].copy(), Y),
        (X.astype(np.float64), Y),
        (X.reshape(5, 1, 2), Y),
        (X, Y.astype(np.int32)),
        ({"x": X}, Y),
        ({"z": X}, Y),
    ],
)
def test_the_fingerprint_tells_other_rows(other: Any) -> None:
    assert gather_rows(other).fingerprint != gather_rows((X, Y)).fingerprint


def test_the_order_of_named_inputs_makes_no_difference() -> None:
    a, b = gather_rows({"a": X, "b": Y}), gather_rows({"b": Y, "a": X})
    assert a.fingerprint == b.fingerprint
    assert isinstance(b.inputs, dict)


def test_data_that_cannot_be_used() -> None:
    with pytest.raises(CalibrationError, match="no rows"):
        gather_rows(X[:0])
    with pytest.raises(CalibrationError, match=r"different numbers of rows \(inputs: 5, labels: 4\)"):
        gather_rows((X, Y[:4]))
    with pytest.raises(CalibrationError, match="different numbers of rows"):
        gather_rows({"a": X, "b": X[:2]})
    with pytest.raises(InputError, match="max_rows=0"):
        gather_rows(X, 0)


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.eye(2)[Y], r"labels of shape \(5, 2\)"),
        (Y + 0.5, "no class numbers"),
        (-Y, "no class numbers"),
        (np.where(Y == 1, np.nan, 0.0), "no class numbers"),
        (np.array(list("abcde")), "no class numbers"),
    ],
)
def test_labels_that_no_answer_can_equal_are_refused(labels: Any, said: str) -> None:
    with pytest.raises(CalibrationError, match=said):
        gather_rows((X, labels))
    assert gather_rows((X, Y.astype(np.float64))).rows == 5


def test_a_label_of_another_class_is_refused() -> None:
    program: Any = Flipped()
    with pytest.raises(CalibrationError, match="a label 2, and the program has the classes 0 to 1"):
        answer(program, program.plain, gather_rows((X, 2 * Y)))


def test_answers_are_counted() -> None:
    program: Any = Flipped()
    pool = gather_rows((X, Y))
    answered, exit_index = answer(program, program.plain, pool, batch_size=2)
    # Rows 0 and 2 leave early. Plain is right on rows 0, 1, 3; the program on 1, 2, 3.
    assert answered == Answered(5, pool.fingerprint, {"early": 2, "backbone": 3}, 2, 3, 3, 1, 1)
    assert exit_index.dtype == np.int32
    np.testing.assert_array_equal(exit_index, [0, 1, 0, 1, 1])


def test_without_labels_nothing_is_right_or_wrong() -> None:
    program: Any = Flipped()
    answered, _ = answer(program, program.plain, gather_rows({"x": X}))
    assert answered.disagreements == 2
    assert {answered.right, answered.plain_right, answered.lost, answered.gained} == {None}
    late, _ = answer(program, program.plain, gather_rows(X[3:]))
    assert late.exits == {"early": 0, "backbone": 2}
