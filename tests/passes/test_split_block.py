"""Splitting: a chain of well-formed blocks that gives the same bits as the whole."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from models import ZOO, captured
from torch import Tensor

from exitcompiler.cut_points import CutPoint, find_candidates
from exitcompiler.errors import PassError
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.passes.split_block import split_block
from exitcompiler.printer import print_program
from exitcompiler.program import Jump, Program, Return
from exitcompiler.verify import verify


def _run_chain(program: Program, inputs: Mapping[str, Tensor]) -> Tensor:
    """All rows of a batch through all blocks, tensors handed over as they are."""
    values: dict[str, Tensor] = dict(inputs)
    with torch.no_grad():
        for block in program.blocks:
            known = {**values, **block.run(values)}
            if isinstance(block.terminator, Return):
                return known[block.terminator.values[0]]
            assert isinstance(block.terminator, Jump)
            edge = block.terminator.edge
            names = program.block(edge.target).params
            values = {param: known[value] for param, value in zip(names, edge.values, strict=True)}
    raise AssertionError("the chain does not return")


def _every_cut(program: Program) -> list[CutPoint]:
    return [
        CutPoint(f"cut.{i}", candidate.node.name, candidate.live, candidate.spec, 0.0)
        for i, candidate in enumerate(find_candidates(program.entry.body))
    ]


@pytest.mark.parametrize("name", ZOO)
def test_the_chain_gives_the_same_bits(name: str) -> None:
    program = captured(name).program
    for cuts in (find_cut_points(program), _every_cut(program)):
        chain = split_block(program, cuts)
        verify(chain)
        assert len(chain.blocks) == len(cuts) + 1
        assert (chain.inputs, chain.outputs) == (program.inputs, program.outputs)
        for rows in (1, 2, 5):
            inputs = ZOO[name].inputs(rows, rows)
            assert torch.equal(_run_chain(chain, inputs), _run_chain(program, inputs))


@pytest.mark.parametrize("name", ["resnet", "bert"])
def test_each_cut_alone_gives_the_same_bits(name: str) -> None:
    program = captured(name).program
    inputs = ZOO[name].inputs(3, 1)
    expected = _run_chain(program, inputs)
    for cut in _every_cut(program):
        chain = split_block(program, [cut])
        verify(chain)
        assert torch.equal(_run_chain(chain, inputs), expected)


def test_the_chain_reads_like_this() -> None:
    program = captured("bert").program
    cuts = find_cut_points(program)
    chain = split_block(program, [cuts[3], cuts[1]])  # in any order
    assert [block.name for block in chain.blocks] == ["to_layers_0", "to_layers_2", "to_backbone"]
    assert [list(block.params) for block in chain.blocks] == [
        ["input_ids", "attention_mask"],
        ["layer_norm_2", "attention_mask"],
        ["layer_norm_6", "attention_mask"],
    ]
    assert [list(block.results) for block in chain.blocks] == [
        ["layer_norm_2"],
        ["layer_norm_6"],
        ["linear_17"],
    ]
    assert "jump to_layers_2(layer_norm_2, attention_mask)" in print_program(chain)
    assert chain.exits == ("backbone",)


def test_parameters_are_shared_and_each_is_in_one_block() -> None:
    program = captured("resnet").program
    chain = split_block(program, find_cut_points(program))
    whole = {tensor.data_ptr() for tensor in program.entry.body.state_dict().values()}
    parts = [tensor.data_ptr() for block in chain.blocks for tensor in block.body.state_dict().values()]
    assert set(parts) == whole
    assert len(parts) == len(set(parts))


def test_shapes_and_module_paths_stay_on_the_nodes() -> None:
    program = captured("vit").program
    for block in split_block(program, find_cut_points(program)).blocks:
        calls = [node for node in block.body.graph.nodes if node.op == "call_function"]
        assert all("val" in node.meta for node in block.body.graph.nodes if node.op != "output")
        assert any("nn_module_stack" in node.meta for node in calls)


def test_an_input_that_only_a_later_block_needs_is_passed_along() -> None:
    program = captured("bert").program
    first, second = find_cut_points(program)[1:3]
    # As if the first cut had been found for another main input: the mask is not in its live values.
    chain = split_block(program, [replace(first, live=(first.value,)), second])
    assert list(chain.blocks[1].params) == ["layer_norm_2", "attention_mask"]
    verify(chain)


def test_no_cuts_leave_the_program_as_it_is() -> None:
    program = captured("mlp").program
    assert split_block(program, []) is program


def test_same_names_are_made_unique() -> None:
    program = captured("mlp").program
    cuts = [replace(cut, name="a.b" if i else "a_b") for i, cut in enumerate(find_cut_points(program))]
    names = [block.name for block in split_block(program, cuts).blocks]
    assert names == ["to_a_b", "to_a_b_2", "to_a_b_3", "to_backbone"]


def test_bad_cuts_are_refused() -> None:
    program = captured("mlp").program
    cut = find_cut_points(program)[0]
    with pytest.raises(PassError, match=r"cut '1': the program has no values \['nothing'\]"):
        split_block(program, [replace(cut, value="nothing", live=("nothing",))])
    with pytest.raises(PassError, match="two cuts go through the same value"):
        split_block(program, [cut, cut])
    with pytest.raises(PassError, match="one block"):
        split_block(split_block(program, [cut]), [cut])
