"""Exits of a training that is gone on with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from finetuned import tuning_of
from joint_samples import small_program, tune

from exitcompiler import fitting
from exitcompiler.errors import TrainingError
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.settings import Settings


@pytest.mark.parametrize("notes", [None, {"exits": "blocks.0"}, {"exits": [1]}])
def test_a_checkpoint_that_does_not_say_its_exits_is_refused(tmp_path: Path, notes: Any) -> None:
    tune(checkpoint=tmp_path, epochs=1, notes=notes)
    with pytest.raises(TrainingError, match="does not say which exits") as refused:
        fitting._places_to_tune(
            small_program(), [], None, None, None, None, Settings(), tuning_of(checkpoint=tmp_path), None
        )  # type: ignore[arg-type]
    assert refused.value.where == str(tmp_path)
    assert "another checkpoint folder" in str(refused.value.remedy)


def test_more_exits_than_are_asked_for_are_told() -> None:
    cuts = list(find_cut_points(small_program()))[:2]
    assert fitting._remarks(cuts, Settings(max_exits=2)) == ()
    (remark,) = fitting._remarks(cuts, Settings(max_exits=1))
    assert f"2 exits of its checkpoint ({cuts[0].name}, {cuts[1].name}), more than max_exits=1" in remark
