"""Capture: every kind of model becomes one block that answers as it does, or is refused with a reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from models import (
    CLASSES,
    ZOO,
    BatchMeanModel,
    BranchesOnData,
    CountsCalls,
    MutatesBuffer,
    RandomModel,
    RowAttention,
    Sample,
    bert,
    captured,
    images,
    mlp,
    resnet,
    tokens,
    vectors,
)
from torch import Tensor, nn

from exitcompiler.capture import capture
from exitcompiler.controlflow import OutputStructure
from exitcompiler.errors import CalibrationError, InputError, UnsupportedModelError
from exitcompiler.flops import count_flops
from exitcompiler.program import ValueSpec
from exitcompiler.row_independence import check_row_independence, differing_rows
from exitcompiler.verify import verify


def _logits(sample: Sample, answer: object) -> Tensor:
    if isinstance(answer, Tensor):
        return answer
    assert isinstance(answer, dict | tuple)
    return answer[sample.logits]  # type: ignore[index, no-any-return]


@pytest.mark.parametrize("name", ZOO)
def test_zoo_is_captured_bit_by_bit(name: str) -> None:
    sample = ZOO[name]
    program = captured(name).program
    verify(program)
    assert program.exits == ("backbone",)
    assert program.outputs == {"logits": ValueSpec(("batch", CLASSES), "float32")}
    assert list(program.inputs) == list(sample.inputs(1, 0))
    (result,) = program.entry.results
    model = sample.build(0).eval()
    for rows in (1, 2, 5):
        inputs = sample.inputs(rows, rows)
        with torch.no_grad():
            assert torch.equal(program.entry.run(inputs)[result], _logits(sample, model(**inputs)))


def test_module_paths_and_shapes_stay_on_the_nodes() -> None:
    body = captured("resnet").program.entry.body
    calls = [node for node in body.graph.nodes if node.op == "call_function"]
    assert all("val" in node.meta for node in calls)
    stacks = {path for node in calls for path, _ in node.meta.get("nn_module_stack", {}).values()}
    assert {"layer1.0", "layer3.1.conv2", "linear"} <= stacks


class Views(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, CLASSES, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolution(x).view(x.shape[0], -1, 16).mean(2)  # joins dims that may lie apart


def test_bodies_take_values_of_any_strides() -> None:
    module, sample = Views().eval(), images(4)
    body = capture(module, sample).program.entry.body
    strided = sample["x"].contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        module(strided)
    with torch.no_grad():
        torch.testing.assert_close(body(strided)[0], module(sample["x"]))


def test_the_original_shares_nothing_with_the_copy() -> None:
    model = mlp()
    program = capture(model, vectors(1)["x"]).program
    inputs = {"input": vectors(2)["x"]}
    before = program.entry.run(inputs)
    with torch.no_grad():
        next(model.parameters()).zero_()
    assert model.training
    assert torch.equal(program.entry.run(inputs)["linear_3"], before["linear_3"])


@pytest.mark.parametrize(
    "example",
    [
        tokens(2),
        tuple(tokens(2).values()),
        {name: value.numpy() for name, value in tokens(2).items()},
        dict(reversed(tokens(2).items())),
    ],
    ids=["dict", "tuple", "numpy", "other order"],
)
def test_examples_come_in_many_forms(example: object) -> None:
    program = capture(bert(), example, logits="logits").program  # type: ignore[arg-type]
    assert list(program.inputs) == ["input_ids", "attention_mask"]


class Outputs(nn.Module):
    """Returns its logits in a given structure."""

    def __init__(self, structure: str) -> None:
        super().__init__()
        self.fc = nn.Linear(12, CLASSES)
        self.structure = structure

    def forward(self, x: Tensor) -> object:
        y = self.fc(x)
        match self.structure:
            case "dict of one":
                return {"my scores": y}
            case "dict":
                return {"features": x, "my scores": y}
            case "tuple of one":
                return (y,)
            case "tuple":
                return (x, [x, x], y)
            case "vector":
                return y[:, 0]
            case "one class":
                return y[:, :1]
            case "double":
                return y.double()
            case "infinite":
                return y / 0
            case "transposed":
                return y.T
            case "text":
                return "y"
        return y


@pytest.mark.parametrize(
    ("structure", "logits", "expected", "output"),
    [
        ("tensor", None, OutputStructure("tensor"), "logits"),
        ("dict of one", None, OutputStructure("dict", "my scores"), "my_scores"),
        ("dict", "my scores", OutputStructure("dict", "my scores"), "my_scores"),
        ("dict", 1, OutputStructure("dict", "my scores"), "my_scores"),
        ("tuple of one", None, OutputStructure("tuple"), "logits"),
        ("tuple", 2, OutputStructure("tuple"), "logits"),
        ("tuple", -1, OutputStructure("tuple"), "logits"),
    ],
)
def test_logits_are_found_in_the_output(
    structure: str, logits: str | int | None, expected: OutputStructure, output: str
) -> None:
    model = Outputs(structure)
    captured = capture(model, vectors(1), logits=logits)
    assert captured.structure == expected
    assert list(captured.program.outputs) == [output]
    (result,) = captured.program.entry.results
    x = vectors(3)
    assert torch.equal(captured.program.entry.run(x)[result], model.fc(x["x"]).detach())


@pytest.mark.parametrize(
    ("structure", "logits", "message"),
    [
        ("dict", None, r"several outputs(.|\n)*logits= with one of \['features', 'my scores'\]"),
        ("dict", "other", "no output 'other'"),
        ("tuple", None, r"several outputs(.|\n)*\[0, 2\]"),
        ("tuple", 1, "no output 1"),
        ("tensor", "other", "no output 'other'"),
        ("vector", None, r"must be \[batch, classes\]"),
        ("one class", None, "two classes at least"),
        ("double", None, r"float32(.|\n)*model.float\(\)"),
        ("transposed", None, r"must be \[batch, classes\]"),
        ("text", None, "returns str"),
    ],
)
def test_other_outputs_are_refused(structure: str, logits: str | int | None, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        capture(Outputs(structure), vectors(1), logits=logits)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (MutatesBuffer(), "changes its own state 'counter'"),
        (CountsCalls(), "changes its own state 'calls'"),
        (BranchesOnData(), r"module 'chooser' \(models.py:\d+\): .* depends on the values"),
        (BatchMeanModel(), r"node 'sub' \(aten.sub.Tensor\): the rows of a batch influence each other"),
        (RowAttention(), r"node 'squeeze' .*: the rows of a batch influence each other"),
        (RandomModel(), "module '.+': the model is random"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_what_cannot_be_captured_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        capture(model, vectors(1))
    assert caught.value.where
    assert caught.value.remedy


class AsksForDtypes(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return x * mask.type_as(x) + torch.empty_like(x).fill_(1) + x.type_as(mask.float())


def test_asking_for_a_dtype_is_no_use_of_a_value() -> None:
    inputs = {"x": torch.randn(3, 4), "mask": torch.ones(3, 4, dtype=torch.int64)}
    body = capture(AsksForDtypes(), inputs).program.entry.body
    (converted,) = body.graph.find_nodes(op="call_function", target=torch.ops.aten._to_copy.default)[:1]
    assert [node.name for node in converted.all_input_nodes] == ["mask"]
    for operator in (torch.ops.aten.type_as.default, torch.ops.aten.empty_like.default):
        assert not body.graph.find_nodes(op="call_function", target=operator)
    torch.testing.assert_close(body(*inputs.values())[0], 2 * inputs["x"] + 1)


class AttentionOfAnyRank(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (2, 2, 3))[..., None]
        attended = nn.functional.scaled_dot_product_attention(windows, windows.sin(), windows.cos())
        tokens = attended.flatten(1, 3)
        mask = torch.ones(12, 12, dtype=torch.bool).tril()
        tokens = nn.functional.scaled_dot_product_attention(tokens, tokens.sin(), tokens, mask)
        return tokens.flatten(1)


def test_attention_has_four_dimensions() -> None:
    inputs = vectors(4)
    body = capture(AttentionOfAnyRank(), inputs).program.entry.body
    target = torch.ops.aten.scaled_dot_product_attention.default
    found = body.graph.find_nodes(op="call_function", target=target)
    assert [node.meta["val"].ndim for node in found] == [4, 4]
    assert all(operand.meta["val"].ndim == 4 for node in found for operand in node.args[:3])
    torch.testing.assert_close(body(*inputs.values())[0], AttentionOfAnyRank()(*inputs.values()))


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.view(2, -1)


class FixedBatchInside(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 12), LoopsOverRows())

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.layers(x)
        return logits


class LoopsOverRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([2 * row for row in x])


class CountsRows(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).reshape(len(x), int(x.shape[0]) * CLASSES // len(x))


def test_counting_rows_in_python_does_not_fix_them() -> None:
    model = CountsRows().eval()
    program = capture(model, vectors(2)).program
    inputs = vectors(5)
    (logits,) = program.entry.run(inputs).values()
    with torch.no_grad():
        torch.testing.assert_close(logits, model(**inputs))
    stacks = [node.meta.get("nn_module_stack", {}) for node in program.entry.body.graph.nodes]
    assert any(path == "layer" for stack in stacks for path, _ in stack.values())


class SelectsPositions(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] + x[x > 0].sum()


class BatchStandardisation(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.std(0)


class Cond(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return answer


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (FixedBatch(), r"^FixedBatch \(test_capture.py:\d+\): .* fixes the batch size"),
        (FixedBatchInside(), r"^module 'layers.1' \(test_capture.py:\d+\): .* fixes the batch size"),
        (SelectsPositions(), "influence each other|depends on the values"),
        (BatchStandardisation(), r"node 'div' \(aten.div.Tensor\): a row alone gets NaN"),
        (Cond(), r"node 'cond' .*one way for the whole batch"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_subtler_models_are_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message) as caught:
        capture(model, vectors(2))
    assert caught.value.where
    assert caught.value.remedy


def test_lazy_modules_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"uninitialized(.|\n)*run lazy modules once"):
        capture(nn.Sequential(nn.LazyLinear(4)), vectors(2)["x"])


def test_bad_numbers_are_the_datas_fault() -> None:
    x = vectors(2)["x"]
    x[1, 3] = np.nan
    with pytest.raises(CalibrationError, match="input 'input': the example holds NaN"):
        capture(mlp(), x)
    with pytest.raises(CalibrationError, match="logits for the example hold NaN or infinite"):
        capture(Outputs("infinite"), vectors(2))


@pytest.mark.parametrize(
    ("example", "error", "message"),
    [
        ({"y": torch.ones(2, 12)}, InputError, r"no parameters \['y'\](.|\n)*\['input'\]"),
        ((torch.ones(2, 12), torch.ones(2, 12)), InputError, "2 inputs for a model that takes"),
        (torch.ones(0, 12), InputError, "needs rows along dim 0"),
        (torch.tensor(1.0), InputError, "needs rows along dim 0"),
        ({}, InputError, "no inputs|lacks"),
        (None, InputError, "needs an example"),
        ([3], UnsupportedModelError, "inputs must be tensors, not int"),
        (torch.ones(2, 12, dtype=torch.complex64), UnsupportedModelError, "complex64 are not supported"),
        (torch.ones(2, 13), UnsupportedModelError, "fails on the example"),
    ],
)
def test_bad_examples_are_refused(example: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        capture(mlp(), example)  # type: ignore[arg-type]


def test_inputs_need_the_same_rows_and_all_of_them() -> None:
    inputs = tokens(2)
    with pytest.raises(InputError, match="different numbers of rows"):
        capture(bert(), {**inputs, "attention_mask": inputs["attention_mask"][:1]}, logits="logits")
    with pytest.raises(InputError, match=r"lacks the model's parameters \['attention_mask'\]"):
        capture(bert(), inputs["input_ids"], logits="logits")


class Reserved(nn.Module):
    def forward(self, action: Tensor) -> Tensor:
        return action * 2


def test_reserved_names_are_refused_with_a_way_out() -> None:
    with pytest.raises(UnsupportedModelError, match=r"'action': this name is reserved(.|\n)*rename"):
        capture(Reserved(), vectors(1)["x"])


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    batch = torch.export.Dim("b", min=1, max=64)
    return torch.export.export(resnet().eval(), (images(2)["x"],), dynamic_shapes={"x": {0: batch}})


def test_exported_programs_are_captured(exported: torch.export.ExportedProgram, tmp_path: Path) -> None:
    path = tmp_path / "model.pt2"
    torch.export.save(exported, path)
    model, x = resnet().eval(), images(3, seed=1)
    for source, example in ((exported, None), (path, x["x"]), (str(path), x)):
        program = capture(source, example).program
        verify(program)
        (result,) = program.entry.results
        with torch.no_grad():
            assert torch.equal(program.entry.run(x)[result], model(x["x"]))


def test_exported_programs_with_a_static_batch_are_refused() -> None:
    static = torch.export.export(mlp().eval(), (vectors(2)["x"],))
    with pytest.raises(UnsupportedModelError, match=r"batch dimension is static(.|\n)*torch.export.Dim"):
        capture(static)


def test_exported_programs_in_training_mode_are_refused() -> None:
    batch = torch.export.Dim("b", min=2, max=64)
    training = torch.export.export(resnet(), (images(2)["x"],), dynamic_shapes={"x": {0: batch}})
    with pytest.raises(UnsupportedModelError, match=r"own buffers(.|\n)*model.eval\(\)"):
        capture(training)


def test_files_that_are_no_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        capture(tmp_path / "missing.pt2")
    (tmp_path / "bad.pt2").write_bytes(b"not a model")
    with pytest.raises(UnsupportedModelError, match=r"bad.pt2: not a readable exported program"):
        capture(tmp_path / "bad.pt2")


def test_made_up_rows_differ_and_stay_in_the_domain() -> None:
    inputs = {**tokens(1), "ones": torch.ones(1, 10, dtype=torch.bool), "x": torch.zeros(1, 4)}
    rows = differing_rows(inputs)
    assert {name: value.shape[0] for name, value in rows.items()} == dict.fromkeys(inputs, 5)
    assert set(rows["attention_mask"].flatten().tolist()) == {0, 1}
    assert set(rows["input_ids"].flatten().tolist()) == set(inputs["input_ids"].flatten().tolist())
    assert len({tuple(row.tolist()) for row in rows["ones"]}) == 5
    assert len({tuple(row.tolist()) for row in rows["x"]}) == 5


def test_row_check_uses_the_rows_that_are_given() -> None:
    with pytest.raises(UnsupportedModelError, match="influence each other"):
        capture(BatchMeanModel(), vectors(4))


def test_row_check_finds_a_dependence_on_the_order() -> None:
    def run(values: dict[str, Tensor]) -> Tensor:
        x = values["x"]
        return x + 0.01 * torch.arange(x.shape[0]).unsqueeze(1)

    with pytest.raises(UnsupportedModelError, match="influence each other"):
        check_row_independence(run, vectors(1))  # type: ignore[arg-type]


def test_flops_are_those_of_the_formulas() -> None:
    linear = 12 * 16 + 2 * 16 * 16 + 16 * CLASSES
    assert count_flops(captured("mlp").program.entry.body) == 2 * linear
    layer = 4 * 10 * 16 * 16 + 2 * 10 * 10 * 16 + 2 * 10 * 16 * 32
    expected = 2 * (4 * layer + 16 * 16 + 16 * CLASSES)
    assert count_flops(captured("bert").program.entry.body) == expected
