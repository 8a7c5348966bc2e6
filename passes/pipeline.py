"""Runs passes one after another, verifies after each, and lets observers watch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeAlias

from exitcompiler.errors import VerifyError
from exitcompiler.passes.base import Pass, PassResult
from exitcompiler.printer import print_program
from exitcompiler.program import Program
from exitcompiler.verify import verify

__all__ = ["Observer", "Pipeline", "dump_to"]

logger = logging.getLogger(__name__)

Observer: TypeAlias = Callable[[str, Program, PassResult], None]
"""Called after each pass with its name, the program before, and the result."""


@dataclass(frozen=True)
class Pipeline:
    """Several passes in order; itself a pass, so pipelines nest.

    Args:
        passes: Run in this order.
        fixpoint: Run the whole list again until no pass modifies anything.
        observers: Called after every pass.
    """

    name: ClassVar[str] = "pipeline"

    passes: Sequence[Pass]
    fixpoint: bool = False
    observers: Sequence[Observer] = ()

    def __call__(self, program: Program) -> PassResult:
        """Run the passes.

        Raises:
            PassError: From a pass.
            VerifyError: A pass left a program that is not well-formed; the pass is named.
        """
        modified_at_all = False
        while True:
            modified = False
            for step in self.passes:
                result = _run(step, program)
                for observer in self.observers:
                    observer(step.name, program, result)
                program = result.program
                modified |= result.modified
            modified_at_all |= modified
            if not (self.fixpoint and modified):
                return PassResult(program, modified_at_all)


def _run(step: Pass, program: Program) -> PassResult:
    result = step(program)
    logger.debug("pass %s: modified=%s", step.name, result.modified)
    if result.modified == (result.program is program):
        raise VerifyError(f"pass {step.name!r} says modified={result.modified}, which is not so")
    try:
        verify(result.program)
    except VerifyError as error:
        raise VerifyError(
            error.what, where=f"after pass {step.name!r}, {error.where or 'program'}"
        ) from error
    return result


def dump_to(folder: Path) -> Observer:
    """An observer that writes each modifying pass's program before and after as text files.

    Args:
        folder: Created where missing; files are called ``003-merge-blocks.before.txt`` and so on.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def observe(name: str, before: Program, result: PassResult) -> None:
        if not result.modified:
            return
        number = len(list(folder.glob("*.after.txt")))
        for stage, program in (("before", before), ("after", result.program)):
            text = print_program(program, bodies=True) + "\n"
            (folder / f"{number:03d}-{name}.{stage}.txt").write_text(text, encoding="utf-8")

    return observe
