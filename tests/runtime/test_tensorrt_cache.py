"""A cache gives back what was put in for exactly this case, or nothing, and says why."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from exitcompiler.errors import InputError
from exitcompiler.runtime.manifest import Json
from exitcompiler.runtime.tensorrt_cache import EngineCache, user_cache_folder

FACTS: dict[str, Json] = {
    "flavour": "tensorrt",
    "version": "10.16.1.11",
    "device": "NVIDIA Paper",
    "compute_capability": [8, 9],
    "onnx": "ab" * 32,
    "settings": {"profiles": [[1, 1, 1]]},
}
CONTENT = b"ftrt" + bytes(range(256)) * 20


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "not yet" / "there")


def test_what_was_put_in_comes_out(cache: EngineCache) -> None:
    assert cache.read("engine", FACTS) is None
    cache.write("engine", FACTS, CONTENT)
    assert cache.read("engine", FACTS) == CONTENT
    assert cache.read("timings", FACTS) is None
    cache.write("engine", FACTS, b"newer")
    assert cache.read("engine", FACTS) == b"newer"
    assert os.listdir(cache.folder) == [cache.path("engine", FACTS).name]


@pytest.mark.parametrize("fact", list(FACTS))
def test_any_other_case_is_another_entry(cache: EngineCache, fact: str) -> None:
    cache.write("engine", FACTS, CONTENT)
    other: dict[str, Json] = {**FACTS, fact: "something else"}
    assert cache.path("engine", other) != cache.path("engine", FACTS)
    assert cache.read("engine", other) is None


def test_an_entry_of_another_version_under_this_name_is_not_used(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    older: dict[str, Json] = {**FACTS, "version": "10.1.0.27", "device": "another"}
    cache.write("engine", older, CONTENT)
    cache.path("engine", older).rename(cache.path("engine", FACTS))
    assert cache.read("engine", FACTS) is None
    assert "made for another case (device, version)" in caplog.text


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda raw: raw[:-1], "bytes instead of"),
        (lambda raw: raw + b"x", "bytes instead of"),
        (lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]), "its content has changed"),
        (lambda raw: b"", "does not say what it is"),
        (lambda raw: b"\xff\xfe" + raw, "does not say what it is"),
        (lambda raw: b"[1]\n" + raw, "does not say what it is"),
        (lambda raw: raw.replace(b"cache 1", b"cache 9", 1), "does not say what it is"),
        (
            lambda raw: raw.replace(b'"facts":{', b'"facts":7,"old":{', 1),
            "does not say what it was made from",
        ),
    ],
)
def test_a_damaged_entry_is_not_used_and_the_log_says_why(
    cache: EngineCache, caplog: pytest.LogCaptureFixture, damage: object, says: str
) -> None:
    cache.write("engine", FACTS, CONTENT)
    path = cache.path("engine", FACTS)
    path.write_bytes(damage(path.read_bytes()))  # type: ignore[operator]
    assert cache.read("engine", FACTS) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert says in record.message
    assert "made again" in record.message
    cache.write("engine", FACTS, CONTENT)
    assert cache.read("engine", FACTS) == CONTENT


def test_a_folder_that_cannot_be_written_is_no_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    cache = EngineCache(tmp_path / "file" / "cache")
    cache.write("engine", FACTS, CONTENT)
    assert "cannot be kept for the next time" in caplog.text


def test_an_entry_that_cannot_be_read_is_made_again(
    cache: EngineCache, caplog: pytest.LogCaptureFixture
) -> None:
    cache.path("engine", FACTS).mkdir(parents=True)
    assert cache.read("engine", FACTS) is None
    assert "cannot be read" in caplog.text


def test_nothing_half_written_is_left(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    cache.folder.mkdir(parents=True)
    monkeypatch.setattr(os, "replace", fail)
    cache.write("engine", FACTS, CONTENT)
    assert os.listdir(cache.folder) == []


def test_the_folder_is_its_owners(cache: EngineCache) -> None:
    cache.write("engine", FACTS, CONTENT)
    assert cache.folder.stat().st_mode & 0o077 == 0


def test_the_users_folder_is_where_the_system_keeps_such_things(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / "exitcompiler" / "tensorrt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache_folder() == tmp_path / ".cache" / "exitcompiler" / "tensorrt"


def test_without_a_home_folder_the_variable_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(InputError, match=r"cache: there is no home folder.*\n.*set XDG_CACHE_HOME"):
        user_cache_folder()
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert user_cache_folder() == Path("/somewhere/exitcompiler/tensorrt")
