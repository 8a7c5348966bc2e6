"""The cuda backend as far as it goes without a GPU: what it needs, what it says, what it prepares."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from device_programs import images, network_with_exits
from emulated_cuda import emulated_device
from programs import aten, build_body

import exitcompiler
from exitcompiler.controlflow import ACTION, DTYPES, EngineSignature, ValueSpec, engine_signature
from exitcompiler.errors import BackendUnavailableError, DeviceError, InputError, LoweringError
from exitcompiler.program import torch_dtype
from exitcompiler.runtime import backends
from exitcompiler.runtime.backends import available_backends, create_backend, unavailable_reason
from exitcompiler.runtime.cuda_backend import _TYPES, CudaBackend, _Address, _explained, _rewrite
from exitcompiler.runtime.device import DeviceArray
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.runtime.torch_bodies import Place, move_body, run_block
from exitcompiler.settings import Settings
from exitcompiler.targets import candidate_backends

NORM = torch.ops.aten._native_batch_norm_legit_no_training.default

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@no_gpu
@pytest.mark.parametrize("backend", ["cuda", "tensorrt"])
def test_without_a_gpu_there_is_one_clear_error_at_once(backend: str) -> None:
    assert backend not in available_backends()
    with pytest.raises(BackendUnavailableError, match=r"NVIDIA driver|not installed"):
        create_backend(backend)
    with pytest.raises(BackendUnavailableError):  # before it looks at the model or the data
        exitcompiler.compile(None, None, backend=backend, precision="fp16")  # type: ignore[arg-type]


def test_packages_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_installed", lambda package: package == "torch")
    assert unavailable_reason("cuda") == "cuda is not installed (cuda.bindings and safetensors)"
    assert unavailable_reason("tensorrt") == (
        "tensorrt is not installed (tensorrt or tensorrt_rtx and cuda.bindings)"
    )
    with pytest.raises(
        BackendUnavailableError,
        match=r"cuda\.bindings and safetensors cannot be imported\n.*pip install 'exitcompiler\[cuda\]'",
    ):
        create_backend("cuda")


def test_what_is_available_depends_on_packages_and_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "is_installed", lambda package: True)
    monkeypatch.setattr(backends, "_has_gpu", lambda: True)
    assert available_backends() == ("onnxruntime", "openvino", "torch", "cuda", "tensorrt")
    monkeypatch.setattr(backends, "_has_gpu", lambda: False)
    assert available_backends() == ("onnxruntime", "openvino", "torch")
    assert unavailable_reason("cuda") == "cuda needs an NVIDIA GPU, and there is none here"


def test_auto_asks_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    monkeypatch.setattr("exitcompiler.targets.unavailable_reason", lambda _: None)
    monkeypatch.setattr("exitcompiler.targets.create_backend", lambda name, **_: made.append(name))
    candidate_backends(Settings())
    assert made == ["onnxruntime", "openvino"]
    monkeypatch.undo()
    with pytest.raises(
        BackendUnavailableError, match=r"'fp16', is installed\n.*backend='cuda' or 'tensorrt'"
    ):
        candidate_backends(Settings(precision="fp16"))
    with pytest.raises(BackendUnavailableError, match=r"no precision 'fp16'\n.*'cuda' or 'tensorrt'"):
        create_backend("onnxruntime", precision="fp16")
    with pytest.raises(InputError, match="unknown precision"):
        Settings(precision="int4")


@no_gpu
def test_a_torch_without_cuda_is_said() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA")
    with emulated_device(), pytest.raises(BackendUnavailableError, match=r"build without CUDA\n.*CUDA 12.8"):
        CudaBackend(threads=1)
    with (
        emulated_device(driver_version=12040),
        pytest.raises(BackendUnavailableError, match=r"12\.8 or later"),
    ):
        CudaBackend(threads=1)
    with pytest.raises(BackendUnavailableError, match=r"no precision 'int8'\n.*fp32, fp16, bf16"):
        CudaBackend(precision="int8", threads=1)


def test_it_runs_no_onnx() -> None:
    backend = CudaBackend.__new__(CudaBackend)
    with pytest.raises(LoweringError, match=r"does not run ONNX.*\n.*tensorrt"):
        backend.load(b"", EngineSignature({}, {}))


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_memory_is_described_as_torch_reads_it(dtype: str) -> None:
    found = _Address(DeviceArray(512, (3, 2), dtype)).__cuda_array_interface__
    assert (found["shape"], found["data"], found["strides"], found["version"]) == (
        (3, 2),
        (512, False),
        None,
        3,
    )
    spec = ValueSpec((3, 2), dtype)
    assert np.dtype(_TYPES[dtype]).itemsize == torch_dtype(spec).itemsize
    if dtype != "bfloat16":
        assert np.dtype(found["typestr"]) == np.dtype(dtype)


def test_a_body_is_moved_with_all_that_it_makes() -> None:
    spec = ValueSpec(("batch", 3), "float32")
    body = build_body({"x": spec}, [("y", aten.add.Tensor, ("x", "w"))], ["y"], {"w": torch.ones(3)})
    graph = body.graph
    output = graph.output_node()
    (y,) = output.args[0]  # type: ignore[misc]
    with graph.inserting_before(output):
        full = graph.call_function(aten.full.default, ([3], 2.0), {"device": torch.device("cpu")})
        z = graph.call_function(aten.mul.Tensor, (y, full))
    output.args = ((z,),)
    body.recompile()
    known: dict[Place, torch.Tensor] = {}
    moved = move_body(body, torch.device("meta"), known)
    (result,) = moved(torch.empty(4, 3, device="meta"))
    assert result.device.type == "meta"
    assert [tensor.device.type for tensor in moved.state_dict().values()] == ["meta"]
    (found,) = body(torch.ones(4, 3))
    assert found.tolist() == [[4.0] * 3] * 4
    again = move_body(body, torch.device("meta"), known)
    assert next(again.buffers()) is next(moved.buffers())


def test_batch_norms_are_folded_and_what_nothing_reads_is_let_go() -> None:
    body = move_body(network_with_exits().entry.body, torch.device("cpu"), {})
    x = images(5)
    with torch.no_grad():
        expected = body(x)
        _rewrite(body)
        found = body(x)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    assert len(body.graph.find_nodes(op="call_function", target=NORM)) == 1  # the head's
    assert {name for name, _ in body.named_buffers()} == {
        node.target for node in body.graph.find_nodes(op="get_attr")
    }


def test_weights_are_shared_only_as_long_as_somebody_has_them() -> None:
    spec = ValueSpec(("batch", 3), "float32")
    body = build_body({"x": spec}, [("y", aten.add.Tensor, ("x", "w"))], ["y"], {"w": torch.ones(3)})
    known: weakref.WeakValueDictionary[Place, torch.Tensor] = weakref.WeakValueDictionary()
    moved = move_body(body, torch.device("meta"), known)
    assert len(known) == 1
    del moved
    gc.collect()  # graph modules are circles
    assert len(known) == 0


def test_a_block_with_its_gate() -> None:
    block = network_with_exits().entry
    weight, bias = (torch.from_numpy(array) for array in gate_parameters(block))
    image = images(20)
    with torch.no_grad():
        values = run_block(
            block,
            lambda params: block.body(*params),
            {"image": image, "gate_weight": weight, "gate_bias": bias},
        )
    assert values.keys() >= engine_signature(block).outputs.keys()
    confidence = values["blocks_0_linear_confidence"]
    assert torch.equal(values[ACTION], (confidence[:, 0] + bias[0] < 0).long())


def test_errors_of_torch_are_explained_by_their_first_cause() -> None:
    def fail() -> None:
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors ...")
        finally:
            raise RuntimeError("operation failed due to a previous error during capture")

    with (
        pytest.raises(
            LoweringError, match=r"^here: not so: operation not permitted when stream is capturing\n"
        ),
        _explained("here", "not so"),
    ):
        fail()
    with (
        pytest.raises(DeviceError, match=r"CUDA out of memory.*\n.*smaller batch"),
        _explained("here", "not so"),
    ):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(DeviceError, match="as it is"), _explained("here", "not so"):
        raise DeviceError("as it is")


def test_what_the_caller_was_busy_with_is_no_cause() -> None:
    def ask() -> None:
        with _explained("here", "not so"):
            raise ValueError("the one")

    def be_busy() -> None:
        try:
            {}["other"]
        except KeyError:
            ask()

    with pytest.raises(LoweringError, match="not so: the one"):
        be_busy()
