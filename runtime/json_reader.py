"""Strict reading of JSON documents: every mistake names the key where it was found."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NoReturn, TypeVar

from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.manifest import Json

__all__ = ["Node", "parse_json"]

T = TypeVar("T")

_REMEDY = "the artifact is damaged; save it again, or fetch it again from where it came"


def parse_json(text: bytes, where: str) -> Json:
    """Parse strict JSON: UTF-8, no NaN or infinity, no key twice.

    Args:
        text: The document.
        where: Its name, for the error.

    Raises:
        ArtifactError: It is not.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is not JSON")

    def unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError(f"a key is there twice: {[key for key, _ in pairs]}")
        return found

    try:
        document: Json = json.loads(text.decode(), parse_constant=refuse, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"not valid JSON: {error}", where=where, remedy=_REMEDY) from error
    return document


class Node:
    """A place in a JSON document.

    Args:
        value: What stands there.
        path: Where that is, as ``manifest.json: operating_points[0].name``.
    """

    def __init__(self, value: Json, path: str) -> None:
        self.value = value
        self.path = path

    def fail(self, what: str) -> NoReturn:
        """Raise an ArtifactError for this place."""
        raise ArtifactError(what, where=self.path, remedy=_REMEDY)

    def __getitem__(self, key: str) -> Node:
        mapping = self.mapping()
        if key not in mapping:
            self.fail(f"key {key!r} is missing")
        return self._child(key)

    def get(self, key: str) -> Node | None:
        """The value of an optional key; None where it is absent or null."""
        return None if self.mapping().get(key) is None else self._child(key)

    def only(self, *keys: str) -> None:
        """Refuse keys that are not listed: where an unknown one would change the meaning."""
        unknown = sorted(self.mapping().keys() - set(keys))
        if unknown:
            self.fail(f"unknown keys {unknown}")

    def items(self) -> Iterator[tuple[str, Node]]:
        """Keys and values of an object."""
        return ((key, self._child(key)) for key in self.mapping())

    def mapping(self) -> Mapping[str, Json]:
        """The value as an object."""
        if not isinstance(self.value, dict):
            self.fail(f"expected an object, found {_kind(self.value)}")
        return self.value

    def each(self, read: Callable[[Node], T]) -> tuple[T, ...]:
        """The entries of an array, each read by ``read``."""
        if not isinstance(self.value, list):
            self.fail(f"expected an array, found {_kind(self.value)}")
        return tuple(read(Node(entry, f"{self.path}[{i}]")) for i, entry in enumerate(self.value))

    def string(self) -> str:
        """The value as a string."""
        if not isinstance(self.value, str):
            self.fail(f"expected a string, found {_kind(self.value)}")
        return self.value

    def choice(self, options: Sequence[str]) -> str:
        """The value as one of some strings."""
        value = self.string()
        if value not in options:
            self.fail(f"expected one of {list(options)}, found {value!r}")
        return value

    def integer(self, low: int = 0, high: int | None = None) -> int:
        """The value as a whole number in ``low..high``."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"expected a whole number, found {_kind(value)}")
        if value < low or (high is not None and value > high):
            self.fail(f"{value} is not in {low}..{'' if high is None else high}")
        return value

    def number(self) -> float:
        """The value as a finite number."""
        value = self.value
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"expected a number, found {_kind(value)}")
        try:
            number = float(value)
        except OverflowError:
            self.fail("the number is too large")
        if not math.isfinite(number):
            self.fail("the number is not finite")
        return number

    def _child(self, key: str) -> Node:
        return Node(self.mapping()[key], f"{self.path}.{key}" if self.path[-1:] != " " else self.path + key)


def _kind(value: Json) -> str:
    return {dict: "an object", list: "an array", str: "a string", bool: "a truth value"}.get(
        type(value), "null" if value is None else "a number"
    )
