"""compile() and cascade() in int8, end to end: what runs is what was scored, and drops count from float32."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from trained import stripes, trained_family, trained_network

import exitcompiler
from exitcompiler import delivery, float_layers
from exitcompiler.cascades import CascadeOptions, cascade_in_detail
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.data import Rows
from exitcompiler.errors import BackendUnavailableError, CalibrationError, InputError, LoweringError
from exitcompiler.interpreter import interpret
from exitcompiler.runtime.manifest import block_path
from exitcompiler.scoring import float_logits
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe
from exitcompiler.trtexec_export import export_trtexec

for package in ("onnxruntime", "openvino"):
    pytest.importorskip(package)

RECIPE = HeadRecipe(epochs=3)
BACKENDS = ("onnxruntime", pytest.param("openvino", marks=pytest.mark.slow))
CALIBRATION = stripes(900, seed=2)


@functools.cache
def compiled_details(backend: str) -> Details:
    settings = Settings(0.03, backend=backend, precision="int8", threads=1, max_exits=2, recipe=RECIPE)
    # Whether exits pay on this machine today is not what is tested.
    with mock.patch.object(delivery, "WORTHWHILE", 0.0):
        return compile_in_detail(trained_network(), CALIBRATION, stripes(900, seed=3), settings)


@functools.cache
def cascade_details() -> Details:
    """The same network twice: in int8, and in float32 for the doubtful rows."""
    settings = Settings(0.0, backend="onnxruntime", precision="int8", threads=1)
    options = CascadeOptions(names=["low", "high"], precisions=["int8", "fp32"])
    with mock.patch.object(delivery, "WORTHWHILE", 0.0):
        return cascade_in_detail([trained_network()] * 2, CALIBRATION, None, settings, options)


def integers_of(details: Details) -> dict[str, bool]:
    """Block of the chosen program -> whether its model has integer weights."""
    artifact = details.compiled.artifact
    point = artifact.manifest.operating_points[0]
    return {
        name: b"DequantizeLinear" in artifact.files[block_path(file)] for name, file in point.files.items()
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_answers_are_those_of_the_oracle(backend: str) -> None:
    details = compiled_details(backend)
    assert details.selection is not None
    compiled = details.compiled
    assert not details.selection.chosen.point.policy.is_plain
    assert compiled.backend.precision == "int8"
    assert compiled.artifact.manifest.precision == "int8"
    x, _ = stripes(60, seed=4)
    result = compiled.run(x)
    oracle = interpret(details.selection.chosen.program, {"image": torch.from_numpy(x)})
    agree = result.exit_index == oracle.exit_index
    assert agree.mean() >= 0.9  # a score on the edge of a threshold may fall to either side
    wanted = oracle.outputs["logits"].numpy()
    np.testing.assert_allclose(result.outputs[agree], wanted[agree], atol=0.15 * np.abs(wanted).max())
    assert (result.outputs.argmax(axis=1) == wanted.argmax(axis=1)).mean() >= 0.9


@pytest.mark.parametrize("backend", BACKENDS)
def test_all_blocks_and_the_plain_engine_compute_on_integers(backend: str) -> None:
    details = compiled_details(backend)
    assert all(integers_of(details).values())
    artifact = details.compiled.artifact
    plain = artifact.manifest.operating_points[artifact.manifest.plain]
    assert all(b"DequantizeLinear" in artifact.files[block_path(file)] for file in plain.files.values())
    assert details.candidates is not None
    for block in details.candidates.program.blocks[1:]:
        assert {spec.dtype for spec in block.params.values()} == {"uint8"}


@pytest.mark.parametrize("backend", BACKENDS)
def test_feature_maps_cross_blocks_as_the_backend_has_them(backend: str) -> None:
    details = compiled_details(backend)
    assert details.selection is not None
    names = [
        name
        for built in (details.selection.chosen, *details.selection.shipped)
        for block in built.program.blocks[1:]
        for name in block.params
    ]
    assert {name.endswith("_last") for name in names} == {backend == "onnxruntime"}


def test_a_cascade_takes_images_in_integers() -> None:
    def scaled(image: torch.Tensor) -> torch.Tensor:
        return (image.float() - 128.0) / 32.0

    def images(rows: tuple[Any, Any]) -> tuple[Any, Any]:
        return np.clip(rows[0] * 32.0 + 128.0, 0, 255).astype(np.uint8), rows[1]

    small, _, large = trained_family()
    with mock.patch.object(delivery, "WORTHWHILE", 0.0):
        compiled = exitcompiler.cascade(
            [small, large], images(CALIBRATION), transforms=[scaled, scaled],
            backend="onnxruntime", threads=1, max_accuracy_drop=0.03,
        )  # fmt: skip
    x, y = images(stripes(200, seed=4))
    for point in compiled.operating_points:
        assert (compiled.select(name=point.name)(x).argmax(axis=1) == y).mean() > 0.7
        for block in point.control_flow.blocks:
            assert (
                block.params.get("image", compiled.manifest.inputs["image"])
                == compiled.manifest.inputs["image"]
            )


def test_accuracy_drops_count_from_float32() -> None:
    details = compiled_details("onnxruntime")
    x, y = CALIBRATION
    fresh = details.split.certify
    rows = Rows({"image": torch.from_numpy(x[fresh])}, y[fresh])
    exact = float_logits(details.program, rows).argmax(axis=1)
    certificate = details.compiled.artifact.report["certificate"]
    assert certificate["backbone_accuracy"] == pytest.approx(float((exact == y[fresh]).mean()))
    found = details.compiled(x[fresh]).argmax(axis=1)
    assert certificate["errors"] == pytest.approx(
        int(((exact == y[fresh]) & (found != y[fresh])).sum()), abs=3
    )
    assert details.table is not None
    learn = details.split.learn
    learned = Rows({"image": torch.from_numpy(x[learn])}, y[learn])
    np.testing.assert_array_equal(
        details.table.reference_correct, float_logits(details.program, learned).argmax(axis=1) == y[learn]
    )
    plain = details.compiled.plain(x[learn]).argmax(axis=1) == y[learn]
    assert (plain == details.table.plain_correct).mean() > 0.99
    (point,) = [p for p in details.compiled.operating_points if p.name == "plain"]
    drop = details.table.reference_correct.mean() - details.table.plain_correct.mean()
    assert point.estimate.accuracy_drop == pytest.approx(float(drop))


def test_it_says_how_it_was_quantised(tmp_path: Path) -> None:
    compiled = compiled_details("onnxruntime").compiled
    entry = compiled.artifact.report["quantization"]
    assert entry["kept_float"] == []
    assert entry["plain"] in ("int8", "fp32")
    assert entry["accuracy_drop"]["lower"] <= entry["accuracy_drop"]["value"] <= 0.03
    text = " ".join(compiled.explain().split())
    assert "Without exits, int8 drops" in text
    assert "Left in float32 besides the last layer: none." in text
    compiled.report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "<h2>Precision</h2>" in page
    assert "Without exits, int8 drops" in page


def test_what_is_saved_runs_without_torch_and_only_in_int8(tmp_path: Path) -> None:
    compiled = compiled_details("onnxruntime").compiled
    compiled.save(tmp_path / "m.exit")
    x, _ = stripes(50, seed=6)
    np.save(tmp_path / "x.npy", x)
    script = """
        import sys
        sys.modules["torch"] = None
        sys.modules["onnx"] = None
        import numpy, exitcompiler
        folder = sys.argv[1]
        model = exitcompiler.load(folder + "/m.exit", "onnxruntime")
        numpy.save(folder + "/y.npy", model(numpy.load(folder + "/x.npy")))
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(tmp_path)], check=True, timeout=60)
    np.testing.assert_array_equal(np.load(tmp_path / "y.npy"), compiled(x))
    other = exitcompiler.load(tmp_path / "m.exit", "openvino", threads=1)
    assert other.backend.precision == "int8"
    assert (other(x).argmax(axis=1) == compiled(x).argmax(axis=1)).mean() >= 0.9
    with pytest.raises(InputError, match="typed for int8: they do not run at fp32"):
        exitcompiler.load(tmp_path / "m.exit", "onnxruntime", precision="fp32")
    with pytest.raises(BackendUnavailableError, match=r"no precision 'int8'\n.*'onnxruntime' or 'openvino'"):
        exitcompiler.load(tmp_path / "m.exit", "torch")


def test_one_network_in_two_precisions_is_a_cascade() -> None:
    details = cascade_details()
    assert details.table is not None
    assert set(details.table.exits) == {"low", "high"}
    flow = {block.name: block for block in details.candidates.program.blocks}  # type: ignore[union-attr]
    kinds = {name: block.body.graph for name, block in flow.items()}
    pairs = torch.ops.quantized_decomposed.quantize_per_tensor.default
    assert kinds["low"].find_nodes(op="call_function", target=pairs)
    assert not kinds["high"].find_nodes(op="call_function", target=pairs)
    x, _ = stripes(60, seed=8)
    compiled = details.compiled
    assert compiled(x).shape == (60, 4)
    assert set(compiled.artifact.report["quantized_networks"]) == {"low"}
    # The reference in float32 answers as the network itself does.
    high = details.table.correct(("high", "own"))
    assert (high == details.table.reference_correct).mean() > 0.995


@pytest.mark.parametrize(
    ("precision", "message"),
    [
        ("auto", "no precision 'auto'"),
        (["int8"], "for 2 networks"),
        (["int8", "bf16"], "'int8' or 'fp32'"),
        ("int4", "unknown precision"),
    ],
)
def test_precisions_of_a_cascade_that_make_no_sense(precision: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        exitcompiler.cascade([trained_network()] * 2, CALIBRATION, names=["a", "b"], precision=precision)


def _random(shape: int) -> Callable[..., Any]:
    rng = np.random.default_rng(0)
    return lambda program, engines, rows: rng.normal(size=(len(rows), shape)).astype(np.float32)


def test_a_network_that_int8_breaks_is_refused_with_the_next_best(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_layers, "plain_logits", _random(4))
    monkeypatch.setattr(float_layers, "COUNTS", (0, 1))
    with pytest.raises(CalibrationError, match=r"int8 costs this network \d+\.\d+ points") as caught:
        exitcompiler.compile(
            trained_network(), CALIBRATION, backend="onnxruntime", precision="int8", threads=1, recipe=RECIPE
        )
    assert "bf16" in str(caught.value)
    assert "precision='auto'" in str(caught.value)


@pytest.mark.slow
def test_auto_goes_on_in_float32_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_layers, "plain_logits", _random(4))
    monkeypatch.setattr(float_layers, "COUNTS", (0,))
    compiled = exitcompiler.compile(
        trained_network(), CALIBRATION, backend="onnxruntime", precision="auto", threads=1, recipe=RECIPE
    )
    rows = compiled.artifact.report["precisions"]
    (refused,) = [row for row in rows if "refused" in row]
    assert "int8 costs this network" in refused["refused"]
    assert compiled.artifact.manifest.precision == "fp32"
    assert "int8: Int8 costs this network" in " ".join(compiled.explain().split())


@functools.cache
def auto_details() -> Details:
    settings = Settings(0.03, backend="onnxruntime", precision="auto", threads=1, max_exits=1, recipe=RECIPE)
    return compile_in_detail(trained_network(), stripes(500, seed=2), stripes(900, seed=3), settings)


def test_auto_compares_all_and_takes_the_fastest_within_the_limit() -> None:
    details = auto_details()
    rows = details.compiled.artifact.report["precisions"]
    names = [row["name"] for row in rows]
    assert names[:2] == ["fp32", "int8"]
    assert set(names) <= {"fp32", "int8", "exits in fp32", "exits in int8", "int8, then fp32"}
    assert len(names) >= 3
    (chosen,) = [row for row in rows if row["chosen"]]
    kept = [row for row in rows if row["kept"]]
    assert chosen["mean_latency_ms"] == min(row["mean_latency_ms"] for row in kept)
    assert all(row["accuracy_drop"] <= 0.03 for row in kept)
    text = details.compiled.explain()
    assert "Precision  (* chosen)" in text
    assert f"* {chosen['name']}" in text
    x, y = stripes(600, seed=9)
    answers = details.compiled(x).argmax(axis=1)
    exact = float_logits(details.program, Rows({"image": torch.from_numpy(x)}, y)).argmax(axis=1)
    assert (exact == y).mean() - (answers == y).mean() < 0.06


@pytest.mark.slow
def test_auto_without_a_backend_for_int8_says_so() -> None:
    compiled = exitcompiler.compile(
        trained_network(), stripes(400, seed=2), backend="torch", precision="auto", threads=1, recipe=RECIPE
    )
    rows = {row["name"]: row for row in compiled.artifact.report["precisions"]}
    assert "no precision 'int8'" in rows["int8"]["refused"]
    assert not {"exits in int8", "int8, then fp32"} & rows.keys()
    assert compiled.backend.name == "torch"


class Unsplit(torch.nn.Module):
    """One convolution: no place where an exit could be."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(1, 8, 3)
        self.head = torch.nn.Linear(8, 4)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Logits."""
        logits = self.head(torch.relu(self.conv(image)).mean(dim=(2, 3)))
        assert isinstance(logits, torch.Tensor)
        return logits


@pytest.mark.slow
def test_auto_under_a_latency_budget_delivers_what_its_table_says() -> None:
    x, _ = stripes(400, seed=2)  # without labels: agreement with the network is the target
    options: Any = {"backend": "onnxruntime", "threads": 1, "precision": "auto", "recipe": RECIPE}
    compiled = exitcompiler.compile(Unsplit(), x, latency_budget_ms=1000.0, **options)
    rows = {row["name"]: row for row in compiled.artifact.report["precisions"]}
    (chosen,) = [name for name, row in rows.items() if row["chosen"]]
    # All of them are fast enough, and only float32 agrees with itself entirely.
    assert rows["fp32"]["accuracy_drop"] == 0.0
    assert rows[chosen]["accuracy_drop"] <= 0.0
    if chosen == "fp32":
        assert compiled.artifact.manifest.precision == "fp32"
        assert "in fp32" in compiled.explain()
    with pytest.raises(InputError, match=r"nothing keeps a mean latency of 1e-06 ms, neither in float32"):
        exitcompiler.compile(Unsplit(), x, latency_budget_ms=1e-6, **options)


def test_under_a_latency_budget_no_accuracy_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_layers, "plain_logits", _random(4))
    monkeypatch.setattr(float_layers, "COUNTS", (0,))
    compiled = exitcompiler.compile(
        Unsplit(), stripes(400, seed=2), backend="onnxruntime", precision="int8", threads=1,
        latency_budget_ms=1000.0, recipe=RECIPE,
    )  # fmt: skip
    assert compiled.artifact.report["quantization"]["plain"] == "fp32"
    # What comes back is in float32, and is not called anything else.
    assert compiled.artifact.manifest.precision == "fp32"
    assert "the plain network in float32 is returned" in " ".join(compiled.explain().split())


def test_a_reference_in_float32_need_not_bear_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float_layers, "plain_logits", _random(4))
    monkeypatch.setattr(float_layers, "COUNTS", (0,))
    compiled = exitcompiler.cascade(
        [Unsplit()] * 2, stripes(400, seed=2), names=["low", "high"], precision=["int8", "fp32"],
        backend="onnxruntime", threads=1,
    )  # fmt: skip
    assert compiled.artifact.report["quantization"]["plain"] == "fp32"


def test_what_other_tools_do_not_take_is_refused_by_name(tmp_path: Path) -> None:
    compiled = compiled_details("onnxruntime").compiled
    with pytest.raises(InputError, match=r"in int8 as CPUs have it.*\n.*precision='fp16'"):
        export_trtexec(compiled.artifact, tmp_path / "plans", (1,))
    with pytest.raises(LoweringError, match="quantize_per_tensor"):
        compiled.save(tmp_path / "with-torch.exit", torch=True)
    assert not (tmp_path / "with-torch.exit").exists()
