"""Training data that comes from loaders: counted, checked batch by batch, gathered, ended; and fitted on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trained import stripes, trained_network

from exitcompiler import data as data_module
from exitcompiler import fitting
from exitcompiler.capture import capture
from exitcompiler.data import Extent, Rows, TrainingData, read_training_data
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.errors import CalibrationError
from exitcompiler.heads import LinearHead
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.program import Program
from exitcompiler.progress import reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.settings import Settings
from exitcompiler.training import FeatureStream, HeadRecipe, train_heads

X, Y = stripes(200, seed=3)
BATCHES = [(X[start : start + 20], Y[start : start + 20]) for start in range(0, 200, 20)]


class _Stream(IterableDataset[tuple[np.ndarray, int]]):
    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        return ((image, int(label)) for image, label in zip(X, Y, strict=True))


class _Endless:
    """Batches of 20 without end; with a length, where one is given."""

    drawn = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for number in count():
            self.drawn += 1
            yield BATCHES[number % 10]


class _EndlessWithLength(_Endless):
    def __len__(self) -> int:
        return 10


@functools.cache
def _program() -> Program:
    return capture(trained_network(), X[:8]).program


def _data(source: Any) -> TrainingData:
    return read_training_data(source, ["image"], minimum=100).for_model(_program())


def _pass(data: TrainingData, batch_size: int = 64) -> list[int]:
    epoch = data.epoch(batch_size, torch.Generator().manual_seed(0))
    return [len(inputs["image"]) for inputs, _ in epoch]


def _loader(batch_size: int) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.from_numpy(X), torch.from_numpy(Y)), batch_size=batch_size)


@pytest.mark.parametrize(
    "source",
    [
        (X, Y), BATCHES, _loader(1), _loader(30), _loader(200), DataLoader(_Stream(), batch_size=7),
        [(X[:3], Y[:3]), (X[3:150], Y[3:150]), (X[150:], Y[150:])],
    ],
    ids=["rows", "list", "single rows", "loader", "one batch", "iterable dataset", "uneven"],
)  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 32, 64, 128, 500])
def test_counting_says_what_an_epoch_gives(source: Any, batch_size: int) -> None:
    data = _data(source)
    extent = data.count(batch_size)
    sizes = _pass(data, batch_size)
    assert sum(sizes) == 200
    assert len(sizes) == extent.batches
    assert extent.labelled
    assert 200 <= extent.rows <= 210  # a loader's last batch is taken to be full
    assert all(size >= batch_size for size in sizes[:-1])


def test_single_rows_are_gathered_in_order() -> None:
    epoch = list(_data(_loader(1)).epoch(128, torch.Generator()))
    np.testing.assert_array_equal(np.concatenate([labels for _, labels in epoch if labels is not None]), Y)
    np.testing.assert_array_equal(torch.cat([inputs["image"] for inputs, _ in epoch]).numpy(), X)


def test_a_loader_with_a_length_is_counted_by_its_first_batch() -> None:
    endless = _EndlessWithLength()
    assert _data(endless).count(40) == Extent(200, 5, labelled=True)
    assert endless.drawn == 1


def test_a_loader_without_a_length_or_an_end_is_not_counted_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_module, "COUNT_LIMIT", 1000)
    endless = _Endless()
    with pytest.raises(CalibrationError, match="no end") as caught:
        _data(endless).count(40)
    assert endless.drawn == 51
    assert "__len__" in (caught.value.remedy or "")


def test_too_few_training_rows_in_a_loader_are_refused() -> None:
    with pytest.raises(CalibrationError, match="60 rows are too few, at least 100"):
        _data(BATCHES[:3]).count(40)


WRONG: dict[str, tuple[Any, str]] = {
    "shape": ((X[:, :, :8], Y), r"image.*rows are float32\[1, 8, 16\]"),
    "dtype": ((X.astype(np.float64), Y), r"image.*rows are float64"),
    "name": (({"picture": X}, Y), "picture.*the model takes.*image"),
    "label": ((X, Y + 1), "label 4 is out of range"),
    "no labels": (X, "some batches have labels"),
    "strings": ((X.astype(str), Y), "is not data"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_late_batch_that_does_not_fit_is_named(case: str) -> None:
    batch, message = WRONG[case]
    source = [*BATCHES, batch]
    for draw in (_pass, lambda data: data.count(64)):
        with pytest.raises(CalibrationError, match=message):
            draw(_data(source))


@pytest.mark.parametrize("case", ["shape", "dtype", "name", "label", "strings"])
def test_rows_that_do_not_fit_are_named_at_once(case: str) -> None:
    source, message = WRONG[case]
    with pytest.raises(CalibrationError, match=message):
        _data(source)


def _train(data: TrainingData, batches: int, target: bool = False) -> None:
    program = _program()
    cut = find_cut_points(program)[0]
    logits = next(iter(program.entry.results))
    stream = FeatureStream.of(program, [cut.value, *([logits] if target else [])])
    heads = {(cut.name, "linear"): LinearHead(cut.spec, 4)}
    with reporting(False) as reporter, reporter.step("training") as step:
        train_heads(
            stream, heads, dict.fromkeys(heads, cut.value), data, epochs=1, batches=batches,
            recipe=HeadRecipe(batch_size=40), seed=0, step=step, target=logits if target else None,
        )  # fmt: skip


@pytest.mark.parametrize("batches", range(1, 8))
def test_training_draws_no_more_batches_than_were_counted(batches: int) -> None:
    endless = _Endless()
    _train(_data(endless), batches)
    assert endless.drawn == 2 * batches


def test_training_that_takes_no_step_is_refused() -> None:
    one_row = TrainingData(Rows({"image": torch.from_numpy(X[:1])}, Y[:1]), ("image",))
    with pytest.raises(CalibrationError, match="no batch of two rows"):
        _train(one_row, 1)


@pytest.mark.parametrize(("source", "target"), [(BATCHES, True), ([X], False)])
def test_labels_in_one_pass_only_are_refused(source: Any, target: bool) -> None:
    with pytest.raises(CalibrationError, match="some passes have labels"):
        _train(_data(source), 3, target)


def _shuffling() -> DataLoader[Any]:
    dataset = TensorDataset(torch.from_numpy(X), torch.from_numpy(Y))
    return DataLoader(dataset, batch_size=16, shuffle=True)


class _Counting:
    """Counts how often a loader is gone through."""

    passes = 0

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        self.passes += 1
        return iter(BATCHES)


def _fit(make: Callable[[], Any], epochs: int = 2) -> Any:
    settings = Settings(backend="torch", threads=1, max_exits=2, recipe=HeadRecipe(epochs=epochs), seed=5)
    engines = Engines(create_backend("torch", precision="fp32", threads=1), Lowerer())
    sample = Rows({"image": torch.from_numpy(X)}, Y)
    data = read_training_data(make(), ["image"], minimum=100)
    with reporting(False) as reporter:
        return fitting.fit_exits(_program(), data, sample, engines, settings, reporter)


def test_fitting_leaves_the_random_numbers_of_the_caller_alone_and_follows_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Measured times choose the places: here they are the same in both runs.
    monkeypatch.setattr(fitting, "block_times_us", lambda blocks, *_, **__: [1.0] * len(blocks))
    weights = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        fitted = _fit(_shuffling)
        assert torch.equal(torch.rand(3), expected)
        heads = fitted.candidates.heads
        weights.append({(*key, name): t for key in heads for name, t in heads[key].body.state_dict().items()})
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert torch.equal(tensor, weights[1][name]), name


def test_fitting_goes_through_a_loader_once_to_count_and_once_to_probe() -> None:
    counting = _Counting()
    fitted = _fit(lambda: counting, epochs=3)
    assert counting.passes == 2 + 3
    assert fitted.rows == 200


def test_every_exit_stands_at_the_end_of_the_block_that_computes_its_value() -> None:
    fitted = _fit(lambda: (X, Y), epochs=1)
    candidates = fitted.candidates
    value_of = {place.cut.name: place.cut.value for place in fitted.places if place.chosen}
    assert len(value_of) == 2
    for exit_name, value in value_of.items():
        assert value in candidates.program.block(candidates.block_of[exit_name]).results


@pytest.mark.parametrize(
    "make",
    [lambda: _loader(1), lambda: DataLoader(_Stream(), batch_size=8), lambda: list(islice(BATCHES, 10))],
    ids=["single rows", "iterable dataset", "list"],
)
def test_fitting_takes_loaders_of_all_kinds(make: Callable[[], Any]) -> None:
    assert _fit(make, epochs=1).rows == 200
