"""Compiles one network of the zoo with exits forced into it, and compares what comes out with torch.

Nothing is trained and nothing is measured: what is asked is whether a network can be captured, cut, given
exits, rewritten, lowered and run. All of it is done by the compiler's own code.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from gpu_programs import choose_cuts, thresholds, untrained_head
from torch import Tensor, nn

from exitcompiler.candidates import build_program, chain_candidates
from exitcompiler.capture import capture
from exitcompiler.certify import forced_differences
from exitcompiler.cut_points import CutPoint
from exitcompiler.data import Rows
from exitcompiler.engines import Lowerer
from exitcompiler.errors import LoweringError, PassError, UnsupportedModelError
from exitcompiler.fitting import distinct_cuts
from exitcompiler.fx_utils import nodes_by_name
from exitcompiler.interpreter import interpret
from exitcompiler.naming import LINEAR, value_name
from exitcompiler.packaging import pack
from exitcompiler.passes.base import PassResult
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.policies import LinearRule, Policy, leave_above
from exitcompiler.program import ExitHead, Program
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.manifest import MODEL_FILE, Artifact
from exitcompiler.settings import Settings
from exitcompiler.training import FeatureStream

__all__ = ["EXITS", "PARITY", "ROWS", "Progress", "compile_with_exits"]

EXITS: Final = 3
PARITY: Final = 1e-3
"""How much outputs may differ from torch's, relative to the largest of them."""
ROWS: Final = 8
_PLACES: Final = (0.2, 0.4, 0.6, 0.8)
"""Of the network's FLOPs, how many lie before each exit, about."""
_CONSTANT: Final = 1
"""Which of the places gets a gate that always goes on, for prune-constant-gates to find."""
_SHARE: Final = 1 / (EXITS + 1)


@dataclass
class Progress:
    """What has been found out about a network so far.

    Args:
        tell: Called with the figures at the beginning of every stage, so that they outlive a crash.
        figures: ``stage``, ``seconds`` per stage, ``nodes``, ``cut_points``, ``exits``, ``difference``, ...
    """

    tell: Callable[[Mapping[str, Any]], object] = lambda figures: None
    figures: dict[str, Any] = field(default_factory=lambda: {"seconds": {}})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage."""
        self.figures["stage"] = name
        self.tell(self.figures)
        began = time.perf_counter()
        yield
        self.figures["seconds"][name] = round(time.perf_counter() - began, 2)


@torch.no_grad()
def compile_with_exits(module: nn.Module, inputs: Mapping[str, Tensor], progress: Progress) -> None:
    """Compile a network with three exits, and compare every answer of it with torch's.

    Args:
        module: In eval mode.
        inputs: ``ROWS`` rows by the names of its parameters.
        progress: What is found out goes here.

    Raises:
        ExitCompilerError: It cannot be compiled, or answers differ.
    """
    figures = progress.figures
    with progress.stage("capture"):
        captured = capture(module, dict(inputs))
        whole = captured.program
        figures["nodes"] = len(nodes_by_name(whole.entry.body))
    with progress.stage("cut points"):
        cuts = distinct_cuts(find_cut_points(whole))
        figures["cut_points"] = len(cuts)
        chosen = _chosen(cuts)
    with progress.stage("exits"):
        program = _with_exits(whole, chosen, inputs)
        figures["exits"] = list(program.exits[:-1])
    with progress.stage("lower"):
        backend = create_backend("onnxruntime", threads=1)
        # The program stands in for the plain network, which nothing here runs: it is lowered once.
        artifact = pack([], program, 1.0, None, captured.structure, backend, Lowerer(), Settings())
        figures["model_bytes"] = len(artifact.files[MODEL_FILE])
    rows = Rows(dict(inputs), None)
    with progress.stage("forced exits"):
        compiled = CompiledModel(artifact, backend)
        figures["difference"] = _forced_difference(compiled, program, rows)
    with progress.stage("one file"):
        figures["one_file_difference"] = _one_file_difference(artifact, program, rows)
    figures["stage"] = "done"


def _chosen(cuts: Sequence[CutPoint]) -> list[CutPoint]:
    if len(cuts) < EXITS:
        raise UnsupportedModelError(
            f"it has {len(cuts)} places where few values are live, {EXITS} exits are asked for",
            where=f"after {', '.join(cut.name for cut in cuts) or 'no module'}",
            remedy="exits need places where all that goes on is in few values: ask for fewer of them",
        )
    return choose_cuts(cuts, _PLACES if len(cuts) > EXITS else _PLACES[:EXITS])


def _with_exits(whole: Program, cuts: Sequence[CutPoint], inputs: Mapping[str, Tensor]) -> Program:
    """The program with a gate at three cuts; a fourth gets one that prune-constant-gates takes."""
    (logits,) = whole.outputs.values()
    stream = FeatureStream(FeatureStream.of(whole, [cut.value for cut in cuts]).body, _values(cuts), False)
    features = stream(inputs)
    heads = {
        (cut.name, LINEAR): untrained_head(cut, features[cut.value], int(logits.shape[1])) for cut in cuts
    }
    candidates = chain_candidates(whole, cuts, heads)
    constant = cuts[_CONSTANT] if len(cuts) > EXITS else None
    live = [cut for cut in cuts if cut is not constant]
    scores = np.stack([_confidence(heads[cut.name, LINEAR], features[cut.value]) for cut in live])
    limits, _ = thresholds(scores, [_SHARE] * EXITS)
    rules = {cut.name: _rule(cut, (1.0, 0.0, 0.0), -limit) for cut, limit in zip(live, limits, strict=True)}
    if constant is not None:
        rules[constant.name] = _rule(constant, (0.0, 0.0, 0.0), -1.0)
    changed = []

    def observe(name: str, _: Program, result: PassResult) -> None:
        if result.modified:
            changed.append(name)

    decisions = tuple(rules[cut.name] for cut in cuts)
    program = build_program(candidates, Policy(candidates.topology, decisions), observers=(observe,))
    if constant is not None:
        _check_pruned(program, live, constant, changed)
    return program


def _values(cuts: Sequence[CutPoint]) -> tuple[str, ...]:
    return tuple(cut.value for cut in cuts)


def _confidence(head: ExitHead, feature: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    confidence: Tensor = head.body(feature)[1]
    return confidence[:, 0].numpy()  # the highest probability


def _rule(cut: CutPoint, weight: Sequence[float], bias: float) -> LinearRule:
    return leave_above(LINEAR, ((cut.name, LINEAR),), weight, bias)


def _check_pruned(
    program: Program, live: Sequence[CutPoint], constant: CutPoint, changed: Sequence[str]
) -> None:
    """Check that the constant gate has gone, and its head with it."""
    gone = value_name(constant.name, LINEAR, "logits")
    left = [block.name for block in program.blocks if gone in nodes_by_name(block.body)]
    expected = (*(cut.name for cut in live), "backbone")
    passes = {"prune-constant-gates", "eliminate-dead-code", "merge-blocks"}
    if left or program.exits != expected or not passes <= set(changed):
        raise PassError(
            f"a constant gate is left: exits {program.exits}, its head in {left}, changed by {changed}",
            where=f"exit {constant.name!r}",
        )


def _forced_difference(compiled: CompiledModel, program: Program, rows: Rows) -> float:
    """The largest difference at any exit, four rows together and one alone, relative to the largest output.

    Raises:
        LoweringError: It is above ``PARITY``.
    """
    worst = 0.0
    for found in forced_differences(compiled, program, rows, count=4):
        relative = found.difference / found.largest if found.largest else found.difference
        worst = max(worst, _tolerated(relative, f"exit {found.exit!r}, batch of {found.rows}"))
    return worst


def _one_file_difference(artifact: Artifact, program: Program, rows: Rows) -> float:
    """The same for the one-file model on a batch whose rows leave at different exits, and on single rows."""
    session = onnxruntime.InferenceSession(artifact.files[MODEL_FILE], providers=["CPUExecutionProvider"])
    oracle = interpret(program, rows.inputs)
    if set(oracle.exit_index.tolist()) != set(range(len(program.exits))):
        raise LoweringError(
            f"rows leave at {sorted(set(oracle.exit_index.tolist()))} only", where="the gates"
        )
    (expected,) = (value.numpy() for value in oracle.outputs.values())
    largest, worst = float(np.abs(expected).max()), 0.0
    first = [int(np.flatnonzero(oracle.exit_index == index)[0]) for index in range(len(program.exits))]
    for batch in (list(range(len(rows))), *([row] for row in first)):
        where = f"model.onnx, batch of {len(batch)}"
        feeds = {name: values[batch].numpy() for name, values in rows.inputs.items()}
        logits, exit_index = session.run(None, feeds)
        if not np.array_equal(exit_index, oracle.exit_index[batch]):
            raise LoweringError(
                f"rows leave at {exit_index.tolist()}, not at {oracle.exit_index[batch].tolist()}",
                where=where,
            )
        worst = max(worst, _tolerated(float(np.abs(logits - expected[batch]).max()) / largest, where))
    return worst


def _tolerated(relative: float, where: str) -> float:
    if not relative <= PARITY:
        raise LoweringError(
            f"outputs differ by {relative:.2g} of the largest, {PARITY:g} is tolerated",
            where=where,
            remedy="compile with backend='torch', and report this",
        )
    return relative
