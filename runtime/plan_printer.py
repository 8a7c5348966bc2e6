"""A plan as text: what one launch does, a line a step, for people and for tests."""

from __future__ import annotations

from collections.abc import Iterator

from exitcompiler.runtime.graph_plan import (
    LEFT,
    Compact,
    Conditional,
    Gather,
    Guard,
    PickBucket,
    Plan,
    Route,
    RunBlock,
    Scope,
    Step,
)

__all__ = ["print_plan"]


def print_plan(plan: Plan) -> str:
    """One line for every step, indented under the condition that it stands under.

    ::

        plan for 1 row
            run first
            route first: "exit1" | second; c0 = 0 | 1
            if c0:
                run second
                route second: "backbone"
    """
    rows = "1 row" if plan.capacity == 1 else f"up to {plan.capacity} rows"
    return "\n".join([f"plan for {rows}", *_lines(plan, plan.root, 1)])


def _lines(plan: Plan, scope: Scope, depth: int) -> Iterator[str]:
    indent = "    " * depth
    for step in scope:
        if not isinstance(step, Conditional):
            yield indent + _line(plan, step)
            continue
        yield f"{indent}{step.kind} {step.condition}:"
        for index, body in enumerate(step.bodies):
            if step.kind == "switch":
                yield f"{indent}  {index}:"
            yield from _lines(plan, body, depth + 1)


def _line(plan: Plan, step: Step) -> str:
    on = "" if plan.capacity == 1 else f" on {step.rows}" if isinstance(step, RunBlock | Gather) else ""
    match step:
        case RunBlock(block):
            return f"run {block}{on}"
        case Route(block, _, ways, condition=condition):
            targets = (f'"{plan.exits[w.exit]}"' if w.target == LEFT else plan.blocks[w.target] for w in ways)
            sets = "" if condition is None else f"; {condition} = {' | '.join(str(way.arm) for way in ways)}"
            return f"route {block}: {' | '.join(targets)}{sets}"
        case Gather(block, moves):
            values = ", ".join(f"{move.target} = {' | '.join(move.sources)}" for move in moves)
            return f"gather {block}{on}: {values}"
        case Guard(target, condition):
            return f"{condition} = goes to {plan.blocks[target]}"
        case Compact(target, rows, count, condition):
            return f"{rows}, {count} = rows that go to {plan.blocks[target]}; {condition} = any"
        case PickBucket(count, buckets, condition):
            return f"{condition} = bucket of {' | '.join(map(str, buckets))} for {count}"
        case Conditional():
            raise AssertionError(step)
