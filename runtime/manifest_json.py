"""The manifest as JSON, both ways.

Reading is strict. Inside ``control_flow`` an unknown key is an error, as it would change what the
program computes. Elsewhere unknown keys are ignored and lost when saved again, except for what stands
under ``extensions`` (of the manifest and of each operating point), which is kept as it is: the place
for what later versions add without changing what this version reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import cast

from exitcompiler.control_flow_checks import verify_control_flow
from exitcompiler.controlflow import (
    DTYPES,
    BlockInterface,
    Branch,
    ConstantGate,
    ControlFlow,
    Edge,
    Gate,
    Jump,
    LinearGate,
    OutputStructure,
    Return,
    Successor,
    Terminator,
    ValueSpec,
    engine_signature,
)
from exitcompiler.errors import ArtifactError, VerifyError
from exitcompiler.runtime.json_reader import Node, parse_json
from exitcompiler.runtime.manifest import (
    MANIFEST_FILE,
    SCHEMA_VERSION,
    Estimate,
    Execution,
    FileEntry,
    Json,
    Manifest,
    OperatingPoint,
    Part,
    PartKind,
)

__all__ = ["control_flow_from_json", "control_flow_to_json", "manifest_from_json", "manifest_to_json"]

_DIGEST = "digest"


def manifest_to_json(manifest: Manifest) -> bytes:
    """The manifest as a JSON document, readable, with a digest over all the rest.

    Raises:
        ValueError: It holds a number that is not finite.
    """
    document: dict[str, Json] = {
        "schema_version": 1 if manifest.part is None else SCHEMA_VERSION,
        "inputs": _specs_to_json(manifest.inputs),
        "outputs": _specs_to_json(manifest.outputs),
        "output_structure": {
            "kind": manifest.output_structure.kind,
            "key": manifest.output_structure.key,
        },
        "backend": manifest.backend,
        "precision": manifest.precision,
        "threads": manifest.threads,
        "batch_size": manifest.batch_size,
        "operating_points": [_point_to_json(point) for point in manifest.operating_points],
        "selected": manifest.selected,
        "plain": manifest.plain,
        "one_file": manifest.one_file,
        "certificate": None if manifest.certificate is None else dict(manifest.certificate),
        "environment": dict(manifest.environment),
        "files": {
            path: {"sha256": entry.sha256, "size_bytes": entry.size_bytes}
            for path, entry in sorted(manifest.files.items())
        },
        "extensions": dict(manifest.extensions),
    }
    if manifest.part is not None:
        document["part"] = _part_to_json(manifest.part)
    document[_DIGEST] = _digest(document)
    return json.dumps(document, indent=1, allow_nan=False).encode()


def manifest_from_json(text: bytes) -> Manifest:
    """Read a manifest and check that it makes sense as a whole.

    Raises:
        ArtifactError: Naming the key at fault; or it was written by a newer version.
    """
    root = Node(parse_json(text, MANIFEST_FILE), f"{MANIFEST_FILE}: ")
    version = root["schema_version"].integer()
    if not 1 <= version <= SCHEMA_VERSION:
        raise ArtifactError(
            f"the artifact has schema version {version}; this version of exitcompiler reads 1 to "
            f"{SCHEMA_VERSION}",
            where=MANIFEST_FILE,
            remedy="it was written by a newer version: pip install --upgrade exitcompiler, or save it again "
            "with this version",
        )
    document = dict(root.mapping())
    if document.pop(_DIGEST, None) != _digest(document):
        root[_DIGEST].fail("the digest does not match: the manifest was changed after it was written")
    points = root["operating_points"].each(_point_from_json)
    last = len(points) - 1
    one_file, threads, certificate = root.get("one_file"), root.get("threads"), root.get("certificate")
    plain, part = root.get("plain"), root.get("part") if version > 1 else None
    manifest = Manifest(
        inputs=_specs_from_json(root["inputs"]),
        outputs=_specs_from_json(root["outputs"]),
        output_structure=_structure_from_json(root["output_structure"]),
        backend=root["backend"].string(),
        precision=root["precision"].string(),
        threads=None if threads is None else threads.integer(1),
        batch_size=root["batch_size"].integer(1),
        operating_points=points,
        selected=root["selected"].integer(0, last),
        plain=None if plain is None else plain.integer(0, last),
        one_file=None if one_file is None else one_file.integer(0, last),
        certificate=None if certificate is None else certificate.mapping(),
        environment=root["environment"].mapping(),
        files={path: _file_from_json(node) for path, node in root["files"].items()},
        extensions=_extensions(root),
        part=None if part is None else _part_from_json(part),
    )
    _check(manifest, root)
    return manifest


def _digest(document: Mapping[str, Json]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _check(manifest: Manifest, root: Node) -> None:
    """What no single key shows."""
    names = [point.name for point in manifest.operating_points]
    if len(set(names)) != len(names):
        root["operating_points"].fail(f"names are not unique: {names}")
    for i, point in enumerate(manifest.operating_points):
        flow = point.control_flow
        where = Node(None, f"{MANIFEST_FILE}: operating_points[{i}]")
        if list(flow.inputs.items()) != list(manifest.inputs.items()):
            where.fail("its inputs are not the model's")
        if list(flow.outputs.items()) != list(manifest.outputs.items()):
            where.fail("its outputs are not the model's")
        needed = {block.name for block in flow.blocks if engine_signature(block).outputs}
        if needed != point.files.keys():
            where.fail(f"files for blocks {sorted(point.files)}, but blocks {sorted(needed)} need one")
        if point.torch_files and needed != point.torch_files.keys():
            where.fail(f"torch files for blocks {sorted(point.torch_files)} of {sorted(needed)}")
        rates, part = point.estimate.exit_rates.keys(), manifest.part
        if not rates <= set(flow.exits) or (part is None and rates != set(flow.exits)):
            where.fail(f"exit rates for {sorted(rates)}; exits are {list(flow.exits)}")
        if bool(flow.carried) != (part is not None and part.kind == "near"):
            where.fail("a near part of a split program carries values, and nothing else does")
        if flow.carried and manifest.one_file is not None:
            root["one_file"].fail("a one-file model carries nothing")
    if manifest.plain is None and manifest.part is None:
        root["plain"].fail("only a part of a split program may be without its plain backbone")
    logits = next(iter(manifest.outputs.values()), None)
    if logits is None or len(manifest.outputs) > 1 or logits.batch_axis != 0 or len(logits.shape) != 2:
        root["outputs"].fail("expected one output: logits of shape [batch, classes]")


def _point_to_json(point: OperatingPoint) -> Json:
    estimate = point.estimate
    return {
        "name": point.name,
        "control_flow": control_flow_to_json(point.control_flow),
        "files": dict(point.files),
        "estimate": {
            "accuracy": estimate.accuracy,
            "accuracy_drop": estimate.accuracy_drop,
            "excess_error": estimate.excess_error,
            "mean_latency_ms": estimate.mean_latency_ms,
            "exit_rates": dict(estimate.exit_rates),
        },
        "execution": point.execution,
        "torch_files": dict(point.torch_files),
        "extensions": dict(point.extensions),
    }


def _point_from_json(node: Node) -> OperatingPoint:
    estimate = node["estimate"]
    return OperatingPoint(
        name=node["name"].string(),
        control_flow=control_flow_from_json(node["control_flow"]),
        files={name: value.string() for name, value in node["files"].items()},
        estimate=Estimate(
            accuracy=estimate["accuracy"].number(),
            accuracy_drop=estimate["accuracy_drop"].number(),
            excess_error=estimate["excess_error"].number(),
            mean_latency_ms=estimate["mean_latency_ms"].number(),
            exit_rates={name: value.number() for name, value in estimate["exit_rates"].items()},
        ),
        execution=cast(Execution, node["execution"].choice(("blocks", "single"))),
        torch_files={name: value.string() for name, value in node["torch_files"].items()},
        extensions=_extensions(node),
    )


def control_flow_to_json(flow: ControlFlow) -> dict[str, Json]:
    """A program without bodies as JSON; values are arrays, as their order counts."""
    carried: dict[str, Json] = {"carried": _specs_to_json(flow.carried)} if flow.carried else {}
    return {
        "inputs": _specs_to_json(flow.inputs),
        "outputs": _specs_to_json(flow.outputs),
        "blocks": [
            {
                "name": block.name,
                "params": _specs_to_json(block.params),
                "results": _specs_to_json(block.results),
                "terminator": _terminator_to_json(block.terminator),
            }
            for block in flow.blocks
        ],
        **carried,
    }


def control_flow_from_json(node: Node) -> ControlFlow:
    """Read a program without bodies.

    Raises:
        ArtifactError: Naming the key at fault, or what makes the program ill-formed.
    """
    node.only("inputs", "outputs", "blocks", "carried")
    carried = node.get("carried")
    flow = ControlFlow(
        inputs=_specs_from_json(node["inputs"]),
        outputs=_specs_from_json(node["outputs"]),
        blocks=node["blocks"].each(_block_from_json),
        carried={} if carried is None else _specs_from_json(carried),
    )
    try:
        verify_control_flow(flow)
    except VerifyError as error:
        node.fail(f"not a well-formed program: {error}")
    return flow


def _block_from_json(node: Node) -> BlockInterface:
    node.only("name", "params", "results", "terminator")
    return BlockInterface(
        name=node["name"].string(),
        params=_specs_from_json(node["params"]),
        results=_specs_from_json(node["results"]),
        terminator=_terminator_from_json(node["terminator"]),
    )


def _specs_to_json(specs: Mapping[str, ValueSpec]) -> Json:
    return [{"name": name, "shape": list(spec.shape), "dtype": spec.dtype} for name, spec in specs.items()]


def _specs_from_json(node: Node) -> dict[str, ValueSpec]:
    pairs = node.each(_spec_from_json)
    specs = dict(pairs)
    if len(specs) != len(pairs):
        node.fail(f"names are not unique: {[name for name, _ in pairs]}")
    return specs


def _spec_from_json(node: Node) -> tuple[str, ValueSpec]:
    node.only("name", "shape", "dtype")
    shape = node["shape"].each(lambda size: size.string() if isinstance(size.value, str) else size.integer())
    return node["name"].string(), ValueSpec(shape, node["dtype"].choice(sorted(DTYPES)))


def _terminator_to_json(terminator: Terminator) -> Json:
    match terminator:
        case Return():
            return _successor_to_json(terminator)
        case Jump(edge):
            return {"kind": "jump", "edge": _successor_to_json(edge)}
        case Branch(gate, edges):
            return {
                "kind": "branch",
                "gate": _gate_to_json(gate),
                "edges": [_successor_to_json(edge) for edge in edges],
            }


def _terminator_from_json(node: Node) -> Terminator:
    kind = node["kind"].choice(("return", "jump", "branch"))
    if kind == "return":
        return _return_from_json(node)
    if kind == "jump":
        node.only("kind", "edge")
        return Jump(_edge_from_json(node["edge"]))
    node.only("kind", "gate", "edges")
    return Branch(_gate_from_json(node["gate"]), node["edges"].each(_successor_from_json))


def _successor_to_json(way: Successor) -> Json:
    if isinstance(way, Return):
        carries: dict[str, Json] = {"carries": list(way.carries)} if way.carries else {}
        return {"kind": "return", "values": list(way.values), "exit": way.exit, **carries}
    return {"kind": "edge", "target": way.target, "values": list(way.values)}


def _successor_from_json(node: Node) -> Successor:
    kind = node["kind"].choice(("return", "edge"))
    return _return_from_json(node) if kind == "return" else _edge_from_json(node)


def _return_from_json(node: Node) -> Return:
    node.only("kind", "values", "exit", "carries")
    carries = node.get("carries")
    return Return(
        values=node["values"].each(Node.string),
        exit=node["exit"].string(),
        carries=() if carries is None else carries.each(Node.string),
    )


def _edge_from_json(node: Node) -> Edge:
    node.only("kind", "target", "values")
    node["kind"].choice(("edge",))
    return Edge(node["target"].string(), node["values"].each(Node.string))


def _gate_to_json(gate: Gate) -> Json:
    if isinstance(gate, ConstantGate):
        return {"kind": "constant", "action": gate.action, "actions": gate.actions}
    return {
        "kind": "linear",
        "reads": list(gate.reads),
        "weight": [list(row) for row in gate.weight],
        "bias": list(gate.bias),
    }


def _gate_from_json(node: Node) -> Gate:
    if node["kind"].choice(("constant", "linear")) == "constant":
        node.only("kind", "action", "actions")
        return ConstantGate(node["action"].integer(), node["actions"].integer(1))
    node.only("kind", "reads", "weight", "bias")
    return LinearGate(
        reads=node["reads"].each(Node.string),
        weight=node["weight"].each(lambda row: row.each(Node.number)),
        bias=node["bias"].each(Node.number),
    )


def _structure_from_json(node: Node) -> OutputStructure:
    kind = node["kind"].choice(("tensor", "dict", "tuple"))
    if kind != "dict":
        return OutputStructure(kind)
    return OutputStructure(kind, node["key"].string())


def _file_from_json(node: Node) -> FileEntry:
    return FileEntry(_sha256_from_json(node["sha256"]), node["size_bytes"].integer())


def _sha256_from_json(node: Node) -> str:
    sha256 = node.string()
    if len(sha256) != 64 or set(sha256) - set("0123456789abcdef"):
        node.fail("expected 64 lower-case hexadecimal digits")
    return sha256


def _part_to_json(part: Part) -> Json:
    return {"kind": part.kind, "edges": [list(edge) for edge in part.edges], "whole": part.whole}


def _part_from_json(node: Node) -> Part:
    node.only("kind", "edges", "whole")
    return Part(
        kind=cast(PartKind, node["kind"].choice(("near", "far"))),
        edges=node["edges"].each(_pair_from_json),
        whole=_sha256_from_json(node["whole"]),
    )


def _pair_from_json(node: Node) -> tuple[str, str]:
    names = node.each(Node.string)
    if len(names) != 2:
        node.fail(f"expected two block names, found {len(names)}")
    return names[0], names[1]


def _extensions(node: Node) -> Mapping[str, Json]:
    found = node.get("extensions")
    return {} if found is None else found.mapping()
