"""A baseline is read as it was written, and nothing else is taken for one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from budget_figures import ENVIRONMENT, answered, measurement, process
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.baseline import measurement_to_json, read_baseline, write_baseline
from exitcompiler.budgets.figures import Answered, Environment, Measurement, ProcessFigures, SideFigures
from exitcompiler.errors import BudgetError, InputError

NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=8)
COUNTS = st.integers(0, 10**6)
SIZES = st.integers(1, 10**6)


def rounded(number: float) -> float:
    return float(f"{number:.6g}")


TIMES = st.floats(1e-3, 1e12).map(rounded)


@st.composite
def answers(draw: st.DrawFn) -> Answered:
    exits = draw(st.dictionaries(NAMES, COUNTS, min_size=1, max_size=4))
    rows = sum(exits.values())
    if rows == 0:
        exits = dict.fromkeys(exits, 1)
        rows = len(exits)
    share = st.integers(0, rows)
    labelled = draw(st.one_of(st.just([None] * 4), st.lists(share, min_size=4, max_size=4)))
    return Answered(rows, draw(NAMES), exits, draw(share), *labelled)


@st.composite
def measurements(draw: st.DrawFn) -> Measurement:
    answered = draw(answers())
    sizes = draw(st.sets(st.integers(1, 4096), max_size=3))
    blocks = draw(st.dictionaries(NAMES, TIMES, max_size=3))

    def side() -> SideFigures:
        return SideFigures(*(draw(TIMES) for _ in range(4)), {size: draw(TIMES) for size in sizes})

    def one() -> ProcessFigures:
        exits = {name: draw(TIMES) for name in answered.exits}
        first = draw(st.sampled_from(["program", "plain"]))
        return ProcessFigures(side(), side(), exits, blocks, first, draw(TIMES), draw(SIZES), draw(TIMES))  # type: ignore[arg-type]

    environment = Environment(
        draw(st.text(st.characters(codec="utf-8"), max_size=8)),
        draw(st.integers(1, 999)),
        draw(NAMES),
        draw(NAMES),
        draw(st.integers(1, 999)),
        draw(NAMES),
        draw(st.dictionaries(NAMES, NAMES, max_size=3)),
    )
    processes = tuple(one() for _ in range(draw(st.integers(1, 3))))
    return Measurement(environment, draw(NAMES), draw(SIZES), answered, processes)


@given(measurements())
def test_a_baseline_is_read_as_it_was_written(written: Measurement) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "baseline.json"
        write_baseline(path, written)
        found = read_baseline(path)
        assert found == written
        assert list(found.answered.exits) == list(written.answered.exits)


def test_what_is_written_can_be_compared_line_by_line(tmp_path: Path) -> None:
    first, again = tmp_path / "first.json", tmp_path / "again.json"
    write_baseline(first, measurement(noise=0.1, seed=3))
    found = read_baseline(first)
    write_baseline(again, found)
    assert first.read_bytes() == again.read_bytes()
    text = first.read_text(encoding="utf-8")
    assert text.endswith("}\n")
    document = json.loads(text)
    assert list(document) == sorted(document)
    noisy = measurement(noise=0.1, seed=3).processes[0].load_ms
    assert document["processes"][0]["load_ms"] == rounded(noisy) != noisy
    assert found.processes[0].peak_bytes == measurement().processes[0].peak_bytes


def change(*keys: str | int, to: Any = None, delete: bool = False) -> Callable[[Any], None]:
    def apply(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        if delete:
            del document[keys[-1]]
        else:
            document[keys[-1]] = to

    return apply


@pytest.mark.parametrize(
    ("mistake", "place", "said"),
    [
        (change("schema", to=2), "schema", "schema 2 is not one"),
        (change("schema", delete=True), "", "'schema' is missing"),
        (change("point", to=3), "point", "expected a string, found a number"),
        (change("point", delete=True), "", "'point' is missing"),
        (change("size_bytes", to=1.5), "size_bytes", "whole number"),
        (change("more", to=1), "", "unknown keys ['more']"),
        (change("environment", "cores", to=0), "environment.cores", "0 is not in 1.."),
        (change("environment", "cpu", delete=True), "environment", "'cpu' is missing"),
        (change("environment", "versions", "numpy", to=2), "environment.versions.numpy", "a string"),
        (change("answered", "rows", to=99), "answered.exits", "100 rows left at exits, of 99"),
        (change("answered", "rows", to=0), "answered.rows", "0 is not in 1.."),
        (change("answered", "exits", 0, "rows", to=-1), "answered.exits[0].rows", "-1 is not in"),
        (change("answered", "exits", 0, "name", to="middle"), "answered.exits", "'middle' is there twice"),
        (change("answered", "lost", to=101), "answered.lost", "101 is not in 0..100"),
        (change("answered", "gained", delete=True), "answered", "together, or none"),
        (change("processes", to=[]), "processes", "there is no process"),
        (change("processes", to={}), "processes", "expected an array"),
        (change("processes", 0, "first", to="both"), "processes[0].first", "expected one of"),
        (change("processes", 0, "load_ms", to=-1), "processes[0].load_ms", "-1.0 is not positive"),
        (change("processes", 0, "load_ms", to=True), "processes[0].load_ms", "expected a number"),
        (change("processes", 0, "load_ms", to=10**999), "processes[0].load_ms", "too large"),
        (change("processes", 0, "plain", "p50_us", delete=True), "processes[0].plain", "'p50_us' is missing"),
        (change("size_bytes", to=0), "size_bytes", "0 is not in 1.."),
        (change("processes", 0, "peak_bytes", to=0), "processes[0].peak_bytes", "0 is not in 1.."),
        (change("processes", 0, "plain", "p95_us", to=0), "processes[0].plain.p95_us", "0.0 is not positive"),
        (change("processes", 0, "exits_us", "early", to=0.0), "processes[0].exits_us.early", "not positive"),
        (change("processes", 0, "blocks_us", "first", to=0), "processes[0].blocks_us.first", "not positive"),
        (
            change("processes", 0, "program", "rows_per_second", "32", to=0),
            "processes[0].program.rows_per_second.32",
            "not positive",
        ),
        (change("processes", 0, "exits_us", "early", delete=True), "processes[0]", "not those of 'answered'"),
        (
            change("processes", 0, "plain", "rows_per_second", "032", to=1),
            "processes[0].plain.rows_per_second",
            "'032' is not a batch size",
        ),
    ],
)
def test_a_mistake_is_named_with_its_place(
    tmp_path: Path, mistake: Callable[[Any], None], place: str, said: str
) -> None:
    path = tmp_path / "baseline.json"
    document: Any = {"schema": 1, **measurement_to_json(measurement())}
    mistake(document)
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(BudgetError) as raised:
        read_baseline(path)
    assert raised.value.where == (f"{path}: {place}" if place else str(path))
    assert said in raised.value.what
    assert "--update-baseline" in str(raised.value.remedy)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"[]", "expected an object"),
        (b'{"schema": NaN}', "NaN is not JSON"),
        (b'{"schema": 1, "schema": 1}', "twice"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_file_that_is_no_baseline(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "baseline.json"
    path.write_bytes(content)
    with pytest.raises(BudgetError, match=said):
        read_baseline(path)


def test_files_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="no such baseline"):
        read_baseline(tmp_path / "none.json")
    with pytest.raises(BudgetError, match="cannot be read"):
        read_baseline(tmp_path)
    with pytest.raises(InputError, match="cannot be written"):
        write_baseline(tmp_path / "none" / "baseline.json", measurement())


def test_figures_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    answers = answered()
    bad = replace(process(0, answers), load_ms=float("nan"))
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_baseline(tmp_path / "b.json", Measurement(ENVIRONMENT, "point", 1, answers, (bad,)))
    assert list(tmp_path.iterdir()) == []
