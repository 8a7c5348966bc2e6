"""Search over what every site does: deepest first, on the rows that arrive, from several starts."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import networkx as nx
import numpy as np

from exitcompiler.costs import runs_at
from exitcompiler.gate_search import Action, Choice, Choices, Float64Array, Plane, Problem, best_cuts, cut
from exitcompiler.naming import OWN
from exitcompiler.scores import FEATURES, BoolArray, HeadKey
from exitcompiler.topology import passed_before

__all__ = ["frugal", "known_heads", "known_sites", "search"]

SETTLED: Final = 4
"""From how many of the best starts sweeps go on until the objective no longer falls."""

NEXT_TO_NOTHING: Final = 0.002
"""A site of a cascade whose absence raises the objective by less than this share of the reference's time is
left out."""

MOST_NETWORKS: Final = 5
"""Of more networks than this not every subset is a start."""


def known_sites(problem: Problem, choices: Choices) -> list[frozenset[int]]:
    """Per place, the sites that have decided something on every way there.

    Where no way leads, those that would have if the ways that could be there were.
    """
    topology = problem.table.topology
    steps = problem.steps(choices)
    passed = passed_before([step.targets for step in steps])
    known: list[frozenset[int]] = []
    for place, before in enumerate(passed):
        if before is not None:
            known.append(frozenset(site for site in before if steps[site].gated))
            continue
        follows = topology.follows[place]
        from_there = [follows] if follows is not None else [
            site for site in range(place)
            if passed[site] is not None and steps[site].gated and place in topology.ways[site]
        ]  # fmt: skip
        ways = [known[site] | ({site} if steps[site].gated else frozenset()) for site in from_there]
        known.append(frozenset.intersection(*ways) if ways else frozenset())
    return known


def known_heads(problem: Problem, choices: Choices, known: Collection[int]) -> tuple[HeadKey, ...]:
    """The heads whose confidences can be read where these sites have been passed."""
    table = problem.table
    found: list[HeadKey] = []
    for place in sorted(known):
        site = table.topology.sites[place]
        own = [(site, OWN)] if (site, OWN) in table.heads else []
        found += dict.fromkeys([*own, *(k for k in choices[place].step(site).heads if k in table.heads)])
    return tuple(found)


@dataclass
class _Later:
    """What is known of the places behind a site, while a sweep goes from the end to the start.

    Args:
        value_us: Per place, time and penalty still to come, ``float64[n]``.
        running: Per place, whether a row that passes has its network run.
        demanded: Per place, the sites that must have been passed before a row may come there.
        read: Per place, the heads of earlier sites that are read there or further on.
    """

    value_us: list[Float64Array]
    running: list[bool]
    demanded: list[frozenset[int]]
    read: list[frozenset[HeadKey]]

    @classmethod
    def behind_all(cls, problem: Problem) -> _Later:
        """Before any site has been looked at."""
        topology = problem.table.topology
        count = len(topology.places)
        tail_us = np.full(problem.table.rows, problem.costs.segment_us[-1])
        return cls([tail_us] * count, [True] * count, [frozenset()] * count, [frozenset()] * count)

    def add(self, problem: Problem, place: int, choice: Choice) -> None:
        """Take in a site, all later ones being there already."""
        table = problem.table
        sites = table.topology.sites
        step = choice.step(sites[place])
        self.running[place] = runs_at(table.topology, place, step, self.running)
        self.value_us[place] = problem.value_us(place, choice, self.value_us, self.running[place])
        foreign = frozenset(key for key in choice.reads if key[0] != sites[place])
        needed = {site for key in step.heads for site in table.needs(key)} | {site for site, _ in foreign}
        behind = frozenset[int]().union(*(self.demanded[target] for target in choice.targets))
        here = {place} if step.gated else frozenset()
        self.demanded[place] = frozenset(map(sites.index, needed)) | (behind - here)
        self.read[place] = foreign.union(*(self.read[target] for target in choice.targets))


@dataclass(frozen=True)
class _Site:
    """A site to choose at: who comes, what has been passed, what is behind it."""

    problem: Problem
    place: int
    arrives: BoolArray
    known: frozenset[int]
    heads: frozenset[HeadKey]
    later: _Later
    may_decide: bool

    @property
    def name(self) -> str:
        return self.problem.table.topology.sites[self.place]

    def available(self, key: HeadKey) -> bool:
        """Whether a head's scores, or an agreement, can be had here."""
        if key[0] != self.name:
            return key in self.heads
        sites = self.problem.table.topology.sites
        return all(sites.index(site) in self.known for site in self.problem.table.needs(key))

    def choose(self) -> Choice | None:
        """The best that there is; None where every possibility takes away what a later site reads."""
        return min(self._options(), key=lambda option: option[0], default=(0.0, None))[1]

    def _options(self) -> Iterator[tuple[float, Choice | None]]:
        """Possibilities with their cost on the rows that come; of equal ones the first counts."""
        ways = self.problem.table.topology.ways[self.place]
        for way in ways:
            if self.later.demanded[way] <= self.known:
                yield self._constant(way)
        if not (self.may_decide or not ways):
            return
        kinds = [kind for kind in self.problem.table.kinds(self.name) if self.available((self.name, kind))]
        for kind in kinds:
            yield self._constant(kind)
            if not ways:
                continue
            for direction in self.problem.directions[self.name, kind]:
                if all(map(self.available, direction.reads)):
                    onward = [way for way in ways if self._may_go(way, (kind, *direction.reads))]
                    actions: list[Action] = [kind, *onward]
                    costs = [self._action_us(action) for action in actions]
                    total, thresholds = best_cuts(direction, costs, self.arrives)
                    yield self._rule(total, cut(direction, actions, thresholds))
        for plane in self.problem.planes.get(self.name, ()):
            if all(map(self.available, plane.reads)) and all(self._may_take(plane, a) for a in plane.actions):
                action_us = np.stack([self._action_us(action) for action in plane.actions], axis=1)
                yield self._rule(*plane.shifted(action_us, self.arrives))

    def _may_take(self, plane: Plane, action: Action) -> bool:
        if isinstance(action, str):
            return self.available((self.name, action))
        answers = [other for other in plane.actions if isinstance(other, str)]
        return self._may_go(action, (*answers, *plane.reads))

    def _may_go(self, way: int, computed: Sequence[str | HeadKey]) -> bool:
        """Whether a rule that computes these heads may send rows to a place."""
        here = {(self.name, key) if isinstance(key, str) else key for key in computed} | {(self.name, OWN)}
        read = {key for key in self.later.read[way] if key[0] == self.name}
        return self.later.demanded[way] <= self.known | {self.place} and read <= here

    def _action_us(self, action: Action) -> Float64Array:
        return self.problem.action_us(self.place, action, self.later.value_us)

    def _constant(self, action: Action) -> tuple[float, Choice]:
        choice = Choice((action,))
        topology = self.problem.table.topology
        running = runs_at(topology, self.place, choice.step(self.name), self.later.running)
        return float(self._action_us(action)[self.arrives].sum()) + self._paid_us(choice, running), choice

    def _rule(self, total: float, choice: Choice | None) -> tuple[float, Choice | None]:
        return (np.inf, None) if choice is None else (total + self._paid_us(choice, True), choice)

    def _paid_us(self, choice: Choice, running: bool) -> float:
        per_row = self.problem.costs.step_us(self.place, choice.step(self.name)) if running else 0.0
        return per_row * int(self.arrives.sum())


def _sweep(problem: Problem, choices: Choices, allowed: Sequence[bool]) -> Choices:
    """Choose anew at every site, deepest first; each on the rows that arrive there.

    From no decision at all, where every row may come everywhere, this is the bottom-up pass of
    Bolukbasi et al. 2017, section 3 (and section 4 where sites have several ways on).

    Args:
        problem: What to minimise.
        choices: Where to start; earlier ones decide who arrives.
        allowed: Per site whether something may be decided there.
    """
    arrives = problem.arrivals(choices)
    known = known_sites(problem, choices)
    later = _Later.behind_all(problem)
    current = list(choices)
    for place in reversed(range(len(choices))):
        heads = frozenset(known_heads(problem, choices, known[place]))
        rows = arrives[place] if arrives[place].any() else ~arrives[place]
        site = _Site(problem, place, rows, known[place], heads, later, allowed[place])
        current[place] = site.choose() or current[place]
        later.add(problem, place, current[place])
    return tuple(current)


def _settle(
    problem: Problem, choices: Choices, allowed: Sequence[bool], sweeps: int = 6
) -> tuple[float, Choices]:
    """Sweep until the objective no longer falls; the result is never worse than the start."""
    best = problem.objective_us(choices)
    for _ in range(sweeps):
        trial = _sweep(problem, choices, allowed)
        value = problem.objective_us(trial)
        if value >= best - 1e-9 * abs(best):
            break
        best, choices = value, trial
    return best, choices


def search(
    problem: Problem, starts: Sequence[Choices], allowed: Sequence[bool], *, explore: bool = True
) -> tuple[float, Choices]:
    """The best choices found from several starts, by sweeps and by taking single sites out.

    A sweep moves one site at a time and so cannot see that two of them only pay without each other;
    taking one out and settling the rest can.

    Args:
        problem: What to minimise.
        starts: To start from as well.
        allowed: Per site whether something may be decided there.
        explore: Start from every sub-topology of a cascade too, which takes most of the time.

    Returns:
        The objective in microseconds, and the choices; never worse than any start, than the best
        single exit, or than the backbone alone.
    """
    nothing = problem.nothing
    begun = [_sweep(problem, nothing, allowed), *starts]
    if explore or len(problem.table.topology.networks) == 1:
        begun += _first_steps(problem, allowed)
    begun = sorted((c for c in begun if _consistent(problem, c)), key=problem.objective_us)
    # One sweep says little about what a start comes to: of every first network the best goes on too.
    firsts = {_first(problem, start): start for start in reversed(begun)}
    settled = [*begun[:SETTLED], *(s for s in firsts.values() if not any(s is b for b in begun[:SETTLED]))]
    best, choices = min((_settle(problem, start, allowed) for start in settled), key=lambda pair: pair[0])
    while (found := next(_fewer(problem, choices, allowed, best - 1e-9 * abs(best)), None)) is not None:
        best, choices = _settle(problem, found[1], allowed)
    plain = problem.objective_us(nothing)
    return (best, choices) if best < plain else (plain, nothing)


def _fewer(
    problem: Problem, choices: Choices, allowed: Sequence[bool], below: float
) -> Iterator[tuple[float, Choices, tuple[bool, ...]]]:
    """Choices with a site less, their objective if below a bound, and where something may be decided then."""
    # Where many networks are to be tried without, one sweep each has to do.
    sweeps = 3 if len(problem.table.topology.networks) == 1 else 1
    for place, choice in enumerate(choices):
        if not choice.reads and (choice.targets or not problem.table.topology.ways[place]):
            continue
        without = tuple(index != place and ok for index, ok in enumerate(allowed))
        start = _without(problem, choices, place)
        if _consistent(problem, start):
            value, trial = _settle(problem, start, without, sweeps)
            if value < below:
                yield value, trial, without


def frugal(problem: Problem, choices: Choices, allowed: Sequence[bool]) -> Choices:
    """Do without sites that bring next to nothing: a network has to be kept in memory for them.

    Args:
        problem: What to minimise; at most ``NEXT_TO_NOTHING`` is given up, all in all.
        choices: Found by ``search``.
        allowed: Per site whether something may be decided there.
    """
    bound = problem.objective_us(choices) + NEXT_TO_NOTHING * problem.costs.whole_us
    while True:
        fewer = min(_fewer(problem, choices, allowed, bound), key=lambda found: found[0], default=None)
        if fewer is None:
            return choices
        _, choices, allowed = fewer


def _first(problem: Problem, choices: Choices) -> int:
    """The network that every row runs first."""
    running = problem.running(choices)
    place = 0
    while not running[place]:
        (place,) = choices[place].targets
    return problem.table.topology.network_of[place]


def _first_steps(problem: Problem, allowed: Sequence[bool]) -> Iterator[Choices]:
    """Starts that one sweep makes: the best single site; and every sub-topology of a cascade."""
    count = len(problem.table.topology.networks)
    if count == 1:
        alone = [tuple(i == index and ok for i, ok in enumerate(allowed)) for index in range(len(allowed))]
        singles = [_sweep(problem, problem.nothing, only) for only in alone]
        yield min(singles, key=problem.objective_us, default=problem.nothing)
        return
    sizes = range(1, count + 1) if count <= MOST_NETWORKS else (1, 2, count)
    for size in sizes:
        for networks in itertools.combinations(range(count), size):
            start = _through(problem, networks)
            if start is not None:
                yield _sweep(problem, start, allowed)


def _through(problem: Problem, networks: Sequence[int]) -> Choices | None:
    """Choices where every row passes these networks, in order, and the last one answers.

    Networks on the way that are not named are skipped. All that ran can be read by what comes after,
    so that a sweep from here sees what deciding after several networks would bring.
    """
    topology = problem.table.topology
    graph = topology.network_graph()
    way = [0]
    for network in networks:
        if not nx.has_path(graph, way[-1], network):
            return None
        way += nx.shortest_path(graph, way[-1], network)[1:]
    choices = list(problem.nothing)
    for number, following in itertools.pairwise(way):
        end, start = _end(problem, number), topology.network_of.index(following)
        passing = Choice((start,))
        if number in networks:
            reads = ((topology.sites[end], OWN),)
            rows = np.ones(problem.table.rows, np.int64)
            passing = Choice((OWN, start), reads, np.zeros((2, FEATURES)), np.array([-1.0, 0.0]), rows)
        for place in range(topology.network_of.index(number), end):
            choices[place] = Choice((place + 1,))
        choices[end] = passing
        if number not in networks:  # skipped at its first site
            choices[topology.network_of.index(number)] = Choice((start,))
    for place in range(topology.network_of.index(way[-1]), _end(problem, way[-1])):
        choices[place] = Choice((place + 1,))
    choices[_end(problem, way[-1])] = Choice((OWN,))
    return tuple(choices)


def _end(problem: Problem, network: int) -> int:
    """The last site of a network."""
    numbers = problem.table.topology.network_of
    return len(numbers) - 1 - numbers[::-1].index(network)


def _consistent(problem: Problem, choices: Choices) -> bool:
    """Whether everything that is read has been computed on every way."""
    known = known_sites(problem, choices)
    passed = passed_before([step.targets for step in problem.steps(choices)])
    for place, choice in enumerate(choices):
        if passed[place] is None:
            continue
        heads = frozenset(known_heads(problem, choices, known[place]))
        site = _Site(problem, place, np.ones(0, np.bool_), known[place], heads, _NOTHING_LATER, True)
        step = choice.step(site.name)
        if not all(map(site.available, (*choice.reads, *step.heads))):
            return False
    return True


_NOTHING_LATER: Final = _Later([], [], [], [])


def _without(problem: Problem, choices: Choices, place: int) -> Choices:
    """Decide nothing at a site, nor at those that read what it computes."""
    table = problem.table
    site = table.topology.sites[place]
    left = list(choices)
    rows = [np.sum(choices[place].takes(target)) for target in choices[place].targets]
    onward = choices[place].targets[int(np.argmax(rows))] if rows else problem.nothing[place].actions[0]
    left[place] = Choice((onward,))
    for later in range(place + 1, len(left)):
        step = left[later].step(table.topology.sites[later])
        needed = {need for key in step.heads for need in table.needs(key)}
        if site in needed or any(key[0] == site for key in left[later].reads):
            left = list(_without(problem, tuple(left), later))
    return tuple(left)
