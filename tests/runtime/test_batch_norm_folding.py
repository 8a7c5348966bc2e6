"""Batch norms folded into convolutions compute what both computed, and only where they may."""

from __future__ import annotations

import pytest
import torch
from models import ZOO
from torch import nn

from exitcompiler.capture import capture
from exitcompiler.passes.cast_precision import cast_precision
from exitcompiler.runtime.batch_norm_folding import fold_batch_norms
from exitcompiler.runtime.torch_bodies import move_body

NORM = torch.ops.aten._native_batch_norm_legit_no_training.default


def trained(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts as training leaves them: not 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            for tensor in (module.running_mean, module.bias):
                if tensor is not None:
                    tensor.data.normal_(generator=generator)
            for tensor in (module.running_var, module.weight):
                if tensor is not None:
                    tensor.data.uniform_(0.3, 2.0, generator=generator)
    return model.eval()


def body_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.fx.GraphModule:
    return move_body(capture(trained(model), inputs).program.entry.body, torch.device("cpu"), {})


def norms(body: torch.fx.GraphModule) -> int:
    return len(body.graph.find_nodes(op="call_function", target=NORM))


@pytest.mark.parametrize("name", ["resnet", "depthwise"])
def test_a_network_has_none_left_and_answers_the_same(name: str) -> None:
    sample = ZOO[name]
    inputs = sample.inputs(5, 0)
    model = trained(sample.build(0))
    body = move_body(capture(model, inputs, logits=sample.logits).program.entry.body, torch.device("cpu"), {})
    expected = body(*inputs.values())
    count = norms(body)
    assert count > 5
    assert fold_batch_norms(body) == count
    assert norms(body) == 0
    for found, wanted in zip(body(*inputs.values()), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "layers",
    [
        [nn.Conv2d(3, 4, 3, bias=True), nn.BatchNorm2d(4)],
        [nn.Conv2d(3, 4, 3, padding="same"), nn.BatchNorm2d(4, affine=False)],
        [nn.Conv2d(4, 4, 3, groups=2, stride=2, bias=False), nn.BatchNorm2d(4, eps=0.1)],
    ],
    ids=["bias", "padding by name, not affine", "groups"],
)
def test_every_form_of_convolution(layers: list[nn.Module]) -> None:
    x = torch.randn(2, layers[0].in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    body = body_of(nn.Sequential(*layers, nn.Flatten()), {"input": x})
    expected = body(x)
    assert fold_batch_norms(body) == 1
    torch.testing.assert_close(body(x), expected, rtol=1e-5, atol=1e-5)


def test_in_half_precision_weights_are_rounded_once() -> None:
    sample = ZOO["resnet"]
    inputs = sample.inputs(4, 0)
    program = cast_precision(capture(trained(sample.build(0)), inputs).program, "fp16")
    body = move_body(program.entry.body, torch.device("cpu"), {})
    expected = body(*inputs.values())
    assert fold_batch_norms(body) > 5
    assert body.folded_weight_0.dtype == torch.float16
    torch.testing.assert_close(body(*inputs.values()), expected, rtol=0.05, atol=0.05)


class _Shared(nn.Module):
    """The convolution is read by something else as well."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        return (self.norm(y) + y).flatten(1)


class _First(nn.Module):
    """A norm that reads no convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(self.norm(x)).flatten(1)


@pytest.mark.parametrize("make", [_Shared, _First])
def test_what_may_not_be_folded_stays(make: type[nn.Module]) -> None:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    body = body_of(make(), {"x": x})
    expected = body(x)
    assert fold_batch_norms(body) == 0
    assert norms(body) == 1
    for found, wanted in zip(body(x), expected, strict=True):
        assert torch.equal(found, wanted)
