"""The kernels of a device graph: compiled for every architecture, arguments laid out as they read them."""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import pytest

from exitcompiler.errors import BackendUnavailableError, LoweringError
from exitcompiler.runtime import cuda_kernels
from exitcompiler.runtime.cuda_kernels import (
    COMPACT,
    COPY,
    GATHER,
    GUARD,
    KERNELS,
    MOST_ROWS,
    MOVE,
    PICK_BUCKET,
    ROUTE,
    WAY,
    compile_kernels,
    kernel_source,
)

ET_EXEC, EM_CUDA, SHT_SYMTAB = 2, 190, 2
STT_FUNC, STB_GLOBAL, SHN_UNDEF = 2, 1, 0
STRUCTURES = {
    "Copy": COPY,
    "Way": WAY,
    "Move": MOVE,
    "RouteArguments": ROUTE,
    "GuardArguments": GUARD,
    "CompactArguments": COMPACT,
    "PickBucketArguments": PICK_BUCKET,
    "GatherArguments": GATHER,
}


@dataclass(frozen=True)
class Symbol:
    name: str
    type: int
    binding: int
    section: int


@dataclass(frozen=True)
class Elf:
    type: int
    machine: int
    symbols: tuple[Symbol, ...]


def read_elf(image: bytes) -> Elf:
    """Header and symbols of a 64-bit little-endian ELF file."""
    assert image[:6] == b"\x7fELF\x02\x01"
    kind, machine = struct.unpack_from("<HH", image, 16)
    (table,) = struct.unpack_from("<Q", image, 40)
    size, count, _ = struct.unpack_from("<HHH", image, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", image, table + i * size) for i in range(count)]
    symbols = []
    for section in sections:
        if section[1] != SHT_SYMTAB:
            continue
        _, _, _, _, offset, length, link, _, _, step = section
        names = sections[link][4]
        for at in range(offset, offset + length, step):
            name, info, _, index, _, _ = struct.unpack_from("<IBBHQQ", image, at)
            text = image[names + name : image.index(b"\0", names + name)].decode()
            symbols.append(Symbol(text, info & 15, info >> 4, index))
    return Elf(kind, machine, tuple(symbols))


def functions_of(elf: Elf, *, defined: bool) -> set[str]:
    return {
        symbol.name
        for symbol in elf.symbols
        if symbol.type == STT_FUNC
        and symbol.binding == STB_GLOBAL
        and (symbol.section != SHN_UNDEF) is defined
    }


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_the_kernels_compile_to_a_cubin_that_needs_the_conditional_setter_alone(architecture: str) -> None:
    elf = read_elf(compile_kernels(architecture))
    assert (elf.type, elf.machine) == (ET_EXEC, EM_CUDA)
    assert functions_of(elf, defined=False) == {"cudaGraphSetConditional"}
    assert functions_of(elf, defined=True) == {*KERNELS}
    needed = {s.name for s in elf.symbols if s.section == SHN_UNDEF and s.binding == STB_GLOBAL}
    assert needed == {"cudaGraphSetConditional"}  # nor data


def test_another_undefined_function_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    # ptxas takes no extern that it does not know; this one it does.
    source = kernel_source() + (
        '\nextern "C" __device__ int vprintf(const char *, const char *);'
        '\nextern "C" __global__ void talks() { vprintf("", ""); }\n'
    )
    monkeypatch.setattr(cuda_kernels, "kernel_source", lambda: source)
    elf = read_elf(compile_kernels.__wrapped__("sm_90"))
    assert functions_of(elf, defined=False) == {"cudaGraphSetConditional", "vprintf"}


def test_one_compilation_serves_all_who_ask() -> None:
    assert compile_kernels("sm_90") is compile_kernels("sm_90")


@pytest.mark.parametrize("name", STRUCTURES)
def test_structures_lie_in_memory_as_the_kernels_read_them(name: str) -> None:
    source = re.sub(r"//.*", "", kernel_source())
    found = re.search(rf"struct {name} \{{(.*?)\}};", source, re.DOTALL)
    assert found
    fields = {}
    for declaration in filter(None, map(str.strip, found[1].split(";"))):
        kind, field = re.fullmatch(r"(.*?)(\w+)", declaration, re.DOTALL).groups()
        fields[field] = {"int": "i4", "unsigned int": "u4", "long long": "i8"}.get(kind.strip(), "u8")
        assert fields[field] != "u8" or "*" in kind
    expected = np.dtype(list(fields.items()), align=True)
    assert STRUCTURES[name] == expected
    assert f"static_assert(sizeof({name}) == {expected.itemsize}," in source


def test_the_source_and_its_description_agree_on_the_most_rows() -> None:
    assert f"#define MOST_ROWS {MOST_ROWS}\n" in kernel_source()


def test_what_nvrtc_refuses_is_an_error_with_its_log() -> None:
    with pytest.raises(LoweringError, match=r"(?s)sm_12:.*invalid value for --gpu-architecture.*newer than"):
        compile_kernels("sm_12")


def test_what_does_not_compile_is_an_error_with_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "kernel_source", lambda: "int main() { return nonsense; }")
    with pytest.raises(LoweringError, match=r'kernels.cu\(1\): error: identifier "nonsense" is undefined'):
        compile_kernels.__wrapped__("sm_90")


def test_without_nvrtc_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import cuda.bindings

    def missing() -> None:
        raise RuntimeError("libnvrtc.so.13 not found")

    absent = ModuleType("nvrtc")
    absent.nvrtcVersion = missing
    monkeypatch.setattr(cuda.bindings, "nvrtc", absent)
    with pytest.raises(BackendUnavailableError, match=r"(?s)libnvrtc.*pip install 'exitcompiler\[cuda\]'"):
        compile_kernels.__wrapped__("sm_90")
