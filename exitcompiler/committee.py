"""Heads at the end of a network of a cascade: its own answer, answers of several networks, agreement.

None of them has parameters. An answer of several networks is the mean of their probabilities; how far
a network agrees with an earlier one is no answer, but something for gates to read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

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

__all__ = ["agreement_head", "joint_head", "own_head"]

_CONFIDENCE = ValueSpec((BATCH, FEATURES), "float32")


def own_head(network: str, classes: int) -> ExitHead:
    """A network's own answer, with its confidence features.

    Reads the network's logits and answers with that very value; only the confidence is computed.

    Args:
        network: Its name.
        classes: How many.
    """
    confidence = value_name(network, OWN, "confidence")
    body = _named(_own_body(classes), [network], [confidence])
    return ExitHead(
        head_exit(network, OWN), body, {confidence: _CONFIDENCE}, (value_name(network, OWN, "logits"),)
    )


def joint_head(network: str, others: Sequence[str], classes: int) -> ExitHead:
    """The mean of a network's and earlier ones' probabilities, as logits, with confidence features.

    In the graph what ``committee_scores.joint_logits`` computes.

    Args:
        network: Its name.
        others: Names of networks that have answered before.
        classes: How many.
    """
    kind = together_with(others)
    logits, confidence = value_name(network, kind, "logits"), value_name(network, kind, "confidence")
    networks = [network, *others]
    body = _named(_joint_body(len(networks), classes), networks, [logits, confidence])
    return ExitHead(
        head_exit(network, kind), body, {logits: _logits(classes), confidence: _CONFIDENCE}, (logits,)
    )


def agreement_head(network: str, other: str, classes: int) -> ExitHead:
    """How far a network agrees with an earlier one: three features for gates, and no answer.

    In the graph what ``committee_scores.agreement_features`` computes.

    Args:
        network: Its name.
        other: Name of a network that has answered before.
        classes: How many.
    """
    kind = agreement_with(other)
    confidence = value_name(network, kind, "confidence")
    body = _named(_agreement_body(classes), [network, other], [confidence])
    return ExitHead(head_exit(network, kind), body, {confidence: _CONFIDENCE}, ())


def _logits(classes: int) -> ValueSpec:
    return ValueSpec((BATCH, classes), "float32")


def _named(body: fx.GraphModule, networks: Sequence[str], results: Sequence[str]) -> fx.GraphModule:
    """The body that reads the logits of these networks, and whose results are called so."""
    reads = [node.name for node in body.graph.nodes if node.op == "placeholder"]
    made = [node.name for node in result_nodes(body)]
    names = [*(value_name(name, OWN, "logits") for name in networks), *results]
    return extract_body(body, reads, made, rename=dict(zip((*reads, *made), names, strict=True)))


# Bodies differ between networks in names only: each is traced once, which takes a quarter of a second.


@cache
def _own_body(classes: int) -> fx.GraphModule:
    features = Confidence(nn.Identity())

    def confidence(logits: Tensor) -> Tensor:
        _, found = features(logits)
        assert isinstance(found, Tensor)
        return found

    return trace_body(FunctionModule(confidence, ["logits"]), {"logits": _logits(classes)}, ["confidence"])


@cache
def _joint_body(count: int, classes: int) -> fx.GraphModule:
    features = Confidence(nn.Identity())

    def answer(*logits: Tensor) -> tuple[Tensor, Tensor]:
        log_p = torch.stack([F.log_softmax(scores, dim=1) for scores in logits])
        # By hand, since not every backend takes the largest term out of a ReduceLogSumExp.
        top = log_p.amax(dim=0)
        joint = top + (log_p - top).exp().sum(dim=0).log() - math.log(len(logits))
        _, confidence = features(joint)
        return joint, confidence

    reads = [f"logits_{number}" for number in range(count)]
    specs = dict.fromkeys(reads, _logits(classes))
    return trace_body(FunctionModule(answer, reads), specs, ["joint", "confidence"])


@cache
def _agreement_body(classes: int) -> fx.GraphModule:
    def agreement(this: Tensor, earlier: Tensor) -> Tensor:
        p, q = this.softmax(dim=1), earlier.softmax(dim=1)
        # The largest logit, not probability: rounded, two probabilities may be equal.
        of_this, of_other = this.argmax(dim=1, keepdim=True), earlier.argmax(dim=1, keepdim=True)
        overlap = (p * q).sum(dim=1, keepdim=True)
        return torch.cat([q.gather(1, of_this), p.gather(1, of_other), overlap], dim=1)

    reads = ["this", "earlier"]
    specs = dict.fromkeys(reads, _logits(classes))
    return trace_body(FunctionModule(agreement, reads), specs, ["confidence"])
