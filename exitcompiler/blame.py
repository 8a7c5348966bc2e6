"""Says where in a model something goes wrong: by module, by node, by line.

Only looked for once an error is certain, so it may run the model again and keep all values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from exitcompiler.fx_utils import is_batch_size

__all__ = ["find_failing_node", "find_random_module", "find_row_mixing", "node_place"]

_TOLERANCE = 1e-4


def node_place(node: fx.Node) -> str:
    """Where a node stands: ``module 'layer1.0', node 'mean' (aten.mean.dim)``."""
    stack = node.meta.get("nn_module_stack")
    paths = [path for path, _ in stack.values() if path] if stack else []
    module = [f"module {paths[-1]!r}"] if paths else []
    return ", ".join([*module, f"node {node.name!r} ({node.target})"])


def find_random_module(module: nn.Module, run: Callable[[], object]) -> str:
    """The innermost module, of those that run first, whose output differs between two runs.

    Args:
        module: The model.
        run: Runs it, always on the same input.
    """
    first, second = _outputs(module, run), _outputs(module, run)
    for (path, one), (_, other) in zip(first, second, strict=False):
        if not all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(one, other, strict=True)):
            return f"module {path!r}" if path else type(module).__name__
    return type(module).__name__


def _outputs(module: nn.Module, run: Callable[[], object]) -> list[tuple[str, list[Tensor]]]:
    """What every module returns, in the order in which they are done."""
    outputs: list[tuple[str, list[Tensor]]] = []

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, answer: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(answer) if isinstance(leaf, Tensor)]
            outputs.append((path, [tensor.clone() for tensor in tensors]))

        return hook

    hooks = [child.register_forward_hook(keep(path)) for path, child in module.named_modules()]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    return outputs


def find_row_mixing(body: fx.GraphModule, rows: Mapping[str, Tensor], batch: Sequence[int]) -> fx.Node | None:
    """The first node whose value for a row alone differs from that in a batch; None if that is not found.

    Values whose dim 0 is not the batch are not compared.

    Args:
        body: The captured graph.
        rows: Of its inputs.
        batch: Indices of rows that were answered otherwise together than alone.
    """
    together = _values(body, [values[list(batch)] for values in rows.values()])
    for place, row in enumerate(batch):
        alone = _values(body, [values[[row]] for values in rows.values()])
        for node, value in together.items():
            if node in alone and not _same(value[place], alone[node][0]):
                return node
    return None


def find_failing_node(
    body: fx.GraphModule, rows: Mapping[str, Tensor], batch: Sequence[int]
) -> fx.Node | None:
    """The node at which the graph fails for a batch; None where it does not.

    Args:
        body: The captured graph.
        rows: Of its inputs.
        batch: Indices of rows.
    """
    reached: list[fx.Node] = []

    class Follow(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            reached.append(node)
            return super().run_node(node)

    try:
        with torch.no_grad():
            Follow(body).run(*(values[list(batch)] for values in rows.values()))
    except Exception:  # whatever it is, it has been raised before
        return reached[-1]
    return None


def _same(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point():
        return bool(torch.equal(one, other))
    limit = _TOLERANCE * max(float(other.abs().max()), 1e-6)
    return bool((one - other).abs().max() <= limit)


@torch.no_grad()
def _values(body: fx.GraphModule, inputs: Sequence[Tensor]) -> dict[fx.Node, Tensor]:
    """The values that have rows, of all nodes that are computed."""
    found: dict[fx.Node, Tensor] = {}

    class Keep(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            value = super().run_node(node)
            fake = node.meta.get("val")
            if isinstance(fake, Tensor) and fake.ndim and fake.numel() and is_batch_size(fake.shape[0]):
                found[node] = value
            return value

    Keep(body).run(*inputs)
    return found
