"""Compiles the emulated driver, and kernels for it, with g++; each version once."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ["BuildError", "build_driver", "build_image", "compiler"]

HERE = Path(__file__).resolve().parent
CACHE = HERE.parent.parent / "build" / "emulated_cuda"
COMMON = ("-std=c++17", "-O1", "-fPIC")
STRICT = ("-Wall", "-Wextra", "-Werror")
# Kernels call the emulator at every access to memory, and where one is misaligned or beyond an array.
CHECKED = (
    "-fsanitize=kernel-address",
    "--param=asan-instrumentation-with-call-threshold=0",
    "--param=asan-stack=0",
    "--param=asan-globals=0",
    "-fsanitize=alignment,bounds,null",
    "-Wno-unknown-pragmas",
)


class BuildError(Exception):
    """g++ does not take something: with what it says."""


def compiler() -> str | None:
    """The path of g++, if there is one."""
    return shutil.which("g++")


def build_driver() -> Path:
    """The emulated driver as a shared library."""
    sources = sorted(HERE.glob("*.cpp"))
    key = _hash([path.read_bytes() for path in (*sources, *sorted(HERE.glob("*.h")))])
    target = CACHE / key / "libcuda.so.1"
    if not target.exists():
        with tempfile.TemporaryDirectory() as folder:
            objects = [Path(folder, f"{source.stem}.o") for source in sources]
            _run_all(
                [
                    [*COMMON, *STRICT, "-c", str(s), "-o", str(o)]
                    for s, o in zip(sources, objects, strict=True)
                ],
            )
            _link(target, [*map(str, objects), "-ldl"])
    return target


def build_image(source: str) -> bytes:
    """Compile CUDA C++ to what the emulated driver loads as a module.

    Args:
        source: In the subset that ``kernels.cu`` keeps to.
    """
    names = re.findall(r"__global__\s+void\s+(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\s*\(", source)
    key = _hash([source.encode(), *(path.read_bytes() for path in sorted(HERE.glob("*.h")))])
    target = CACHE / key / "kernels.so"
    if not target.exists():
        kernels = ", ".join(f"EMULATED_KERNEL({name})" for name in names)
        text = (
            f'#include "kernel_shim.h"\n#line 1 "kernels.cu"\n{source}\n'
            f"static const EmulatedKernel emulated_kernels[] = {{{kernels}}};\n"
            '#include "kernel_hooks.h"\n'
        )
        with tempfile.TemporaryDirectory() as folder:
            file, image = Path(folder, "image.cpp"), str(Path(folder, "image.o"))
            file.write_text(text, encoding="utf-8")
            _run_all([[*COMMON, *CHECKED, f"-I{HERE}", "-c", str(file), "-o", image]])
            _link(target, [image, "-Wl,-Bsymbolic,-z,defs"])
    return target.read_bytes()


def _hash(contents: Sequence[bytes]) -> str:
    flags = " ".join((*COMMON, *CHECKED)).encode()
    return hashlib.sha256(b"\0".join((*contents, flags))).hexdigest()[:16]


def _link(target: Path, arguments: Sequence[str]) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    unfinished = target.with_suffix(f".{os.getpid()}")
    _run_all([["-shared", "-o", str(unfinished), *arguments]])
    unfinished.replace(target)


def _run_all(commands: Sequence[Sequence[str]]) -> None:
    """Run g++ several times at once."""
    running = [subprocess.Popen(["g++", *command], stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[1] for process in running]
    if any(process.returncode for process in running):
        raise BuildError("\n".join(text for text in said if text))
