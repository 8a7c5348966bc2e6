"""How exits, heads and their values are called, everywhere."""

from __future__ import annotations

import re
from typing import Final, Literal, TypeAlias

__all__ = ["BACKBONE", "DEEP", "LINEAR", "HeadKind", "head_exit", "identifier", "value_name"]

HeadKind: TypeAlias = Literal["linear", "deep"]
LINEAR: Final = "linear"
DEEP: Final = "deep"

BACKBONE: Final = "backbone"
"""The exit at the end of the network, which answers with the backbone's own logits."""


def identifier(name: str) -> str:
    """A module path as an identifier: ``layer1.8`` -> ``layer1_8``."""
    text = re.sub(r"\W", "_", name)
    return f"_{text}" if not text or text[0].isdigit() else text


def head_exit(exit_name: str, kind: str) -> str:
    """The way to leave through one of several heads at an exit: ``layer1.8/deep``."""
    return f"{exit_name}/{kind}"


def value_name(exit_name: str, kind: str, what: str) -> str:
    """A value that a head makes: ``layer1_8_deep_logits``."""
    return f"{identifier(exit_name)}_{kind}_{what}"
