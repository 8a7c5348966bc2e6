"""Fine-tuning on a GPU: as on a CPU, but for rounding. For `make gpu-check`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from trained import stripes

samples = pytest.importorskip("joint_samples", reason="a package that training needs is not installed")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]

BATCHES = 5
ALIKE: dict[str, Any] = {"rtol": 0.05, "atol": 0.05}


def test_it_learns_what_it_learns_on_a_cpu_and_comes_back_to_it() -> None:
    from exitcompiler.capture import capture

    model = samples.small_network()
    program = capture(model, stripes(4, seed=1)[0]).program
    before = {path: tensor.clone() for path, tensor in model.state_dict().items()}
    there = samples.tune(program=program, device="cuda", teacher=0.5, epochs=3)
    here = samples.tune(program=program, device="cpu", teacher=0.5, epochs=3)
    np.testing.assert_allclose(there.history, here.history, **ALIKE)
    assert there.device is not None
    assert there.device.startswith("cuda (")
    assert json.loads(json.dumps(there.notes)) == there.notes
    for state in (samples.state_of(there), program.entry.body.state_dict(), model.state_dict()):
        assert {tensor.device.type for tensor in state.values()} == {"cpu"}
    assert all(torch.equal(tensor, before[path]) for path, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", ["stripe_rows", "NoisyLoader"])
@pytest.mark.parametrize("stop_after", [BATCHES, BATCHES + 3])
def test_an_interrupted_training_goes_on(tmp_path: Path, make: str, stop_after: int) -> None:
    options: dict[str, Any] = {"epochs": 3, "device": "cuda", "teacher": 0.5, "mixup": 0.5}
    whole = samples.tune(getattr(samples, make)(), **options)
    with pytest.raises(KeyboardInterrupt):
        samples.tune(
            getattr(samples, make)(),
            step=samples.CountedStep(stop_after),
            checkpoint=tmp_path,
            checkpoint_minutes=0.0,
            **options,
        )
    resumed = samples.tune(getattr(samples, make)(), checkpoint=tmp_path, checkpoint_minutes=0.0, **options)
    assert resumed.resumed_at == (stop_after - 1) // BATCHES
    np.testing.assert_allclose(resumed.history, whole.history, **ALIKE)


def test_it_goes_on_where_a_cpu_stopped(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        samples.tune(epochs=2, step=samples.CountedStep(BATCHES + 2), checkpoint=tmp_path, device="cpu")
    resumed = samples.tune(epochs=2, checkpoint=tmp_path, device="cuda")
    np.testing.assert_allclose(resumed.history, samples.tune(epochs=2).history, **ALIKE)


def test_without_labels_and_in_mixed_precision() -> None:
    mixed = samples.tune(samples.stripe_rows(labelled=False), device="cuda", mixed_precision=True, epochs=3)
    full = samples.tune(samples.stripe_rows(labelled=False), device="cuda", epochs=3)
    assert full.precision == "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        assert mixed.precision == "bfloat16"
    np.testing.assert_allclose(mixed.history, full.history, rtol=0.1, atol=0.1)
    assert {tensor.dtype for tensor in samples.state_of(mixed).values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize("mixed", [False, True])
def test_a_network_that_makes_tensors_itself_and_is_recurrent(mixed: bool) -> None:
    options: dict[str, Any] = {"program": samples.reading_program(), "heads": {}, "reads": {}, "teacher": 0.5}
    tuned = samples.tune(
        samples.token_rows(),
        epochs=8,
        lr=0.02,
        adamw_lr=0.02,
        device="cuda",
        mixed_precision=mixed,
        **options,
    )
    assert tuned.history[-1][0] < tuned.history[0][0]
    inputs = samples.token_rows().inputs
    with torch.no_grad():
        (answer,) = tuned.program.entry.run(inputs).values()
    assert answer.isfinite().all()


def test_full_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from exitcompiler.errors import TrainingError
    from exitcompiler.finetuning import loop

    def fill(*given: Any) -> torch.Tensor:
        return torch.empty(1 << 50, device="cuda")

    monkeypatch.setattr(loop, "exit_losses", fill)
    with pytest.raises(TrainingError, match="memory is full"):
        samples.tune(device="cuda")


def test_the_small_program_was_not_moved() -> None:
    samples.tune(device="cuda")
    assert {t.device.type for t in samples.small_program().entry.body.state_dict().values()} == {"cpu"}
