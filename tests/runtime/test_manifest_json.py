"""The manifest as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_programs import artifact_of, cascade, chain, diamond, plain, random_program

from exitcompiler.controlflow import OutputStructure
from exitcompiler.errors import ArtifactError
from exitcompiler.runtime.json_reader import Node
from exitcompiler.runtime.manifest import FileEntry, Manifest
from exitcompiler.runtime.manifest_json import (
    _digest,
    control_flow_from_json,
    control_flow_to_json,
    manifest_from_json,
    manifest_to_json,
)
from exitcompiler.splitting import split_artifact


def example() -> Manifest:
    manifest = artifact_of(chain(), cascade(), diamond(), plain()).manifest
    return replace(
        manifest, files={"model.onnx": FileEntry("ab" * 32, 7)}, extensions={"later": [1, {"a": None}]}
    )


def test_it_comes_back_as_it_was() -> None:
    manifest = replace(example(), threads=None, output_structure=OutputStructure("dict", "logits"))
    assert manifest_from_json(manifest_to_json(manifest)) == manifest


@given(seed=st.integers(0, 10_000))
def test_any_control_flow_comes_back_as_it_was(seed: int) -> None:
    flow = random_program(seed).flow
    text = json.dumps(control_flow_to_json(flow), sort_keys=True)
    assert control_flow_from_json(Node(json.loads(text), "flow")) == flow


def change(edit: Callable[[dict[str, Any]], object]) -> bytes:
    """The example's JSON, changed by somebody who keeps the digest right."""
    document = json.loads(manifest_to_json(example()))
    edit(document)
    document.pop("digest")
    document["digest"] = _digest(document)
    return json.dumps(document).encode()


def first_gate(document: dict[str, Any]) -> dict[str, Any]:
    gate: dict[str, Any] = document["operating_points"][0]["control_flow"]["blocks"][0]["terminator"]["gate"]
    return gate


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda d: d.pop("backend"), r"manifest.json: .*'backend' is missing"),
        (lambda d: d.update(threads=0), r"threads: 0 is not in 1\.\."),
        (lambda d: d.update(threads=True), "threads: expected a whole number"),
        (lambda d: d.update(batch_size="1"), "batch_size: expected a whole number, found a string"),
        (lambda d: d.update(selected=9), "selected: 9 is not in"),
        (lambda d: d.update(plain=-1), "plain: -1 is not in"),
        (lambda d: d.update(plain=None), "plain: only a part"),
        (lambda d: d.update(certificate=[]), "certificate: expected an object, found an array"),
        (lambda d: d.update(operating_points=[]), "is not in"),
        (lambda d: d.update(outputs=[]), "outputs"),
        (lambda d: d["inputs"][0].update(dtype="float8"), r"inputs\[0\].dtype: expected one of"),
        (lambda d: d["inputs"][0].update(shape=[4]), "its inputs are not the model's"),
        (lambda d: d["inputs"].append(d["inputs"][0]), "names are not unique"),
        (lambda d: d["output_structure"].update(kind="list"), "output_structure.kind: expected one of"),
        (lambda d: d["output_structure"].update(kind="dict"), "output_structure.key: expected a string"),
        (lambda d: d["files"]["model.onnx"].update(sha256="AB"), "64 lower-case"),
        (lambda d: d["operating_points"][1].update(name="point0"), "names are not unique"),
        (lambda d: d["operating_points"][0]["files"].pop("first"), "need one"),
        (lambda d: d["operating_points"][0]["torch_files"].update(a="b"), "torch files"),
        (lambda d: d["operating_points"][0].update(execution="fast"), r"operating_points\[0\].execution"),
        (lambda d: d["operating_points"][0]["estimate"].update(accuracy=None), "accuracy: expected a number"),
        (lambda d: d["operating_points"][0]["estimate"]["exit_rates"].pop("exit1"), "exit rates"),
        (lambda d: first_gate(d).update(extra=1), r"gate: unknown keys \['extra'\]"),
        (lambda d: first_gate(d).update(bias=[1.0]), "not a well-formed program"),
        (lambda d: first_gate(d).update(bias=[10**400, 1.0]), "too large"),
        (lambda d: first_gate(d).update(kind="tree"), "gate.kind: expected one of"),
    ],
)
def test_every_mistake_names_its_place(edit: Callable[[dict[str, Any]], object], where: str) -> None:
    with pytest.raises(ArtifactError, match=where):
        manifest_from_json(change(edit))


def near_part(edit: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(manifest_to_json(split_artifact(artifact_of(chain()), "second").near.manifest))
    edit(document)
    document.pop("digest")
    document["digest"] = _digest(document)
    return json.dumps(document).encode()


def returned(document: dict[str, Any]) -> dict[str, Any]:
    way: dict[str, Any] = document["operating_points"][0]["control_flow"]["blocks"][0]["terminator"]["edges"][
        1
    ]
    return way


def test_parts_come_back_as_they_were_and_whole_programs_stay_readable_for_older_versions() -> None:
    parts = split_artifact(artifact_of(chain()), "second")
    for manifest in (parts.near.manifest, parts.far.manifest):
        text = manifest_to_json(manifest)
        assert manifest_from_json(text) == manifest
        assert json.loads(text)["schema_version"] == 2
    whole = manifest_to_json(example())
    assert json.loads(whole)["schema_version"] == 1
    assert b'"carr' not in whole
    assert b'"part"' not in whole


@pytest.mark.parametrize(
    ("edit", "where"),
    [
        (lambda d: returned(d)["carries"].pop(), r"exit 'first:second', carried: 1 values bind 2 params"),
        (lambda d: returned(d).pop("carries"), "no exit carries"),
        (lambda d: returned(d).update(carries=["h", "h"]), "cannot bind 'earlier'"),
        (lambda d: d["operating_points"][0]["control_flow"].pop("carried"), "bind 0 params"),
        (lambda d: d.pop("part"), "exit rates|only a part|nothing else does"),
        (lambda d: d["part"].update(kind="far"), "carries values, and nothing else does"),
        (lambda d: d["part"].update(whole="ab"), "part.whole: expected 64"),
        (lambda d: d["part"]["edges"][0].pop(), r"part.edges\[0\]: expected two block names"),
        (lambda d: d.update(one_file=0), "one_file: a one-file model carries nothing"),
        (lambda d: d.update(schema_version=1), "nothing else does|only a part"),
    ],
)
def test_mistakes_in_a_part(edit: Callable[[dict[str, Any]], object], where: str) -> None:
    with pytest.raises(ArtifactError, match=where):
        manifest_from_json(near_part(edit))


def test_what_later_versions_add_is_ignored_or_kept() -> None:
    def edit(document: dict[str, Any]) -> None:
        document["graph_plans"] = {"a": 1}
        document["extensions"]["cascade"] = "kept"

    manifest = manifest_from_json(change(edit))
    assert manifest.extensions == {"later": [1, {"a": None}], "cascade": "kept"}
    assert b"graph_plans" not in manifest_to_json(manifest)


def test_a_newer_schema_says_so() -> None:
    with pytest.raises(ArtifactError, match=r"schema version 3.*\n.*newer version"):
        manifest_from_json(change(lambda d: d.update(schema_version=3)))


@pytest.mark.parametrize(
    "text",
    [b"", b"\xff\xfe", b"[" * 100_000, b'{"schema_version": NaN}', b'{"a": 1, "a": 2}', b'{"a": Infinity}'],
)
def test_what_is_not_strict_json_is_refused(text: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        manifest_from_json(text)


@given(position=st.integers(0, 10**9), value=st.integers(0, 255))
def test_a_changed_byte_is_noticed_or_makes_no_difference(position: int, value: int) -> None:
    manifest = artifact_of(chain()).manifest
    text = bytearray(manifest_to_json(manifest))
    text[position % len(text)] = value
    try:
        found = manifest_from_json(bytes(text))
    except ArtifactError:
        return
    assert found == manifest
