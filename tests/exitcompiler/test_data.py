"""Reading what users give as data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.calibration import peek, require_rows
from exitcompiler.data import Rows, TrainingData, read_rows, read_training_data, split_rows
from exitcompiler.errors import CalibrationError
from exitcompiler.model_interface import as_tensors

X = np.arange(40, dtype=np.float32).reshape(10, 4)
Y = np.arange(10) % 3


@pytest.mark.parametrize(
    "data",
    [
        (X, Y),
        [X, Y],
        (torch.from_numpy(X), torch.from_numpy(Y)),
        ({"x": X}, Y),
        [(X[:6], Y[:6]), (X[6:], Y[6:])],
        [({"x": X[:6]}, Y[:6]), ({"x": X[6:]}, Y[6:])],
        (batch for batch in [(X[:3], Y[:3]), (X[3:], Y[3:])]),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=4
        ),
    ],
    ids=["pair", "list", "tensors", "dict", "batches", "dict batches", "generator", "loader"],
)
def test_all_forms_give_the_same_rows(data: object) -> None:
    rows = read_rows(data, ["x"], minimum=1)
    assert rows.labels is not None
    np.testing.assert_array_equal(rows.inputs["x"].numpy(), X)
    np.testing.assert_array_equal(rows.labels, Y)


@pytest.mark.parametrize("data", [X, {"x": X}, [X[:5], X[5:]], [{"x": X[:5]}, {"x": X[5:]}]])
def test_inputs_alone_have_no_labels(data: object) -> None:
    rows = read_rows(data, ["x"], minimum=1)
    assert rows.labels is None
    assert len(rows) == 10


@pytest.mark.parametrize(
    "x", [X[:, ::-1], X.astype(">f4"), X[::-1]], ids=["columns reversed", "big-endian", "rows reversed"]
)
def test_arrays_that_torch_cannot_share_are_copied(x: np.ndarray) -> None:
    rows = read_rows((x, Y), ["x"], minimum=1)
    np.testing.assert_array_equal(rows.inputs["x"].numpy(), x)
    np.testing.assert_array_equal(as_tensors(x, ["x"])["x"].numpy(), x)


def test_an_example_of_strings_is_refused() -> None:
    with pytest.raises(CalibrationError, match="input 'x': an array of dtype <U1"):
        as_tensors(np.array(["a", "b"]), ["x"])


@pytest.mark.parametrize(
    ("data", "example"),
    [
        ((X, Y), X[:8]),
        ([X, Y], X[:8]),
        (({"x": X}, Y), {"x": X[:8]}),
        (((X, X), Y), (X[:8], X[:8])),
        ({"x": X}, {"x": X[:8]}),
        ([(X[:6], Y[:6]), (X[6:], Y[6:])], X[:6]),
        (((X[:6], Y[:6]), (X[6:], Y[6:])), X[:6]),
        ([X[:5], X[5:]], X[:5]),
        (iter([({"x": X}, list(Y))]), {"x": X[:8]}),
    ],
)
def test_a_peek_sees_the_inputs_that_reading_will_see(data: object, example: Any) -> None:
    whole, seen = peek(data)
    assert type(seen) is type(example)
    assert str(seen) == str(example)
    rows = read_rows(whole, ["x"] if not isinstance(example, tuple) else ["x", "z"], minimum=1)
    assert len(rows) == 10


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"x": 3}, "int is no array"),
        ([{"x": 3}], "int is no array"),
        (np.float32(3), "no data|no array"),
        (torch.tensor(3.0), "no array"),
        ("text", "no data"),
        (3, "no data"),
        (iter(()), "no data"),
        ([3], "int is no array"),
    ],
)
def test_a_peek_at_what_is_no_data_says_so(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        peek(data)


@pytest.mark.parametrize(("with_training", "fit"), [(False, 0.4), (True, 0.0)])
@pytest.mark.parametrize("batch_size", [1, 64, 500])
def test_the_number_of_rows_asked_for_is_enough(with_training: bool, fit: float, batch_size: int) -> None:
    small = split_rows(120, fit=fit, certify=0.2, seed=0)
    with pytest.raises(CalibrationError, match="120 rows are too few") as caught:
        require_rows(small, with_training=with_training, batch_size=batch_size)
    found = re.search(r"at least (\d+) rows", caught.value.remedy or "")
    assert found
    enough = split_rows(int(found[1]), fit=fit, certify=0.2, seed=0)
    require_rows(enough, with_training=with_training, batch_size=batch_size)


def test_only_the_part_that_is_too_small_is_named() -> None:
    split = split_rows(1000, fit=0.4, certify=0.2, seed=0)
    require_rows(split, with_training=False, batch_size=200)
    with pytest.raises(CalibrationError, match="200 to certify, 201 are needed") as caught:
        require_rows(split, with_training=False, batch_size=201)
    assert "learn gates" not in caught.value.what


def test_several_inputs_by_name_or_in_order() -> None:
    mask = np.ones((10, 2), np.int64)
    for inputs in ({"x": X, "mask": mask}, {"mask": mask, "x": X}, (X, mask)):
        rows = read_rows((inputs, Y), ["x", "mask"], minimum=1)
        assert list(rows.inputs) == ["x", "mask"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (({"x": X, "z": X}, Y), "the model takes"),
        (({"z": X}, Y), "the model takes"),
        (("text", Y), "cannot read|is not data"),
        ("text", "is not data"),
        ((X, Y[:, None]), "cannot read|shape"),
        ([(X, Y[:-1])], "one per row"),
        ([({"x": X, "y": X[:4]}, Y)], "the model takes|different numbers"),
        ([], "no rows"),
        ((X.astype(str), Y), "dtype <U32 is not data"),
        ((X.astype(object), Y), "dtype object is not data"),
        ({"x": 3}, "cannot read"),
        ((X, Y.astype(str)), "whole class numbers"),
        ([(X, [[0], [1, 2]])], "labels cannot be read|shape"),
    ],
)
def test_what_cannot_be_read_is_named(data: object, message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        read_rows(data, ["x"], minimum=1)


@given(st.integers(1, 400), st.sampled_from([0.0, 0.4]), st.sampled_from([0.2, 0.3]), st.integers(0, 5))
def test_a_split_uses_every_row_exactly_once(rows: int, fit: float, certify: float, seed: int) -> None:
    split = split_rows(rows, fit=fit, certify=certify, seed=seed)
    together = np.concatenate([split.fit, split.learn, split.certify])
    assert sorted(together.tolist()) == list(range(rows))
    assert len(split.fit) == round(rows * fit)


def test_an_epoch_over_rows_is_shuffled_by_the_generator_and_complete() -> None:
    data = TrainingData(Rows({"x": torch.from_numpy(X)}, Y.astype(np.int64)), ("x",))
    first = [labels for _, labels in data.epoch(3, torch.Generator().manual_seed(1))]
    again = [labels for _, labels in data.epoch(3, torch.Generator().manual_seed(1))]
    for a, b in zip(first, again, strict=True):
        assert a is not None
        np.testing.assert_array_equal(a, b)
    assert sorted(np.concatenate([a for a in first if a is not None]).tolist()) == sorted(Y.tolist())


def test_a_loader_is_gone_through_anew_and_a_generator_is_kept() -> None:
    class Counting:
        passes = 0

        def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
            self.passes += 1
            yield X, Y

    loader = Counting()
    data = read_training_data(loader, ["x"], minimum=1)
    for _ in range(3):
        assert len(list(data.epoch(4, torch.Generator()))) == 1
    assert loader.passes == 3
    kept = read_training_data(iter([(X, Y)]), ["x"], minimum=1)
    assert isinstance(kept.source, Rows)


def test_a_loader_with_a_nan_is_refused_when_it_comes() -> None:
    bad = X.copy()
    bad[3] = np.nan
    data = read_training_data([(X, Y), (bad, Y)], ["x"], minimum=1)
    with pytest.raises(CalibrationError, match="NaN or Inf"):
        list(data.epoch(4, torch.Generator()))
