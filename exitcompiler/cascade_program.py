"""Several captured networks as one program, in which nothing is decided yet.

Every network keeps its own blocks; from the end of each block that is a site, rows may go on in the
same network, or to the first block of a later one, which takes the cascade's inputs anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Final

import networkx as nx
from torch import fx

from exitcompiler.candidates import Candidates
from exitcompiler.committee import HeadMaker
from exitcompiler.controlflow import (
    RESERVED,
    Branch,
    ConstantGate,
    Edge,
    Jump,
    Return,
    Successor,
    Terminator,
    ValueSpec,
    successors,
)
from exitcompiler.errors import InputError
from exitcompiler.fx_utils import BodyBuilder, extract_body, nodes_by_name, result_nodes
from exitcompiler.naming import (
    OWN,
    agreement_with,
    free_name,
    head_exit,
    identifier,
    together_with,
    value_name,
)
from exitcompiler.networks import Network
from exitcompiler.program import Block, ExitHead, Program
from exitcompiler.scores import HeadKey
from exitcompiler.topology import Topology
from exitcompiler.verify import verify

__all__ = ["Member", "cascade_program"]

_FEW: Final = 3
"""Up to this many earlier networks, every subset of them gets a joint answer."""


@dataclass(frozen=True)
class Member:
    """A network of a cascade, and the exits inside it.

    Args:
        network: The captured network.
        chain: The same, split at its exits; None: it has none.
        block_of: Exit name -> name of the block of ``chain`` at whose end it stands, in order; every
            block but the last ends at one.
        heads: (exit, kind) -> head.
    """

    network: Network
    chain: Program | None = None
    block_of: Mapping[str, str] = field(default_factory=dict)
    heads: Mapping[HeadKey, ExitHead] = field(default_factory=dict)

    @property
    def program(self) -> Program:
        """The network's blocks."""
        return self.network.program if self.chain is None else self.chain


def cascade_program(members: Sequence[Member], edges: AbstractSet[tuple[int, int]]) -> Candidates:
    """Put networks side by side into one program, with every way that the edges allow.

    ::

        a: (x) -> (y)             a(x) -> (a_own_logits):
        b: (x) -> (y)     =>          branch always 0:
                                          b(x)
                                          return "a/plain" (a_own_logits)
                                  b(x) -> (b_own_logits):
                                      return "b/plain" (b_own_logits)

    All values but the program's inputs get the name of their network before theirs; its logits are called
    ``<network>_own_logits``. The inputs are handed along everywhere; dead code elimination takes
    them out again where no later network needs them. Parameters are shared with the networks.

    Args:
        members: In topological order; all with the same inputs, and as many classes.
        edges: Pairs (network, later network), by position.

    Raises:
        InputError: The edges do not fit the networks, or two names are too much alike.
        UnsupportedModelError: A head cannot be exported.
    """
    topology = Topology(tuple(_sites(member) for member in members), frozenset(edges))
    naming = _Naming(members)
    first_block = [naming.block(member, member.program.entry.name) for member in members]
    inputs = members[0].network.program.inputs
    blocks: list[Block] = []
    for number, member in enumerate(members):
        onward = [Edge(first_block[later], tuple(inputs)) for a, later in sorted(edges) if a == number]
        blocks.extend(_blocks(member, onward, naming))
    outputs = members[-1].network.program.outputs
    program = Program(dict(inputs), dict(outputs), tuple(blocks))
    verify(program)
    end_heads, needs = _end_heads(members, _earlier(members, edges))
    heads = _inner_heads(members, naming) | end_heads
    heads = {key: heads[key] for key in sorted(heads, key=lambda key: topology.sites.index(key[0]))}
    _require_distinct(program, heads)
    return Candidates(program, topology, naming.block_of, heads, needs)


def _sites(member: Member) -> tuple[str, ...]:
    name = member.network.name
    return (*(f"{name}/{exit_name}" for exit_name in member.block_of), name)


def _logits(member: Member) -> str:
    end = member.program.blocks[-1].terminator
    assert isinstance(end, Return)
    return end.values[0]


class _Naming:
    """What blocks and values of the networks are called in the cascade: names that occur once.

    The network's name in front tells most of them apart; where it does not (``a`` with a value ``b_c``,
    ``a_b`` with a value ``c``) a number does.
    """

    def __init__(self, members: Sequence[Member]) -> None:
        self.inputs = members[0].network.program.inputs
        self.placeholders = nodes_by_name(members[0].program.entry.body)
        self.block_of: dict[str, str] = {}
        self._blocks: dict[tuple[str, str], str] = {}
        self._values: dict[str, dict[str, str]] = {}
        taken_blocks = {member.network.name for member in members}
        taken = {*self.inputs, *RESERVED, *(_own_logits(member) for member in members)}
        for member in members:
            name, (*inner, last) = member.network.name, member.program.blocks
            for block in inner:
                self._blocks[name, block.name] = free_name(f"{identifier(name)}_{block.name}", taken_blocks)
            self._blocks[name, last.name] = name
            for site, block_name in zip(_sites(member), (*member.block_of.values(), last.name), strict=True):
                self.block_of[site] = self._blocks[name, block_name]
            values = {value: value for value in self.inputs} | {_logits(member): _own_logits(member)}
            for block in member.program.blocks:
                for value in nodes_by_name(block.body):
                    if value not in values:
                        values[value] = free_name(f"{identifier(name)}_{value}", taken)
            self._values[name] = values

    def block(self, member: Member, block: str) -> str:
        """The name of a network's block."""
        return self._blocks[member.network.name, block]

    def values(self, member: Member) -> Mapping[str, str]:
        """A network's values: name there -> name in the cascade."""
        return self._values[member.network.name]


def _own_logits(member: Member) -> str:
    return value_name(member.network.name, OWN, "logits")


def _blocks(member: Member, onward: Sequence[Edge], naming: _Naming) -> list[Block]:
    """A network's blocks, renamed; each takes the inputs too, and may go on to other networks."""
    values = naming.values(member)
    renamed = []
    for block in member.program.blocks:
        ways: list[Successor] = [
            _extended(way, member, naming) for way in successors(block.terminator) if isinstance(way, Edge)
        ]
        end = () if ways else (Return((_own_logits(member),), head_exit(member.network.name, "plain")),)
        missing = [name for name in naming.inputs if name not in block.params]
        renamed.append(
            Block(
                naming.block(member, block.name),
                _renamed(block.params, values) | {name: naming.inputs[name] for name in missing},
                _renamed(block.results, values),
                _terminator((*ways, *onward, *end)),
                _renamed_body(block.body, values, {name: naming.placeholders[name] for name in missing}),
            )
        )
    return renamed


def _renamed(specs: Mapping[str, ValueSpec], names: Mapping[str, str]) -> dict[str, ValueSpec]:
    return {names[name]: spec for name, spec in specs.items()}


def _extended(way: Edge, member: Member, naming: _Naming) -> Edge:
    target = member.program.block(way.target)
    values = tuple(naming.values(member)[value] for value in way.values)
    missing = tuple(name for name in naming.inputs if name not in target.params)
    return Edge(naming.block(member, way.target), (*values, *missing))


def _terminator(ways: tuple[Successor, ...]) -> Terminator:
    (first, *others) = ways
    if others:
        return Branch(ConstantGate(0, len(ways)), ways)
    return first if isinstance(first, Return) else Jump(first)


def _renamed_body(
    body: fx.GraphModule, names: Mapping[str, str], more: Mapping[str, fx.Node]
) -> fx.GraphModule:
    """The body with other names, and with further params that it does not use."""
    builder = BodyBuilder()
    nodes = nodes_by_name(body).values()
    copies = {n: builder.placeholder(names[n.name], n) for n in nodes if n.op == "placeholder"}
    for name, like in more.items():
        builder.placeholder(name, like)
    for node in nodes:
        if node not in copies:
            copies[node] = builder.copy(node, copies, body, name=names[node.name])
    return builder.finish([copies[node] for node in result_nodes(body)])


def _earlier(members: Sequence[Member], edges: AbstractSet[tuple[int, int]]) -> dict[str, tuple[str, ...]]:
    """Network -> the networks that rows may have met before it."""
    graph: nx.DiGraph[int] = nx.DiGraph(list(edges))
    graph.add_nodes_from(range(len(members)))
    names = [member.network.name for member in members]
    return {
        name: tuple(names[before] for before in sorted(nx.ancestors(graph, number)))
        for number, name in enumerate(names)
    }


def _inner_heads(members: Sequence[Member], naming: _Naming) -> dict[HeadKey, ExitHead]:
    heads: dict[HeadKey, ExitHead] = {}
    for member in members:
        for (exit_name, kind), head in member.heads.items():
            site = f"{member.network.name}/{exit_name}"
            heads[site, kind] = _renamed_head(head, exit_name, site, kind, naming.values(member))
    return heads


def _end_heads(
    members: Sequence[Member], earlier: Mapping[str, Sequence[str]]
) -> tuple[dict[HeadKey, ExitHead], dict[HeadKey, tuple[str, ...]]]:
    """The heads at the ends of networks, and which networks have to have answered before each."""
    make = HeadMaker(int(next(iter(members[0].network.program.outputs.values())).shape[1]))
    heads: dict[HeadKey, ExitHead] = {}
    needs: dict[HeadKey, tuple[str, ...]] = {}
    for name, before in earlier.items():
        heads[name, OWN] = make.own(name)
        for others in _committees(before):
            key = name, together_with(others)
            heads[key], needs[key] = make.joint(name, others), others
        for other in before:
            key = name, agreement_with(other)
            heads[key], needs[key] = make.agreement(name, other), (other,)
    return heads, needs


def _committees(earlier: Sequence[str]) -> list[tuple[str, ...]]:
    """With whom a network answers: every set of earlier ones where they are few, else each, and all."""
    sizes: Iterable[int] = range(1, len(earlier) + 1) if len(earlier) <= _FEW else (1, len(earlier))
    return [others for size in sizes for others in combinations(earlier, size)]


def _renamed_head(
    head: ExitHead, exit_name: str, site: str, kind: str, values: Mapping[str, str]
) -> ExitHead:
    """The head of an exit inside a network, as one of the cascade's."""
    made = {
        value_name(exit_name, kind, what): value_name(site, kind, what) for what in ("logits", "confidence")
    }
    reads = [node.name for node in head.body.graph.nodes if node.op == "placeholder"]
    rename = {name: values[name] for name in reads} | made
    return replace(
        head,
        exit=head_exit(site, kind),
        body=extract_body(head.body, reads, list(head.results), rename=rename),
        results={rename[name]: spec for name, spec in head.results.items()},
        answer=tuple(rename[name] for name in head.answer),
    )


def _require_distinct(program: Program, heads: Mapping[HeadKey, ExitHead]) -> None:
    seen = {value: f"block {block.name!r}" for block in program.blocks for value in block.values}
    for (site, kind), head in heads.items():
        for value in head.results:
            if value in seen:
                raise InputError(
                    f"{seen[value]} and head {kind!r} would both make a value {value!r}",
                    where=f"site {site!r}",
                    remedy="give the networks names that differ in more than punctuation: names=[...]",
                )
            seen[value] = f"head {kind!r} of site {site!r}"
