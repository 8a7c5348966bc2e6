"""Policies: what is done at each site, as plain data."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from exitcompiler.controlflow import ConstantGate, Gate, LinearGate
from exitcompiler.costs import Step
from exitcompiler.errors import InputError
from exitcompiler.naming import OWN
from exitcompiler.scores import FEATURES, BoolArray, HeadKey, IntArray, ScoreTable
from exitcompiler.topology import Topology, passed_before

__all__ = ["Decision", "GoOn", "Leave", "LinearRule", "Policy", "gate_of", "leave_above", "widen"]


@dataclass(frozen=True)
class GoOn:
    """Rows go on; where this is all a site does, its heads are not built.

    Args:
        target: The site that comes next, in a cascade also the first one of another network; None: the
            next place of the same network.
    """

    target: str | None = None


@dataclass(frozen=True)
class Leave:
    """Rows are answered; where this is all a site does, the program ends there.

    Args:
        head: The kind of head that answers.
    """

    head: str


@dataclass(frozen=True)
class LinearRule:
    """A row takes the action with the highest linear score; a tie goes to the first.

    Args:
        actions: What there is to choose among, one of them at most ``Leave``.
        reads: The heads whose confidences are the features: one of the site's own first, then others of
            its own, or those of earlier sites that every row has passed.
        weight: ``[actions][3 * len(reads)]``.
        bias: ``[actions]``.
    """

    actions: tuple[Leave | GoOn, ...]
    reads: tuple[HeadKey, ...]
    weight: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]

    @property
    def head(self) -> str:
        """The kind of head that answers; where none does, the one whose confidence comes first."""
        return next((action.head for action in self.actions if isinstance(action, Leave)), self.reads[0][1])

    def choose(self, table: ScoreTable) -> IntArray:
        """The action of every row, ``int64[n]``."""
        features = table.features(self.reads).astype(np.float64)
        scores = features @ np.asarray(self.weight).T + np.asarray(self.bias)
        return np.asarray(scores.argmax(axis=1), np.int64)


Decision: TypeAlias = GoOn | Leave | LinearRule


def leave_above(
    head: str, reads: tuple[HeadKey, ...], weight: Sequence[float], bias: float, onward: GoOn | None = None
) -> LinearRule:
    """The rule to leave where ``weight . features + bias >= 0``, and to go on elsewhere."""
    zeros = (0.0,) * len(weight)
    return LinearRule((Leave(head), onward or GoOn()), reads, (tuple(weight), zeros), (bias, 0.0))


def gate_of(decision: Decision, names: Mapping[HeadKey, str]) -> Gate:
    """The program's gate for a decision, over its actions in their order.

    Args:
        decision: What the site does.
        names: (site, kind) -> the name of that head's confidence features ``float32[batch, 3]``; only
            what a rule reads is looked up.

    Raises:
        InputError: The rule reads a head whose confidences have no name here.
    """
    if not isinstance(decision, LinearRule):
        return ConstantGate(action=0, actions=1)
    missing = [key for key in decision.reads if key not in names]
    if missing:
        raise InputError(f"the confidences of {missing} do not reach the site", where="gate")
    return LinearGate(tuple(names[key] for key in decision.reads), decision.weight, decision.bias)


@dataclass(frozen=True)
class Policy:
    """What to do at each site.

    Args:
        topology: The sites.
        decisions: One per site; those that no row comes to mean nothing.

    Raises:
        InputError: Rows are sent where no way leads, or a rule reads what is not there on every way.
    """

    topology: Topology
    decisions: tuple[Decision, ...]

    def __post_init__(self) -> None:
        sites = self.topology.sites
        if len(sites) != len(self.decisions):
            raise InputError(f"{len(self.decisions)} decisions for {len(sites)} sites", where="policy")
        for place, passed in enumerate(self._passed[: len(sites)]):
            decision = self.decisions[place]
            if passed is not None and isinstance(decision, LinearRule):
                _require_rule(sites[place], decision, self._computed(passed))

    @classmethod
    def plain(cls, topology: Topology) -> Policy:
        """The policy that answers every row with the backbone, or with the reference network, alone."""
        decisions: list[Decision] = [GoOn() for _ in topology.sites]
        path = topology.reference
        for place, target in itertools.pairwise(path):
            if topology.follows[target] != place:
                decisions[place] = GoOn(topology.sites[target])
        if not topology.tail:
            decisions[-1] = Leave(OWN)
        return cls(topology, tuple(decisions))

    @property
    def exits(self) -> tuple[str, ...]:
        """The sites' names."""
        return self.topology.sites

    @cached_property
    def steps(self) -> tuple[Step, ...]:
        """What happens at each place."""
        steps = tuple(self._step(place, decision) for place, decision in enumerate(self.decisions))
        return (*steps, Step()) if self.topology.tail else steps

    @cached_property
    def _passed(self) -> list[frozenset[int] | None]:
        passed = passed_before([step.targets for step in self.steps])
        for place, decision in enumerate(self.decisions):
            if passed[place] is not None and isinstance(decision, GoOn):
                self._target(place, decision)
        return passed

    def _computed(self, passed: Iterable[int]) -> set[HeadKey]:
        """The heads that have been computed where these places were passed."""
        gated = [place for place in passed if self.steps[place].gated]
        own = {(self.topology.sites[place], OWN) for place in gated}  # a network that ran has answered
        return own.union(*(self.steps[place].heads for place in gated))

    @property
    def kept(self) -> dict[str, Leave | LinearRule]:
        """The sites to build, in order: where rows come and something is decided or answered."""
        found = zip(self.topology.sites, self.decisions, self._passed, strict=False)
        return {
            site: decision
            for site, decision, passed in found
            if passed is not None and not isinstance(decision, GoOn)
        }

    @property
    def live(self) -> tuple[str, ...]:
        """The sites that rows come to, in order."""
        return tuple(s for s, before in zip(self.exits, self._passed, strict=False) if before is not None)

    @property
    def is_plain(self) -> bool:
        """Whether every row is answered by the backbone, or the reference network, alone."""
        kept = self.kept
        if self.topology.tail:
            return not kept
        return kept == {self.topology.sites[-1]: Leave(OWN)}

    def targets(self, site: str) -> tuple[int | None, ...]:
        """Per action of a site's decision the place that rows go on to; None where they leave."""
        place = self.topology.sites.index(site)
        decision = self.decisions[place]
        actions = decision.actions if isinstance(decision, LinearRule) else (decision,)
        return tuple(None if isinstance(a, Leave) else self._target(place, a) for a in actions)

    def walk(self, table: ScoreTable) -> tuple[BoolArray, IntArray]:
        """The way of every row.

        Returns:
            Which places each row passes, ``bool[n, places]``, and where it is answered, ``int64[n]``.

        Raises:
            InputError: The table has other sites.
        """
        if table.topology != self.topology:
            raise InputError(f"the table has sites {list(table.exits)}, the policy {list(self.exits)}")
        passed = np.zeros((table.rows, len(self.topology.places)), np.bool_)
        passed[:, 0] = True
        answered = np.full(table.rows, passed.shape[1] - 1, np.int64)
        for place, site in enumerate(self.topology.sites):
            before = self._passed[place]
            if before is None:
                continue
            self._require_needs(table, place, before)
            decision, here = self.decisions[place], passed[:, place]
            targets = self.targets(site)
            action = decision.choose(table) if isinstance(decision, LinearRule) else None
            for number, target in enumerate(targets):
                taken: NDArray[np.bool_] = here if action is None else here & (action == number)
                if target is None:
                    answered[taken] = place
                else:
                    passed[:, target] |= taken
        return passed, answered

    def _require_needs(self, table: ScoreTable, place: int, passed: Iterable[int]) -> None:
        ran = {self.topology.sites[before] for before in passed if self.steps[before].gated}
        missing = {site for key in self.steps[place].heads for site in table.needs(key)} - ran
        if missing:
            raise InputError(
                f"uses scores of {sorted(missing)}, which not every row has passed",
                where=f"site {self.topology.sites[place]!r}",
            )

    def _step(self, place: int, decision: Decision) -> Step:
        site = self.topology.sites[place]
        match decision:
            case GoOn(target=None) if not self._has_next(place):
                return Step()  # no row comes here, or it is refused below
            case GoOn():
                return Step((self._target(place, decision),))
            case Leave(head):
                return Step((), ((site, head),))
            case LinearRule():
                onward = [a for a in decision.actions if isinstance(a, GoOn)]
                heads = [(site, a.head) for a in decision.actions if isinstance(a, Leave)]
                heads += [key for key in decision.reads if key[0] == site]
                targets = tuple(self._target(place, action) for action in onward)
                return Step(targets, tuple(dict.fromkeys(heads)), gated=True)

    def _has_next(self, place: int) -> bool:
        return any(self.topology.follows[way] == place for way in self.topology.ways[place])

    def _target(self, place: int, action: GoOn) -> int:
        ways, places = self.topology.ways[place], self.topology.places
        for way in ways:
            if self.topology.follows[way] == place if action.target is None else places[way] == action.target:
                return way
        raise InputError(
            f"no way leads from {places[place]!r} to {action.target or 'a next place'!r}",
            where="policy",
            remedy=f"ways lead to {[places[way] for way in ways]}",
        )


def _require_rule(site: str, rule: LinearRule, computed: set[HeadKey]) -> None:
    where = f"rule of site {site!r}"
    if not rule.reads or rule.reads[0][0] != site:
        raise InputError(f"must read a head of its own first: reads {list(rule.reads)}", where=where)
    missing = [key for key in rule.reads if key[0] != site and key not in computed]
    if missing:
        raise InputError(f"reads {missing}, not computed on every way to this site", where=where)
    width = FEATURES * len(rule.reads)
    if len(rule.weight) != len(rule.actions) or any(len(row) != width for row in rule.weight):
        raise InputError(
            f"weights are not [{len(rule.actions)}][{width}]: {len(rule.reads)} heads of 3 features",
            where=where,
        )
    if len(rule.bias) != len(rule.actions) or sum(isinstance(a, Leave) for a in rule.actions) > 1:
        raise InputError("needs one bias per action, and leaves in one way at most", where=where)
    if not all(math.isfinite(v) for row in (*rule.weight, rule.bias) for v in row):
        raise InputError("weights must be finite", where=where)


def widen(policy: Policy, topology: Topology) -> Policy:
    """A policy over some sites as one over all of a topology: at the others every row goes on.

    Args:
        policy: Over ``topology.restrict(...)`` of some sites.
        topology: All sites.

    Raises:
        InputError: Ways that differ would have to go through one network that decides nothing; see
            ``Topology.closed``.
    """
    few = dict(zip(policy.exits, policy.decisions, strict=True))
    decisions: list[Decision] = [GoOn() for _ in topology.sites]
    network_of = dict(zip(topology.places, topology.network_of, strict=True))
    gone = [n for n, network in enumerate(topology.networks) if not any(site in few for site in network)]

    def target(site: str, action: GoOn) -> GoOn:
        """The same way on, by the name that the first site of that network has here."""
        if action.target is None:
            return action
        path = topology.path(network_of[site], network_of[action.target], gone)
        for skipped, following in itertools.pairwise(path[1:]):
            start = topology.sites.index(topology.networks[skipped][0])
            onward = GoOn(topology.networks[following][0])
            if decisions[start] not in (GoOn(), onward):
                raise InputError(
                    f"two ways lead through {topology.networks[skipped][-1]!r}, which is left out",
                    where="policy",
                )
            decisions[start] = onward
        return GoOn(topology.networks[path[1]][0])

    entry = network_of[policy.exits[0]] if policy.exits else 0
    for skipped, following in itertools.pairwise(topology.path(0, entry, gone) if entry else ()):
        start = topology.sites.index(topology.networks[skipped][0])
        decisions[start] = GoOn(topology.networks[following][0])
    for place, site in enumerate(topology.sites):
        match few.get(site):
            case GoOn() as action:
                decisions[place] = target(site, action)
            case LinearRule() as rule:
                actions = tuple(a if isinstance(a, Leave) else target(site, a) for a in rule.actions)
                decisions[place] = replace(rule, actions=actions)
            case Leave() as answer:
                decisions[place] = answer
    return Policy(topology, tuple(decisions))
