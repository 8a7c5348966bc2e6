"""Random weights that behave as trained ones do: everything takes part, and rounding errors stay small."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["liven", "settle"]

_SPREAD: Final = 0.1
_CONSTANT_BELOW: Final = 1e-5
_RAISED_BY: Final = 1.0
_LEAST_SHARE: Final = 0.1


@torch.no_grad()
def liven(module: nn.Module, seed: int = 0) -> None:
    """Replace parameters that are constant when a network is new, and raise the biases of batch norms.

    Zeros in the last layer, in layer scales and residual gains would hide whatever is wrong before them. And
    where half of every channel is cut off after a batch norm, the errors of a new network grow by a fifth a
    layer (Yang et al. 2019, A Mean Field Theory of Batch Normalization); less of it is cut off then.
    """
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if not parameter.is_floating_point() or parameter.std(correction=0) > _CONSTANT_BELOW:
            continue
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if parameter.ndim > 1 and parameter.shape[0] > 1 and parameter[0].numel() > 1:
            parameter.copy_(noise / parameter[0].numel() ** 0.5)
        else:
            parameter.add_(_SPREAD * noise)
    for norm in _batch_norms(module):
        if norm.bias is not None:
            norm.bias.add_(_RAISED_BY)


@torch.no_grad()
def settle(module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
    """Set batch-norm statistics to those of the rows, so that values stay of order one.

    Channels that hardly vary are left so: they hold little but rounding errors.

    Args:
        module: In eval mode.
        inputs: Rows by the names of its parameters.
    """

    def adopt(norm: Any, arguments: tuple[Tensor, ...]) -> None:
        (values,) = arguments
        dims = [0, *range(2, values.ndim)]
        variance = values.var(dims, correction=0)
        norm.running_mean.copy_(values.mean(dims))
        norm.running_var.copy_(variance.clamp(min=_LEAST_SHARE * float(variance.mean())))

    hooks = [norm.register_forward_pre_hook(adopt) for norm in _batch_norms(module)]
    module(**inputs)
    for hook in hooks:
        hook.remove()


def _batch_norms(module: nn.Module) -> list[Any]:
    kinds = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
    return [m for m in module.modules() if isinstance(m, kinds) and m.running_mean is not None]
