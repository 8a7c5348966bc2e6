"""The near side: answers what it can, and asks the far side for the rest.

    python device.py parts/near.exit --cloud http://127.0.0.1:8000 --data data.npz

Where the far side is down, too slow, or answers nonsense, the near side's own answer holds, marked as such.
"""

from __future__ import annotations

import argparse
import http.client
import queue
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import wire

import exitcompiler
from exitcompiler.errors import InputError
from exitcompiler.runtime.hand_over import hand_over_of

__all__ = ["FALL_BACK", "FAR", "NEAR", "Answer", "EdgeModel", "FarSideError"]

NEAR, FAR, FALL_BACK = "near", "far", "fall-back"
THREAD = "ask the far side"


class FarSideError(Exception):
    """The far side gave no answer that can be used; says why."""


@dataclass(frozen=True)
class Answer:
    """What `EdgeModel.run` returns.

    Args:
        outputs: ``[batch, classes]``, the logits.
        source: Per row ``NEAR``, ``FAR``, or ``FALL_BACK``: the near side's answer to a row that should
            have been answered by the far side.
        exits: Per row, the exit that it was answered at.
        failure: Why rows fell back; None: none did.
    """

    outputs: np.ndarray
    source: np.ndarray
    exits: list[str]
    failure: str | None


class EdgeModel:
    """The near part of a split program, with the far part behind a URL.

    Args:
        near: As loaded.
        url: Of the far side: ``http://host:port``.
        timeout_s: How long one `run` waits for it, all in all: name look-up, connection and answer, of all
            its requests together.
        most_rows: Rows per request, at most; those of a larger batch go in several.

    Raises:
        InputError: It is not a near part, or the URL is not of that form.
    """

    def __init__(
        self, near: exitcompiler.CompiledModel, url: str, *, timeout_s: float = 0.5, most_rows: int = 256
    ) -> None:
        part = near.manifest.part
        if part is None or part.kind != "near":
            raise InputError("this is not the near part of a split program", where="device")
        self._near = near
        self._hand_over = hand_over_of(near.manifest)
        self._specs = wire.answer_specs(near.manifest.outputs)
        self._address = _address(url)
        self._timeout_s = timeout_s
        self._most_rows = most_rows

    def run(self, *inputs: Any) -> Answer:
        """Answer a batch, as the whole program would."""
        result = self._near.run(*inputs)
        outputs = result.outputs
        if isinstance(outputs, dict | tuple):  # in the model's structure
            (outputs,) = outputs.values() if isinstance(outputs, dict) else outputs
        source = np.full(len(outputs), NEAR, "<U9")
        exits = [self._near.exits[index] for index in result.exit_index]
        failure: str | None = None
        rows, values = result.handed_over.rows, result.handed_over.values
        source[rows] = FALL_BACK
        deadline = time.monotonic() + self._timeout_s
        for start in range(0, len(rows), self._most_rows):
            asked = slice(start, start + self._most_rows)
            try:
                logits, names = self._ask({name: value[asked] for name, value in values.items()}, deadline)
            except FarSideError as error:
                failure = str(error)
                break  # the rest would fare no better
            outputs[rows[asked]], source[rows[asked]] = logits, FAR
            for row, name in zip(rows[asked], names, strict=True):
                exits[row] = name
        return Answer(outputs, source, exits, failure)

    def _ask(self, values: Mapping[str, np.ndarray], deadline: float) -> tuple[np.ndarray, list[str]]:
        """The far side's logits for some rows, and the names of their exits."""
        count = len(next(iter(values.values())))
        answer = self._post(wire.encode(values, self._hand_over.whole), count, deadline)
        try:
            arrays, exits = wire.decode(answer, self._specs, self._hand_over.whole)
        except wire.MessageError as error:
            raise FarSideError(f"malformed answer: {error}") from error
        index = arrays.pop(wire.EXIT_INDEX)
        (logits,) = arrays.values()
        if len(logits) != count:
            raise FarSideError(f"malformed answer: {len(logits)} rows for {count}")
        if index.min() < 0 or index.max() >= len(exits):
            raise FarSideError(f"malformed answer: {len(exits)} exits, but numbers up to {index.max()}")
        if not np.isfinite(logits).all():
            raise FarSideError("malformed answer: not finite")
        return logits, [exits[i] for i in index]

    def _post(self, message: bytes, rows: int, deadline: float) -> bytes:
        """Post a message from a thread that nobody waits for longer than until the deadline.

        A socket's own time-out is one per read: a far side that sends a byte now and then would never
        run into it, and looking up a name has none.
        """
        late = FarSideError(f"no answer within {self._timeout_s:g} s")
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            raise late
        connection = http.client.HTTPConnection(*self._address, timeout=left_s)
        found: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        limit, line = wire.message_limit_bytes(self._specs, rows), _Line()
        arguments = (connection, message, limit, line, found)
        threading.Thread(target=_post, args=arguments, name=THREAD, daemon=True).start()
        try:
            answer = found.get(timeout=left_s)
        except queue.Empty:
            line.cut()
            raise late from None
        if isinstance(answer, bytes):
            return answer
        if isinstance(answer, TimeoutError):
            raise late from answer
        if isinstance(answer, FarSideError):
            raise answer
        raise FarSideError(f"cannot be asked: {answer or type(answer).__name__}") from answer


class _Line:
    """The socket of a request, for the thread that does not want to wait for it any longer.

    A duplicate of its own: http.client lets go of the socket, and closes it, when it sees fit, and the number
    of a closed one may by then belong to another.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def hold(self, connected: socket.socket) -> None:
        """Take the socket; TimeoutError: nobody waits any more."""
        with self._lock:
            if self._is_cut:
                raise TimeoutError
            self._socket = connected.dup()

    def cut(self) -> None:
        """End whatever waits for the socket, now or later."""
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                with suppress(OSError):  # the far side may have hung up
                    self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the duplicate."""
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def _post(
    connection: http.client.HTTPConnection,
    message: bytes,
    limit: int,
    line: _Line,
    found: queue.SimpleQueue[bytes | Exception],
) -> None:
    try:
        with closing(line), closing(connection):
            connection.connect()
            line.hold(connection.sock)
            connection.request("POST", wire.PATH, message, {"Content-Type": "application/octet-stream"})
            with connection.getresponse() as response:
                content = response.read(limit + 1)
        if response.status == 200:
            found.put(content)
        else:
            found.put(FarSideError(f"status {response.status}: {content[:200].decode(errors='replace')}"))
    except (OSError, http.client.HTTPException) as error:
        found.put(error)


def _address(url: str) -> tuple[str, int]:
    """Host and port of a URL that says nothing else."""
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", 80 if parts.port is None else parts.port
        host.encode("idna")  # as the look-up will
    except ValueError as error:
        raise InputError(f"{url!r} is not http://host:port: {error}", where="device") from error
    more = parts.path.strip("/") or parts.query or parts.fragment or "@" in parts.netloc
    if parts.scheme != "http" or not host or not port or more:
        raise InputError(f"{url!r} is not http://host:port", where="device")
    return host, port


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answer rows here, and ask the far side for the rest.")
    parser.add_argument("near", metavar="near.exit")
    parser.add_argument("--cloud", metavar="URL", default="http://127.0.0.1:8000")
    parser.add_argument("--data", metavar="DATA.npz", required=True, help="x, and y if there are labels")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--timeout-ms", type=float, default=500.0)
    options = parser.parse_args()
    model = EdgeModel(exitcompiler.load(options.near), options.cloud, timeout_s=options.timeout_ms / 1000.0)
    with np.load(options.data, allow_pickle=False) as data:
        x, y = data["x"], data["y"] if "y" in data.files else None
    answers = [model.run(x[i : i + options.batch_size]) for i in range(0, len(x), options.batch_size)]
    source = np.concatenate([answer.source for answer in answers])
    predictions = np.concatenate([answer.outputs.argmax(axis=1) for answer in answers])
    for name in (NEAR, FAR, FALL_BACK):
        rows = source == name
        right = "" if y is None or not rows.any() else f", {np.mean(predictions[rows] == y[rows]):.1%} right"
        print(f"{name:<10}{rows.sum():>7} rows{right}")
    if y is not None:
        print(f"{'all':<10}{len(y):>7} rows, {np.mean(predictions == y):.1%} right")
    for failure in dict.fromkeys(answer.failure for answer in answers if answer.failure):
        print(f"far side: {failure}")


if __name__ == "__main__":
    main()
