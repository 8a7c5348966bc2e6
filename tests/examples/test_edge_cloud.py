"""The example of a device and a server, on loopback: right answers, and failures of every kind."""

from __future__ import annotations

import http.client
import importlib
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx_programs import artifact_of, cascade, chain, random_rows

from exitcompiler.controlflow import OutputStructure, ValueSpec
from exitcompiler.errors import InputError
from exitcompiler.runtime.compiled import CompiledModel
from exitcompiler.runtime.loading import open_artifact
from exitcompiler.splitting import Split, split

pytest.importorskip("onnxruntime")

PATIENT_S = 30.0
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "edge_cloud"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(EXAMPLE)
    return {name: importlib.import_module(name) for name in ("wire", "cloud", "device")}


@pytest.fixture(scope="module")
def whole() -> CompiledModel:
    return open_artifact(artifact_of(cascade(3)), "onnxruntime")


@pytest.fixture(scope="module")
def parts(whole: CompiledModel) -> Split:
    return split(whole, "big_stem")


@contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def answering(content: bytes, status: int = 200, wait: threading.Event | None = None) -> Iterator[str]:
    """A far side that says always the same; one byte at a time until ``wait`` is set.

    As HTTP/1.0 without a length, so that the client hands the connection over to the response.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            while wait is not None and not wait.wait(0.01):
                self.wfile.write(b"x")
            self.wfile.write(content)

        def log_message(self, *arguments: object) -> None:
            pass

        def handle(self) -> None:
            try:
                super().handle()
            except OSError:
                assert wait is not None  # the device has hung up

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as url:
        yield url


def wait_for_threads(name: str) -> None:
    """Wait until no thread whose name holds this is left; those that never end fail the test."""
    for thread in threading.enumerate():
        if name in thread.name:
            thread.join(PATIENT_S)
            assert not thread.is_alive()


def check_fall_back(answer: Any, whole: CompiledModel, parts: Split, rows: np.ndarray) -> None:
    """Rows for the far side have the cheap network's answer, marked as such; all others are as ever."""
    near = parts.near.run(rows)
    handed_over = near.handed_over.rows
    assert len(handed_over)
    np.testing.assert_array_equal(np.flatnonzero(answer.source == "fall-back"), handed_over)
    assert set(np.delete(answer.source, handed_over)) <= {"near"}
    np.testing.assert_array_equal(answer.outputs, near.outputs)
    stayed = np.setdiff1d(np.arange(len(rows)), handed_over)
    np.testing.assert_array_equal(answer.outputs[stayed], whole(rows)[stayed])


@pytest.mark.parametrize("structure", [OutputStructure("tensor"), OutputStructure("dict", "logits")])
def test_the_same_answers_as_the_whole_program(example: dict[str, Any], structure: OutputStructure) -> None:
    whole = open_artifact(artifact_of(cascade(3), structure=structure), "onnxruntime")
    parts, rows = split(whole, "big_stem"), random_rows(40)
    expected = whole.run(rows)
    logits = expected.outputs["logits"] if structure.kind == "dict" else expected.outputs
    with serving(example["cloud"].Cloud(parts.far)) as url:
        for most_rows in (256, 3):
            model = example["device"].EdgeModel(parts.near, url, timeout_s=PATIENT_S, most_rows=most_rows)
            answer = model.run(rows)
            np.testing.assert_array_equal(answer.outputs, logits)
            assert answer.exits == [whole.exits[i] for i in expected.exit_index]
            assert set(answer.source) == {"near", "far"}
            assert answer.failure is None
        for row, wanted in zip(rows[:10], logits, strict=False):
            np.testing.assert_array_equal(model.run(row[None]).outputs[0], wanted)


def test_the_far_side_is_down(example: dict[str, Any], whole: CompiledModel, parts: Split) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    rows = random_rows(40)
    answer = example["device"].EdgeModel(parts.near, f"http://127.0.0.1:{port}").run(rows)
    check_fall_back(answer, whole, parts, rows)
    assert "cannot be asked" in answer.failure


def test_the_far_side_is_too_slow(example: dict[str, Any], whole: CompiledModel, parts: Split) -> None:
    rows, never = random_rows(40), threading.Event()
    with answering(b"", wait=never) as url:  # it goes on sending, and would for ever
        answer = example["device"].EdgeModel(parts.near, url, timeout_s=0.2, most_rows=1).run(rows)
        check_fall_back(answer, whole, parts, rows)
        wait_for_threads(example["device"].THREAD)
        wait_for_threads("process_request_thread")  # the server's: nobody listens to it any more
    assert answer.failure == "no answer within 0.2 s"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # it takes the connection and says nothing
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        check_fall_back(
            example["device"].EdgeModel(parts.near, url, timeout_s=0.1).run(rows), whole, parts, rows
        )
        wait_for_threads(example["device"].THREAD)


def test_the_time_out_holds_for_all_requests_together(
    example: dict[str, Any], whole: CompiledModel, parts: Split
) -> None:
    rows, pause_s, timeout_s = random_rows(40), 0.15, 0.5
    server = example["cloud"].Cloud(parts.far)
    answer_at_once = server.answer

    def answer_late(message: bytes) -> bytes:
        time.sleep(pause_s)
        content: bytes = answer_at_once(message)
        return content

    server.answer = answer_late
    with serving(server) as url:
        answer = example["device"].EdgeModel(parts.near, url, timeout_s=timeout_s, most_rows=1).run(rows)
        wait_for_threads(example["device"].THREAD)
    handed_over = parts.near.run(rows).handed_over.rows
    late = np.flatnonzero(answer.source == "fall-back")
    answered = len(handed_over) - len(late)
    assert answered <= timeout_s / pause_s < len(handed_over)
    np.testing.assert_array_equal(late, handed_over[answered:])
    assert answer.failure == "no answer within 0.5 s"
    rest = np.delete(np.arange(len(rows)), late)
    np.testing.assert_array_equal(answer.outputs[rest], whole(rows)[rest])


def test_a_connection_is_cut_whenever_it_comes(example: dict[str, Any]) -> None:
    ours, theirs = socket.socketpair()
    theirs.settimeout(PATIENT_S)
    with ours, theirs:
        line = example["device"]._Line()
        line.hold(ours)
        ours.close()  # as http.client does
        line.cut()
        assert theirs.recv(1) == b""
        line.close()
        line.cut()
    ours, theirs = socket.socketpair()
    with ours, theirs:
        line = example["device"]._Line()
        line.cut()
        with pytest.raises(TimeoutError):
            line.hold(ours)


def test_the_far_side_answers_nonsense(example: dict[str, Any], whole: CompiledModel, parts: Split) -> None:
    encode, key, rows = example["wire"].encode, parts.hand_over.whole, random_rows(40)
    count = len(parts.near.run(rows).handed_over.rows)
    logits, exits = np.zeros((count, 3), np.float32), np.zeros(count, np.int32)
    good = encode({"logits": logits, "exit_index": exits}, key, ("large",))
    nan = np.full_like(logits, np.nan)
    for content, status, failure in (
        (good, 500, "status 500"),
        (b"", 200, "ends within its header"),
        (b"\xff" * 5000, 200, "ends within its header"),
        (good[:-1], 200, "bytes, not"),
        (good + b"x", 200, "bytes, not"),
        (encode({"logits": logits, "exit_index": exits}, "0" * 64, ("large",)), 200, "another program"),
        (encode({"logits": logits.astype(np.float64), "exit_index": exits}, key, ("large",)), 200, "float64"),
        (encode({"logits": logits[:, :2], "exit_index": exits}, key, ("large",)), 200, "malformed"),
        (encode({"logits": logits[:1], "exit_index": exits[:1]}, key, ("large",)), 200, "1 rows for"),
        (encode({"logits": logits, "exit_index": exits + 1}, key, ("large",)), 200, "1 exits"),
        (encode({"logits": nan, "exit_index": exits}, key, ("large",)), 200, "not finite"),
    ):
        with answering(content, status) as url:
            answer = example["device"].EdgeModel(parts.near, url, timeout_s=PATIENT_S).run(rows)
        check_fall_back(answer, whole, parts, rows)
        assert failure in answer.failure


def post(url: str, body: bytes, path: str = "/answer", **headers: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=PATIENT_S)
    try:
        connection.request("POST", path, body, headers)
        response = connection.getresponse()
        return response.status, response.read().decode(errors="replace")
    finally:
        connection.close()


def test_a_request_that_is_not_one_is_refused_and_the_server_stays_up(
    example: dict[str, Any], parts: Split
) -> None:
    encode, key = example["wire"].encode, parts.hand_over.whole
    (name,) = parts.hand_over.values
    values = random_rows(2)
    good = encode({name: values}, key)
    infinite = encode({name: np.full_like(values, np.inf)}, key)

    def with_header(edit: Any) -> bytes:
        length = int.from_bytes(good[:4], "little")
        header = json.loads(good[4 : 4 + length])
        text = json.dumps(edit(header)).encode()
        return len(text).to_bytes(4, "little") + text + good[4 + length :]

    with serving(example["cloud"].Cloud(parts.far, most_rows=4)) as url:
        for body, status, message in (
            (b"", 400, "ends within its header"),
            (b"\x05\x00\x00\x00hello", 400, "not JSON"),
            (b"\x02\x00\x00\x00[]", 400, "not an object"),
            (b"\xff\xff\xff\xff{}", 400, "ends within its header"),
            (good[:-1], 400, "bytes, not"),
            (good + b"x", 400, "bytes, not"),
            (with_header(lambda h: {**h, "rows": 10**30}), 400, "values"),
            (with_header(lambda h: {**h, "rows": -1}), 400, "-1 rows"),
            (with_header(lambda h: {**h, "rows": True}), 400, "True rows"),
            (with_header(lambda h: {**h, "exits": [1]}), 400, "exits are not names"),
            (encode({name: values.astype(np.float64)}, key), 400, "float64"),
            (encode({name: values[:, :3]}, key), 400, "values"),
            (encode({"other": values}, key), 400, "other"),
            (encode({name: values}, "0" * 64), 400, "another program"),
            (infinite, 400, "NaN or infinity"),
        ):
            found, text = post(url, body)
            assert (found, message in text) == (status, True), text
        assert post(url, good, path="/other")[0] == 404
        for length, status in ((b"", b" 411 "), (b"Content-Length: 100000\r\n", b" 413 ")):
            with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENT_S) as raw:
                raw.sendall(b"POST /answer HTTP/1.0\r\n" + length + b"\r\n")
                assert status in raw.recv(1000)
        assert post(url, good)[0] == 200


def test_messages_come_back_as_they_were(example: dict[str, Any]) -> None:
    wire = example["wire"]
    specs, arrays = {}, {}
    for name, dtype in (("a", "float32"), ("b", "bool"), ("c", "uint8"), ("d", "int64"), ("e", "float16")):
        specs[name] = ValueSpec(("batch", 2, 3), dtype)
        arrays[name] = np.asfortranarray(np.arange(30).reshape(5, 2, 3) % 2).astype(dtype)
    found, exits = wire.decode(wire.encode(arrays, "key", ("end",)), specs, "key")
    assert exits == ("end",)
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)
    flag = {"b": specs["b"]}
    message = wire.encode({"b": np.full((1, 2, 3), 2, np.uint8)}, "key").replace(b"uint8", b"bool")
    message = (int.from_bytes(message[:4], "little") - 1).to_bytes(4, "little") + message[4:]
    with pytest.raises(wire.MessageError, match="neither 0 nor 1"):
        wire.decode(message, flag, "key")


def test_only_the_right_part_is_taken(example: dict[str, Any], parts: Split) -> None:
    other = open_artifact(artifact_of(chain(3)))
    for wrong in (parts.near, other):
        with pytest.raises(InputError, match="not the far part"):
            example["cloud"].Cloud(wrong)
    for wrong in (parts.far, other):
        with pytest.raises(InputError, match="not the near part"):
            example["device"].EdgeModel(wrong, "http://127.0.0.1:1")


@pytest.mark.parametrize("url", [
    "ftp://127.0.0.1", "127.0.0.1:80", "http://", "http://:80", "http://host:99999", "http://host:-1",
    "http://host:port", "http://host:0", "http://[::1", "http://a..b", "http://me@host", "http://host/path",
    "http://host?key=1", "http://host:80/?key=1", "http://host#part",
])  # fmt: skip
def test_urls_that_say_something_else(example: dict[str, Any], parts: Split, url: str) -> None:
    with pytest.raises(InputError, match="is not http://host:port"):
        example["device"].EdgeModel(parts.near, url)


@pytest.mark.parametrize(("url", "address"), [
    ("http://host:8000", ("host", 8000)), ("http://host:8000/", ("host", 8000)),
    ("http://host", ("host", 80)), ("http://[::1]:99", ("::1", 99)),
])  # fmt: skip
def test_urls_that_say_where(
    example: dict[str, Any], parts: Split, url: str, address: tuple[str, int]
) -> None:
    assert example["device"].EdgeModel(parts.near, url)._address == address


def test_the_device_from_the_command_line(
    example: dict[str, Any], parts: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    parts.near.save(tmp_path / "near.exit")
    rows = random_rows(40)
    np.savez(tmp_path / "data.npz", x=rows, y=np.zeros(40, np.int64))
    with serving(example["cloud"].Cloud(parts.far)) as url:
        arguments = [str(tmp_path / "near.exit"), "--cloud", url, "--data", str(tmp_path / "data.npz")]
        monkeypatch.setattr(
            "sys.argv", ["device.py", *arguments, "--batch-size", "7", "--timeout-ms", "30000"]
        )
        example["device"].main()
    lines = capsys.readouterr().out.splitlines()
    counts = {line.split()[0]: int(line.split()[1]) for line in lines}
    handed_over = len(parts.near.run(rows).handed_over.rows)
    assert counts == {"near": 40 - handed_over, "far": handed_over, "fall-back": 0, "all": 40}
