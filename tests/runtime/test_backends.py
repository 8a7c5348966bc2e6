"""Backends and their engines."""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from onnx_programs import TestProgram, chain, random_rows, to_onnx

from exitcompiler.controlflow import Branch, EngineSignature, LinearGate, engine_signature
from exitcompiler.errors import BackendUnavailableError, ExitCompilerError, InputError, LoweringError
from exitcompiler.runtime import backends
from exitcompiler.runtime.backends import available_backends, create_backend, numpy_dtype
from exitcompiler.runtime.rows import gate_parameters
from exitcompiler.runtime.single_row import aligned_empty
from exitcompiler.runtime.torch_backend import torch_engine

ONNX_BACKENDS = [
    pytest.param(
        "onnxruntime", marks=pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="")
    ),
    pytest.param("openvino", marks=pytest.mark.skipif(not importlib.util.find_spec("openvino"), reason="")),
]


@pytest.mark.parametrize("name", ONNX_BACKENDS)
@pytest.mark.parametrize("static_batch", [None, 1])
def test_an_engine_gives_what_its_block_computes(name: str, static_batch: int | None) -> None:
    program = chain(1)
    block = program.flow.entry
    signature = engine_signature(block)
    backend = create_backend(name, threads=2)
    engine = backend.load(to_onnx(block, program.bodies["first"]), signature, static_batch=static_batch)
    runner = engine.runner()
    for count in (1, 1) if static_batch else (5, 2):
        inputs = [random_rows(count, count), *gate_parameters(block)]
        expected = program.engine(block).run(inputs)
        for found in (engine.run(inputs), runner(inputs)):
            assert [f.dtype for f in found] == [numpy_dtype(s) for s in signature.outputs.values()]
            for a, b in zip(found, expected, strict=True):
                np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ONNX_BACKENDS)
def test_bound_buffers_are_read_and_written_in_place(name: str) -> None:
    program = chain(1)
    block = program.flow.entry
    signature = engine_signature(block)
    engine = create_backend(name, threads=1).load(
        to_onnx(block, program.bodies["first"]), signature, static_batch=1
    )
    inputs = [aligned_empty(spec, 1) for spec in signature.inputs.values()]
    outputs = [aligned_empty(spec, 1) for spec in signature.outputs.values()]
    assert all(array.ctypes.data % 64 == 0 for array in (*inputs, *outputs))
    call = engine.bind(inputs, outputs)
    for seed in range(3):
        values = [random_rows(1, seed), *(p + seed for p in gate_parameters(block))]
        for buffer, value in zip(inputs, values, strict=True):
            buffer[...] = value
        call()
        for found, expected in zip(outputs, program.engine(block).run(values), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("name", ONNX_BACKENDS)
def test_what_an_engine_returned_stays_as_it_is(name: str) -> None:
    program = chain(1)
    block = program.flow.entry
    engine = create_backend(name, threads=1).load(
        to_onnx(block, program.bodies["first"]), engine_signature(block)
    )
    first = engine.run([random_rows(3, 0), *gate_parameters(block)])
    kept = [array.copy() for array in first]
    engine.run([random_rows(3, 1), *gate_parameters(block)])
    for a, b in zip(first, kept, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", ONNX_BACKENDS)
def test_models_that_do_not_fit(name: str) -> None:
    program = chain(1)
    backend = create_backend(name, threads=1)
    model, signature = (
        to_onnx(program.flow.entry, program.bodies["first"]),
        engine_signature(program.flow.entry),
    )
    with pytest.raises(LoweringError, match="does not take the model"):
        backend.load(b"\x08\x0agarbage", signature)
    with pytest.raises(LoweringError, match="the model's outputs are"):
        backend.load(model, EngineSignature(signature.inputs, {"h": signature.outputs["h"]}))
    with pytest.raises(LoweringError, match="the model's inputs are"):
        backend.load(model, EngineSignature({"y": signature.inputs["x"]}, signature.outputs))


def torch_body(program: TestProgram, name: str) -> object:
    body = program.bodies[name]
    params = list(program.flow.block(name).params)

    def run(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        values = {p: t.numpy() for p, t in zip(params, tensors, strict=True)}
        return tuple(torch.from_numpy(affine(values)) for affine in body.values())

    return run


def test_the_torch_engine_evaluates_the_gate() -> None:
    for seed in range(5):
        program = chain(seed)
        block = program.flow.entry
        engine = torch_engine(block, torch_body(program, "first"), threads=1)  # type: ignore[arg-type]
        inputs = [random_rows(60, seed), *gate_parameters(block)]
        for a, b in zip(engine.run(inputs), program.engine(block).run(inputs), strict=True):
            np.testing.assert_array_equal(a, b)
            assert a.dtype == b.dtype


def test_a_tie_goes_to_the_lowest_action() -> None:
    program = chain(0)
    block = program.flow.entry
    assert isinstance(block.terminator, Branch)
    assert isinstance(block.terminator.gate, LinearGate)
    ties = [np.zeros((2, 2), np.float32), np.zeros(2, np.float32)]
    engines = [torch_engine(block, torch_body(program, "first"))]  # type: ignore[arg-type]
    engines += [
        create_backend(name, threads=1).load(to_onnx(block, program.bodies["first"]), engine_signature(block))
        for name in ("onnxruntime", "openvino")
        if name in available_backends()
    ]
    for engine in engines:
        assert engine.run([random_rows(4), *ties])[-1].tolist() == [0, 0, 0, 0]


def test_torch_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    program = chain(0)
    engine = torch_engine(program.flow.entry, torch_body(program, "first"), threads=before + 1)  # type: ignore[arg-type]
    engine.run([random_rows(1), *gate_parameters(program.flow.entry)])
    assert torch.get_num_threads() == before


def test_asking_for_what_there_is_not() -> None:
    with pytest.raises(InputError, match=r"unknown backend 'tpu'.*\n.*'onnxruntime', 'openvino'"):
        create_backend("tpu")
    with pytest.raises(InputError, match="threads=0"):
        create_backend("onnxruntime", threads=0)
    with pytest.raises(BackendUnavailableError, match=r"'onnxruntime' has no precision 'bf16'.*\n.*openvino"):
        create_backend("onnxruntime", precision="bf16")
    with pytest.raises(BackendUnavailableError, match="no precision 'int4'"):
        create_backend("openvino", precision="int4")
    with pytest.raises(ExitCompilerError, match="does not run ONNX"):
        create_backend("torch").load(b"", EngineSignature({}, {}))


def test_a_missing_backend_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr(
        backends.importlib.util, "find_spec", lambda name: None if name == "openvino" else real(name)
    )
    assert "openvino" not in available_backends()
    with pytest.raises(BackendUnavailableError, match="pip install openvino; installed here: onnxruntime"):
        create_backend("openvino")


def test_openvino_precision_is_what_was_asked_for() -> None:
    pytest.importorskip("openvino")
    import openvino as ov

    program = chain(1)
    block = program.flow.entry
    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    for precision, hint in (("fp32", ov.Type.f32), ("bf16", ov.Type.bf16)):
        if precision == "bf16" and "BF16" not in capabilities:
            with pytest.raises(BackendUnavailableError, match="no bf16"):
                create_backend("openvino", precision="bf16")
            continue
        engine = create_backend("openvino", precision=precision, threads=1).load(
            to_onnx(block, program.bodies["first"]), engine_signature(block)
        )
        assert engine._compiled.get_property("INFERENCE_PRECISION_HINT") == hint  # type: ignore[attr-defined]


def test_idle_workers_of_onnxruntime_sessions_do_not_spin() -> None:
    pytest.importorskip("onnxruntime")
    from exitcompiler.runtime.onnxruntime_backend import OnnxRuntimeBackend

    options = OnnxRuntimeBackend(threads=2)._options
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert (options.intra_op_num_threads, options.inter_op_num_threads) == (2, 1)


def test_a_process_of_ours_shares_threads_where_there_are_several_of_onnxruntime() -> None:
    pytest.importorskip("onnxruntime")
    script = """
        from exitcompiler.runtime.backends import share_threads
        from exitcompiler.runtime.onnxruntime_backend import _shared_pool

        share_threads("onnxruntime", 1)
        share_threads("openvino", 2)
        assert _shared_pool.threads is None
        share_threads("auto", 2)
        assert _shared_pool.threads == 2
    """
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": ""}
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, env=environment, timeout=60)


def test_onnxruntime_sessions_can_share_one_thread_pool() -> None:
    pytest.importorskip("onnxruntime")
    script = """
        from exitcompiler.errors import BackendUnavailableError
        from exitcompiler.runtime.backends import create_backend
        from exitcompiler.runtime.onnxruntime_backend import share_thread_pool
        from onnx_programs import chain, to_onnx, random_rows
        from exitcompiler.runtime.rows import gate_parameters
        from exitcompiler.controlflow import engine_signature

        share_thread_pool(2)
        share_thread_pool(2)
        program = chain(1)
        block = program.flow.entry
        engine = create_backend("onnxruntime", threads=2).load(
            to_onnx(block, program.bodies["first"]), engine_signature(block))
        engine.run([random_rows(3), *gate_parameters(block)])
        for wrong in (lambda: share_thread_pool(3), lambda: create_backend("onnxruntime", threads=1)):
            try:
                wrong()
            except BackendUnavailableError as error:
                assert "share a pool of 2 threads" in str(error), error
            else:
                raise AssertionError("accepted")
    """
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PATH": ""},
        timeout=60,
    )


@pytest.mark.skipif(
    not importlib.util.find_spec("openvino") or not hasattr(signal, "SIGUSR1"), reason="needs both"
)
def test_signals_are_handled_after_a_backend_was_freed_on_another_thread() -> None:
    script = """
        import gc, os, signal, threading
        from exitcompiler.runtime.backends import create_backend
        handled = []
        signal.signal(signal.SIGUSR1, lambda *given: handled.append(given))
        kept = [create_backend("openvino", threads=1)]
        thread = threading.Thread(target=lambda: (kept.clear(), gc.collect()))
        thread.start()
        thread.join()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert len(handled) == 1
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=True, timeout=60)
