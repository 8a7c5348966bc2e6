"""MODEL and DATA of the command line."""

from __future__ import annotations

import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from exitcompiler.data_sources import batches_of, input_shape_of_model, load_data, load_model
from exitcompiler.errors import CalibrationError, InputError, UnsupportedModelError
from exitcompiler.image_folder import ImageFolder, ImagePreprocessing

FACTORIES = """
import numpy as np
import torch

def module():
    return torch.nn.Linear(3, 2)

def with_example():
    return torch.nn.Linear(3, 2), torch.zeros(1, 3)

def nonsense():
    return "a string"

def data():
    return np.zeros((4, 3), np.float32), np.zeros(4, np.int64)

constant = 5
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a module in the working directory."""
    name = f"factories_of_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    yield name
    sys.modules.pop(name, None)


def test_a_factory_of_the_working_directory_gives_the_model(factories: str) -> None:
    path_before = list(sys.path)
    model, example = load_model(f"{factories}:module")
    assert isinstance(model, torch.nn.Linear)
    assert example is None
    assert sys.path == path_before
    model, example = load_model(f"{factories}:with_example")
    assert input_shape_of_model(model, example) == (1, 3)


def test_a_pt2_file_gives_the_exported_program_and_its_input_shape(tmp_path: Path) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(
        torch.nn.Conv2d(3, 4, 3), (torch.zeros(2, 3, 8, 9),), dynamic_shapes=({0: batch},)
    )
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    model, example = load_model(str(path))
    shape = input_shape_of_model(model, example)
    assert shape is not None
    assert shape[1:] == (3, 8, 9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{m}:absent", "has no 'absent'"),
        ("{m}:constant", "is a int, not a function"),
        ("no_such_module_at_all:f", "no module named 'no_such_module_at_all'"),
        ("model.onnx", "neither a .pt2 file nor package.module:factory"),
        ("missing.pt2", "there is no such file"),
    ],
)
def test_a_bad_model_name_is_an_input_error(factories: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_model(text.format(m=factories))


def test_a_factory_that_gives_no_model_is_unsupported(factories: str) -> None:
    with pytest.raises(UnsupportedModelError, match="returned a str"):
        load_model(f"{factories}:nonsense")


def test_a_damaged_pt2_is_unsupported(tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"not an archive")
    with pytest.raises(UnsupportedModelError, match=r"torch\.export\.save"):
        load_model(str(path))


def test_npz_with_x_and_y(tmp_path: Path) -> None:
    x, y = np.arange(12, dtype=np.float32).reshape(4, 3), np.arange(4)
    path = tmp_path / "data.npz"
    np.savez_compressed(path, x=x, y=y)
    inputs, labels = load_data(str(path))
    np.testing.assert_array_equal(inputs, x)
    np.testing.assert_array_equal(labels, y)


def test_npz_without_labels_and_with_several_inputs(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3)))
    assert load_data(str(tmp_path / "a.npz")).shape == (4, 3)
    np.savez(
        tmp_path / "b.npz", input_ids=np.zeros((4, 7), np.int64), mask=np.ones((4, 7)), y=np.zeros(4, int)
    )
    inputs, labels = load_data(str(tmp_path / "b.npz"))
    assert sorted(inputs) == ["input_ids", "mask"]
    assert len(labels) == 4


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((4, 3)), "y": np.zeros(3, int)}, "different numbers of rows"),
        ({"y": np.zeros(3, int)}, "holds no inputs"),
        ({"x": np.zeros((0, 3)), "y": np.zeros(0, int)}, "holds no rows"),
        ({"x": np.array([{"a": 1}], object), "y": np.zeros(1, int)}, "not numbers"),
        ({"x": np.array(["a", "b"]), "y": np.zeros(2, int)}, "not numbers"),
        ({"x": np.float32(3.0), "y": np.float32(1.0)}, "holds no rows"),
    ],
)
def test_a_bad_npz_is_a_calibration_error(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, **arrays)
    with pytest.raises(CalibrationError, match=message):
        load_data(str(path))


@pytest.mark.parametrize("cut", [0, 10, -30])
def test_a_truncated_npz_is_a_calibration_error(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.zeros((4, 3)), y=np.zeros(4, int))
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CalibrationError, match="not a readable"):
        load_data(str(path))


def test_a_pickle_in_an_npz_is_never_loaded(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x.npy", b"\x80\x04K\x01.")
    with pytest.raises(CalibrationError, match="not a readable"):
        load_data(str(path))


def test_data_of_no_known_form(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nor a folder"):
        load_data("data.csv")
    with pytest.raises(InputError, match="no such file"):
        load_data(str(tmp_path / "missing.npz"))


def test_a_factory_gives_data(factories: str) -> None:
    x, y = load_data(f"{factories}:data")
    assert (x.shape, y.shape) == ((4, 3), (4,))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Three red images and two blue ones of several sizes and formats."""
    folder = tmp_path / "images"
    for name, color, files in (("b_red", (255, 0, 0), 3), ("a_blue", (0, 0, 255), 2)):
        (folder / name).mkdir(parents=True)
        for number in range(files):
            Image.new("RGB", (10 + number, 20), color).save(
                folder / name / f"{number}.{'png' if number else 'bmp'}"
            )
        (folder / name / "notes.txt").write_text("not an image")
    return folder


def test_a_folder_of_images_becomes_rows(images: Path) -> None:
    data = load_data(str(images), input_shape=("batch", 3, 4, 6))
    assert isinstance(data, ImageFolder)
    assert data.classes == ("a_blue", "b_red")
    for _ in range(2):  # can be gone through again
        ((x, y),) = list(data)
        assert x.shape == (5, 3, 4, 6)
        assert x.dtype == np.float32
        assert sorted(y.tolist()) == [0, 0, 1, 1, 1]
        np.testing.assert_array_equal(x[:, 0].mean((1, 2)), y)  # red
        np.testing.assert_array_equal(x[:, 2].mean((1, 2)), 1 - y)  # blue


def test_image_preprocessing_is_mean_and_std_per_channel(images: Path) -> None:
    preprocessing = ImagePreprocessing((0.5, 0.0, 0.5), (0.25, 1.0, 0.5), size=(2, 2))
    ((x, y),) = list(load_data(str(images), preprocessing=preprocessing))
    red = x[y == 1][0]
    np.testing.assert_allclose(red[:, 0, 0], [(1 - 0.5) / 0.25, 0.0, (0 - 0.5) / 0.5])


def test_grey_images_for_a_model_with_one_channel(images: Path) -> None:
    ((x, _),) = list(load_data(str(images), input_shape=("batch", 1, 4, 4)))
    assert x.shape == (5, 1, 4, 4)


@pytest.mark.parametrize(
    ("shape", "preprocessing", "message"),
    [
        (None, ImagePreprocessing(), "size of the model's images is not known"),
        (("batch", 10), ImagePreprocessing(), "not a batch of images"),
        (("batch", 3, "h", "w"), ImagePreprocessing(), "images of any size"),
        (("batch", 3, 4, 4), ImagePreprocessing(mean=(0.1, 0.2)), "2 numbers for 3 channels"),
        (("batch", 3, 4, 4), ImagePreprocessing(std=(0.0,)), "must be above 0"),
    ],
)
def test_images_that_do_not_fit_the_model(
    images: Path, shape: tuple[int | str, ...] | None, preprocessing: ImagePreprocessing, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load_data(str(images), input_shape=shape, preprocessing=preprocessing)


def test_an_empty_folder_and_a_broken_image(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="no images"):
        load_data(str(tmp_path / "empty"), input_shape=("batch", 3, 4, 4))
    (images / "b_red" / "broken.png").write_bytes(b"nothing")
    with pytest.raises(CalibrationError, match=r"broken\.png"):
        list(load_data(str(images), input_shape=("batch", 3, 4, 4)))


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(1, 9), st.booleans(), st.booleans())
def test_rebatching_keeps_rows_and_order(
    sizes: list[int], batch_size: int, labelled: bool, named: bool
) -> None:
    x = np.arange(sum(sizes) * 2).reshape(-1, 2)
    y = np.arange(len(x))
    cuts = np.cumsum(sizes)[:-1]
    source: list[Any] = []
    for xs, ys in zip(np.split(x, cuts), np.split(y, cuts), strict=True):
        inputs: Any = {"a": xs, "b": -xs} if named else torch.from_numpy(xs)
        source.append((inputs, ys) if labelled else inputs)
    batches = list(batches_of(iter(source), batch_size))
    lengths = [len(b["a"] if isinstance(b, dict) else b) for b, _ in batches]
    assert all(length == batch_size for length in lengths[:-1])
    assert 1 <= lengths[-1] <= batch_size
    back = np.concatenate([b["a"] if isinstance(b, dict) else b for b, _ in batches])
    np.testing.assert_array_equal(back, x)
    if labelled:
        np.testing.assert_array_equal(
            np.concatenate([labels for _, labels in batches if labels is not None]), y
        )
    else:
        assert all(labels is None for _, labels in batches)


def test_rebatching_whole_arrays() -> None:
    x, y = np.arange(10).reshape(5, 2), np.arange(5)
    assert [len(inputs) for inputs, _ in batches_of((x, y), 2)] == [2, 2, 1]
    assert [labels for _, labels in batches_of(x, 3)] == [None, None]
    assert [len(inputs) for inputs, _ in batches_of((x, y), 2, max_rows=3)] == [2, 1]
    assert [len(inputs) for inputs, _ in batches_of((x, y), 2, max_rows=4)] == [2, 2]
    assert [len(inputs) for inputs, _ in batches_of((x, y), 2, max_rows=9)] == [2, 2, 1]


@pytest.mark.parametrize("data", [5, "text", [("a", "b")]])
def test_rebatching_what_is_no_data(data: Any) -> None:
    with pytest.raises(CalibrationError):
        list(batches_of(data, 2))


@pytest.mark.parametrize("labels", [np.eye(2)[[0, 1, 1]], np.zeros((3, 1))])
def test_labels_of_more_than_a_number_per_row_are_refused(labels: Any) -> None:
    x = np.zeros((3, 2, 4, 4), np.float32)
    for data in ((x, labels), [(x, labels)]):
        with pytest.raises(CalibrationError, match=r"labels of shape \(3, \d\) are no class numbers"):
            next(batches_of(data, 2))


def test_rebatching_mixed_labels() -> None:
    x = np.zeros((2, 2))
    with pytest.raises(CalibrationError, match="some batches have labels"):
        list(batches_of(iter([(x, np.zeros(2, int)), x]), 4))
