"""Computes the scores that gates are learned on, with the engines that will run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from exitcompiler.candidates import Candidates
from exitcompiler.controlflow import Return, engine_signature
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.naming import value_name
from exitcompiler.program import Block, Program
from exitcompiler.progress import Step
from exitcompiler.runtime.backends import Array, Engine
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.scores import Agreement, FloatArray, HeadKey, HeadScores, ScoreTable

__all__ = ["References", "float_logits", "plain_logits", "run_block", "score_rows"]

BATCH_SIZE = 32


@dataclass(frozen=True)
class References:
    """Answers, ``float32[rows, classes]``, besides those of the candidates.

    Args:
        original: Of the backbone as it was given, where the candidates' end is another (tuned, or in another
            precision): accuracy drops are counted from it.
        plain: Of the plain engine that comes back where no exit pays, where it is in another precision.
    """

    original: FloatArray | None = None
    plain: FloatArray | None = None


def score_rows(
    candidates: Candidates,
    engines: Engines,
    rows: Rows,
    step: Step,
    references: References | None = None,
) -> ScoreTable:
    """All heads' logits and the backbone's, on all rows.

    Every row goes through every network and every head, at the precision that will run: scores of
    another precision would be other scores.

    Args:
        candidates: Sites and heads.
        engines: Make and keep the engines.
        rows: Labels and inputs.
        step: Progress, one unit a row.
        references: What else is compared with.

    Raises:
        CalibrationError: Scores are not finite, or labels do not fit the classes.
    """
    heads = {key: candidates.head_block(key) for key in candidates.heads}
    loaded = engines.load([*candidates.program.blocks, *heads.values()])
    found: dict[HeadKey, list[FloatArray]] = {key: [] for key in heads}
    backbone: list[FloatArray] = []
    last = candidates.program.blocks[-1].terminator
    assert isinstance(last, Return)
    for inputs, _ in rows.batches(BATCH_SIZE):
        values: dict[str, Array] = {name: tensor.numpy() for name, tensor in inputs.items()}
        for block in candidates.program.blocks:  # values keep their names along all ways
            values.update(run_block(block, loaded.get(block.name), values))
        for key, block in heads.items():
            outputs = values | run_block(block, loaded.get(block.name), values)
            what = "logits" if candidates.heads[key].answer else "confidence"
            found[key].append(np.array(outputs[value_name(*key, what)]))
        backbone.append(np.array(values[last.values[0]]))
        step.advance(len(backbone[-1]))
    answers, features = {}, {}
    for key, head in candidates.heads.items():
        needs, scores = candidates.needs.get(key, ()), np.concatenate(found[key])
        if head.answer:
            answers[key] = HeadScores(*key, scores, needs)
        else:
            features[key] = Agreement(scores, needs)
    backbone_logits: FloatArray = np.concatenate(backbone)
    beside = References() if references is None else references
    return ScoreTable(
        candidates.topology, answers, backbone_logits, rows.labels, features, beside.original, beside.plain
    )


def plain_logits(program: Program, engines: Engines, rows: Rows) -> FloatArray:
    """What a network of one block answers, ``float32[rows, classes]``."""
    block = program.entry
    engine = engines.load([block])[block.name]
    found = []
    for inputs, _ in rows.batches(BATCH_SIZE):
        values = {name: tensor.numpy() for name, tensor in inputs.items()}
        (logits,) = run_block(block, engine, values).values()
        found.append(np.array(logits))
    return np.concatenate(found)


@torch.no_grad()
def float_logits(program: Program, rows: Rows) -> FloatArray:
    """What a network of one block answers in float32, ``float32[rows, classes]``: by torch, on the CPU.

    Whatever a backend's precision is, that is what accuracy drops are counted from.
    """
    found = []
    for inputs, _ in rows.batches(BATCH_SIZE):
        (logits,) = program.entry.run(inputs).values()
        found.append(logits.numpy())
    return np.concatenate(found)


def run_block(block: Block, engine: Engine | None, values: Mapping[str, Array]) -> dict[str, Array]:
    """What one block hands out for a batch; nothing where it needs no engine."""
    if engine is None:
        return {}
    inputs = [values[name] for name in block.params] + gate_parameters(block)
    results = engine.run([np.ascontiguousarray(value) for value in inputs])
    return dict(zip(engine_signature(block).outputs, results, strict=True))
