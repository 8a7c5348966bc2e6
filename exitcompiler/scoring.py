"""Computes the scores that gates are learned on, with the engines that will run."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from exitcompiler.candidates import Candidates
from exitcompiler.controlflow import Return, engine_signature
from exitcompiler.data import Rows
from exitcompiler.engines import Engines
from exitcompiler.naming import value_name
from exitcompiler.program import Block, Program
from exitcompiler.progress import Step
from exitcompiler.runtime.backends import Array
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.scores import HeadKey, HeadScores, ScoreTable

__all__ = ["run_block", "run_chain", "score_rows"]

BATCH_SIZE = 32


def score_rows(candidates: Candidates, engines: Engines, rows: Rows, step: Step) -> ScoreTable:
    """All heads' logits and the backbone's, on all rows.

    Every row goes through the whole backbone and every head, at the precision that will run: scores of
    another precision would be other scores.

    Args:
        candidates: Exits and heads.
        engines: Make and keep the engines.
        rows: Labels and inputs.
        step: Progress, one unit a row.

    Raises:
        CalibrationError: Scores are not finite, or labels do not fit the classes.
    """
    heads = {key: candidates.head_block(key) for key in candidates.heads}
    engines.load([*candidates.chain.blocks, *heads.values()])
    logits: dict[HeadKey, list[Array]] = {key: [] for key in heads}
    backbone: list[Array] = []
    last = candidates.chain.blocks[-1].terminator
    assert isinstance(last, Return)
    for inputs, _ in rows.batches(BATCH_SIZE):
        values = run_chain(candidates.chain, engines, {name: t.numpy() for name, t in inputs.items()})
        for key, block in heads.items():
            outputs = run_block(block, engines, values)
            logits[key].append(np.array(outputs[value_name(*key, "logits")]))
        backbone.append(np.array(values[last.values[0]]))
        step.advance(len(backbone[-1]))
    scores = {key: HeadScores(*key, np.concatenate(parts)) for key, parts in logits.items()}
    return ScoreTable(candidates.exits, scores, np.concatenate(backbone), rows.labels)


def run_chain(chain: Program, engines: Engines, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of a chain of blocks whose values keep their names, for a batch."""
    values = dict(inputs)
    for block in chain.blocks:
        values.update(run_block(block, engines, values))
    return values


def run_block(
    block: Block, engines: Engines, values: Mapping[str, Array], static_batch: int | None = None
) -> dict[str, Array]:
    """What one block hands out for a batch."""
    outputs = engine_signature(block).outputs
    if not outputs:
        return {}
    inputs = [values[name] for name in block.params] + gate_parameters(block)
    results = engines.engine(block, static_batch).run([np.ascontiguousarray(value) for value in inputs])
    return dict(zip(outputs, results, strict=True))
