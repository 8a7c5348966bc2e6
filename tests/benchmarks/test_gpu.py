"""The GPU check where there is no GPU: programs, arithmetic, tables, and its graphs on an emulated driver."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from emulated_cuda import Emulator, HostEngine, emulated_device, kernel_image, primary_context
from fake_tensorrt import FakeTensorRt
from gpu_sample import sample_run

from exitcompiler.interpreter import interpret
from exitcompiler.program import Block
from exitcompiler.runtime.batch_norm_folding import fold_batch_norms
from exitcompiler.runtime.cuda_driver import Driver
from exitcompiler.runtime.torch_backend import torch_engine


@dataclass
class Bench:
    """The emulated device as the benchmark sees it.

    Args:
        lab: A `gpu_lab.Lab`.
        emulator: What it runs on.
        ran: Block -> how often it ran, and on how many rows.
    """

    lab: Any
    emulator: Emulator
    ran: Counter[tuple[str, int]]


@pytest.fixture
def device(bench: Callable[[str], ModuleType]) -> Iterator[Bench]:
    gpu_lab = bench("gpu_lab")
    ran: Counter[tuple[str, int]] = Counter()
    with emulated_device() as emulator:
        driver = Driver.open()
        stream = driver.create_stream()

        def engine(block: Block) -> HostEngine:
            inner = torch_engine(block, lambda values: block.body(*values))

            def run(inputs: list[Any]) -> list[Any]:
                ran[block.name, len(inputs[0])] += 1
                return inner.run(inputs)

            counted = SimpleNamespace(signature=inner.signature, run=run)
            return HostEngine(counted, driver, emulator, block.name)

        effort = gpu_lab.Effort(turns=4, seconds=60.0, least=4, warm_up=0)
        lab = gpu_lab.Lab(driver, stream, engine, compile_image=lambda _: kernel_image(), effort=effort)
        with lab.part() as part:
            yield Bench(part, emulator, ran)
        driver.destroy_stream(stream)
        gc.collect()
        driver.close()
        assert emulator.alive() == {}


# Graphs, on the emulated driver


def test_chains_run_as_many_kernels_as_they_are_matched_with(
    bench: Callable[[str], ModuleType], device: Bench
) -> None:
    nodes, build = bench("gpu_nodes"), importlib.import_module("exitcompiler.runtime.cuda_graphs").build
    lab, count = device.lab, 5
    addresses = nodes.state_of_one_row(lab)
    module = lab.driver.load_module(kernel_image())
    for kind, (chain, kernels) in (*nodes.FLAT.items(), *nodes.NESTED.items()):
        graph = build(nodes.chain_plan(chain(count)), lab.driver, addresses, {}, module)
        graph.launch(lab.stream)
        lab.wait()
        ran = Counter(line.split()[0] for line in device.emulator.executed())
        assert ran["kernel"] == kernels(count) + 1, kind
        skipped = sum(line.endswith("none") for line in device.emulator.executed())
        assert skipped == (count if "not taken" in kind else 0), kind
        assert ran["if"] + ran["switch"] == count, kind
        graph.close()
    lab.driver.unload_module(module)


def test_nodes_are_measured_and_what_is_refused_is_told(
    bench: Callable[[str], ModuleType], device: Bench
) -> None:
    nodes = bench("gpu_nodes")
    found = nodes.measure_nodes(device.lab, nodes.FLAT, (0, 1, 3))
    assert found["refused"] == {}
    assert set(found["kinds"]) == set(nodes.FLAT)
    nested = nodes.measure_nodes(device.lab, nodes.NESTED, (0, 1, 3))
    assert set(nested["kinds"]) == {*nodes.NESTED, nodes.INSIDE}
    device.emulator.fail("cuGraphInstantiateWithParams", 801, call=8)
    found = nodes.measure_nodes(device.lab, nodes.FLAT, (0, 1, 3))
    ((name, reason),) = found["refused"].items()
    assert name == "IF, not taken 3"
    assert "CUDA_ERROR_NOT_SUPPORTED" in reason
    assert list(found["kinds"]["IF, not taken"]["chain_us"]) == ["0", "1"]


def test_single_rows(bench: Callable[[str], ModuleType], device: Bench, workload: Any) -> None:
    latency = bench("gpu_latency")
    found = latency.row_figures(device.lab, workload, workload.program, workload.whole)
    assert found["exit_rates"] == dict(zip(workload.program.exits, (0.5, 0.25, 0.25), strict=True))
    assert latency.HOST in found["wall"]["contenders"]
    assert latency.HOST not in found["device"]["contenders"]
    assert found["wall"]["turns"] == 4
    assert found["wall"]["over_ideal"]["value"] > 0
    json.dumps(found)


def test_a_host_that_branches_runs_the_blocks_that_the_row_needs(
    bench: Callable[[str], ModuleType], device: Bench, workload: Any
) -> None:
    host = bench("gpu_graphs").HostBranching(device.lab, workload.program)
    names = [block.name for block in workload.program.blocks]
    for exit_index in range(3):
        row = np.flatnonzero(workload.exit_index == exit_index)[0]
        device.ran.clear()
        host.stage(workload.x[row : row + 1])
        host.launch()
        device.lab.wait()
        assert dict(device.ran) == {(name, 1): 1 for name in names[: exit_index + 1]}


def test_batches_of_every_mix(bench: Callable[[str], ModuleType], device: Bench, workload: Any) -> None:
    found = bench("gpu_latency").batch_figures(device.lab, workload, workload.program, batch=8)
    assert found["mixes"][0]["rows_by_exit"] == [8, 0, 0]
    assert all("missing" not in mix for mix in found["mixes"])
    middle = workload.program.blocks[1].name
    # By rows: exactly as many as get there, which need not be a bucket.
    assert device.ran[middle, 6] > 0
    assert device.ran[middle, 7] == 0
    json.dumps(found)


def test_parity_is_found_and_its_absence_too(
    bench: Callable[[str], ModuleType], device: Bench, workload: Any
) -> None:
    checks = bench("gpu_checks")
    x, batches = workload.x[:8], (1, 3, 8)
    wanted = checks.answer_rows(workload.program, x)
    found = checks.parity(device.lab, workload.program, x, wanted, batches)
    assert [entry["rows"] for entry in found.values()] == [8, 6, 8]
    assert all(entry["same_exit"] == 1.0 and entry["relative"] < 1e-5 for entry in found.values())
    lower = importlib.import_module("exitcompiler.passes.cast_precision").cast_precision
    rounded = checks.parity(device.lab, lower(workload.program, "fp16"), x, wanted, (4,))
    assert all(1e-5 < entry["relative"] < 0.05 for entry in rounded.values())


def test_between_launch_and_result_the_driver_is_asked_for_launches_alone(
    bench: Callable[[str], ModuleType], device: Bench, workload: Any
) -> None:
    found = bench("gpu_checks").quiet_launches(device.lab, workload, (1, 5, 8), repeats=3)
    for entry in found.values():
        quiet = {"launches": 3, "calls": {"launch": 3}, "allocate": 0, "wait": 0, "taken_bytes": 0}
        assert entry == quiet


def test_calls_that_allocate_or_wait_are_told(bench: Callable[[str], ModuleType], device: Bench) -> None:
    checks = bench("gpu_checks")
    counting = checks.Counting(device.lab.driver)
    stats = {"num_device_alloc": 7, "segment.all.allocated": 3}

    class Executor:
        def run_device(self, inputs: list[Any], rows: int) -> None:
            counting.free(counting.malloc(256))
            stats["num_device_alloc"] += 1
            raise RuntimeError("called a synchronizing CUDA operation")

    cuda = SimpleNamespace(
        synchronize=lambda: None, set_sync_debug_mode=lambda mode: None, memory_stats=lambda: dict(stats)
    )
    found = checks.watch_calls(Executor(), None, 1, counting, cuda, 2)
    assert found["allocate"] == found["wait"] == 1
    assert found["device_allocations"] == 1
    assert found["segments"] == 0
    assert "synchronizing" in found["torch_waited"]


def test_memory_by_rows(bench: Callable[[str], ModuleType], device: Bench, workload: Any) -> None:
    found = bench("gpu_checks").memory(device.lab, workload.program, (1, 8), lambda: 0)
    assert found["8"]["values_bytes"] > found["1"]["values_bytes"] > 0
    assert found["8"]["nodes"]["switch"] == 3
    assert found["1"]["nodes"]["if"] == 2
    assert found["1"]["device_bytes"] >= found["1"]["values_bytes"] + found["1"]["tables_bytes"]


def test_the_steps_find_what_the_tables_show(
    bench: Callable[[str], ModuleType],
    device: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workload: Any,
) -> None:
    steps, checks = bench("gpu_steps"), bench("gpu_checks")
    monkeypatch.setattr(bench("gpu_lab"), "open_lab", lambda effort=None: nullcontext(device.lab))
    monkeypatch.setattr(steps, "_workload", lambda name: workload)
    monkeypatch.setattr(steps, "PARITY", ("fp32", "tf32", "fp16"))  # the emulation has no bfloat16
    monkeypatch.setattr(checks, "parity", functools.partial(checks.parity, batches=(1, 4)))
    found = sample_run()
    for name in ("nodes", "rows resnet56 fp32", "batches resnet56", "parity resnet56"):
        record = steps.Record(tmp_path / "figures.json")
        steps.run_step(name, record)
        found["steps"][name]["figures"] = json.loads((tmp_path / "figures.json").read_text())
    found["targets"] = bench("gpu_targets").judge(found)
    assert not [line for line in found["targets"] if "not measured" in line["measured"]]
    text = bench("gpu_text").section(found)
    assert "Could not be built" not in text
    assert "| 16 + 8 + 8 |" in text
    assert "| ResNet-56, 32x32 | fp16 | 4 |" in text


def test_the_step_of_tensorrt(
    bench: Callable[[str], ModuleType],
    device: Bench,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workload: Any,
) -> None:
    trt = FakeTensorRt("tensorrt", "11.4.0.106")
    nothing = device.emulator.host_function(lambda: None, "tensorrt")

    def launch(_: Any, stream: int) -> None:
        with primary_context() as (cuda, _):
            cuda.cuLaunchKernel(nothing, 1, 1, 1, 1, 1, 1, 0, stream, 0, 0)

    trt.launch = launch
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    steps = bench("gpu_steps")
    api = importlib.import_module("exitcompiler.runtime.tensorrt_api")
    monkeypatch.setattr(api, "installed_flavours", lambda: ("tensorrt",))
    monkeypatch.setattr(bench("gpu_lab"), "open_lab", lambda effort=None: nullcontext(device.lab))
    monkeypatch.setattr(steps, "_workload", lambda name: workload)
    record = steps.Record(tmp_path / "figures.json")
    steps.run_step("tensorrt resnet56", record)
    found = record.values["tensorrt"]
    assert len(found["contenders"]) == 3
    assert found["against"]["whole network, one TensorRT engine"]["value"] > 0
    monkeypatch.setattr(api, "installed_flavours", lambda: ())
    absent = steps.Record(tmp_path / "absent.json")
    steps.run_step("tensorrt resnet56", absent)
    assert absent.values == {"absent": "TensorRT is not installed"}


def test_pytorch_takes_turns_with_the_program(
    bench: Callable[[str], ModuleType], device: Bench, workload: Any
) -> None:
    gpu_torch = bench("gpu_torch")
    x = torch.from_numpy(workload.x[:1].copy())
    eager = gpu_torch.eager_network(device.lab, workload.network, x)
    found = bench("gpu_latency").compare_single_rows(device.lab, workload, workload.program, {"eager": eager})
    assert found["turns"] == 4
    assert found["against"]["eager"]["value"] > 0
    eager.stage(workload.x[5:6])
    np.testing.assert_array_equal(x.numpy(), workload.x[5:6])


def test_a_chain_written_with_cond_answers_like_the_program(
    bench: Callable[[str], ModuleType], workload: Any
) -> None:
    gpu_torch = bench("gpu_torch")
    bodies = {block.name: copy.deepcopy(block.body) for block in workload.program.blocks}
    assert sum(map(fold_batch_norms, bodies.values())) == 7  # all of ResNet-8, as `CondGraph` does it
    gates = gpu_torch.gate_tensors(workload.program, torch.device("cpu"))

    def cond(predicate: Any, if_true: Any, if_false: Any, operands: Any) -> Any:
        assert predicate.shape == ()
        return (if_true if predicate else if_false)(*operands)

    for row in range(6):
        x = torch.from_numpy(workload.x[row : row + 1])
        (wanted,) = interpret(workload.program, {"x": x}).outputs.values()
        with torch.inference_mode():
            answer = gpu_torch.run_chain(workload.program, bodies, gates, x, cond)
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)


def test_pytorch_takes_the_chain_for_conditional_nodes(
    bench: Callable[[str], ModuleType], workload: Any
) -> None:
    gpu_torch = bench("gpu_torch")
    if not gpu_torch.has_cond_in_graphs():
        pytest.skip(f"torch {torch.__version__} captures no torch.cond")
    from torch._higher_order_ops.cudagraph_conditional_nodes import CUDAGraphCaptureControlFlowOpDispatchMode

    bodies = {block.name: block.body for block in workload.program.blocks}
    gates = gpu_torch.gate_tensors(workload.program, torch.device("cpu"))
    x = torch.from_numpy(workload.x[:1])
    with (
        torch.inference_mode(),
        CUDAGraphCaptureControlFlowOpDispatchMode(),
        pytest.raises(ValueError, match="must be on a cuda device"),  # it got as far as making the node
    ):
        gpu_torch.run_chain(workload.program, bodies, gates, x, torch.ops.higher_order.cond)
