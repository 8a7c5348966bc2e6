"""A function as a module that torch.export can take: its inputs have names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from inspect import Parameter, Signature
from typing import Any

from torch import Tensor, nn

__all__ = ["FunctionModule"]


class FunctionModule(nn.Module):
    """Calls a function with one tensor per name.

    Args:
        function: Takes the tensors by position; where it is a module, its parameters are this one's.
        names: Of the inputs, in order.
    """

    def __init__(self, function: Callable[..., Any], names: Sequence[str]) -> None:
        super().__init__()
        self.function = function

        def forward(*inputs: Tensor) -> Any:
            return function(*inputs)

        # torch.export gives inputs the names in the signature, and knows none for *inputs.
        parameters = [Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names]
        forward.__dict__["__signature__"] = Signature(parameters)
        self.forward = forward
