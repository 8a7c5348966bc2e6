"""Training: that it learns, goes on as if it had not stopped, and says what went wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from joint_samples import (
    BATCH,
    CountedStep,
    NoisyLoader,
    linear_heads,
    reading_program,
    same_state,
    small_program,
    state_of,
    stripe_rows,
    token_rows,
    tune,
    tuning_of,
)
from models import captured, tokens
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from trained import stripes

from exitcompiler.data import Extent, Rows, TrainingData
from exitcompiler.errors import CalibrationError, InputError, TrainingError
from exitcompiler.finetuning import loop
from exitcompiler.finetuning.checkpoints import FILE, read_checkpoint, write_checkpoint
from exitcompiler.finetuning.joint_network import backbone_logits
from exitcompiler.finetuning.loop import train_jointly
from exitcompiler.heads import LinearHead
from exitcompiler.program import Program

BATCHES = 5
"""Of a pass over the forty rows, eight at a time."""


def _accuracy(program: Program, rows: Rows) -> float:
    with torch.no_grad():
        answers = program.entry.run(rows.inputs)[backbone_logits(program)].argmax(1).numpy()
    return float((answers == rows.labels).mean())


def test_training_lowers_every_loss_and_teaches_the_network() -> None:
    x, y = stripes(600, seed=3)
    rows = Rows({"image": torch.from_numpy(x)}, y)
    tuned = tune(rows, epochs=6, batch_size=30, teacher=0.0, lr=0.1, adamw_lr=0.02)
    assert [len(losses) for losses in tuned.history] == [3] * 6
    for first, last in zip(tuned.history[0], tuned.history[-1], strict=True):
        assert last < first
    x, y = stripes(300, seed=9)
    fresh = Rows({"image": torch.from_numpy(x)}, y)
    assert _accuracy(small_program(), fresh) < 0.4
    assert _accuracy(tuned.program, fresh) > 0.55
    assert tuned.resumed_at == 0
    assert not any(head.training for head in tuned.heads.values())


def test_the_same_seed_gives_the_same_weights_and_another_one_does_not() -> None:
    one = tune(mixup=0.5, seed=3)
    assert same_state(one, tune(mixup=0.5, seed=3))
    assert not same_state(one, tune(mixup=0.5, seed=4))


def test_torchs_own_generator_does_not_matter_where_rows_are_given() -> None:
    torch.manual_seed(77)
    one = tune()
    torch.rand(3)
    assert same_state(one, tune())


MIXED = {"mixup": 0.7, "freeze_batchnorm": True}


@pytest.mark.parametrize(
    ("make", "options", "stop_after"),
    [
        (stripe_rows, {}, 1), (stripe_rows, {}, BATCHES), (stripe_rows, {}, 3 * BATCHES - 1),
        (stripe_rows, {"accumulate": 2}, BATCHES + 3), (stripe_rows, MIXED, BATCHES + 3),
        (NoisyLoader, {}, BATCHES - 1), (NoisyLoader, {}, BATCHES),
        (NoisyLoader, {"accumulate": 2}, BATCHES + 3), (NoisyLoader, MIXED, 2 * BATCHES + 1),
    ],
)  # fmt: skip
def test_an_interrupted_training_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, make: Callable[[], Any], options: dict[str, Any], stop_after: int
) -> None:
    """Checkpoints after every step: it goes on in the middle of a pass."""
    kept: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_minutes": 0.0}
    whole = tune(make(), epochs=3, **options)
    with pytest.raises(KeyboardInterrupt):
        tune(make(), epochs=3, step=CountedStep(stop_after), **kept, **options)
    step = CountedStep()
    resumed = tune(make(), epochs=3, step=step, **kept, **options)
    assert same_state(resumed, whole)
    np.testing.assert_allclose(resumed.history, whole.history, rtol=1e-12)
    assert resumed.resumed_at == (stop_after - 1) // BATCHES  # the last batch is told before its pass is over
    assert step.batches == 3 * BATCHES


class _Augmented(torch.utils.data.Dataset[Any]):
    """Rows whose noise a loader's workers draw."""

    def __init__(self) -> None:
        self.rows = stripe_rows()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        assert self.rows.labels is not None
        return self.rows.inputs["image"][index] + torch.randn(1, 16, 16), int(self.rows.labels[index])


def test_an_interrupted_training_goes_on_with_a_loader_that_has_workers(tmp_path: Path) -> None:
    def loader() -> Any:
        return torch.utils.data.DataLoader(_Augmented(), batch_size=BATCH, shuffle=True, num_workers=1)

    whole = tune(loader())
    kept: dict[str, Any] = {"checkpoint": tmp_path, "checkpoint_minutes": 0.0}
    with pytest.raises(KeyboardInterrupt):
        tune(loader(), step=CountedStep(BATCHES + 3), **kept)
    resumed = tune(loader(), **kept)
    assert resumed.resumed_at == 1
    assert same_state(resumed, whole)


def test_it_goes_on_from_the_end_of_a_pass(tmp_path: Path) -> None:
    whole = tune(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        tune(epochs=3, step=CountedStep(2 * BATCHES + 2), checkpoint=tmp_path, checkpoint_minutes=60.0)
    resumed = tune(epochs=3, checkpoint=tmp_path)
    assert resumed.resumed_at == 2
    assert same_state(resumed, whole)
    assert resumed.history == whole.history


def test_a_checkpoint_written_on_the_way_changes_nothing(tmp_path: Path) -> None:
    assert same_state(tune(), tune(checkpoint=tmp_path, checkpoint_minutes=0.0))


class _Untouchable:
    """Data that nobody may look at."""

    def __iter__(self) -> Iterator[Any]:
        raise AssertionError("it was trained again")


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    first = tune(checkpoint=tmp_path)
    heads, reads = linear_heads(small_program())
    step = CountedStep()
    again = train_jointly(
        small_program(), heads, reads, TrainingData(_Untouchable(), ("image",)), Extent(40, BATCHES, True),
        tuning_of(checkpoint=tmp_path), seed=0, step=step,  # type: ignore[arg-type]
    )  # fmt: skip
    assert same_state(first, again)
    assert again.history == first.history
    assert again.resumed_at == 2
    assert step.batches == 2 * BATCHES


@pytest.mark.parametrize(
    "changed",
    [{"lr": 0.01}, {"epochs": 3}, {"seed": 1}, {"source": stripe_rows(41)}, {"freeze_batchnorm": True}],
)
def test_the_checkpoint_of_another_training_is_not_gone_on_from(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    tune(checkpoint=tmp_path, epochs=2, freeze_batchnorm=False, lr=0.02)
    other: dict[str, Any] = {"epochs": 2, "freeze_batchnorm": False, "lr": 0.02, **changed}
    with pytest.raises(TrainingError, match="of another training"):
        tune(checkpoint=tmp_path, **other)


def test_where_it_runs_and_how_often_it_is_kept_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(epochs=3)
    with pytest.raises(KeyboardInterrupt):
        tune(epochs=3, step=CountedStep(BATCHES + 2), checkpoint=tmp_path, checkpoint_minutes=60.0)
    asked: list[str] = []

    def elsewhere(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(loop, "training_device", elsewhere)
    monkeypatch.setattr(loop, "device_name", lambda device: "another one")
    step = CountedStep()
    resumed = tune(epochs=3, step=step, checkpoint=tmp_path, checkpoint_minutes=0.0, device="cuda:1")
    assert asked == ["cuda:1"]
    assert resumed.resumed_at == 1
    assert len(step.notes) == 2 * BATCHES  # it did train
    assert same_state(resumed, whole)
    assert (resumed.device, whole.device) == ("cpu, then another one", "cpu")
    again = tune(epochs=3, checkpoint=tmp_path)
    assert (again.device, again.precision) == ("cpu, then another one", "float32")


def test_the_checkpoint_of_another_network_is_not_gone_on_from(tmp_path: Path) -> None:
    tune(checkpoint=tmp_path)
    with pytest.raises(TrainingError, match="of another training"):
        tune(checkpoint=tmp_path, program=tune(epochs=1).program)


@pytest.mark.parametrize("lost", ["network.", "rng.order", "rng.drawing", "rng.mixing", "numbers"])
def test_a_checkpoint_that_lacks_something_is_refused(tmp_path: Path, lost: str) -> None:
    tune(checkpoint=tmp_path)
    with safe_open(tmp_path / FILE, framework="pt") as file:
        run = json.loads(file.metadata()["facts"])["run"]
    whole = read_checkpoint(tmp_path, run)
    assert whole is not None
    tensors = {path: tensor for path, tensor in whole.tensors.items() if not path.startswith(lost)}
    numbers = {} if lost == "numbers" else whole.numbers
    write_checkpoint(tmp_path, replace(whole, tensors=tensors, numbers=numbers))
    with pytest.raises(TrainingError, match="does not fit this version"):
        tune(checkpoint=tmp_path)


class _BreaksDown(LinearHead):
    """Answers with infinity from its seventh batch on."""

    calls = 0

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(features) * (math.inf if self.calls > 6 else 1.0)


def _breaking_heads(kind: type[_BreaksDown] = _BreaksDown) -> dict[Any, nn.Module]:
    heads, _ = linear_heads(small_program())
    (first, _), (second, head) = heads.items()
    breaking = kind.__new__(kind)
    breaking.__dict__.update(head.__dict__)
    return {first: heads[first], second: breaking}


def test_a_loss_that_is_not_finite_is_told_by_exit_pass_and_batch(tmp_path: Path) -> None:
    heads = _breaking_heads()
    with pytest.raises(TrainingError) as stopped:
        tune(heads=heads)
    said = str(stopped.value)
    first, second = ("/".join(key) for key in heads)
    assert f"not finite at {second}" in said
    assert first not in said
    assert "the network's end" not in said
    assert stopped.value.where == "fine-tuning, pass 2, batch 2"
    assert stopped.value.remedy is not None
    assert "lower lr" in stopped.value.remedy
    assert "checkpoint" not in said
    with pytest.raises(TrainingError, match=r"checkpoint in .* is of before") as stopped:
        tune(heads=_breaking_heads(), checkpoint=tmp_path)
    assert "another checkpoint folder" in str(stopped.value.remedy)


class _OverflowingStatistics(_BreaksDown):
    """Its statistics overflow in the last batch of the first pass; its answers do not."""

    def forward(self, features: Tensor) -> Tensor:
        self.calls += 1
        answer = LinearHead.forward(self, features)
        if self.calls == BATCHES:
            self.norm.running_var.data.fill_(math.inf)
        return answer


def test_statistics_that_are_not_finite_are_not_kept_and_the_pass_is_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="statistics are not finite") as stopped:
        tune(heads=_breaking_heads(_OverflowingStatistics), checkpoint=tmp_path)
    assert stopped.value.where == "fine-tuning, end of pass 1"
    for path, tensor in load_file(tmp_path / FILE).items():
        assert not tensor.is_floating_point() or tensor.isfinite().all(), path


def test_what_was_infinite_before_may_stay_so(tmp_path: Path) -> None:
    """A mask, for one; and a recurrent layer drops nothing out while it is trained."""
    options: dict[str, Any] = {"program": reading_program(), "heads": {}, "reads": {}, "teacher": 0.0}
    tuned = tune(token_rows(), epochs=8, lr=0.02, adamw_lr=0.02, checkpoint=tmp_path, **options)
    assert tuned.history[-1][0] < 0.9 * tuned.history[0][0]
    assert (tmp_path / FILE).is_file()


FULL = "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: 99 bytes\nand so on"


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(FULL)])
def test_full_memory_is_told_with_what_to_do(
    error: RuntimeError, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> None:
        raise error

    monkeypatch.setattr(loop, "exit_losses", fail)
    for options in ({}, {"checkpoint": tmp_path}):
        with pytest.raises(TrainingError, match=r"memory is full: .*memory[^\n]*\n") as stopped:
            tune(accumulate=3, **options)
        assert stopped.value.where == "fine-tuning, pass 1, batch 1"
        assert "batch_size=4 and accumulate=6" in str(stopped.value.remedy)
        assert ("another checkpoint folder" in str(stopped.value.remedy)) == bool(options)


def test_other_errors_of_torch_are_not_taken_for_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "exit_losses", lambda *given: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        tune()


def test_the_log_says_how_long_it_will_take(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = [0.0]

    class Slow(CountedStep):
        def advance(self, count: float = 1, *, note: str | None = None) -> None:
            clock[0] += 90.0 * count

    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    with caplog.at_level("INFO", "exitcompiler"):
        tune(epochs=3, step=Slow())
    said = [record.message.rpartition("; ")[2] for record in caplog.records if "pass" in record.message]
    assert said == ["about 15 min left", "about 8 min left", "about 0 min left"]


class _Optimist(NoisyLoader):
    """Says that it has more batches than it gives."""

    def __len__(self) -> int:
        return super().__len__() + 2


def test_a_loader_that_gives_less_than_it_says_is_told(caplog: pytest.LogCaptureFixture) -> None:
    tune(NoisyLoader())
    assert not caplog.records
    tune(_Optimist())
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert f"the first pass had {BATCHES} batches, and {BATCHES + 1} were counted" in record.message


def test_weights_that_are_not_finite_are_never_kept(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        tune(checkpoint=tmp_path, checkpoint_minutes=0.0, adamw_lr=1e38, head_adamw_lr=1e38)
    for path, tensor in load_file(tmp_path / FILE).items():
        if path.startswith("network."):
            assert tensor.isfinite().all(), path


def test_ctrl_c_says_what_is_kept_and_how_to_go_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped:
        tune(step=CountedStep(BATCHES + 2))
    assert "nothing is kept: give a checkpoint folder" in stopped.value.__notes__[0]
    with pytest.raises(KeyboardInterrupt) as stopped:
        tune(step=CountedStep(BATCHES + 2), checkpoint=tmp_path / "run")
    (note,) = stopped.value.__notes__
    assert note.startswith("fine-tuning was stopped")
    assert f"the last checkpoint is in {tmp_path / 'run'}: run the same again" in note


def test_accumulated_gradients_are_those_of_one_large_batch() -> None:
    """True where no batch norm mixes the rows of a batch: theirs are frozen, and there are no heads.

    Muon's rate is next to nothing, as it computes in bfloat16 and would turn the last bits into differences.
    """
    alone: dict[str, Any] = {
        "heads": {}, "reads": {}, "freeze_batchnorm": True, "lr": 1e-12, "adamw_lr": 1e-2, "epochs": 1,
    }  # fmt: skip
    large = tune(batch_size=20, **alone)
    small = tune(batch_size=10, accumulate=2, **alone)
    for path, expected in state_of(large).items():
        torch.testing.assert_close(state_of(small)[path], expected, rtol=1e-3, atol=1e-5)
    assert not torch.allclose(
        state_of(tune(batch_size=10, **alone))["head.bias"],
        state_of(large)["head.bias"],
        rtol=1e-3,
        atol=1e-5,
    )
    assert small.history[0] == pytest.approx(large.history[0], rel=0.05)


def test_without_labels_the_originals_answers_are_learned() -> None:
    rows = stripe_rows()
    program = small_program()
    answers = program.entry.run(rows.inputs)[backbone_logits(program)].argmax(1).numpy()
    assert not np.array_equal(answers, rows.labels)
    for options in ({"teacher": 0.0}, {"teacher": 0.5}):
        learned = tune(stripe_rows(labelled=False), **options)
        assert same_state(learned, tune(Rows(rows.inputs, answers), **options))
        assert not same_state(learned, tune(rows, **options))


def test_the_teacher_alone_holds_the_network_where_it_is() -> None:
    """A network that answers as its teacher does has nothing to learn but through its heads."""
    kept = tune(teacher=1.0, heads={}, reads={}, freeze_batchnorm=True, epochs=1, adamw_lr=1e-6, lr=1e-9)
    assert kept.history[0][0] == pytest.approx(0.0, abs=1e-4)


def test_a_loader_is_drawn_anew_every_pass_and_its_batches_are_joined() -> None:
    loader, step = NoisyLoader(), CountedStep()
    tune(loader, epochs=3, batch_size=10, step=step)
    trained = loader.passes[-3:]
    assert [len(batches) for batches in trained] == [10] * 3
    assert not torch.equal(trained[0][0], trained[1][0])
    assert step.batches == 3 * 4


def test_a_batch_of_one_row_is_left_out() -> None:
    tuned = tune(stripe_rows(2 * BATCH + 1), epochs=1, step=(step := CountedStep()))
    assert step.batches == 3
    assert all(loss > 0.5 for loss in tuned.history[0])  # a mean over two batches, not three
    assert len(step.notes) == 3
    with pytest.raises(CalibrationError, match="no batch of two rows"):
        tune(stripe_rows(1))


def test_the_mean_loss_leaves_out_what_was_not_trained() -> None:
    losses: list[float] = []

    class Noting(CountedStep):
        def advance(self, count: float = 1, *, note: str | None = None) -> None:
            super().advance(count, note=note)
            if note is not None:
                losses.append(float(note.rpartition(" ")[2]))

    tuned = tune(stripe_rows(2 * BATCH + 1), epochs=1, step=Noting())
    assert tuned.history[0][-1] == pytest.approx(np.mean(losses[:2]), abs=0.01)


def test_labels_that_come_and_go_are_refused() -> None:
    heads, reads = linear_heads(small_program())
    for rows, labelled in ((stripe_rows(labelled=False), True), (stripe_rows(), False)):
        with pytest.raises(CalibrationError, match="some passes have labels"):
            train_jointly(
                small_program(), heads, reads, TrainingData(rows, ("image",)), Extent(40, BATCHES, labelled),
                tuning_of(), seed=0, step=CountedStep(),  # type: ignore[arg-type]
            )  # fmt: skip


def test_a_network_for_tokens_is_tuned_and_its_tokens_are_not_mixed() -> None:
    program = captured("bert").program
    heads, reads = linear_heads(program, classes=5)
    rows = Rows(tokens(24, 1), np.arange(24) % 5)
    options: dict[str, Any] = {"program": program, "heads": heads, "reads": reads, "teacher": 0.0}
    tuned = tune(rows, epochs=6, lr=0.01, adamw_lr=5e-3, **options)
    assert tuned.history[-1][-1] < tuned.history[0][-1]
    with pytest.raises(InputError, match="'input_ids', 'attention_mask'"):
        tune(rows, mixup=1.0, **options)


def test_half_precision_multiplies_and_full_precision_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exitcompiler.finetuning.devices.supports_bfloat16", lambda: True)
    full, mixed = tune(), tune(mixed_precision=True)
    assert (full.precision, mixed.precision, mixed.device) == ("float32", "bfloat16", "cpu")
    assert {tensor.dtype for tensor in state_of(mixed).values()} == {torch.float32, torch.int64}
    assert not same_state(full, mixed)
    np.testing.assert_allclose(mixed.history, full.history, rtol=0.05)


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(TrainingError, match="device 'cuda:99' cannot be used"):
        tune(device="cuda:99")
