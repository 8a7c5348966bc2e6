"""How networks, exits, heads and their values are called, everywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = [
    "BACKBONE",
    "DEEP",
    "LINEAR",
    "OWN",
    "agreement_with",
    "free_name",
    "head_exit",
    "identifier",
    "together_with",
    "value_name",
]

LINEAR: Final = "linear"
DEEP: Final = "deep"

OWN: Final = "own"
"""What answers at the end of a network of a cascade: its own classifier."""

BACKBONE: Final = "backbone"
"""The exit at the end of the network, which answers with the backbone's own logits."""


def together_with(networks: Iterable[str]) -> str:
    """The kind of head that answers with the mean of this network and earlier ones: ``with a+b``."""
    return f"with {'+'.join(networks)}"


def agreement_with(network: str) -> str:
    """The features that say how far a network agrees with an earlier one: ``agreement with a``."""
    return f"agreement with {network}"


def identifier(name: str) -> str:
    """A module path as an identifier: ``layer1.8`` -> ``layer1_8``."""
    text = re.sub(r"\W", "_", name)
    return f"_{text}" if not text or text[0].isdigit() else text


def free_name(name: str, taken: set[str]) -> str:
    """The name, or ``name_2``, ``name_3`` ... where it is taken; it is taken from now on."""
    unique, count = name, 1
    while unique in taken:
        count += 1
        unique = f"{name}_{count}"
    taken.add(unique)
    return unique


def head_exit(exit_name: str, kind: str) -> str:
    """The way to leave through one of several heads at an exit: ``layer1.8/deep``."""
    return f"{exit_name}/{kind}"


def value_name(exit_name: str, kind: str, what: str) -> str:
    """A value that a head makes: ``layer1_8_deep_logits``."""
    return f"{identifier(exit_name)}_{identifier(kind)}_{what}"
