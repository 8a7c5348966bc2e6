"""Answers of several networks: the graph, its twin in numpy, and every backend say the same."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from committee_scores import agreement_features, joint_logits
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from exitcompiler.committee import HeadMaker
from exitcompiler.controlflow import BATCH, Edge, Jump, ValueSpec, engine_signature
from exitcompiler.passes.lower_to_onnx import lower_blocks
from exitcompiler.program import Block, ExitHead
from exitcompiler.runtime.backends import create_backend
from exitcompiler.scores import softmax_confidence

CLASSES = 4
NETWORKS = ("a", "b", "c")
MAKE = HeadMaker(CLASSES)
HEADS = {
    "own": MAKE.own("c"),
    "one": MAKE.joint("c", ["a"]),
    "two": MAKE.joint("c", ["a", "b"]),
    "agreement": MAKE.agreement("c", "a"),
}

# Probabilities that underflow to zero, ties, and all between.
scores = arrays.arrays(
    np.float32, (3, 2, CLASSES), elements=st.sampled_from([-1e4, -200.0, -3.0, 0.0, 0.5, 2.0, 40.0, 1e4])
)


def values(logits: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{name}_own_logits": array for name, array in zip(NETWORKS, logits, strict=True)}


def run(head: ExitHead, logits: np.ndarray) -> dict[str, np.ndarray]:
    given_values = values(logits)
    reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        found = head.body(*(torch.from_numpy(given_values[name]) for name in reads))
    return {name: value.numpy() for name, value in zip(head.results, found, strict=True)}


def expected(kind: str, logits: np.ndarray) -> dict[str, np.ndarray]:
    a, b, c = logits
    if kind == "own":
        return {"c_own_confidence": softmax_confidence(c)}
    if kind == "agreement":
        return {"c_agreement_with_a_confidence": agreement_features(c, a)}
    joint = joint_logits([c, a] if kind == "one" else [c, a, b])
    name = "c_with_a" if kind == "one" else "c_with_a_b"
    return {f"{name}_logits": joint, f"{name}_confidence": softmax_confidence(joint)}


@pytest.mark.parametrize("kind", HEADS)
@given(logits=scores)
def test_the_graph_computes_what_its_twin_computes(kind: str, logits: np.ndarray) -> None:
    found = run(HEADS[kind], logits)
    for name, value in expected(kind, logits).items():
        assert np.isfinite(found[name]).all()
        # Float32 against float64: logits of 1e4 are rounded to 1e-3.
        np.testing.assert_allclose(found[name], value, rtol=1e-5, atol=2e-3 if "logits" in name else 2e-4)


def test_the_joint_answer_is_the_mean_of_the_probabilities() -> None:
    logits = np.random.default_rng(0).normal(size=(3, 50, CLASSES)).astype(np.float32) * 3
    p = torch.from_numpy(logits).softmax(2).numpy()
    joint = torch.from_numpy(joint_logits(list(logits))).softmax(1).numpy()
    np.testing.assert_allclose(joint, p.mean(axis=0), atol=1e-6)


def test_agreement_says_what_each_thinks_of_the_other_answer() -> None:
    this, other = np.log([[0.7, 0.2, 0.1]]), np.log([[0.3, 0.6, 0.1]])
    np.testing.assert_allclose(agreement_features(this, other), [[0.3, 0.2, 0.21 + 0.12 + 0.01]], atol=1e-6)


def test_what_answers_and_how_it_is_called() -> None:
    assert {kind: (head.exit, head.answer) for kind, head in HEADS.items()} == {
        "own": ("c/own", ("c_own_logits",)),
        "one": ("c/with a", ("c_with_a_logits",)),
        "two": ("c/with a+b", ("c_with_a_b_logits",)),
        "agreement": ("c/agreement with a", ()),
    }


@pytest.mark.parametrize("backend_name", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("kind", HEADS)
def test_backends_agree(kind: str, backend_name: str) -> None:
    pytest.importorskip(backend_name)
    head = HEADS[kind]
    reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
    spec = ValueSpec((BATCH, CLASSES), "float32")
    block = Block(
        "head", dict.fromkeys(reads, spec), head.results, Jump(Edge("on", tuple(head.results))), head.body
    )
    engine = create_backend(backend_name, threads=1).load(
        lower_blocks([block])["head"], engine_signature(block), static_batch=None
    )
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(3, 40, CLASSES)).astype(np.float32) * 4
    logits[:, :8] = generator.choice(np.float32([-1e4, -200, 0, 40, 1e4]), size=(3, 8, CLASSES))
    found = engine.run([values(logits)[name] for name in reads])
    for name, value in zip(head.results, found, strict=True):
        assert np.isfinite(value).all()
        np.testing.assert_allclose(value, run(head, logits)[name], rtol=1e-5, atol=1e-5)
