"""The parts of the demonstration; the whole of it is the slow test."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

import exitcompiler
from exitcompiler.demo import DigitsResNet, Rows, disturb, load_rows, run_demo, show_image, train_network

_DIGITS = [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
"""How often scikit-learn's images show each digit."""


def test_splits_are_disjoint_complete_and_seeded() -> None:
    split = load_rows(seed=1)
    parts = (split.train, split.calibration, split.held_out)
    assert [len(part.labels) for part in parts] == [800, 600, 397]
    assert all(part.images.shape[1:] == (1, 16, 16) for part in parts)
    everything = np.concatenate([part.images for part in parts])
    assert 0.0 <= everything.min() < everything.max() <= 1.0
    assert sum(np.bincount(part.labels, minlength=10) for part in parts).tolist() == _DIGITS
    np.testing.assert_array_equal(load_rows(seed=1).train.images, split.train.images)
    assert not np.array_equal(load_rows(seed=2).train.labels, split.train.labels)


def test_disturbed_images_are_other_images_of_the_same_digits() -> None:
    rows = load_rows().train
    disturbed = disturb(rows, 3)
    assert disturbed.images.shape == rows.images.shape
    np.testing.assert_array_equal(disturbed.labels, rows.labels)
    np.testing.assert_array_equal(disturb(rows, 3).images, disturbed.images)
    difference = np.abs(disturbed.images - rows.images).mean((1, 2, 3))
    assert difference.min() < 0.02 < 0.15 < difference.max()  # some easy, some hard


def test_the_network_learns_and_is_reproducible() -> None:
    train = load_rows().train
    rows = Rows(train.images[:192], train.labels[:192])

    def trained() -> torch.Tensor:
        torch.manual_seed(0)
        network = train_network(DigitsResNet(blocks=1, width=8), rows, epochs=12)
        assert not network.training
        with torch.inference_mode():
            logits = network(torch.from_numpy(rows.images))
        assert isinstance(logits, torch.Tensor)
        return logits

    first = trained()
    assert float((first.argmax(1).numpy() == rows.labels).mean()) > 0.5
    torch.testing.assert_close(first, trained())


def test_images_are_shown_as_eight_lines() -> None:
    image = np.zeros((16, 16), np.float32)
    image[:2, 14:] = 1.0
    lines = show_image(image).split("\n")
    assert lines[0] == " " * 14 + "@@"
    assert lines[1:] == [" " * 16] * 7


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_demonstration(tmp_path: Path) -> None:
    shown = io.StringIO()
    figures = run_demo(tmp_path / "demo", Console(file=shown, width=100))
    json.dumps(figures)
    assert figures["training_s"] < 60
    assert figures["plain"]["accuracy"] - figures["program"]["accuracy"] < 0.03
    assert (tmp_path / "demo" / "report.html").stat().st_size > 10_000
    assert exitcompiler.load(tmp_path / "demo" / "digits.exit").exits[-1]
    assert len(np.load(tmp_path / "demo" / "held_out.npz")["y"]) == 397
    assert "left at" in shown.getvalue()
