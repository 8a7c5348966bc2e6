"""Writes a program for trtexec: its blocks as ONNX, what their engines have to be, a script to build them."""

from __future__ import annotations

import hashlib
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Final

from exitcompiler.controlflow import EngineSignature, ValueSpec, engine_signature
from exitcompiler.errors import InputError, LoweringError
from exitcompiler.files import write_file
from exitcompiler.runtime.manifest import Artifact, Json, block_path
from exitcompiler.runtime.planning import powers_of_two, require_buckets
from exitcompiler.runtime.tensorrt_folder import BUILD_SCRIPT, DEVICE_FILE, ENGINES_FILE, ENGINES_FORMAT

__all__ = ["DEFAULT_BUCKETS", "export_trtexec"]

DEFAULT_BUCKETS: Final = powers_of_two(32)
"""For how many rows engines are built where nobody says otherwise."""

_UNSAFE: Final = re.compile(r"[^A-Za-z0-9_-]")
_VALUE_NAME: Final = re.compile(r"[A-Za-z0-9_./-]+")  # trtexec takes names apart at , : and '

_README: Final = """\
# Engines of a compiled program

    ./build.sh                      # with the trtexec on the PATH, or
    ./build.sh /path/to/trtexec     # TensorRT 10 or 11, on the GPU that is to run them

builds one engine per block, each with a profile for exactly {rows} rows. Further arguments are
passed on to trtexec, which runs in this folder.

Precision: {precision}. It is that of the models: no flag changes it.

Keep the folder together with the program that it was exported from, and load both:

    exitcompiler.load("OUT.exit", backend="tensorrt", engines="FOLDER")

The runtime finds an engine by the hash of its model (`{engines}`), and compares its inputs, outputs and
profiles with the program's. One of another TensorRT, another device (`{device}`) or another model is refused;
--versionCompatible and --hardwareCompatibilityLevel do not change that. What else `{engines}` says is for
whoever runs the engines without exitcompiler.

The engines are those of operating point {point}.
"""


def export_trtexec(artifact: Artifact, folder: Path, buckets: Sequence[int] = DEFAULT_BUCKETS) -> None:
    """Write the selected program as ONNX blocks with a script that builds their engines.

    ::

        00_first-1f0a.onnx  build.sh  engines.json  README.md      =>  ./build.sh  =>  00_first-1f0a.plan

    Args:
        artifact: As loaded.
        folder: Where to write; made if it does not exist. Engines that are there stay, but those of other
            models are not used: the names hold the models' hashes.
        buckets: The numbers of rows that every engine gets a profile for, rising.

    Raises:
        InputError: ``buckets`` make no sense, the program is in int8, or a file cannot be written.
        LoweringError: A value's name is none that trtexec takes.
    """
    require_buckets(buckets)
    manifest = artifact.manifest
    if manifest.precision == "int8":
        raise InputError(
            "the program is in int8 as CPUs have it, which TensorRT does not take",
            where="export",
            remedy="compile it with precision='fp32', or for a GPU: backend='tensorrt', precision='fp16'",
        )
    point = manifest.operating_points[manifest.selected]
    files: dict[str, bytes] = {}
    engines: list[Json] = []
    builds = []
    for number, (block, file) in enumerate(point.files.items()):
        content = artifact.files[block_path(file)]
        sha256 = hashlib.sha256(content).hexdigest()
        stem = f"{number:02d}_{_UNSAFE.sub('_', block)}-{sha256[:8]}"
        signature = engine_signature(point.control_flow.block(block))
        _require_names(block, signature)
        files[f"{stem}.onnx"] = content
        builds.append(shlex.join(["build", stem, *_profile_flags(signature.inputs, buckets)]))
        engines.append(
            {
                "block": block,
                "onnx": f"{stem}.onnx",
                "onnx_sha256": sha256,
                "plan": f"{stem}.plan",
                "buckets": list(buckets),
                "inputs": _specs_to_json(signature.inputs),
                "outputs": _specs_to_json(signature.outputs),
                "max_aux_streams": 0,
            }
        )
    facts = {
        "format": ENGINES_FORMAT,
        "point": point.name,
        "precision": manifest.precision,
        "engines": engines,
    }
    files[ENGINES_FILE] = json.dumps(facts, indent=2).encode()
    files["README.md"] = _README.format(
        rows=", ".join(map(str, buckets)),
        engines=ENGINES_FILE,
        device=DEVICE_FILE,
        precision=manifest.precision,
        point=point.name,
    ).encode()
    files[BUILD_SCRIPT] = _script(builds, f"{stem}.log")
    _write(folder, files)


def _require_names(block: str, signature: EngineSignature) -> None:
    for name in signature.inputs:
        if not _VALUE_NAME.fullmatch(name):
            raise LoweringError(
                f"trtexec takes no input called {name!r}",
                where=f"block {block!r}",
                remedy="rename the model's parameter, or use the TensorRT backend without trtexec",
            )


def _profile_flags(inputs: Mapping[str, ValueSpec], buckets: Sequence[int]) -> Iterator[str]:
    """One profile per bucket, for exactly this number of rows."""
    for number, rows in enumerate(buckets):
        shapes = ",".join(
            f"{name}:{'x'.join(str(rows if axis == 0 else n) for axis, n in enumerate(spec.shape))}"
            for name, spec in inputs.items()
            if spec.batch_axis == 0
        )
        yield f"--profile={number}"
        yield from (f"--{which}Shapes={shapes}" for which in ("min", "opt", "max"))


def _specs_to_json(specs: Mapping[str, ValueSpec]) -> dict[str, Json]:
    return {name: {"dtype": spec.dtype, "shape": list(spec.shape)} for name, spec in specs.items()}


def _script(builds: Sequence[str], last_log: str) -> bytes:
    template = (resources.files("exitcompiler") / "templates" / "build_engines.sh").read_text("utf-8")
    last = shlex.quote(last_log)
    return template.replace("@BUILDS@", "\n".join(builds)).replace("@LAST_LOG@", last).encode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_file(folder / name, content)
        (folder / BUILD_SCRIPT).chmod(0o755)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(folder)) from error
