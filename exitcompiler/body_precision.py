"""One body in a lower precision: which of its values may be rounded, and the graph that rounds them.

The rules are those of automatic mixed precision (Micikevicius et al. 2018, section 3; the operators are
those that ``torch.autocast`` lists), worked out once and on the graph: products of matrices and
convolutions are in low precision; powers, logarithms, sums and others that lose digits or overflow are in
float32, and so is what is computed from them up to the next product; everything else follows its inputs.
That goes for normalisation and softmax too, which `torch.autocast` keeps in float32: what they sum up they
sum up in float32 inside the kernel.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import IntEnum
from typing import Any, Final

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.node import map_aggregate

from exitcompiler.errors import PassError
from exitcompiler.fx_utils import BodyBuilder, find_attribute, is_symbolic_size, result_nodes

__all__ = ["Kind", "cast_body", "infer_kinds"]

_SAMPLE_ROWS: Final = 2

_PRODUCTS: Final = frozenset({
    "addbmm", "addmm", "addmv", "addr", "baddbmm", "bilinear", "bmm", "chain_matmul", "conv1d", "conv2d",
    "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "convolution",
    "einsum", "gru_cell", "linear", "linalg_multi_dot", "linalg_vecdot", "lstm_cell", "matmul", "mm", "mv",
    "prelu", "rnn_relu_cell", "rnn_tanh_cell", "scaled_dot_product_attention",
})  # fmt: skip

_WIDE: Final = frozenset({
    "acos", "asin", "cdist", "cosh", "cosine_similarity", "cumprod", "cumsum", "dist", "erfinv", "exp",
    "exp2", "expm1", "linalg_norm", "linalg_vector_norm", "log", "log10", "log1p", "log2", "logsumexp",
    "norm", "pdist", "pow", "prod", "reciprocal", "renorm", "rsqrt", "sinh", "std", "std_mean", "sum",
    "tan", "var", "var_mean",
})  # fmt: skip

_MOVES: Final = frozenset({
    "alias", "cat", "clone", "contiguous", "detach", "expand", "flatten", "index_select", "permute",
    "repeat", "reshape", "select", "slice", "split", "squeeze", "stack", "t", "transpose", "unflatten",
    "unsqueeze", "view",
})  # fmt: skip
"""Operators that compute nothing: of constants, they give what is asked for in the precision asked for."""


class Kind(IntEnum):
    """How a value is treated. Where several come together, the largest counts."""

    CONSTANT = 0
    """Depends on no param: stays as it is, and is rounded for those who need it rounded."""
    LOW = 1
    """In low precision."""
    INPUT = 2
    """Stored in float32, and rounded for those who use it."""
    WIDE = 3
    """In float32 up to the next product."""
    EXACT = 4
    """In float32, with everything that is computed from it: answers."""


def infer_kinds(
    body: fx.GraphModule, params: Mapping[str, Kind], answers: Collection[str]
) -> dict[fx.Node, Kind]:
    """How each value of a body is computed.

    An answer may be computed in low precision; whoever reads it reads it in float32.

    Args:
        body: Of a block or a head.
        params: Param -> how it comes in.
        answers: Names of values that are answers.
    """
    kinds: dict[fx.Node, Kind] = {}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            kinds[node] = params[node.name]
        elif node.op == "get_attr":
            kinds[node] = Kind.CONSTANT
        elif node.op == "call_function":
            read = [_as_read(source, kinds[source], answers) for source in node.all_input_nodes]
            kinds[node] = _kind(node, max(read, default=Kind.CONSTANT))
    return kinds


def _as_read(source: fx.Node, kind: Kind, answers: Collection[str]) -> Kind:
    if kind is Kind.CONSTANT or is_symbolic_size(source):
        return Kind.CONSTANT
    if kind is Kind.INPUT or not _is_floating(source.meta.get("val")):
        return Kind.LOW
    return Kind.EXACT if source.name in answers else kind


def _kind(node: fx.Node, widest: Kind) -> Kind:
    if widest in (Kind.CONSTANT, Kind.EXACT):
        return widest
    if _operator(node) in _WIDE:
        return Kind.WIDE
    return Kind.LOW if _operator(node) in _PRODUCTS else widest


def _operator(node: fx.Node) -> str:
    """The operator without its overload: ``conv2d``."""
    packet = getattr(node.target, "overloadpacket", None)
    return "" if packet is None else str(packet.__name__)


def _is_floating(value: object) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point()
    return isinstance(value, tuple | list) and any(map(_is_floating, value))


def cast_body(
    body: fx.GraphModule,
    dtype: torch.dtype,
    kinds: Mapping[fx.Node, Kind],
    stored: Mapping[str, torch.dtype],
) -> fx.GraphModule:
    """The body with everything of kind ``LOW`` computed in ``dtype``.

    ::

        (x: float32): y = conv(x, w); z = log_softmax(y)        y is an answer, float32
        =>  x_float16 = to(x); y_float16 = conv(x_float16, w'); y = to(y_float16); z = log_softmax(y)

    Params and results keep their names.

    Args:
        body: Left as it is.
        dtype: ``torch.float16`` or ``torch.bfloat16``.
        kinds: What `infer_kinds` found.
        stored: Param or result -> the dtype that it comes in or goes out as, where that is float32 so far.

    Raises:
        PassError: An operator does not take the precision; names the node.
    """
    return _Caster(body, dtype, kinds, stored).run()


class _Caster:
    """Copies a body node by node. What type a copy really has is told by running it on fake tensors."""

    def __init__(
        self,
        body: fx.GraphModule,
        dtype: torch.dtype,
        kinds: Mapping[fx.Node, Kind],
        stored: Mapping[str, torch.dtype],
    ) -> None:
        self._body = body
        self._dtype = dtype
        self._kinds = kinds
        self._stored = stored
        self._builder = BodyBuilder(
            reserved=[node.name for node, kind in kinds.items() if kind is not Kind.CONSTANT]
        )
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._copies: dict[tuple[fx.Node, torch.dtype | None], fx.Node] = {}  # None: as it came out
        self._fakes: dict[fx.Node, Any] = {}  # of copies

    def run(self) -> fx.GraphModule:
        """The new body."""
        with torch.no_grad():
            for node in self._body.graph.nodes:
                if node.op == "placeholder":
                    self._add_param(node)
                elif node.op == "call_function" and self._kinds[node] is not Kind.CONSTANT:
                    dtype = self._dtype if self._kinds[node] is Kind.LOW else torch.float32
                    read_in = None if is_symbolic_size(node) else dtype
                    self._copies[node, None] = self._add_call(node, read_in, node.name)
            results = result_nodes(self._body)
            copies = [self._value(node, self._stored.get(node.name)) for node in results]
        for node, copy in zip(results, copies, strict=True):
            self._builder.hand_over_name(copy, node.name, f"{node.name}_{_short(self._dtype)}")
        return self._builder.finish(copies)

    def _add_param(self, node: fx.Node) -> None:
        copy, value = self._builder.placeholder(node.name, node), node.meta["val"]
        dtype = self._stored.get(node.name, value.dtype)
        copy.meta["val"] = value.to(dtype)
        shape = [size if isinstance(size, int) else _SAMPLE_ROWS for size in value.shape]
        with self._mode:
            self._fakes[copy] = torch.empty(shape, dtype=dtype)
        self._copies[node, None] = copy

    def _add_call(self, node: fx.Node, dtype: torch.dtype | None, name: str | None) -> fx.Node:
        """A copy that reads floats in ``dtype``; None: as they are."""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            raise PassError(
                f"{node.target} has an inner graph, whose precision cannot be changed",
                where=f"node {node.name!r}",
                remedy="use precision='fp32', or write this part of the model without it",
            )
        values = {source: self._value(source, dtype) for source in node.all_input_nodes}
        copy = self._builder.copy(node, values, self._body, name=name)
        if dtype is self._dtype:
            copy.args = map_aggregate(copy.args, self._argument)
            copy.kwargs = map_aggregate(copy.kwargs, self._argument)
        self._run(node, copy)
        copy.meta["val"] = _retyped(node.meta.get("val"), self._fakes[copy])
        return copy

    def _run(self, node: fx.Node, copy: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((copy.args, copy.kwargs), self._fakes.__getitem__)
        assert callable(copy.target)
        try:
            with self._mode:
                self._fakes[copy] = copy.target(*args, **kwargs)
        except Exception as error:  # operators raise anything
            raise PassError(
                f"{node.target} does not run in {_short(self._dtype)}: {error}",
                where=f"node {node.name!r}",
                remedy="use precision='fp32'",
            ) from error

    def _argument(self, argument: Any) -> Any:
        """Ask for the low dtype instead of float32; what was finite stays finite in it."""
        if argument is torch.float32:
            return self._dtype
        largest = torch.finfo(self._dtype).max
        if isinstance(argument, float) and largest < abs(argument) < float("inf"):
            return largest if argument > 0 else -largest
        return argument

    def _value(self, source: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """The copy of a value in ``dtype``, if it is a float; cast once for all its users."""
        if (source, dtype) not in self._copies:
            if self._kinds[source] is Kind.CONSTANT:
                self._copies[source, dtype] = self._constant(source, dtype)
            else:
                self._copies[source, dtype] = self._cast(self._copies[source, None], dtype)
        return self._copies[source, dtype]

    def _cast(self, copy: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        fake = self._fakes[copy]
        if not self._differs(fake, dtype):
            return copy
        value = copy.meta.get("val")
        cast = self._builder.call(
            torch.ops.aten._to_copy.default,
            (copy,),
            f"{copy.name}_{_short(dtype)}",
            value.to(dtype) if isinstance(value, torch.Tensor) else None,
            {"dtype": dtype},
        )
        self._fakes[cast] = fake.to(dtype)
        return cast

    def _constant(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """What depends on no param: tensors are cast now, and moved as what they are needed as."""
        if node.op == "get_attr":
            value = find_attribute(self._body, str(node.target))
            if self._differs(value, dtype):
                value = _rounded(value, dtype)
            if not isinstance(value, torch.Tensor):
                return self._builder.copy(node, {}, self._body)
            copy = self._builder.constant(str(node.target), value, node.name, None)
            copy.meta["val"] = _retyped(node.meta.get("val"), value)
            with self._mode:
                self._fakes[copy] = self._mode.from_tensor(value)
            return copy
        if dtype is not None and _operator(node) in _MOVES:
            return self._add_call(node, dtype, None)
        if (node, None) not in self._copies:
            self._copies[node, None] = self._add_call(node, None, None)
        return self._cast(self._copies[node, None], dtype)

    def _differs(self, value: object, dtype: torch.dtype | None) -> bool:
        """Whether a value is a tensor of one of the two precisions, and the other one is asked for."""
        ours = isinstance(value, torch.Tensor) and value.dtype in (torch.float32, self._dtype)
        return ours and dtype is not None and value.dtype is not dtype  # type: ignore[attr-defined]


def _rounded(value: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """A weight in another dtype; what is finite stays finite, as in the mask of an attention."""
    assert dtype is not None
    limits = torch.finfo(dtype)
    return torch.where(value.isfinite(), value.clamp(limits.min, limits.max), value).to(dtype)


def _retyped(value: object, like: object) -> Any:
    """A value on fake tensors with the dtypes of another one, whose shape is that of a sample."""
    if isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor):
        return value.to(like.dtype)
    if isinstance(value, tuple | list) and isinstance(like, tuple | list):
        return type(value)(_retyped(a, b) for a, b in zip(value, like, strict=True))
    return value


def _short(dtype: torch.dtype | None) -> str:
    return str(dtype).removeprefix("torch.")
