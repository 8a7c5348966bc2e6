"""The network and its heads as one module: the same answers, parameters of its own, the same graph back."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from joint_samples import (
    linear_heads,
    reading_program,
    small_network,
    small_program,
    stripe_rows,
    token_rows,
)
from models import CLASSES, ZOO, captured, images
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from trained import stripes

from exitcompiler.capture import capture
from exitcompiler.finetuning.joint_network import JointNetwork, backbone_logits, frozen_copy
from exitcompiler.fx_utils import extract_body
from exitcompiler.optimizers import MuonAdamW, ParameterGroup
from exitcompiler.program import Program
from exitcompiler.verify import verify


def _joint(program: Program, heads: int = 2, classes: int = CLASSES, *, freeze: bool = False) -> JointNetwork:
    modules, reads = linear_heads(program, heads, classes) if heads else ({}, {})
    return JointNetwork(program, modules, reads, freeze_batchnorm=freeze)


def _groups(network: JointNetwork) -> list[ParameterGroup]:
    return network.parameter_groups(lr=0.02, head_lr=0.02, head_adamw_lr=0.01, adamw_lr=0.01, weight_decay=0)


def _train(network: JointNetwork, inputs: Mapping[str, Tensor], steps: int = 2) -> None:
    optimizer = MuonAdamW(_groups(network), steps)
    network.train()
    for _ in range(steps):
        torch.stack([answer.square().mean() for answer in network(*inputs.values())]).sum().backward()
        optimizer.step()
    network.eval()


def _answer(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return program.entry.run(inputs)[backbone_logits(program)]


def _paths(network: JointNetwork, parameters: object) -> set[str]:
    wanted = {id(parameter) for parameter in parameters}  # type: ignore[attr-defined]
    return {path for path, parameter in network.backbone.named_parameters() if id(parameter) in wanted}


@pytest.mark.parametrize("freeze", [True, False])
@pytest.mark.parametrize("name", ["densenet", "bert", "mlp"])
def test_a_network_of_any_kind_is_trained_and_comes_back_as_the_same_graph(name: str, freeze: bool) -> None:
    program, inputs = captured(name).program, ZOO[name].inputs(6, 3)
    before, text = _answer(program, inputs), str(program)
    network = _joint(program, freeze=freeze).eval()
    with torch.no_grad():
        answers = network(*inputs.values())
    assert [list(answer.shape) for answer in answers] == [[6, CLASSES]] * 3
    torch.testing.assert_close(answers[-1], before, rtol=0, atol=0)

    _train(network, inputs)
    tuned = network.tuned_program()
    verify(tuned)
    assert str(tuned) == text
    bodies = [one.entry.body.graph.nodes for one in (program, tuned)]
    said = [[(node.name, node.op, node.target) for node in nodes] for nodes in bodies]
    assert said[0] == said[1]
    with torch.no_grad():
        trained = network(*inputs.values())[-1]
    torch.testing.assert_close(_answer(tuned, inputs), trained, rtol=0, atol=0)
    assert (trained - before).abs().max() > 1e-3
    torch.testing.assert_close(_answer(program, inputs), before, rtol=0, atol=0)


def test_heads_answer_from_the_values_at_their_cuts() -> None:
    program, rows = small_program(), stripe_rows(4)
    heads, reads = linear_heads(program)
    swapped = dict(reversed(heads.items()))
    network = JointNetwork(program, swapped, reads, freeze_batchnorm=False).eval()
    assert network.keys == tuple(swapped)
    with torch.no_grad():
        answers = network(*rows.inputs.values())
        for key, answer in zip(network.keys, answers, strict=False):
            (value,) = extract_body(program.entry.body, ["image"], [reads[key]])(*rows.inputs.values())
            torch.testing.assert_close(answer, heads[key].eval()(value))


@pytest.mark.parametrize("freeze", [True, False])
def test_frozen_statistics_stay_and_free_ones_follow_the_rows(freeze: bool) -> None:
    program, rows = small_program(), stripe_rows(32)
    network = _joint(program, classes=4, freeze=freeze)
    before = {path: value.clone() for path, value in network.backbone.named_buffers()}
    assert {path.rpartition(".")[2] for path in before} == {"running_mean", "running_var"}
    network.train()(*rows.inputs.values())
    moved = {p: not torch.equal(value, before[p]) for p, value in network.backbone.named_buffers()}
    assert set(moved.values()) == {not freeze}
    assert float(network.heads[0].norm.running_mean.abs().max()) > 0.0  # type: ignore[union-attr]


def test_free_statistics_are_learned_as_torch_learns_them() -> None:
    module, rows = small_network(), stripe_rows(16)
    network = _joint(capture(module, stripes(4, seed=1)[0]).program, heads=0).train()
    module.train()
    for _ in range(3):
        network(*rows.inputs.values())
        module(rows.inputs["image"])
    expected = dict(module.named_buffers())
    for path, value in network.backbone.named_buffers():
        torch.testing.assert_close(value, expected[path])


def test_statistics_kept_as_a_cumulative_average_are_learned_too() -> None:
    module = small_network()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None
    network = _joint(capture(module, stripes(4, seed=1)[0]).program, heads=0).train()
    before = {path: value.clone() for path, value in network.backbone.named_buffers()}
    network(*stripe_rows(32).inputs.values())
    assert not any(torch.equal(value, before[path]) for path, value in network.backbone.named_buffers())


def test_neither_the_users_model_nor_the_heads_given_are_changed() -> None:
    module = small_network()
    kept = {path: value.clone() for path, value in module.state_dict().items()}
    needed = {path: parameter.requires_grad for path, parameter in module.named_parameters()}
    program = capture(module, stripes(4, seed=1)[0]).program
    heads, reads = linear_heads(program)
    untrained = {key: {p: v.clone() for p, v in head.state_dict().items()} for key, head in heads.items()}
    network = JointNetwork(program, heads, reads, freeze_batchnorm=False)
    _train(network, stripe_rows(16).inputs)
    assert all(torch.equal(value, kept[path]) for path, value in module.state_dict().items())
    assert {path: parameter.requires_grad for path, parameter in module.named_parameters()} == needed
    assert not module.training
    for key, head in heads.items():
        assert all(torch.equal(value, untrained[key][path]) for path, value in head.state_dict().items())
    before = [parameter for head in heads.values() for parameter in head.parameters()]
    after = list(network.heads.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_tuned_program_does_not_change_with_further_training() -> None:
    rows = stripe_rows(16).inputs
    network = _joint(small_program(), classes=4)
    _train(network, rows)
    tuned = network.tuned_program()
    before = _answer(tuned, rows)
    _train(network, rows)
    torch.testing.assert_close(_answer(tuned, rows), before, rtol=0, atol=0)


class _Tied(nn.Module):
    """A hidden layer used twice, a classifier that is the embedding, a weight that wants no training."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(20, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.second.bias.requires_grad_(False)
        self.out = nn.Linear(8, 20, bias=False)
        self.out.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids).mean(1)
        answer: Tensor = self.out(torch.relu(self.second(torch.relu(self.first(x)))))
        return answer


def test_shared_tensors_are_one_parameter_and_stay_shared() -> None:
    torch.manual_seed(0)
    ids = torch.randint(0, 20, (6, 5))
    network = _joint(capture(_Tied(), ids).program, heads=0)
    assert sorted(tuple(parameter.shape) for parameter in network.parameters()) == [
        (8,),
        (8,),
        (8, 8),
        (20, 8),
    ]
    assert all(parameter.requires_grad for parameter in network.parameters())
    (group,) = _groups(network)
    assert [tuple(parameter.shape) for parameter in group.matrices] == [(8, 8)]
    _train(network, {"ids": ids})
    tuned = network.tuned_program()
    assert len({tensor.data_ptr() for tensor in tuned.entry.body.state_dict().values()}) == 4
    torch.testing.assert_close(_answer(tuned, {"ids": ids}), network(ids)[-1])


def test_a_shared_tensor_under_two_paths_is_one_parameter() -> None:
    program = small_program()
    body = program.entry.body
    reads = [
        node for node in body.graph.find_nodes(op="get_attr") if str(node.target).endswith("norm.weight")
    ]
    assert len(reads) == 2
    joined = _with_shared(program, [str(node.target) for node in reads])
    network = _joint(joined, heads=0)
    separate, shared = (sum(1 for _ in _joint(p, heads=0).parameters()) for p in (program, joined))
    assert shared == separate - 1
    _train(network, stripe_rows(16).inputs)
    one, other = (network.tuned_program().entry.body.get_parameter(str(node.target)) for node in reads)
    assert torch.equal(one, other)


def _with_shared(program: Program, paths: list[str]) -> Program:
    body = copy.deepcopy(program.entry.body)
    first = operator.attrgetter(paths[0])(body)
    for path in paths[1:]:
        parent, _, name = path.rpartition(".")
        setattr(body.get_submodule(parent), name, first)
    return program.with_blocks({program.entry.name: replace(program.entry, body=body)})


def test_hidden_matrices_are_neither_embeddings_nor_classifiers_nor_vectors() -> None:
    network = _joint(captured("bert").program)
    backbone, heads = _groups(network)
    matrices, others = _paths(network, backbone.matrices), _paths(network, backbone.others)
    assert {"embeddings.word.weight", "embeddings.position.weight", "classifier.weight"} <= others
    assert "pooler.weight" in matrices
    assert sum(path.endswith("qkv.weight") for path in matrices) == 4
    assert not matrices & others
    assert matrices | others == {path for path, _ in network.backbone.named_parameters()}
    assert all(parameter.ndim > 1 for parameter in backbone.matrices)
    assert heads.matrices == []  # linear heads are all classifier
    assert {id(p) for p in heads.others} == {id(p) for p in network.heads.parameters()}


class _PooledClassifier(nn.Module):
    """A convolution makes class maps, whose average is the answer, as in SqueezeNet."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Conv2d(3, 6, 3)
        self.classifier = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.classifier(torch.relu(self.hidden(x)))).mean((2, 3)) / 2


def test_a_classifier_is_found_behind_what_follows_it() -> None:
    network = _joint(capture(_PooledClassifier(), images(2)).program, heads=0)
    (group,) = _groups(network)
    assert _paths(network, group.matrices) == {"hidden.weight"}


def test_a_model_in_another_memory_layout_can_be_trained() -> None:
    module = small_network().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    rows = stripe_rows(6).inputs
    network = _joint(capture(module, rows).program, heads=0)
    _train(network, rows)
    torch.testing.assert_close(_answer(network.tuned_program(), rows), network(*rows.values())[-1])


META = torch.device("meta")


def _made(module: nn.Module) -> set[str]:
    """Devices of the tensors that graphs in a module make themselves."""
    graphs = [part.graph for part in module.modules() if isinstance(part, fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes]
    leaves = [leaf for node in nodes for leaf in pytree.tree_leaves((node.args, node.kwargs))]
    return {leaf.type for leaf in leaves if isinstance(leaf, torch.device)}


def _held(module: nn.Module) -> set[str]:
    """Devices of its tensors."""
    return {tensor.device.type for tensor in module.state_dict().values()}


@pytest.mark.parametrize("name", ["bert", "vit", "windows", "densenet", "reader"])
def test_on_another_device_nothing_is_left_behind(name: str) -> None:
    program = reading_program() if name == "reader" else captured(name).program
    inputs = token_rows(3).inputs if name == "reader" else ZOO[name].inputs(3, 3)
    network, teacher = _joint(program, heads=0).train(), frozen_copy(program, META)
    made = _made(network)
    assert made == ({"cpu"} if name in ("reader", "bert") else made)
    network.move_to(META)
    there = [x.to(META) for x in inputs.values()]
    for module in (network, teacher):
        assert _held(module) == {"meta"}
        assert _made(module) == ({"meta"} if made else set())
    assert (_held(program.entry.body), _made(program.entry.body)) == ({"cpu"}, made)  # not moved along
    for (answer,) in (network(*there), teacher(*there)):
        assert answer.device == META
        assert answer.shape[0] == 3


def test_heads_go_along_to_another_device() -> None:
    network = _joint(small_program(), classes=4)
    network.move_to(META)
    answers = network(*(x.to(META) for x in stripe_rows(4).inputs.values()))
    assert [answer.device for answer in answers] == [META] * 3


def test_recurrent_layers_keep_what_their_gradients_need_and_drop_nothing_out() -> None:
    rows = token_rows(6).inputs
    network = _joint(reading_program(), heads=0).train()
    (layer,) = network.backbone.graph.find_nodes(  # type: ignore[union-attr, operator]
        op="call_function", target=torch.ops.aten.gru.input
    )
    names = [argument.name for argument in layer.target._schema.arguments]
    said = dict(zip(names, layer.args, strict=True))
    assert (said["train"], said["dropout"]) == (True, 0.0)
    torch.testing.assert_close(network(*rows.values())[0], network(*rows.values())[0], rtol=0, atol=0)
    torch.testing.assert_close(network(*rows.values())[0].detach(), _answer(reading_program(), rows))


def test_a_shared_buffer_stays_shared_on_another_device() -> None:
    program = small_program()
    body = program.entry.body
    paths = [str(n.target) for n in body.graph.find_nodes(op="get_attr") if "running_mean" in str(n.target)]
    network = _joint(_with_shared(program, paths), heads=0)
    network.move_to(META)
    first, second = (network.backbone.get_buffer(path) for path in paths)
    assert first is second


def test_what_is_a_parameter_under_one_path_is_trained_under_all() -> None:
    program = small_program()
    body = copy.deepcopy(program.entry.body)
    first, second = (
        str(n.target) for n in body.graph.find_nodes(op="get_attr") if str(n.target).endswith("norm.bias")
    )
    parent, _, name = first.rpartition(".")
    delattr(body.get_submodule(parent), name)
    body.get_submodule(parent).register_buffer(name, body.get_parameter(second).detach())
    joined = program.with_blocks({program.entry.name: replace(program.entry, body=body)})
    network = _joint(joined, heads=0)
    assert network.backbone.get_parameter(first) is network.backbone.get_parameter(second)
