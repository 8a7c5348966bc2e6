"""Exits in every kind of network, end to end: cut, heads, gates, engines, and the oracle's answers."""

from __future__ import annotations

import numpy as np
import pytest
from models import ZOO, captured

from exitcompiler.candidates import build_program
from exitcompiler.controlflow import OutputStructure
from exitcompiler.costs import CostModel
from exitcompiler.data import Rows, TrainingData
from exitcompiler.engines import Engines, Lowerer
from exitcompiler.evaluation import evaluate
from exitcompiler.fitting import Fitted, fit_exits
from exitcompiler.frontier import FrontierPoint
from exitcompiler.interpreter import interpret
from exitcompiler.naming import DEEP, LINEAR
from exitcompiler.packaging import pack
from exitcompiler.policies import Policy, leave_above
from exitcompiler.profile import measure_costs
from exitcompiler.progress import reporting
from exitcompiler.runtime.backends import create_backend
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.scores import ScoreTable
from exitcompiler.scoring import score_rows
from exitcompiler.selection import Built
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

ROWS = 160
KINDS = ("vit", "bert", "windows")


def _fit(name: str, engines: Engines, settings: Settings) -> tuple[Fitted, Rows]:
    """Heads on a network with random weights: what it answers is the target."""
    inputs = ZOO[name].inputs(ROWS)
    rows = Rows(inputs, None)
    with reporting(False) as reporter:
        data = TrainingData(rows, tuple(inputs))
        return fit_exits(captured(name).program, data, rows, engines, settings, reporter), rows


def _leave_half(table: ScoreTable) -> Policy:
    """At every exit half of all rows would leave; the second gate reads the first exit's scores as well."""
    decisions = []
    for number, name in enumerate(table.exits):
        kind = (LINEAR, DEEP)[number % 2]
        median = float(np.median(table.heads[name, kind].confidence[:, 0]))
        reads = ((name, kind),) if number != 1 else ((name, kind), (table.exits[0], LINEAR))
        weight = (1.0,) + (0.0,) * (3 * len(reads) - 1)
        decisions.append(leave_above(kind, reads, weight, -median))
    return Policy(table.topology, tuple(decisions))


@pytest.mark.parametrize(
    ("name", "backend"), [*((name, "onnxruntime") for name in KINDS), ("bert", "openvino")]
)
def test_rows_leave_where_the_oracle_says(name: str, backend: str) -> None:
    settings = Settings(backend=backend, threads=1, max_exits=2, recipe=HeadRecipe(epochs=2))
    engines = Engines(create_backend(backend, threads=1), Lowerer())
    fitted, rows = _fit(name, engines, settings)
    candidates = fitted.candidates
    assert candidates is not None, [place.reason for place in fitted.places]
    plain = captured(name).program
    costs: CostModel = measure_costs(candidates, [plain], engines, rows, 1)
    with reporting(False) as reporter, reporter.step("scoring") as step:
        table = score_rows(candidates, engines, rows, step)
    policy = _leave_half(table)
    program = build_program(candidates, policy)
    assert len(program.exits) == len(table.exits) + 1
    judged = evaluate(policy, table, costs)
    point = FrontierPoint(1.0, policy, judged.accuracy_drop, judged.mean_us, judged)
    built = Built(program, point, {}, {})
    structure = OutputStructure("tensor")
    artifact = pack([built], plain, 1.0, None, structure, engines.backend, engines.lowerer, settings)
    compiled = CompiledModel(artifact, engines.backend)
    some = rows.take(slice(0, 40))
    oracle = interpret(program, some.inputs)
    result = compiled.run({key: tensor.numpy() for key, tensor in some.inputs.items()})
    assert len(set(oracle.exit_index.tolist())) > 1
    same = result.exit_index == oracle.exit_index
    assert same.mean() >= 0.95  # medians are scores of real rows: one may fall to either side
    expected = next(iter(oracle.outputs.values())).numpy()
    np.testing.assert_allclose(result.outputs[same], expected[same], atol=1e-4)
    for exit_name in program.exits:
        one = compiled.forced(exit_name).run({key: value[:1].numpy() for key, value in some.inputs.items()})
        assert program.exits[int(one.exit_index[0])] == exit_name
