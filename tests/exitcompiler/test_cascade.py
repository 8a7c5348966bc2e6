"""cascade(), end to end: what comes out works, keeps its word, and says what it did."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import networkx as nx
import numpy as np
import pytest
import torch
from torch.nn import functional as F  # noqa: N812
from trained import SIDE, SmallResNet, stripes, trained_family

import exitcompiler
from exitcompiler import cascade_findings, delivery, selection
from exitcompiler.cascades import CascadeOptions, cascade, cascade_in_detail
from exitcompiler.compiler import Details
from exitcompiler.errors import CalibrationError, InputError
from exitcompiler.frontier import sweep
from exitcompiler.gates import RECIPES
from exitcompiler.interpreter import interpret
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.settings import Settings
from exitcompiler.splitting import edges_of
from exitcompiler.training import HeadRecipe

NAMES = ("small", "middle", "large")
BACKENDS = ("onnxruntime", "openvino", "torch")
CALIBRATION = stripes(1000, seed=2)


class Classes(torch.nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.fc = torch.nn.Linear(SIDE * SIDE, classes)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.fc(image.flatten(1))
        return answer


@contextlib.contextmanager
def quick(worthwhile: float = 0.0) -> Iterator[None]:
    """Few trade-offs and repeats; whether a cascade pays on this machine today is not what is tested."""
    coarse = functools.partial(sweep, steps=5, folds=2, recipes=RECIPES[1:])
    with (
        mock.patch.object(delivery, "WORTHWHILE", worthwhile),
        mock.patch.object(delivery, "SPEEDUP_REPEATS", 100),
        mock.patch.object(selection, "sweep", coarse),
        mock.patch.object(selection, "ROUNDS", 2),
        mock.patch.object(cascade_findings, "STEPS", 2),
    ):
        yield


def compiled_as(networks: Sequence[Any], **options: Any) -> CompiledModel:
    """On torch, which needs no export before a program is chosen."""
    defaults = {"backend": "torch", "threads": 1, "max_accuracy_drop": 0.02}
    with quick():
        return cascade(networks, CALIBRATION, **(defaults | options))


@functools.cache
def details(backend: str) -> Details:
    """Three networks on ONNX Runtime; the first and the last of them on the other backends."""
    step = 1 if backend == "onnxruntime" else 2
    settings, options = Settings(0.02, backend=backend, threads=1), CascadeOptions(names=NAMES[::step])
    with quick():
        return cascade_in_detail(trained_family()[::step], CALIBRATION, None, settings, options)


def require_those_of_the_oracle(found: Details, rows: int = 50) -> None:
    assert found.selection is not None
    x, _ = stripes(rows, seed=4)
    result = found.compiled.run(x)
    program = found.selection.chosen.program
    oracle = interpret(program, {"image": torch.from_numpy(x)})
    assert found.compiled.exits == program.exits
    agree = result.exit_index == oracle.exit_index
    assert agree.mean() >= 0.98  # a score on the very edge of a threshold may fall to either side
    np.testing.assert_allclose(result.outputs[agree], oracle.outputs["logits"].numpy()[agree], atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_the_oracle(backend: str) -> None:
    require_those_of_the_oracle(details(backend))


def test_the_networks_answer_in_turn_and_keep_the_accuracy() -> None:
    compiled = details("onnxruntime").compiled
    assert set(compiled.exits) <= set(NAMES)
    x, y = stripes(600, seed=6)
    result = compiled.run(x)
    assert len(set(result.exit_index.tolist())) > 1
    plain = compiled.plain(x)
    with torch.no_grad():
        large = trained_family()[2](torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(plain, large, atol=1e-4)
    assert (plain.argmax(1) == y).mean() - (result.outputs.argmax(1) == y).mean() < 0.05


def test_a_row_takes_the_same_way_alone_and_in_a_batch() -> None:
    compiled = details("onnxruntime").compiled
    x, _ = stripes(48, seed=5)
    together = compiled.run(x)
    alone = [compiled.run(x[i : i + 1]) for i in range(len(x))]
    assert len(set(together.exit_index.tolist())) > 1
    assert [int(r.exit_index[0]) for r in alone] == together.exit_index.tolist()
    np.testing.assert_allclose(np.concatenate([r.outputs for r in alone]), together.outputs, atol=1e-5)


def test_every_exit_can_be_forced_and_says_what_torch_says() -> None:
    found = details("onnxruntime")
    x, _ = stripes(5, seed=5)
    assert found.selection is not None
    kept = found.selection.chosen.point.policy.kept
    with torch.no_grad():
        rows = {
            n: m(torch.from_numpy(x)).log_softmax(1) for n, m in zip(NAMES, trained_family(), strict=True)
        }
    for index, name in enumerate(found.compiled.exits):
        others = kept[name].head.removeprefix("with ").split("+") if kept[name].head != "own" else []
        expected = torch.stack([rows[n] for n in (name, *others)]).logsumexp(0)
        result = found.compiled.forced(name).run(x)
        assert result.exit_index.tolist() == [index] * 5
        np.testing.assert_allclose(
            torch.from_numpy(result.outputs).softmax(1), expected.softmax(1), atol=1e-4
        )
    assert found.compiled.artifact.report["parity"]["max_relative_difference"] < 1e-4


def test_saved_it_runs_on_every_backend_and_as_one_file(tmp_path: Path) -> None:
    import onnxruntime

    compiled, folder = details("onnxruntime").compiled, tmp_path / "cascade.exit"
    compiled.save(folder, torch=True)
    x, _ = stripes(40, seed=7)
    expected = compiled.run(x)

    def require_same(outputs: np.ndarray, exit_index: np.ndarray) -> None:
        same = exit_index == expected.exit_index
        assert same.mean() >= 0.97
        np.testing.assert_allclose(outputs[same], expected.outputs[same], atol=1e-4)

    for backend in BACKENDS:
        loaded = exitcompiler.load(folder, backend=backend, threads=1)
        result = loaded.run(x)
        require_same(result.outputs, result.exit_index)
        assert loaded.explain() == compiled.explain()
    session = onnxruntime.InferenceSession((folder / "model.onnx").read_bytes())
    require_same(*session.run(None, {"image": x}))
    (one_output, one_index) = session.run(None, {"image": x[:1]})
    np.testing.assert_allclose(one_output, expected.outputs[:1], atol=1e-4)
    assert one_index.tolist() == expected.exit_index[:1].tolist()
    np.savez(tmp_path / "rows.npz", x=x, logits=expected.outputs)
    script = """
        import sys
        sys.modules["torch"] = None
        sys.modules["onnx"] = None
        import numpy, exitcompiler
        rows = numpy.load(sys.argv[2])
        for backend in ("onnxruntime", "openvino"):
            model = exitcompiler.load(sys.argv[1], backend=backend, threads=1)
            found = model(rows["x"])
            assert (found.argmax(1) == rows["logits"].argmax(1)).mean() >= 0.97
            model(rows["x"][:1])
            assert "large" in model.explain()
    """
    code = textwrap.dedent(script)
    subprocess.run(
        [sys.executable, "-c", code, str(folder), str(tmp_path / "rows.npz")], check=True, timeout=60
    )


def test_operating_points_trade_accuracy_for_time() -> None:
    compiled = details("onnxruntime").compiled
    x, _ = stripes(30, seed=7)
    points = {point.name: point for point in compiled.operating_points}
    assert len(points) >= 2
    for name, point in points.items():
        other = compiled.select(name=name)
        assert other.operating_point.name == name
        assert other(x).shape == (30, 4)
        assert sum(point.estimate.exit_rates.values()) == pytest.approx(1.0)
    exact = compiled.select(max_accuracy_drop=0.0)
    assert exact.operating_point.estimate.accuracy_drop <= 0.0
    assert "point that was measured" in exact.explain() or exact.operating_point == compiled.operating_point


def test_the_report_and_the_page_are_about_the_networks(tmp_path: Path) -> None:
    compiled = details("onnxruntime").compiled
    report = compiled.artifact.report
    about = report["cascade"]
    assert [entry["name"] for entry in about["networks"]] == list(NAMES)
    assert about["reference"] == "large"
    assert about["edges"] == [["small", "middle"], ["small", "large"], ["middle", "large"]]
    assert report["rows"] == {"fit": 0, "learn": 800, "certify": 200}
    accuracies = [entry["accuracy"] for entry in about["networks"]]
    assert accuracies == sorted(accuracies)
    assert all(entry["latency_ms"] > 0 for entry in about["networks"])
    assert all(entry["reason"] for entry in (*about["networks"], *report["exits"]))
    assert sum(pattern["share"] for pattern in about["overlap"]["patterns"]) == pytest.approx(1.0)
    assert {"small > middle", "small > large", "middle > large", "small > middle > large"} == about[
        "frontiers"
    ].keys()
    for budget in about["budgets"]:
        shares = budget["networks"]
        assert sum(entry["share_of_time"] for entry in shares) == pytest.approx(1.0)
        assert sum(entry["share_of_rows_answered"] for entry in shares) == pytest.approx(1.0)
        assert all(0.0 <= entry["share_of_rows_run"] <= 1.0 for entry in shares)
    assert report["baselines"].keys() == {"myopic", "uniform", "networks", "oracle"}
    assert all(report["baselines"].values())
    text = compiled.explain()
    assert all(name in text for name in NAMES)
    assert "as fast as large alone" in text
    compiled.report(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(name in page for name in NAMES)


def test_it_can_be_cut_in_two() -> None:
    compiled = details("onnxruntime").compiled
    x, _ = stripes(60, seed=8)
    whole = compiled.run(x)
    cut = [edge for edge in edges_of(compiled.operating_point.control_flow) if edge.obstacle is None]
    assert cut
    parts = exitcompiler.split(compiled, cut[-1].target)
    near = parts.near.run(x)
    assert near.handed_over is not None
    rest = near.handed_over
    answers = near.outputs.copy()
    if len(rest.rows):
        answers[rest.rows] = parts.far(rest.values)
    np.testing.assert_allclose(answers, whole.outputs, atol=1e-5)


def test_without_a_jump_rows_go_from_one_to_the_next(tmp_path: Path) -> None:
    """Also: edges as a networkx graph over names, the dump, and the models as they were."""
    graph: nx.DiGraph[str] = nx.DiGraph([("small", "middle"), ("middle", "large")])
    before = [{k: v.clone() for k, v in model.state_dict().items()} for model in trained_family()]
    compiled = compiled_as(trained_family(), names=NAMES, edges=graph, dump=tmp_path / "dump")
    about = compiled.artifact.report["cascade"]
    assert about["edges"] == [["small", "middle"], ["middle", "large"]]
    assert {tuple(edge) for edge in about["used_edges"]} <= {
        ("small", "middle"),
        ("middle", "large"),
        ("small", "large"),
    }
    texts = list((tmp_path / "dump").glob("*.txt"))
    assert any("select-ways" in text.name for text in texts)
    for model, state in zip(trained_family(), before, strict=True):
        assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())


def test_a_middle_network_that_knows_nothing_is_pruned() -> None:
    torch.manual_seed(0)
    small, _, large = trained_family()
    found = compiled_as([small, SmallResNet().eval(), large], names=NAMES)
    assert set(found.exits) <= {"small", "large"}
    networks = {entry["name"]: entry for entry in found.artifact.report["cascade"]["networks"]}
    assert not networks["middle"]["kept"]
    assert "never to go there" in networks["middle"]["reason"]
    assert all(block.name != "middle" for block in found.operating_point.control_flow.blocks)


@pytest.mark.slow
def test_a_first_network_that_knows_nothing_is_passed_by() -> None:
    torch.manual_seed(0)
    small, _, large = trained_family()
    found = compiled_as([Classes(4), small, large], names=("useless", "small", "large"))
    assert found.exits == ("small", "large")
    assert found.operating_point.control_flow.entry.name == "small"


def test_networks_that_are_all_the_same_are_refused() -> None:
    small, _, _ = trained_family()
    found = compiled_as([small, small], max_accuracy_drop=0.001)
    report = found.artifact.report
    assert report["refused"]
    assert found.exits == ("backbone",) or found.exits == ("SmallResNet-2",)
    x, _ = stripes(6, seed=3)
    with torch.no_grad():
        np.testing.assert_allclose(found(x), small(torch.from_numpy(x)).numpy(), atol=1e-5)
    assert "no cascade was made, SmallResNet-2 alone is returned" in found.explain().replace("\n", " ")


def test_a_cascade_that_does_not_pay_is_refused_with_the_measured_figure() -> None:
    with quick(worthwhile=1e6):
        found = cascade(
            trained_family()[::2], CALIBRATION, threads=1, backend="torch", max_accuracy_drop=0.04
        )
    assert "measured speed-up" in found.artifact.report["refused"]
    assert [point.name for point in found.operating_points] == ["plain"]


def test_a_latency_budget_is_kept_or_said_to_be_impossible() -> None:
    costs = details("torch").costs
    assert costs is not None
    budget_ms = costs.whole_us / 1000.0
    limits: dict[str, Any] = {"max_accuracy_drop": None, "names": NAMES[::2]}
    compiled = compiled_as(trained_family()[::2], latency_budget_ms=2 * budget_ms, **limits)
    assert compiled.operating_point.estimate.mean_latency_ms <= 2 * budget_ms
    with pytest.raises(InputError, match="fastest"):
        compiled_as(trained_family()[::2], latency_budget_ms=budget_ms / 1000.0, **limits)


def halved(image: torch.Tensor) -> torch.Tensor:
    return F.avg_pool2d(image, 2) * 1.5


class HalfSize(torch.nn.Module):
    """A network for images of 8 x 8 that insists on it; its input has another name."""

    def __init__(self) -> None:
        super().__init__()
        self.features = torch.nn.Linear((SIDE // 2) ** 2, 4)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        answer: torch.Tensor = self.features(pixels.flatten(1))
        return answer


@pytest.mark.slow
def test_a_network_with_its_own_input_and_an_exported_one() -> None:
    small, _, large = trained_family()
    x, _ = stripes(40, seed=4)
    rows = torch.export.Dim("rows", min=1)
    exported = torch.export.export(large, (torch.from_numpy(x),), dynamic_shapes=({0: rows},))
    torch.manual_seed(0)
    tiny = HalfSize().eval()
    with quick():
        found = cascade_in_detail(
            [small, tiny, exported],
            CALIBRATION,
            None,
            Settings(0.02, backend="torch", threads=1),
            CascadeOptions(names=NAMES, transforms=[None, halved, None]),
        )
    require_those_of_the_oracle(found)
    assert found.table is not None
    assert found.candidates is not None
    values = found.candidates.program.block("middle").run({"image": torch.from_numpy(x)})
    with torch.no_grad():
        expected = tiny(halved(torch.from_numpy(x)))
    torch.testing.assert_close(values["middle_own_logits"], expected)


@pytest.mark.slow
def test_exits_inside_the_networks() -> None:
    settings = Settings(0.02, backend="torch", threads=1, max_exits=1, recipe=HeadRecipe(epochs=1))
    options = CascadeOptions(names=("middle", "large"), early_exits=True)
    with quick():
        found = cascade_in_detail(trained_family()[1:], CALIBRATION, stripes(1000, seed=3), settings, options)
    assert found.table is not None
    inner = [site for site in found.table.exits if "/" in site]
    assert any(site.startswith("large/") for site in inner)
    require_those_of_the_oracle(found)
    entries = {entry["name"]: entry for entry in found.compiled.artifact.report["exits"]}
    assert {"middle", "large"} <= entries.keys()
    assert all(entries[site]["network"] == site.split("/")[0] for site in inner)
    assert found.compiled.artifact.report["rows"] == {"fit": 1000, "learn": 800, "certify": 200}


X, Y = CALIBRATION
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "one network": ({"networks": [Classes(4)]}, "two networks at least, not 1"),
    "no network": ({"networks": []}, "two networks at least, not 0"),
    "classes": ({"networks": [Classes(4), Classes(5)], "names": ["a", "b"]}, r"'a' has 4, 'b' has 5"),
    "cycle": ({"edges": [(0, 1), (1, 2), (2, 1)]}, "in a circle"),
    "unreachable": ({"edges": [(0, 1)], "names": NAMES}, "every row starts at 'small'.*leads to 'large'"),
    "unknown name": ({"edges": [("small", "huge")], "names": NAMES}, "no network 'huge'"),
    "unknown number": ({"edges": [(0, 7)]}, "no network 7"),
    "itself": ({"edges": [(0, 0)]}, "would follow itself"),
    "no pair": ({"edges": [(0, 1, 2)]}, "no pair of networks"),
    "no direction": ({"edges": nx.Graph([(0, 1)])}, "direction"),
    "names": ({"names": ["a", "b"]}, "2 names for 3 networks"),
    "names twice": ({"names": ["a", "a", "b"]}, "too much alike"),
    "transforms": ({"transforms": [None]}, "1 transforms for 3 networks"),
    "both limits": ({"max_accuracy_drop": 0.1, "latency_budget_ms": 3.0}, "both given"),
    "sizes": ({"networks": [Classes(4), HalfSize()], "names": ["a", "b"]}, r"network 'b'.*\n.*transforms="),
    "few rows": ({"data": (X[:50], Y[:50])}, "50 rows are too few"),
    "no rows": ({"data": (X[:0], Y[:0])}, "too few|rows along dim 0"),
    "no data": ({"data": []}, "there is no data"),
    "one class": ({"data": (X, np.zeros_like(Y))}, "all rows have label 0"),
    "labels": ({"data": (X, Y + 1)}, "label 4 is out of range"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_are_named(case: str) -> None:
    changes, message = MISTAKES[case]
    options: dict[str, Any] = {
        "networks": [Classes(4)] * 3,
        "data": CALIBRATION,
        "backend": "torch",
    } | changes
    with pytest.raises((InputError, CalibrationError, exitcompiler.UnsupportedModelError), match=message):
        cascade(options.pop("networks"), options.pop("data"), threads=1, **options)
