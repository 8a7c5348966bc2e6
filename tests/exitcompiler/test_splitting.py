"""A program cut in two: both parts together against the whole, at every edge, in batches and row by row."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_programs import (
    CLASSES,
    WIDTH,
    Builder,
    TestProgram,
    artifact_of,
    cascade,
    chain,
    diamond,
    plain,
    random_program,
    random_rows,
)

from exitcompiler.artifact import save_artifact
from exitcompiler.controlflow import Branch, ControlFlow, Edge, OutputStructure, Return, ValueSpec
from exitcompiler.errors import ArtifactError, InputError
from exitcompiler.runtime.artifact_files import read_artifact
from exitcompiler.runtime.backends import available_backends
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.hand_over import HandOver, hand_over_of
from exitcompiler.runtime.loading import load, open_artifact
from exitcompiler.runtime.rows import BatchExecutor
from exitcompiler.runtime.single_row import SingleRowExecutor
from exitcompiler.splitting import Split, edges_of, split, split_artifact


def jump_edges(seed: int = 0) -> TestProgram:
    """Three networks; rows get to the large one from the small and from the medium one."""
    make = Builder(seed)
    ways = (Return(("out",), "small"), Edge("medium", ("x", "conf")), Edge("large", ("x", "conf")))
    make.block("small", {"x": WIDTH}, {"out": CLASSES, "conf": 3}, Branch(make.gate(["conf"], 3, 3), ways))
    ways = (Return(("out",), "medium"), Edge("large", ("x2", "c")))
    gate = make.gate(["conf", "c"], 4, 2)
    make.block("medium", {"x2": WIDTH, "c": 3}, {"out": CLASSES, "conf": 1}, Branch(gate, ways))
    make.block("large", {"x3": WIDTH, "c2": 3}, {"out": CLASSES}, Return(("out",), "large"))
    return make.program()


def together(parts: Split, rows: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """What a caller does with the two parts."""
    result = parts.near.run(rows)
    outputs, exits = result.outputs.copy(), [parts.near.exits[i] for i in result.exit_index]
    handed_over = result.handed_over
    if len(handed_over.rows):
        answered = parts.far.run(handed_over.values)
        outputs[handed_over.rows] = answered.outputs
        for row, index in zip(handed_over.rows, answered.exit_index, strict=True):
            exits[row] = parts.far.exits[index]
    return outputs, exits


def cuts(flow: ControlFlow) -> list[str]:
    edges = [edge for edge in edges_of(flow) if edge.obstacle is None]
    blocked = {edge.target for edge in edges_of(flow) if edge.obstacle is not None}
    return [*(e.name for e in edges), *dict.fromkeys(e.target for e in edges if e.target not in blocked)]


@pytest.mark.parametrize("make", [chain, cascade, jump_edges])
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_both_parts_give_the_answers_of_the_whole(make: type, backend: str) -> None:
    pytest.importorskip(backend)
    whole = open_artifact(artifact_of(make(3)), backend)
    rows = random_rows(60)
    expected = whole.run(rows)
    exits = [whole.exits[i] for i in expected.exit_index]
    names = cuts(whole.operating_point.control_flow)
    assert names
    for name in names:
        parts = split(whole, name)
        outputs, taken = together(parts, rows)
        np.testing.assert_array_equal(outputs, expected.outputs)
        assert taken == exits
        singly = [together(parts, row[None]) for row in rows[:20]]
        np.testing.assert_array_equal(np.concatenate([out for out, _ in singly]), expected.outputs[:20])
        assert [exit for _, (exit,) in singly] == exits[:20]


@given(seed=st.integers(0, 10_000), data=st.data())
def test_any_program_cut_at_any_edge(seed: int, data: st.DataObject) -> None:
    program = random_program(seed)
    names = cuts(program.flow)
    if not names:
        return
    parts = split_artifact(artifact_of(program), data.draw(st.sampled_from(names)))
    near, far = (part.manifest.operating_points[0].control_flow for part in (parts.near, parts.far))
    rows = random_rows(20, seed)
    values, exit_index = BatchExecutor(near, program.engine).run([rows], len(rows))
    single = SingleRowExecutor(near, program.engine)
    for row, index in enumerate(exit_index):
        outputs, exit_name = [value[row] for value in values], near.exits[index]
        way = near.returns[exit_name]
        single.inputs[0][...] = rows[row]
        alone, place = single.run()
        assert place == index
        for value, other in zip(alone, outputs if way.carries else outputs[:1], strict=True):
            np.testing.assert_array_equal(value[0], other)
        answer, expected_exit = program.answer_row(rows[row])
        if way.carries:
            inputs = [value[None] for value in outputs[1:]]
            (found,), (place,) = BatchExecutor(far, program.engine).run(inputs, 1)
            found, exit_name = found[0], far.exits[place]
        else:
            found = outputs[0]
        np.testing.assert_array_equal(found, answer)
        assert exit_name == expected_exit


def test_what_is_handed_over() -> None:
    whole = open_artifact(artifact_of(jump_edges(3)))
    parts = split(whole, ("small", "large"))
    rows = random_rows(40)
    result = parts.near.run(rows)
    assert whole.run(rows).handed_over is None
    handing = parts.near.exits.index("small:large")
    np.testing.assert_array_equal(result.handed_over.rows, np.flatnonzero(result.exit_index == handing))
    assert 0 < len(result.handed_over.rows) < 40
    np.testing.assert_array_equal(result.handed_over.values["x3"], rows[result.handed_over.rows])
    small = whole.forced("small")(rows)  # until the far part answers, the small network's answer holds
    np.testing.assert_array_equal(result.outputs[result.handed_over.rows], small[result.handed_over.rows])
    row = int(np.flatnonzero(result.exit_index != handing)[0])
    none = parts.near.run(rows[row : row + 1]).handed_over
    assert {name: value.shape for name, value in none.values.items()} == {"x3": (0, WIDTH), "c2": (0, 3)}
    assert parts.hand_over.values == {
        "x3": ValueSpec(("batch", WIDTH), "float32"), "c2": ValueSpec(("batch", 3), "float32")
    }  # fmt: skip
    assert parts.hand_over.bytes_per_row == 4 * (WIDTH + 3)


def test_tensors_are_handed_over_as_tensors() -> None:
    torch = pytest.importorskip("torch")
    handed_over = (
        split(open_artifact(artifact_of(jump_edges(3))), "large")
        .near.run(torch.from_numpy(random_rows(9)))
        .handed_over
    )
    assert all(isinstance(v, torch.Tensor) for v in (handed_over.rows, *handed_over.values.values()))


def test_a_target_alone_stands_for_all_edges_that_lead_there() -> None:
    artifact = artifact_of(jump_edges(3))
    every, one = split_artifact(artifact, "large"), split_artifact(artifact, "small:large")
    near = every.near.manifest.operating_points[0].control_flow
    assert [block.name for block in near.blocks] == ["small", "medium"]
    assert near.exits == ("small", "small:large", "medium", "medium:large")
    assert (every.shared, one.shared) == ((), ("large",))
    assert len(every.near.files) == 2
    assert len(one.near.files) == 3


def test_two_edges_to_the_same_block() -> None:
    make = Builder(1)
    ways = (Return(("a",), "e"), Edge("second", ("a",)), Edge("second", ("b",)))
    make.block(
        "first", {"x": WIDTH}, {"a": CLASSES, "b": CLASSES, "c": 3}, Branch(make.gate(["c"], 3, 3), ways)
    )
    make.block("second", {"p": CLASSES}, {"out": CLASSES}, Return(("out",), "end"))
    whole = open_artifact(artifact_of(make.program()))
    parts, rows = split(whole, "first:second"), random_rows(60)
    assert parts.near.exits == ("e", "first:second", "first:second'")
    assert set(parts.near.run(rows).exit_index) == {0, 1, 2}
    np.testing.assert_array_equal(together(parts, rows)[0], whole(rows))


def test_estimates_as_far_as_they_are_known() -> None:
    artifact = artifact_of(chain(3))
    parts = split_artifact(artifact, "second:third")
    (near,), (far,) = (part.manifest.operating_points for part in (parts.near, parts.far))
    third = pytest.approx(1 / 3)
    assert near.estimate.exit_rates == {"exit1": third, "exit2": third, "second:third": third}
    assert (far.estimate.exit_rates, parts.share) == ({"backbone": third}, third)
    assert near.estimate.accuracy == artifact.manifest.operating_points[0].estimate.accuracy
    parts = split_artifact(artifact_of(jump_edges()), "small:large")  # "large" is reached in both parts
    assert parts.near.manifest.operating_points[0].estimate.exit_rates == {"small": third, "medium": third}
    assert parts.share is None


@pytest.mark.parametrize(
    ("make", "edge", "message"),
    [
        (
            cascade,
            "",
            r"has no edge ''\n.*small:medium \(16 bytes per row\), small:big_stem \(16 .*medium:big",
        ),
        (cascade, "small:nowhere", "has no edge 'small:nowhere'"),
        (cascade, "small", "has no edge 'small'"),
        (
            cascade,
            ("big_stem", "big"),
            "big_stem:big: no answer to fall back on\n.*can be cut at small:medium",
        ),
        (diamond, "stem:layer", "no answer to fall back on\n.*no edge that it can be cut at"),
        (plain, "", "has no edge"),
    ],
)
def test_where_a_program_cannot_be_cut(make: type, edge: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        split_artifact(artifact_of(make()), edge)


def test_a_text_that_may_mean_several_edges() -> None:
    def fork(*names: str) -> TestProgram:
        """From every block rows may go to each later one."""
        make = Builder(1)
        for index, name in enumerate(names):
            leave, onward = Return(("out",), f"exit{index}"), [Edge(n, ("x",)) for n in names[index + 1 :]]
            gate = make.gate(["c"], 3, 1 + len(onward))
            last = Branch(gate, (leave, *onward)) if onward else leave
            make.block(name, {"x": WIDTH}, {"out": CLASSES, "c": 3}, last)
        return make.program()

    artifact = artifact_of(fork("a", "a:b", "b:c", "c"))
    with pytest.raises(InputError, match=r"'a:b:c' may mean \('a', 'b:c'\) or \('a:b', 'c'\)\n.*as a pair"):
        split_artifact(artifact, "a:b:c")
    assert split_artifact(artifact, ("a:b", "c")).near.manifest.part.edges == (("a:b", "c"),)
    artifact = artifact_of(fork("a", "b", "a:b"))
    with pytest.raises(InputError, match=r"'a:b' may mean \('a', 'b'\) or all edges to 'a:b'"):
        split_artifact(artifact, "a:b")
    assert split_artifact(artifact, ("a", "b")).near.manifest.part.edges == (("a", "b"),)
    with pytest.raises(InputError, match="has no edge 'a:b:c'"):
        split_artifact(artifact, ("a", "b", "c"))


def test_values_that_belong_to_no_row_are_not_handed_over() -> None:
    program = chain()
    first, second, third = program.flow.blocks
    shared = ValueSpec((2,), "float32")
    flow = replace(
        program.flow,
        blocks=(replace(first, results={**first.results, "conf": shared}),
                replace(second, params={**second.params, "earlier": shared}), third),
    )  # fmt: skip
    assert [edge.obstacle is None for edge in edges_of(flow)] == [False, True]


def test_the_near_part_cannot_be_cut_again_but_the_far_part_can() -> None:
    parts = split(open_artifact(artifact_of(chain(3))), "second")
    with pytest.raises(InputError, match="near part of a program that was split"):
        split(parts.near, "second")
    again, rows = split(parts.far, "second:third"), random_rows(50)
    first = parts.near.run(rows)
    outputs = first.outputs
    middle = again.near.run(first.handed_over.values)
    outputs[first.handed_over.rows] = middle.outputs
    rest = again.far(middle.handed_over.values)
    outputs[first.handed_over.rows[middle.handed_over.rows]] = rest
    np.testing.assert_array_equal(outputs, open_artifact(artifact_of(chain(3)))(rows))


def test_parts_are_ordinary_artifacts_on_disk(tmp_path: Path) -> None:
    artifact = artifact_of(jump_edges(3), plain(3), structure=OutputStructure("dict", "logits"))
    save_artifact(artifact, tmp_path / "whole.exit")
    parts = split(tmp_path / "whole.exit", "large")
    for name, part in (("near", parts.near), ("far", parts.far)):
        part.save(tmp_path / f"{name}.exit")
        assert read_artifact(tmp_path / f"{name}.exit").manifest.operating_points == (part.operating_point,)
    near, far = load(tmp_path / "near.exit"), load(tmp_path / "far.exit")
    assert hand_over_of(near.manifest) == hand_over_of(far.manifest) == parts.hand_over
    assert isinstance(parts.hand_over, HandOver)
    rows = random_rows(30)
    result = near.run(rows)
    outputs = result.outputs["logits"]
    outputs[result.handed_over.rows] = far(**result.handed_over.values)
    np.testing.assert_array_equal(outputs, load(tmp_path / "whole.exit")(rows)["logits"])
    assert "Cut at     small:large, medium:large" in far.explain()
    assert b'"schema_version": 1' in (tmp_path / "whole.exit/manifest.json").read_bytes()


def test_what_a_part_has_not() -> None:
    whole = open_artifact(artifact_of(chain(3)))
    near = split(whole, "second").near
    with pytest.raises(InputError, match="no plain network"):
        _ = near.plain
    with pytest.raises(InputError, match="no report"):
        near.report("unused.html")
    with pytest.raises(InputError, match="whole program"):
        hand_over_of(whole.manifest)
    with pytest.raises(ArtifactError, match="forced to one exit"):
        split(whole.forced("exit1"), "second")
    assert near.forced("first:second").run(random_rows(2)).handed_over.rows.tolist() == [0, 1]
    assert isinstance(near, CompiledModel)


def test_splitting_needs_neither_torch_nor_onnx_nor_a_backend(tmp_path: Path) -> None:
    save_artifact(artifact_of(cascade()), tmp_path / "whole.exit")
    script = """
        import sys
        for name in ("torch", "onnx", "onnxruntime", "openvino"):
            sys.modules[name] = None
        from pathlib import Path
        from exitcompiler.inspection import export_parts
        from exitcompiler.runtime.artifact_files import read_artifact
        export_parts(read_artifact(sys.argv[1]), "medium", Path(sys.argv[2]))
    """
    arguments = [str(tmp_path / "whole.exit"), str(tmp_path / "parts")]
    subprocess.run([sys.executable, "-c", textwrap.dedent(script), *arguments], check=True, timeout=60)
    if available_backends():
        load(tmp_path / "parts" / "near.exit")(random_rows(3))
