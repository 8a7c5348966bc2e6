"""Mixing of rows: shares, labels, rectangles."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from exitcompiler.errors import InputError
from exitcompiler.finetuning.mixing import Target, mix_rows

ROWS = 6


def _mixed(inputs: dict[str, Tensor], seed: int) -> tuple[dict[str, Tensor], Target]:
    return mix_rows(inputs, torch.arange(ROWS), torch.Generator().manual_seed(seed))


def _numbered(*shape: int) -> Tensor:
    """Row number ``i`` holds ``i`` everywhere."""
    return torch.arange(ROWS, dtype=torch.float32).reshape(ROWS, *[1] * len(shape)).expand(ROWS, *shape)


@given(st.integers(0, 10_000))
def test_a_vector_is_blended_by_the_share_that_its_label_has(seed: int) -> None:
    blended, target = _mixed({"x": _numbered(3)}, seed)
    assert target.others is not None
    assert target.labels.tolist() == list(range(ROWS))
    assert sorted(target.others.tolist()) == list(range(ROWS))
    assert 0.0 <= target.share <= 1.0
    expected = target.share * target.labels + (1 - target.share) * target.others
    torch.testing.assert_close(blended["x"], expected[:, None].expand(ROWS, 3))


@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(1, 9))
def test_an_image_has_as_much_of_each_row_as_its_labels_say(seed: int, height: int, width: int) -> None:
    images = _numbered(2, height, width)
    mixed, target = _mixed({"x": images}, seed)
    assert target.others is not None
    pasted = mixed["x"]
    for row, (own, other) in enumerate(zip(target.labels.tolist(), target.others.tolist(), strict=True)):
        if not set(pasted[row].unique().tolist()) <= {float(own), float(other)}:
            break  # blended, which the test above looks at
        if own != other:
            foreign = pasted[row] == other
            assert float(1 - foreign.float().mean()) == pytest.approx(target.share, abs=1e-6)
            assert torch.equal(foreign[0], foreign[1])
            at = foreign[0].nonzero()
            if len(at):  # all of what was pasted is one rectangle
                (top, left), (bottom, right) = at.min(0).values.tolist(), at.max(0).values.tolist()
                assert len(at) == (bottom - top + 1) * (right - left + 1)


def test_images_are_pasted_about_every_other_time() -> None:
    pasted = 0
    for seed in range(200):
        mixed, _ = _mixed({"x": _numbered(1, 8, 8)}, seed)
        pasted += int((mixed["x"] == mixed["x"].round()).all())
    assert 70 < pasted < 130


def test_several_inputs_are_blended_by_one_share_in_one_order() -> None:
    for seed in range(20):
        mixed, target = _mixed({"a": _numbered(1, 4, 4), "b": 10 * _numbered(5)}, seed)
        assert target.others is not None
        expected = target.share * target.labels + (1 - target.share) * target.others
        torch.testing.assert_close(mixed["a"], expected.reshape(ROWS, 1, 1, 1).expand(ROWS, 1, 4, 4))
        torch.testing.assert_close(mixed["b"], 10 * expected[:, None].expand(ROWS, 5))


def test_it_is_the_same_for_the_same_generator_and_leaves_its_arguments_alone() -> None:
    images = torch.randn(ROWS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = images.clone()
    for seed in range(10):
        (first, one), (second, other) = _mixed({"x": images}, seed), _mixed({"x": images}, seed)
        assert torch.equal(first["x"], second["x"])
        assert one.share == other.share
        assert one.others is not None
        assert other.others is not None
        assert torch.equal(one.others, other.others)
    assert torch.equal(images, before)
    assert len({_mixed({"x": images}, seed)[1].share for seed in range(10)}) > 5


def test_what_is_not_of_floating_point_is_refused_by_name() -> None:
    tokens = {"ids": torch.zeros(ROWS, 4, dtype=torch.int64), "weights": torch.zeros(ROWS, 4)}
    with pytest.raises(InputError, match=r"\['ids'\] cannot be mixed"):
        _mixed(tokens, 0)
