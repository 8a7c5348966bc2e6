"""Choosing the exits to fine-tune: on frozen features, in a short while, with a reason for every place."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from trained import stripes, trained_network

from exitcompiler import profile
from exitcompiler.capture import capture
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows, TrainingData
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.finetuning import exit_search
from exitcompiler.finetuning.exit_search import ExitSearch, search_exits
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.placement import Place
from exitcompiler.program import Program
from exitcompiler.progress import reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.settings import Settings

PROBES = (0.1, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.97)


@functools.cache
def _program() -> Program:
    return capture(trained_network(), stripes(8, seed=1)[0]).program


def _rows(count: int, seed: int, labelled: bool = True) -> Rows:
    x, y = stripes(count, seed=seed)
    return Rows({"image": torch.from_numpy(x)}, y if labelled else None)


def _places(count: int | None = None) -> list[Place]:
    cuts = list(find_cut_points(_program()))[:count]
    shares = [(index + 1) / 9 for index in range(len(cuts))]
    return [Place(*facts, False, "") for facts in zip(cuts, shares, PROBES, strict=False)]


def _search(source: Any, places: list[Place] | None = None, **options: Any) -> ExitSearch:
    settings = Settings(threads=1, **options)
    data = TrainingData(source, ("image",)).for_model(_program())
    extent = data.count(settings.recipe.batch_size)
    engines = Engines(create_backend("torch", precision="fp32", threads=1), Lowerer())
    places = _places() if places is None else places
    with reporting(False) as reporter:
        return search_exits(_program(), places, data, extent, _rows(40, 5), engines, settings, reporter)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_search, "ROW_BUDGET", 1500)
    monkeypatch.setattr(exit_search, "CANDIDATES", 4)
    monkeypatch.setattr(profile, "LIMIT_S", 0.2)


@pytest.fixture
def fixed_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every segment 100 us, every head 20: what is chosen then depends on scores alone."""

    def measured(program: Program, cuts: Any, heads: Any, *_: Any) -> CostModel:
        return CostModel((100.0,) * (len(cuts) + 1), dict.fromkeys(heads, 20.0), 5.0)

    monkeypatch.setattr(exit_search, "_measured", measured)


def test_a_set_is_chosen_on_measured_times_and_every_place_has_a_reason() -> None:
    found = _search(_rows(1000, seed=3), max_exits=2)
    chosen = tuple(place.cut.name for place in found.places if place.chosen)
    assert chosen == found.tried[0].exits
    assert 1 <= len(chosen) <= 2
    assert [place.cut for place in found.places] == [place.cut for place in _places()]
    for place in found.places:
        assert place.reason.startswith("in the set") == place.chosen
    reasons = [place.reason for place in found.places]
    assert f"{found.tried[0].speedup:.2f}x" in reasons[[p.chosen for p in found.places].index(True)]
    assert "the probe knows nothing here" in reasons[0]
    assert "too late" in reasons[-1]
    assert sum("not in the set" in reason for reason in reasons) + len(chosen) == 4
    assert found.sets == 4 + 6
    assert found.rows == 250
    assert all(len(judged.exits) <= 2 and judged.accuracy_drop <= found.within for judged in found.tried)
    assert found.tried[0].speedup >= 0.99 * max(judged.speedup for judged in found.tried)


@pytest.mark.usefixtures("fixed_times")
def test_the_search_is_repeatable_and_leaves_network_and_generators_alone() -> None:
    program = _program()
    before = {name: value.clone() for name, value in program.entry.body.state_dict().items()}
    torch.manual_seed(7)
    first = _search(_rows(600, seed=3))
    drawn = torch.rand(3)
    torch.manual_seed(7)
    assert torch.equal(torch.rand(3), drawn)
    second = _search(_rows(600, seed=3))
    assert first.places == second.places
    assert first.tried == second.tried
    assert all(torch.equal(before[name], value) for name, value in program.entry.body.state_dict().items())


@pytest.mark.usefixtures("fixed_times")
def test_heads_are_judged_on_rows_that_they_were_not_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _ = stripes(400, seed=3)
    seen: dict[str, set[bytes]] = {"_trained": set(), "_scored": set()}
    for name, rows in seen.items():
        inner = getattr(exit_search, name)

        def watched(*args: Any, inner: Any = inner, rows: set[bytes] = rows) -> Any:
            (data,) = [argument for argument in args if isinstance(argument, TrainingData)]
            assert isinstance(data.source, Rows)
            rows |= {row.numpy().tobytes() for row in data.source.inputs["image"]}
            return inner(*args)

        monkeypatch.setattr(exit_search, name, watched)
    _search(_rows(400, seed=3))
    assert not seen["_trained"] & seen["_scored"]
    assert seen["_trained"] | seen["_scored"] == {row.tobytes() for row in x}
    assert len(seen["_scored"]) == 100


class _Loader:
    """Batches that are new in every pass; counts what was drawn."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.drawn = 0

    def __len__(self) -> int:
        return self.rows // 50

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _ in range(len(self)):
            self.drawn += 50
            yield stripes(50, seed=self.drawn)


@pytest.mark.usefixtures("fixed_times")
def test_of_a_long_loader_only_the_budget_is_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_search, "JUDGED_ROWS", 300)
    loader = _Loader(100_000)
    found = _search(loader)
    assert found.rows == 300
    assert loader.drawn <= 1500 + 300 + 4 * 150  # a batch of three of the loader's is drawn whole


@pytest.mark.usefixtures("fixed_times")
def test_without_labels_the_networks_answers_are_the_target() -> None:
    found = _search(_rows(600, seed=3, labelled=False))
    assert found.tried
    assert any(place.chosen for place in found.places)


@pytest.mark.usefixtures("fixed_times")
def test_a_latency_budget_compares_within_the_default_drop(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    inner = exit_search.rank_sets

    def watched(table: Any, costs: Any, limit: float, most: int) -> Any:
        asked.append((limit, most))
        return inner(table, costs, limit, most)

    monkeypatch.setattr(exit_search, "rank_sets", watched)
    _search(_rows(400, seed=3), latency_budget_ms=1.0)
    _search(_rows(400, seed=3), max_accuracy_drop=0.04, max_exits=1)
    assert asked == [(0.01, 3), (0.04, 1)]


@pytest.mark.parametrize(("probes", "chosen"), [((0.1, 0.9), 1), ((0.1, 0.1), 0)])
def test_where_there_is_nothing_to_choose_nothing_is_trained(
    probes: tuple[float, ...], chosen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(exit_search, "train_at_cuts")
    places = [replace(place, probe_accuracy=p) for place, p in zip(_places(2), probes, strict=True)]
    found = _search(_rows(400, seed=3), places)
    assert sum(place.chosen for place in found.places) == chosen
    assert found.tried == ()


@pytest.mark.usefixtures("fixed_times")
def test_what_the_report_gets_is_json() -> None:
    found = _search(_rows(400, seed=3))
    entry = found.as_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert entry["tried"][0]["exits"] == list(found.tried[0].exits)
    assert entry["sets"] == found.sets
    assert (entry["asked"], entry["within"]) == (0.01, found.within)
