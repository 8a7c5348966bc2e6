"""Heads at the end of a network of a cascade: its own answer, answers of several networks, agreement.

None of them has parameters. An answer of several networks is the mean of their probabilities; how far
a network agrees with an earlier one is no answer, but something for gates to read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F  # noqa: N812

from exitcompiler.controlflow import BATCH, ValueSpec
from exitcompiler.export import trace_body
from exitcompiler.function_module import FunctionModule
from exitcompiler.fx_utils import extract_body, result_nodes
from exitcompiler.heads import Confidence
from exitcompiler.naming import OWN, agreement_with, head_exit, together_with, value_name
from exitcompiler.program import ExitHead
from exitcompiler.scores import FEATURES

__all__ = ["HeadMaker"]

_Function: TypeAlias = Callable[..., Tensor | tuple[Tensor, Tensor]]

_CONFIDENCE = ValueSpec((BATCH, FEATURES), "float32")


class HeadMaker:
    """Makes the heads of one cascade.

    Bodies differ between networks in names only, and tracing one takes a quarter of a second: each is
    traced once, and then copied under other names.

    Args:
        classes: How many.
    """

    def __init__(self, classes: int) -> None:
        self._logits = ValueSpec((BATCH, classes), "float32")
        self._traced: dict[tuple[_Function, int], fx.GraphModule] = {}

    def own(self, network: str) -> ExitHead:
        """A network's own answer, with its confidence features.

        Reads the network's logits and answers with that very value; only the confidence is computed.

        Args:
            network: Its name.

        Raises:
            UnsupportedModelError: The head cannot be exported.
        """
        confidence = value_name(network, OWN, "confidence")
        body = self._body(_confidence, [network], [confidence])
        logits = value_name(network, OWN, "logits")
        return ExitHead(head_exit(network, OWN), body, {confidence: _CONFIDENCE}, (logits,))

    def joint(self, network: str, others: Sequence[str]) -> ExitHead:
        """The mean of a network's and earlier ones' probabilities, as logits, with confidence features.

        ``log((1/m) sum_i softmax(logits_i))``, by the log-softmax of each, so that nothing becomes infinite
        where a probability underflows to zero.

        Args:
            network: Its name.
            others: Names of networks that have answered before.

        Raises:
            UnsupportedModelError: The head cannot be exported.
        """
        kind = together_with(others)
        logits, confidence = value_name(network, kind, "logits"), value_name(network, kind, "confidence")
        body = self._body(_joint, [network, *others], [logits, confidence])
        results = {logits: self._logits, confidence: _CONFIDENCE}
        return ExitHead(head_exit(network, kind), body, results, (logits,))

    def agreement(self, network: str, other: str) -> ExitHead:
        """How far a network agrees with an earlier one: three features for gates, and no answer.

        The formula stands with ``exitcompiler.scores.Agreement``.

        Args:
            network: Its name.
            other: Name of a network that has answered before.

        Raises:
            UnsupportedModelError: The head cannot be exported.
        """
        kind = agreement_with(other)
        confidence = value_name(network, kind, "confidence")
        body = self._body(_agreement, [network, other], [confidence])
        return ExitHead(head_exit(network, kind), body, {confidence: _CONFIDENCE}, ())

    def _body(self, function: _Function, networks: Sequence[str], results: Sequence[str]) -> fx.GraphModule:
        """The function on the logits of these networks, with its results called so."""
        key = function, len(networks)
        if key not in self._traced:
            reads = [f"logits_{number}" for number in range(len(networks))]
            made = [f"result_{number}" for number in range(len(results))]
            specs = dict.fromkeys(reads, self._logits)
            self._traced[key] = trace_body(FunctionModule(function, reads), specs, made)
        body = self._traced[key]
        reads = [node.name for node in body.graph.nodes if node.op == "placeholder"]
        made = [node.name for node in result_nodes(body)]
        names = [*(value_name(name, OWN, "logits") for name in networks), *results]
        return extract_body(body, reads, made, rename=dict(zip((*reads, *made), names, strict=True)))


def _confidence(logits: Tensor) -> Tensor:
    _, confidence = Confidence(nn.Identity())(logits)
    assert isinstance(confidence, Tensor)
    return confidence


def _joint(*logits: Tensor) -> tuple[Tensor, Tensor]:
    log_p = torch.stack([F.log_softmax(scores, dim=1) for scores in logits])
    # By hand, since not every backend takes the largest term out of a ReduceLogSumExp.
    top = log_p.amax(dim=0)
    joint = top + (log_p - top).exp().sum(dim=0).log() - math.log(len(logits))
    return joint, _confidence(joint)


def _agreement(this: Tensor, earlier: Tensor) -> Tensor:
    p, q = this.softmax(dim=1), earlier.softmax(dim=1)
    # The largest logit, not probability: rounded, two probabilities may be equal.
    of_this, of_other = this.argmax(dim=1, keepdim=True), earlier.argmax(dim=1, keepdim=True)
    overlap = (p * q).sum(dim=1, keepdim=True)
    return torch.cat([q.gather(1, of_this), p.gather(1, of_other), overlap], dim=1)
