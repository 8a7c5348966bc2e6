"""Cutting and joining bodies: names, shared storage, sizes, and the same bits as before."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import captured
from torch import Tensor, fx, nn

from exitcompiler.errors import PassError
from exitcompiler.export import trace_body
from exitcompiler.fx_utils import (
    compose_bodies,
    extract_body,
    is_symbolic_size,
    node_spec,
    nodes_by_name,
    required_inputs,
    result_nodes,
)
from exitcompiler.program import ValueSpec

ROW = ValueSpec(("batch", 4), "float32")


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.arange(16.0).view(4, 4) / 10)

    def forward(self, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = torch.tanh(x)
        b = a @ self.weight + side
        return a, b, torch.cat([b, x.new_ones(x.shape[0], 1)], 1)


@pytest.fixture(scope="module")
def chain() -> fx.GraphModule:
    return trace_body(Chain(), {"x": ROW, "side": ROW}, ["a", "b", "c"])


def test_extract_keeps_names_order_and_storage(chain: fx.GraphModule) -> None:
    body = extract_body(chain, ["side", "a"], ["b"])
    assert [node.name for node in body.graph.nodes if node.op == "placeholder"] == ["side", "a"]
    assert [node.name for node in result_nodes(body)] == ["b"]
    assert next(iter(body.parameters())).data_ptr() == next(iter(chain.parameters())).data_ptr()
    a, side = torch.randn(3, 4), torch.randn(3, 4)
    assert torch.equal(body(side, a)[0], a @ next(iter(chain.parameters())) + side)


def test_extract_drops_what_is_not_needed(chain: fx.GraphModule) -> None:
    body = extract_body(chain, ["x", "side"], ["a"])
    assert [node.name for node in body.graph.nodes if node.op != "output"] == ["x", "side", "a"]


def test_extract_recomputes_sizes_from_its_own_params(chain: fx.GraphModule) -> None:
    body = extract_body(chain, ["b"], ["c"])
    sizes = [node for node in body.graph.nodes if is_symbolic_size(node)]
    assert [[argument.name for argument in node.all_input_nodes] for node in sizes] == [["b"]]
    for rows in (1, 3):
        assert body(torch.zeros(rows, 4))[0].tolist() == [[0, 0, 0, 0, 1]] * rows


def test_extract_names_what_is_missing(chain: fx.GraphModule) -> None:
    assert required_inputs(chain, ["b"]) == ("x", "side")
    assert required_inputs(chain, ["b"], ["a"]) == ("side",)
    with pytest.raises(PassError, match=r"also need \['side'\]"):
        extract_body(chain, ["a"], ["b"])
    with pytest.raises(PassError, match=r"no values \['nothing'\]"):
        extract_body(chain, ["x"], ["nothing"])


def test_compose_binds_params_and_renames_clashes(chain: fx.GraphModule) -> None:
    both = compose_bodies(chain, chain, {"x": "a", "side": "side"}, ["b"])
    x, side = torch.randn(2, 4), torch.randn(2, 4)
    assert torch.equal(both(x, side)[0], chain(torch.tanh(x), side)[1])
    assert [node.name for node in result_nodes(both)] == ["b"]
    assert len(list(both.parameters())) == 1


def test_compose_keeps_different_tensors_of_one_path_apart(chain: fx.GraphModule) -> None:
    other = Chain()
    other.weight.data.neg_()
    second = trace_body(other, {"x": ROW, "side": ROW}, ["a2", "b2", "c2"])
    both = compose_bodies(chain, second, {"x": "b", "side": "side"}, ["a", "b2"])
    x, side = torch.randn(2, 4), torch.randn(2, 4)
    expected = second(chain(x, side)[1], side)[1]
    assert torch.equal(both(x, side)[1], expected)
    assert len(list(both.parameters())) == 2


def test_compose_can_hand_out_values_of_the_first(chain: fx.GraphModule) -> None:
    second = extract_body(chain, ["a", "side"], ["b", "c"], rename={"b": "b2"})
    both = compose_bodies(chain, second, {"a": "b", "side": "side"}, ["a", "c", "b2"])
    x, side = torch.randn(2, 4), torch.randn(2, 4)
    first = chain(x, side)
    # "c" is computed by both: the second one's counts.
    b2, c = second(first[1], side)
    for got, expected in zip(both(x, side), (first[0], c, b2), strict=True):
        assert torch.equal(got, expected)


def test_compose_refuses_results_it_cannot_name(chain: fx.GraphModule) -> None:
    second = extract_body(chain, ["a", "side"], ["b"], rename={"b": "x"})
    with pytest.raises(PassError, match="both be called 'x'"):
        compose_bodies(chain, second, {"a": "a", "side": "side"}, ["x"])
    with pytest.raises(PassError, match=r"neither body computes \['z'\]"):
        compose_bodies(chain, second, {"a": "a", "side": "side"}, ["z"])


def test_compose_wants_every_param_bound(chain: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"\['side'\] of the second body are not bound"):
        compose_bodies(chain, chain, {"x": "a"}, ["b"])


def test_node_spec_tells_the_batch_from_multiples_of_it() -> None:
    body = captured("windows").program.entry.body
    specs = {name: node_spec(node) for name, node in nodes_by_name(body).items()}
    assert specs["x"] == ValueSpec(("batch", 3, 16, 16), "float32")
    assert specs["linear"] is None  # four windows per row
    assert specs["add_135"] == ValueSpec(("batch", 8, 8, 8), "float32")


@given(st.data())
def test_split_and_compose_give_the_same_bits(data: st.DataObject) -> None:
    body = captured("mlp").program.entry.body
    candidates = [
        name for name, node in nodes_by_name(body).items() if node.op == "call_function" and node_spec(node)
    ]
    cut = data.draw(st.sampled_from(candidates))
    (result,) = result_nodes(body)
    extra = required_inputs(body, [result.name], [cut])
    first = extract_body(body, ["input"], [cut])
    if cut == result.name:
        return
    second = extract_body(body, [cut, *extra], [result.name])
    joined = compose_bodies(first, second, {cut: cut, **{name: name for name in extra}}, [result.name])
    x = torch.randn(data.draw(st.integers(1, 4)), 12)
    assert torch.equal(joined(x)[0], body(x)[0])
