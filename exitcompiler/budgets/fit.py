"""Refuses limits that a program or its rows can say nothing about."""

from __future__ import annotations

from collections.abc import Sequence

from exitcompiler.budgets.limits import Budget
from exitcompiler.errors import BudgetError

__all__ = ["require_fit"]


def require_fit(budget: Budget, exits: Sequence[str], *, labelled: bool) -> None:
    """Refuse what cannot be judged, before the long measurement.

    Args:
        budget: The limits.
        exits: Of the program.
        labelled: Whether the rows have labels.

    Raises:
        BudgetError: An accuracy drop is limited and there are no labels, or an exit that the program has not
            got.
    """
    for limit in budget.limits:
        metric = limit.metric
        if metric.family == "accuracy" and metric.name == "drop" and not labelled:
            raise BudgetError(
                "the data has no labels, so there is no accuracy",
                where=limit.key,
                remedy="give labels, or limit accuracy.max_disagreement, which needs none",
            )
        if metric.family == "exit_rates" and metric.name and metric.name not in exits:
            raise BudgetError(
                f"the program has no exit {metric.name!r}; it has {', '.join(exits)}",
                where=limit.key,
                remedy="name one of these, or check which operating point is meant",
            )
    most = {
        limit.metric.name: limit.value
        for limit in budget.limits
        if limit.metric.family == "exit_rates" and limit.kind == "max"
    }
    if most.keys() >= set(exits) and sum(most.values()) < 1.0 - 1e-9:
        together = f"{100 * sum(most.values()):g} %"
        raise BudgetError(
            f"the maximums of all exits add up to {together}, and every row leaves somewhere",
            where="exit_rates",
            remedy="raise one of them",
        )
