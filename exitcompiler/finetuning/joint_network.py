"""A captured network and its exit heads as one module that can be trained."""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate
from torch.nn import functional as F  # noqa: N812

from exitcompiler.fx_utils import BodyBuilder, extract_body, nodes_by_name, result_nodes
from exitcompiler.optimizers import ParameterGroup
from exitcompiler.program import Program, Return
from exitcompiler.scores import HeadKey
from exitcompiler.training import head_group

__all__ = ["JointNetwork", "backbone_logits", "class_count", "frozen_copy"]

_EVAL_BATCH_NORM = torch.ops.aten._native_batch_norm_legit_no_training.default
_MATRIX_PRODUCTS = {
    torch.ops.aten.conv1d.default,
    torch.ops.aten.conv2d.default,
    torch.ops.aten.conv3d.default,
    torch.ops.aten.linear.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.mm.default,
}
"""Whose weights are hidden matrices; embeddings and position tables are not."""

_RECURRENT = {
    torch.ops.aten.lstm.input,
    torch.ops.aten.lstm.data,
    torch.ops.aten.gru.input,
    torch.ops.aten.gru.data,
    torch.ops.aten.rnn_tanh.input,
    torch.ops.aten.rnn_relu.input,
}

_USUAL_MOMENTUM: Final = 0.1
"""Of torch's batch norms."""


class JointNetwork(nn.Module):
    """The backbone with its heads: one pass gives the logits of every head, then the backbone's own.

    Parameters are copies: the program they come from, and the user's model, stay as they are. Tensors
    that share memory there are one parameter here.

    Args:
        program: The captured network, one block.
        heads: (exit, kind) -> module from cut value to logits, in the order of the exits; copied.
        reads: (exit, kind) -> name of the cut value.
        freeze_batchnorm: Keep the running statistics of the backbone's batch norms; otherwise rows are
            normalised by their batch, and statistics are learned anew. Heads always learn theirs. In
            ``eval()`` mode all use what they have learned.
    """

    def __init__(
        self,
        program: Program,
        heads: Mapping[HeadKey, nn.Module],
        reads: Mapping[HeadKey, str],
        *,
        freeze_batchnorm: bool,
    ) -> None:
        super().__init__()
        self._program = program
        self.keys = tuple(heads)
        self.values = tuple(dict.fromkeys(reads[key] for key in heads))
        self._reads = tuple(self.values.index(reads[key]) for key in heads)
        block = program.entry
        body = extract_body(block.body, list(block.params), [*self.values, backbone_logits(program)])
        self.backbone = _trainable(body, freeze_batchnorm=freeze_batchnorm)
        self.heads = nn.ModuleList(copy.deepcopy(head) for head in heads.values())

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        """Logits ``[batch, classes]`` of every head in the order of ``keys``, then of the backbone.

        Args:
            inputs: In the order of the program's.
        """
        *values, logits = self.backbone(*inputs)
        answers = [head(values[read]) for head, read in zip(self.heads, self._reads, strict=True)]
        return [*answers, logits]

    def move_to(self, device: torch.device) -> None:
        """Go on working on a device; ``to`` alone leaves behind what the graph itself makes."""
        _move(self.backbone, device)
        self.heads.to(device)

    def tuned_program(self) -> Program:
        """The program with weights and statistics as they are now, copied to the CPU."""
        block = self._program.entry
        return self._program.with_blocks(
            {block.name: replace(block, body=_with_state(block.body, self.backbone))}
        )

    def parameter_groups(
        self, *, lr: float, head_lr: float, head_adamw_lr: float, adamw_lr: float, weight_decay: float
    ) -> list[ParameterGroup]:
        """What an optimiser trains: the backbone at its rates, the heads at theirs.

        Args:
            lr: Peak rate of the backbone's convolutions and hidden layers.
            head_lr: Likewise, of the heads.
            head_adamw_lr: Peak rate of the heads' other parameters.
            adamw_lr: Peak rate of the backbone's other parameters.
            weight_decay: Of convolutions and hidden layers.
        """
        hidden = _hidden_matrices(self.backbone)
        matrices = [p for p in self.backbone.parameters() if id(p) in hidden]
        others = [p for p in self.backbone.parameters() if id(p) not in hidden]
        groups = [ParameterGroup(matrices, others, lr, adamw_lr, weight_decay)]
        if len(self.heads):
            groups.append(head_group(list(self.heads), head_lr, head_adamw_lr, weight_decay))
        return groups


def backbone_logits(program: Program) -> str:
    """The value that a one-block program returns."""
    end = program.entry.terminator
    assert isinstance(end, Return)
    return end.values[0]


def class_count(program: Program) -> int:
    """How many logits a one-block program returns."""
    return int(program.entry.values[backbone_logits(program)].shape[1])


def frozen_copy(program: Program, device: torch.device) -> nn.Module:
    """A one-block program on a device, as a module of its own: from its inputs to its logits, not trained."""
    block = program.entry
    body = extract_body(block.body, list(block.params), [backbone_logits(program)])
    copied = _trainable(body, freeze_batchnorm=True)
    _move(copied, device)
    return copied.eval().requires_grad_(False)


class _BatchNorm(nn.Module):
    """A batch norm that is handed its tensors, which stay under the paths of the network."""

    def __init__(self, momentum: float, eps: float, *, frozen: bool) -> None:
        super().__init__()
        # Captured as 0 where the network has None, an average over all batches since its first training.
        self.momentum = momentum or _USUAL_MOMENTUM
        self.eps = eps
        self.frozen = frozen

    def forward(
        self, x: Tensor, mean: Tensor, variance: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """Normalise, and learn the statistics unless they are frozen."""
        by_batch = self.training and not self.frozen
        return F.batch_norm(x, mean, variance, weight, bias, by_batch, self.momentum, self.eps)


def _trainable(body: fx.GraphModule, *, freeze_batchnorm: bool) -> fx.GraphModule:
    """A copy of a body with tensors of its own, whose batch norms can be trained."""
    holder = _owned(body, body)
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in body.graph.nodes:
        if node.target is _EVAL_BATCH_NORM:
            x, weight, bias, mean, variance, momentum, eps = node.args
            tensors = [copies.get(value, value) for value in (x, mean, variance, weight, bias)]
            holder.add_module(node.name, _BatchNorm(momentum, eps, frozen=freeze_batchnorm))
            copies[node] = graph.call_module(node.name, tuple(tensors))
        elif node.target is operator.getitem and node.args[0].target is _EVAL_BATCH_NORM:
            copies[node] = copies[node.args[0]]  # the first of its results, the only one that inference uses
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.target in _RECURRENT:
                _let_train(copies[node])
    trainable = fx.GraphModule(holder, graph, class_name="Backbone")
    trainable.graph.lint()
    return trainable


def _let_train(node: fx.Node) -> None:
    """Ask a recurrent layer for what its gradient needs, which cuDNN keeps in training only.

    It is captured as in use, where it drops nothing out, and goes on so.
    """
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    for name, value in (("train", True), ("dropout", 0.0)):
        node.update_arg(names.index(name), value)


def _move(body: fx.GraphModule, device: torch.device) -> None:
    """Move a body to a device: its tensors, those it makes itself, and what is shared stays shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in body.modules():
        for name, buffer in module.named_buffers(recurse=False, remove_duplicate=False):
            places.setdefault(id(buffer), []).append((module, name))
    body.to(device)
    for (first, first_name), *others in places.values():
        for module, name in others:
            setattr(module, name, getattr(first, first_name))
    for node in body.graph.nodes:
        node.args = map_aggregate(node.args, lambda value: _there(value, device))
        node.kwargs = map_aggregate(node.kwargs, lambda value: _there(value, device))
    body.recompile()


def _there(argument: Any, device: torch.device) -> Any:
    return device if isinstance(argument, torch.device) else argument


def _with_state(body: fx.GraphModule, trained: nn.Module) -> fx.GraphModule:
    """A body with the tensors of a trained copy."""
    tensors = _owned(body, trained)
    builder = BodyBuilder()
    copies: dict[fx.Node, fx.Node] = {}
    for node in nodes_by_name(body).values():
        if node.op == "placeholder":
            copies[node] = builder.placeholder(node.name, node)
        else:
            copies[node] = builder.copy(node, copies, tensors, name=node.name)
    return builder.finish([copies[node] for node in result_nodes(body)])


def _owned(body: fx.GraphModule, source: nn.Module) -> nn.Module:
    """Copies of all tensors that a body uses, as another module has them; what is shared there stays so."""
    holder = nn.Module()
    paths = dict.fromkeys(str(node.target) for node in body.graph.find_nodes(op="get_attr"))
    found: dict[str, Tensor] = {path: operator.attrgetter(path)(source) for path in paths}
    # What is a parameter under one path is trained under all.
    trained = {_memory(x) for x in found.values() if isinstance(x, nn.Parameter) and x.is_floating_point()}
    shared: dict[tuple[object, ...], nn.Parameter | Tensor] = {}
    for path, value in found.items():
        key = _memory(value)
        if key not in shared:
            # Contiguous: an optimiser takes convolutions as matrices, whatever layout the user has them in.
            copied = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            shared[key] = nn.Parameter(copied) if key in trained else copied
        _attach(holder, path, shared[key])
    return holder


def _memory(tensor: Tensor) -> tuple[object, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


def _attach(module: nn.Module, path: str, value: nn.Parameter | Tensor) -> None:
    *parents, name = path.split(".")
    for parent in parents:
        if not hasattr(module, parent):
            module.add_module(parent, nn.Module())
        module = module.get_submodule(parent)
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    else:
        module.register_buffer(name, value)


def _hidden_matrices(body: fx.GraphModule) -> set[int]:
    """The weights of convolutions and linear layers, by identity, but for those that make the logits."""
    classifiers = _last_products(body)
    found: dict[int, fx.Node] = {}
    for node in body.graph.nodes:
        if node.target in _MATRIX_PRODUCTS:
            for argument in node.args:
                if isinstance(argument, fx.Node) and argument.op == "get_attr":
                    weight = operator.attrgetter(str(argument.target))(body)
                    if isinstance(weight, nn.Parameter) and weight.ndim > 1:
                        found[id(weight)] = node
    return {weight for weight, node in found.items() if node not in classifiers}


def _last_products(body: fx.GraphModule) -> set[fx.Node]:
    """The convolutions and linear layers with no other one between them and the logits."""
    (*_, logits) = result_nodes(body)
    seen, pending, last = set[fx.Node](), [logits], set[fx.Node]()
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _MATRIX_PRODUCTS:
            last.add(node)
        else:
            pending += node.all_input_nodes
    return last
