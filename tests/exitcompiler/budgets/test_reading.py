"""``budget.toml``: what is read, and every way in which it can be wrong, with the message that tells it."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exitcompiler.budgets.limits import Budget, Limit, Metric, RunSettings
from exitcompiler.budgets.quantities import format_figure, unit_of
from exitcompiler.budgets.reading import read_budget
from exitcompiler.errors import BudgetError

EVERYTHING = """
baseline = "baseline.json"
[run]
backend = "onnxruntime"
threads = 2
operating_point = "selected"
max_rows = 1000
confidence = 0.9
[latency.mean]
max = "2 ms"
max_ratio = 0.7
max_increase = "10 %"
max_slowdown = "30 %"
[latency.p99]
max = "5 ms"
[throughput.32]
min = "2500 rows/s"
min_ratio = 1.3
max_decrease = "10 %"
[accuracy]
max_drop = "1 point"
max_drop_increase = "0.5 points"
max_disagreement = "3 %"
fresh_rows = true
[exit_rates]
tolerance = "3 points"
[exit_rates."layer1.0"]
min = "40 %"
max = "70 %"
tolerance = "5 points"
[artifact]
max_size = "4 MB"
max_size_increase = "5 %"
[memory]
max_peak = "300 MB"
max_peak_ratio = 1.2
max_peak_increase = "10 %"
[load]
max_time = "0.5 s"
max_time_ratio = 1.5
max_time_increase = "20 %"
max_time_slowdown = "50 %"
"""

KEYS = [
    "latency.mean.max", "latency.mean.max_ratio", "latency.mean.max_increase", "latency.mean.max_slowdown",
    "latency.p99.max", "throughput.32.min", "throughput.32.min_ratio", "throughput.32.max_decrease",
    "accuracy.max_drop", "accuracy.max_drop_increase", "accuracy.max_disagreement", "exit_rates.tolerance",
    'exit_rates."layer1.0".min', 'exit_rates."layer1.0".max', 'exit_rates."layer1.0".tolerance',
    "artifact.max_size", "artifact.max_size_increase", "memory.max_peak", "memory.max_peak_ratio",
    "memory.max_peak_increase", "load.max_time", "load.max_time_ratio", "load.max_time_increase",
    "load.max_time_slowdown",
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "budget.toml"


def read(path: Path, text: str) -> Budget:
    path.write_text(text, encoding="utf-8")
    return read_budget(path)


def test_everything_there_is(path: Path) -> None:
    budget = read(path, EVERYTHING)
    assert [limit.key for limit in budget.limits] == KEYS
    assert [limit.value for limit in budget.limits] == pytest.approx([
        2.0, 0.7, 0.1, 0.3, 5.0, 2500.0, 1.3, 0.1, 0.01, 0.005, 0.03, 0.03, 0.4, 0.7, 0.05, 4e6, 0.05, 3e8,
        1.2, 0.1, 500.0, 1.5, 0.2, 0.5,
    ], rel=1e-12)  # fmt: skip
    assert budget.limits[0] == Limit(Metric("latency", "mean"), "max", 2.0, "2 ms")
    assert budget.limits[1].text == "0.7"
    assert budget.limits[9].metric == Metric("accuracy", "drop")
    assert [limit.key for limit in budget.limits if limit.needs_baseline] == [
        key for key in KEYS if key.endswith(("increase", "decrease", "slowdown", "tolerance"))
    ]
    assert budget.run == RunSettings("onnxruntime", 2, "selected", 1000, 0.9)
    assert budget.fresh_rows
    assert budget.baseline == path.parent / "baseline.json"
    assert budget.batch_sizes == (32,)


def test_the_least_there_is_and_the_order_of_the_file(path: Path) -> None:
    budget = read(path, '[load]\nmax_time = "1 s"\n[artifact]\nmax_size = "1 MB"\n[latency.p50]\n')
    assert [limit.key for limit in budget.limits] == ["load.max_time", "artifact.max_size"]
    assert budget == Budget(budget.limits)


@pytest.mark.parametrize(("text", "where", "what", "remedy"), [
    ("", "", "is empty", "at least one limit"),
    ("# nothing\n", "", "is empty", "at least one limit"),
    ("[run]\nthreads = 2", "", "no limit", "max_ratio = 0.8"),
    ("[latency.mean]\n[accuracy]\nfresh_rows = true", "", "no limit", "max_ratio = 0.8"),
    ("[latency.mean]\nmax = 2 ms", "", "line 2", "in quotes"),
    ("[latency.mean]\nmax_ratio = 1\nmax_ratio = 2", "", "not TOML", ""),
    ("a = " + 9000 * "1", "", "not TOML", ""),
    ("a = " + 9000 * "[", "", "not TOML", ""),
    ("[latencies.mean]", "", "'latencies'", "did you mean 'latency'?"),
    ("threads = 2", "", "'threads'", "in [run]"),
    ("fresh_rows = true", "", "'fresh_rows'", "in [accuracy]"),
    ("max_size = '1 MB'", "", "'max_size'", "in [artifact]"),
    ("colour = 'blue'", "", "'colour'", "known: baseline, run, latency"),
    ("latency = '2 ms'", "latency", "not a table", "[latency]"),
    ("[[latency]]\nmean = 1", "latency", "a list is not a table", "[latency]"),
    ("run = true", "run", "true is not a table", "[run]"),
    ("[latency]\nmax = '2 ms'", "latency.max", "does not stand in [latency] itself", "[latency.mean]"),
    ("[latency]\nmean = '2 ms'", "latency.mean", "does not stand in [latency] itself", "[latency.mean]"),
    ("[latency.mena]\nmax = '2 ms'", "latency.mena", "not mean, p50", "did you mean 'mean'?"),
    ("[latency.worst]\nmax = '2 ms'", "latency.worst", "not mean, p50", "[latency.mean]"),
    ("[latency.mean]\nmax_raito = 1", "latency.mean.max_raito", "unknown", "did you mean 'max_ratio'?"),
    ("[latency.mean]\nbaseline = 'b'", "latency.mean.baseline", "unknown", "above the first table"),
    ("[latency.mean]\nmin = 1", "latency.mean.min", "unknown", "known: max, max_ratio"),
    ("[latency.mean]\nmax = 2", "latency.mean.max", "no unit", "2 ms"),
    ("[latency.mean.max]\nx = 2", "latency.mean.max", "a table is not a time", "2 ms"),
    ("[throughput.0]\nmin = '1 rows/s'", "throughput.0", "not a batch size", "[throughput.32]"),
    ("[throughput.-1]\nmin = '1 rows/s'", "throughput.-1", "not a batch size", "[throughput.32]"),
    ("[throughput.1.5]\nmin = '1 rows/s'", "throughput.1.5", "unknown", "known: min, min_ratio"),
    ("[throughput.08]\nmin = '1 rows/s'", "throughput.08", "not a batch size", "[throughput.32]"),
    ("[throughput.large]\nmin = '1 rows/s'", "throughput.large", "not a batch size", "[throughput.32]"),
    ("[throughput.8]\nmax = '1 rows/s'", "throughput.8.max", "unknown", "known: min, min_ratio"),
    ("[accuracy]\nmax_drops = '1 point'", "accuracy.max_drops", "unknown", "did you mean 'max_drop'?"),
    ("[accuracy]\nfresh_row = true", "accuracy.fresh_row", "unknown", "did you mean 'fresh_rows'?"),
    ("[accuracy]\nmax_drop = '1 %'", "accuracy.max_drop", "not a drop", "1 point"),
    ("[accuracy]\nmax_drop = '1 point'\nfresh_rows = 1", "accuracy.fresh_rows", "1 is neither true nor", ""),
    ("[exit_rates]\nmin = '4 %'", "exit_rates.min", "does not stand in", '[exit_rates."layer1.0"]'),
    ("[exit_rates.layer1.0]\nmin = '4 %'", "exit_rates.layer1", "'0'", '[exit_rates."layer1.0"]'),
    ('[exit_rates."a b"]\nmin = 4', 'exit_rates."a b".min', "no unit", "40 %"),
    ("[artifact]\nsize = '4 MB'", "artifact.size", "unknown", "did you mean 'max_size'?"),
    ("[artifact]\nmax_size = '4 ms'", "artifact.max_size", "not a size", "4 MB"),
    ("[memory]\nmax_size = '4 MB'", "memory.max_size", "unknown", "in [artifact]"),
    ("[load]\nmax_time_ratio = '2'", "load.max_time_ratio", "not a number", "0.7"),
    ("[run]\nthread = 2", "run.thread", "unknown", "did you mean 'threads'?"),
    ("[run]\nthreads = 0", "run.threads", "not a positive whole number", ""),
    ("[run]\nthreads = true", "run.threads", "true is not a positive whole number", ""),
    ("[run]\nmax_rows = 1.5", "run.max_rows", "not a positive whole number", ""),
    ("[run]\nmax_rows = '5'", "run.max_rows", "not a positive whole number", ""),
    ("[run]\nconfidence = 95", "run.confidence", "95 is not a confidence", "0.95 is 95 %"),
    ("[run]\nconfidence = 0.4", "run.confidence", "not a confidence", ""),
    ("[run]\nconfidence = nan", "run.confidence", "not a confidence", ""),
    ("[run]\nconfidence = '95 %'", "run.confidence", "not a confidence", ""),
    ("[run]\nbackend = 'onnxruntme'", "run.backend", "unknown backend", "did you mean 'onnxruntime'?"),
    ("[run]\nbackend = 3", "run.backend", "unknown backend 3", "known: auto, onnxruntime"),
    ("[run]\noperating_point = 1", "run.operating_point", "1 is not a name", "in quotes"),
    ("baseline = ''", "baseline", "not a name", "in quotes"),
    ("baseline = 3", "baseline", "not a name", "in quotes"),
    ("baseline = '.'", "baseline", "a folder", "baseline.json"),
    ("baseline = './budget.toml'", "baseline", "the budget itself", "baseline.json"),
])  # fmt: skip
def test_what_is_refused(path: Path, text: str, where: str, what: str, remedy: str) -> None:
    if where.startswith(("run.", "baseline")):
        text += "\n[artifact]\nmax_size = '4 MB'"
    with pytest.raises(BudgetError) as raised:
        read(path, text)
    assert raised.value.where == (f"{path}, {where}" if where else str(path))
    assert what in raised.value.what
    assert remedy in (raised.value.remedy or "")


@pytest.mark.parametrize(("text", "where", "what"), [
    ("[exit_rates.a]\nmin = '50 %'\nmax = '40 %'", "exit_rates.a.min", 'above exit_rates.a.max = "40 %"'),
    ("[exit_rates.a]\nmin = '60 %'\n[exit_rates.b]\nmin = '41 %'", "exit_rates", "a, b add up to 101.0 %"),
    ("[latency.p50]\nmax = '2 ms'\n[latency.p95]\nmax = '1 ms'", "latency.p95.max", "below latency.p50.max"),
    ("[latency.p99]\nmax = '1 ms'\n[latency.p50]\nmax = '2 ms'", "latency.p99.max", "below latency.p50.max"),
    (
        "[latency.p50]\nmax = '1 ms'\n[latency.p95]\nmax = '3 ms'\n[latency.p99]\nmax = '2 ms'",
        "latency.p99.max",
        '"2 ms" is below latency.p95.max = "3 ms", though p99 is never below p95',
    ),
])  # fmt: skip
def test_limits_that_contradict_each_other(path: Path, text: str, where: str, what: str) -> None:
    with pytest.raises(BudgetError) as raised:
        read(path, text)
    assert raised.value.where == f"{path}, {where}"
    assert what in raised.value.what


@pytest.mark.parametrize("text", [
    "[exit_rates.a]\nmin = '50 %'\nmax = '50 %'\n[exit_rates.b]\nmin = '50 %'",
    "[exit_rates.a]\nmin = '33 %'\n[exit_rates.b]\nmin = '56 %'\n[exit_rates.c]\nmin = '11 %'",
    "[latency.p50]\nmax = '2 ms'\n[latency.p99]\nmax = '2 ms'",
    "[latency.p50]\nmax_ratio = 1\n[latency.p99]\nmax_ratio = 0.5",  # of plain's percentiles
    "[latency.mean]\nmax = '2 ms'\n[latency.p95]\nmax = '1 ms'",  # few slow rows may do that
    "[exit_rates]\ntolerance = '1 point'\n[exit_rates.a]\ntolerance = '3 points'",  # its own counts
])  # fmt: skip
def test_limits_that_only_seem_to(path: Path, text: str) -> None:
    assert 33 / 100 + 56 / 100 + 11 / 100 > 1.0  # as floats
    assert read(path, text).limits


@pytest.mark.parametrize(
    ("text", "quotes"),
    [
        ("[latency.mean]\nmax = 2 ms", True),
        ("[latency.mean]\nmax = ms", True),
        ("[latency.mean]\nmax_ratio = 1\nmax_ratio = 2", False),
        ("[accuracy]\nmax_drop = '1 %'\n[accuracy]", False),
    ],
)
def test_quotes_are_advised_where_they_help(path: Path, text: str, quotes: bool) -> None:
    with pytest.raises(BudgetError, match="is not TOML") as raised:
        read(path, text)
    assert ("quotes" in (raised.value.remedy or "")) is quotes


def test_a_mark_of_the_byte_order_makes_no_difference(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf[latency.mean]\nmax_ratio = 0.7\n")
    assert [limit.key for limit in read_budget(path).limits] == ["latency.mean.max_ratio"]


def test_files_that_cannot_be_read(path: Path) -> None:
    with pytest.raises(BudgetError, match="No such file") as raised:
        read_budget(path)
    assert raised.value.where == str(path)
    with pytest.raises(BudgetError, match="directory"):
        read_budget(path.parent)
    path.write_bytes(b"[latency.mean]\nmax = '2 \xb5s'")
    with pytest.raises(BudgetError, match="not UTF-8"):
        read_budget(path)


LIMITS = st.sampled_from([
    ("[latency.p95]", Metric("latency", "p95"), "max", "max"),
    ("[latency.mean]", Metric("latency", "mean"), "max_ratio", "max_ratio"),
    ("[latency.mean]", Metric("latency", "mean"), "max_increase", "max_increase"),
    ("[throughput.8]", Metric("throughput", "8"), "min", "min"),
    ("[throughput.8]", Metric("throughput", "8"), "max_decrease", "max_decrease"),
    ("[accuracy]", Metric("accuracy", "drop"), "max", "max_drop"),
    ("[accuracy]", Metric("accuracy", "drop"), "max_increase", "max_drop_increase"),
    ('[exit_rates."a.b"]', Metric("exit_rates", "a.b"), "tolerance", "tolerance"),
    ("[memory]", Metric("memory", "peak"), "max", "max_peak"),
    ("[load]", Metric("load", "time"), "max_slowdown", "max_time_slowdown"),
])  # fmt: skip


@given(limit=LIMITS, value=st.floats(0.01, 1.0))
def test_a_limit_written_as_figures_are_shown_is_read_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, limit: tuple[str, Metric, str, str], value: float
) -> None:
    head, metric, kind, key = limit
    shown = format_figure(metric, kind, value)  # type: ignore[arg-type]
    written = f'"{shown}"' if unit_of(metric, kind).scales else shown  # type: ignore[arg-type]
    path = tmp_path_factory.getbasetemp() / "round_trip.toml"
    (found,) = read(path, f"{head}\n{key} = {written}\n").limits
    assert (found.metric, found.kind) == (metric, kind)
    assert found.key == f"{head[1:-1]}.{key}"
    assert found.value == pytest.approx(value, rel=0.006, abs=0.5001e-4)


@given(text=st.text(max_size=200) | st.builds("[latency.mean]\nmax = {}".format, st.text(max_size=20)))
def test_whatever_is_in_the_file_the_error_is_typed(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.toml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with contextlib.suppress(BudgetError):
        assert read_budget(path).limits
