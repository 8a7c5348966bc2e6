"""The far side: answers, over HTTP, the rows that devices hand over.

    python cloud.py parts/far.exit --port 8000

POST /answer takes a message of `wire.py` and returns one. Meant for a network that you trust: there is
neither encryption nor a check of who asks; put both in front of it.
"""

from __future__ import annotations

import argparse
import logging
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import wire

import exitcompiler
from exitcompiler.errors import ExitCompilerError, InputError
from exitcompiler.runtime.hand_over import hand_over_of

__all__ = ["Cloud"]

READ_TIMEOUT_S = 10.0

_log = logging.getLogger(__name__)


class Cloud(ThreadingHTTPServer):
    """Serves the far part of a split program.

    Args:
        far: As loaded.
        address: Host and port; port 0: any that is free.
        most_rows: A request may hold so many rows; a larger one is refused before it is read.

    Raises:
        InputError: It is not a far part.
    """

    daemon_threads = True

    def __init__(
        self,
        far: exitcompiler.CompiledModel,
        address: tuple[str, int] = ("127.0.0.1", 0),
        most_rows: int = 256,
    ) -> None:
        part = far.manifest.part
        if part is None or part.kind != "far":
            raise InputError("this is not the far part of a split program", where="cloud")
        self.far = far
        self.hand_over = hand_over_of(far.manifest)
        self.limit_bytes = wire.message_limit_bytes(self.hand_over.values, most_rows)
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{self.server_address[0]}:{self.server_address[1]}"

    def answer(self, message: bytes) -> bytes:
        """Answer a request.

        Raises:
            MessageError: The request is not what was agreed on.
            InputError: Its values are not finite.
        """
        inputs, _ = wire.decode(message, self.hand_over.values, self.hand_over.whole)
        result = self.far.run(inputs)
        (output,) = self.far.manifest.outputs
        arrays = {output: result.outputs, wire.EXIT_INDEX: result.exit_index}
        return wire.encode(arrays, self.hand_over.whole, self.far.exits)


class _Handler(BaseHTTPRequestHandler):
    server: Cloud
    timeout = READ_TIMEOUT_S  # a client that stops sending does not hold a thread for ever

    def do_POST(self) -> None:
        """Answer, or say with a status what is wrong."""
        if self.path != wire.PATH:
            return self._send(404, f"POST {wire.PATH}")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()):
            return self._send(411, "Content-Length is missing")
        if len(length) > 15 or int(length) > self.server.limit_bytes:
            return self._send(413, f"more than {self.server.limit_bytes} bytes")
        try:
            message = self.rfile.read(int(length))
        except TimeoutError:
            return self._send(408, "the request did not come in time")
        try:
            answer = self.server.answer(message)
        except (wire.MessageError, InputError) as error:
            return self._send(400, str(error))
        except ExitCompilerError as error:
            _log.exception("the program failed")
            return self._send(500, error.what)
        self._send(200, answer)

    def _send(self, status: int, content: bytes | str) -> None:
        body = content.encode() if isinstance(content, str) else content
        kind = "text/plain; charset=utf-8" if isinstance(content, str) else "application/octet-stream"
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        """Log where all else is logged."""
        _log.info(format, *arguments)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Answer the rows that devices hand over.")
    parser.add_argument("far", metavar="far.exit")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--most-rows", type=int, default=256, help="rows per request, at most")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    with Cloud(exitcompiler.load(options.far), (options.host, options.port), options.most_rows) as cloud:
        _log.info("listening at %s, %d bytes per row", cloud.url, cloud.hand_over.bytes_per_row)
        try:
            cloud.serve_forever()
        except KeyboardInterrupt:
            _log.info("stopped")


if __name__ == "__main__":
    main()
