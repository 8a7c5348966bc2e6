"""What a pass is: a frozen dataclass whose fields are its options, from program to program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from exitcompiler.program import Program

__all__ = ["Pass", "PassResult"]


@dataclass(frozen=True, slots=True)
class PassResult:
    """What a pass gives back.

    Args:
        program: The program after the pass; the very same object where nothing changed.
        modified: Whether anything changed; exact.
    """

    program: Program
    modified: bool


class Pass(Protocol):
    """A pass: leaves its input as it was, gives a well-formed program."""

    name: ClassVar[str]
    """In kebab-case, for pipelines, dumps and error messages."""

    def __call__(self, program: Program) -> PassResult:
        """Rewrite ``program``.

        Raises:
            PassError: The program is not one that this pass can work on.
        """
        ...
