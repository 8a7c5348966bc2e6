"""Networks of a cascade: the same inputs for all, transforms in the graph, errors that name the network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from models import (
    CLASSES,
    BranchesOnData,
    bert,
    depthwise,
    digits_resnet,
    images,
    mlp,
    resnet,
    tokens,
    vectors,
)
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional

from exitcompiler.errors import InputError, UnsupportedModelError
from exitcompiler.network_order import Order, order_networks, topology_edges
from exitcompiler.networks import Network, read_networks
from exitcompiler.verify import verify

NAMES = ("a", "b", "c")


def answer(network: Network, *inputs: Tensor) -> Tensor:
    """The logits of a network, by its graph alone."""
    verify(network.program)
    with torch.no_grad():
        (logits,) = network.program.entry.run(dict(zip(network.program.inputs, inputs, strict=True))).values()
    return logits


def reference(model: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        logits = model.eval()(*inputs)
    assert isinstance(logits, Tensor)
    return logits


class Linear(nn.Module):
    """Takes a vector called as nobody else calls it."""

    def __init__(self, width: int = 12, classes: int = CLASSES) -> None:
        super().__init__()
        self.fc = nn.Linear(width, classes)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.fc(features)
        return logits


class Half(nn.Module):
    """Halves the size and normalises, by a buffer; random while it is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.register_buffer("mean", torch.full((3, 1, 1), 0.25))

    def forward(self, image: Tensor) -> Tensor:
        image = functional.dropout(image, 0.5, self.training)
        return (functional.interpolate(image, scale_factor=0.5, mode="bilinear") - self.mean) / 0.5


def exported(model: nn.Module, sample: Tensor, name: str = "x") -> torch.export.ExportedProgram:
    return torch.export.export(model.eval(), (sample,), dynamic_shapes={name: {0: Dim("batch", max=100)}})


def test_networks_take_the_inputs_of_the_first_by_position() -> None:
    first, second = mlp(0), Linear()
    x = vectors(3)["x"]
    networks = read_networks([first, second], x)
    assert [network.name for network in networks] == ["Mlp", "Linear"]
    assert [list(network.program.inputs) for network in networks] == [["input"], ["input"]]
    torch.testing.assert_close(answer(networks[1], x), reference(second, x))
    assert answer(networks[1], x[:1]).shape == (1, CLASSES)


def test_inputs_of_the_same_name_belong_together() -> None:
    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = bert(1)

        def forward(self, attention_mask: Tensor, input_ids: Tensor) -> Any:
            return self.bert(input_ids, attention_mask)

    inputs = tokens(4)
    networks = read_networks([bert(0), Swapped()], inputs, logits="logits")
    assert [list(network.program.inputs) for network in networks] == [["input_ids", "attention_mask"]] * 2
    expected = bert(1).eval()(**inputs)["logits"]
    torch.testing.assert_close(answer(networks[1], *inputs.values()), expected)


def test_a_transform_becomes_part_of_the_graph_and_is_frozen() -> None:
    x = images(4)["x"]
    half, factor = Half(), torch.tensor([0.5])
    second, third = depthwise(1), resnet(2)
    expected = reference(second, Half().eval()(x)), reference(third, x * 0.5)
    networks = read_networks([resnet(0), second, third], x, transforms=[None, half, lambda x: x * factor])
    assert half.training
    half.mean.add_(1.0)
    factor.add_(1.0)
    for network, logits in zip(networks[1:], expected, strict=True):
        assert network.program.inputs == networks[0].program.inputs
        torch.testing.assert_close(answer(network, x), logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(answer(network, x[:1]), logits[:1], rtol=1e-4, atol=1e-5)


def test_the_first_network_may_have_a_transform_too() -> None:
    raw = (images(3)["x"].abs() * 80).clamp(max=255).to(torch.uint8)
    models = [resnet(0), exported(depthwise(1), images(2)["x"])]
    networks = read_networks(models, {"image": raw}, transforms=[lambda image: image.float() / 255] * 2)
    assert str(networks[0].program).startswith("program (image: uint8[batch, 3, 16, 16])")
    torch.testing.assert_close(answer(networks[0], raw), reference(resnet(0), raw.float() / 255))


def test_files_are_read_and_names_made_unique(tmp_path: Path) -> None:
    x = images(2)["x"]
    path = tmp_path / "ResNet.pt2"
    torch.export.save(exported(resnet(0), x), path)
    assert [n.name for n in read_networks([resnet(0), path, resnet(1)], x)] == [
        "ResNet",
        "ResNet-2",
        "ResNet-3",
    ]
    assert [n.name for n in read_networks([resnet(0), resnet(1)], x, names=["s", "l"])] == ["s", "l"]
    torch.export.save(exported(resnet(0), x), tmp_path / "a:b+c.pt2")
    assert [n.name for n in read_networks([tmp_path / "a:b+c.pt2", resnet(1)], x)] == ["a-b-c", "ResNet"]


@pytest.mark.parametrize(("names", "message"), [
    (["a"], "1 names for 2"),
    (["a", "a"], "too much alike"),
    (["a.b", "a-b"], "too much alike"),
    (["a/b", "c"], r"\['a/b'\] cannot name"),
    (["a+b", "c"], "cannot name"),
    (["a:b", "c"], r"\['a:b'\] cannot name a network[\s\S]*none of / \+ :"),
    (["", "c"], "cannot name"),
    (["a", 1], r"\[1\] cannot name"),
    ([None, b"b"], r"\[None, b'b'\] cannot name"),
])  # fmt: skip
def test_names_that_cannot_be_used(names: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        read_networks([mlp(0), mlp(1)], vectors(2)["x"], names=names)


def test_what_is_no_cascade() -> None:
    x = vectors(2)["x"]
    with pytest.raises(InputError, match="two networks at least"):
        read_networks([mlp(0)], x)
    with pytest.raises(InputError, match="'Mlp' has 5, 'Linear' has 7"):
        read_networks([mlp(0), Linear(classes=7)], x)
    with pytest.raises(InputError, match="1 transforms for 2"):
        read_networks([mlp(0), mlp(1)], x, transforms=[None])
    with pytest.raises(UnsupportedModelError, match=r"network 'BranchesOnData'.*chooser"):
        read_networks([mlp(0), BranchesOnData()], x)


def test_other_inputs_need_a_transform() -> None:
    x = images(2)["x"]
    with pytest.raises(UnsupportedModelError, match=r"network 'gray'[\s\S]*transforms="):
        read_networks([resnet(0), digits_resnet(1)], x, names=["colour", "gray"])
    small = exported(resnet(1), x[:, :, :8, :8])
    with pytest.raises(
        InputError, match=r"'network', input 'x': it takes float32\[batch, 3, 8, 8\][\s\S]*transforms="
    ):
        read_networks([resnet(0), small], x)
    with pytest.raises(InputError, match=r"network 'BertLike': it takes \['input_ids', 'attention_mask'\]"):
        read_networks([mlp(0), bert(0)], vectors(2)["x"])


@pytest.mark.parametrize(("transform", "message"), [
    (lambda x: x.nonsense(), "fails on the example: AttributeError"),
    (lambda x: {"x": x}, "returns dict"),
    (lambda x: x[:1], "shapes"),
    (lambda x: (x, x), "2 (tensors|inputs) for a (network|model)"),
    (lambda x: x + torch.rand_like(x), "it is random"),
    (lambda x: x - x.mean(0, keepdim=True), "influence each other"),
    (lambda x: x if x.sum() > 0 else -x, "depends on the values"),
    (lambda x: x[:, :6], "fails on the example"),
])  # fmt: skip
def test_transforms_that_cannot_be_used(transform: Any, message: str) -> None:
    with pytest.raises((InputError, UnsupportedModelError), match=rf"network 'large'[\s\S]*{message}"):
        read_networks([mlp(0), Linear()], vectors(4)["x"], names=["s", "large"], transforms=[None, transform])


def test_edges_by_name_by_position_and_by_default() -> None:
    assert topology_edges(None, NAMES) == {(0, 1), (0, 2), (1, 2)}
    assert topology_edges([("a", "c"), (0, 2), (0, "b")], NAMES) == {(0, 1), (0, 2)}
    graph: nx.DiGraph[str] = nx.DiGraph([("c", "a"), ("a", "b")])
    assert topology_edges(graph, NAMES) == {(2, 0), (0, 1)}


def test_networks_are_put_into_topological_order() -> None:
    assert order_networks(topology_edges(None, NAMES), NAMES) == Order(
        (0, 1, 2), frozenset({(0, 1), (0, 2), (1, 2)})
    )
    assert order_networks(frozenset({(2, 0), (2, 1)}), NAMES) == Order((2, 0, 1), frozenset({(0, 1), (0, 2)}))


@pytest.mark.parametrize(("edges", "message"), [
    ([("a", "d")], "no network 'd'"),
    ([(0, 3)], "no network 3"),
    ([(0, True)], "no network True"),
    ([("a", "a")], "'a' would follow itself"),
    (["ab"], "'ab' is no pair"),
    (nx.Graph([("a", "b")]), "need a direction"),
    ([("a", "b"), ("b", "c"), ("c", "b")], "in a circle: 'b' -> 'c' -> 'b'"),
    ([("a", "b")], "starts at 'a', and no edge leads to 'c'"),
    ([("a", "c"), ("b", "c")], "starts at 'a', and no edge leads to 'b'"),
])  # fmt: skip
def test_edges_that_make_no_cascade(edges: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        order_networks(topology_edges(edges, NAMES), NAMES)
