"""A small network with exit heads that are trained together with it in well under a second."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from trained import CLASSES, SmallResNet, stripes

from exitcompiler.capture import capture
from exitcompiler.data import Rows, TrainingData
from exitcompiler.finetuning.loop import Tuned, train_jointly
from exitcompiler.finetuning.options import FineTune
from exitcompiler.heads import LinearHead
from exitcompiler.passes.find_cut_points import find_cut_points
from exitcompiler.program import Program
from exitcompiler.scores import HeadKey

BATCH = 8


def small_network(seed: int = 0) -> SmallResNet:
    """Three convolutions with two batch norms, not trained; their statistics are not the defaults."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = SmallResNet(width=4, blocks=2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_mean, -0.3, 0.3)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    return network.eval()


@functools.cache
def small_program() -> Program:
    """It, captured; nobody may change it."""
    return capture(small_network(), stripes(4, seed=1)[0]).program


def linear_heads(
    program: Program, count: int = 2, classes: int = CLASSES
) -> tuple[dict[HeadKey, nn.Module], dict[HeadKey, str]]:
    """New linear heads at the first cuts of a program, the same every time, and what they read."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        cuts = list(find_cut_points(program))[:count]
        assert len(cuts) == count
        heads: dict[HeadKey, nn.Module] = {
            (cut.name, "linear"): LinearHead(cut.spec, classes) for cut in cuts
        }
    return heads, {(cut.name, "linear"): cut.value for cut in cuts}


class Reader(nn.Module):
    """Reads tokens, and makes tensors on the way: positions, the first state of a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.register_buffer("ahead", torch.full((6, 6), -float("inf")).triu(1))
        self.recurrent = nn.GRU(8, 8, num_layers=2, batch_first=True, dropout=0.5)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits ``[batch, 4]`` of ``int64[batch, 6]``."""
        x = self.words(ids) + self.places(torch.arange(6, device=ids.device))
        x = (x @ x.transpose(1, 2) + self.ahead).softmax(2) @ x
        logits: Tensor = self.out(self.recurrent(x)[0].mean(1))
        return logits


@functools.cache
def reading_program() -> Program:
    """It, captured; nobody may change it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return capture(Reader().eval(), token_rows(4).inputs["ids"]).program


def token_rows(count: int = 24) -> Rows:
    """For ``Reader``."""
    ids = torch.randint(0, 20, (count, 6), generator=torch.Generator().manual_seed(1))
    return Rows({"ids": ids}, (ids[:, 0] % CLASSES).numpy())


def stripe_rows(count: int = 40, *, labelled: bool = True) -> Rows:
    """Images for the network."""
    x, y = stripes(count, seed=3)
    return Rows({"image": torch.from_numpy(x)}, y if labelled else None)


class NoisyLoader:
    """A user's own loader: batches of four rows, shuffled and made noisy by torch's own generator."""

    def __init__(self, rows: int = 40) -> None:
        x, y = stripes(rows, seed=3)
        self.x, self.y = torch.from_numpy(x), torch.from_numpy(y)
        self.passes: list[list[Tensor]] = []

    def __len__(self) -> int:
        return -(-len(self.x) // 4)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.passes.append([])
        for part in torch.randperm(len(self.x)).split(4):
            images = self.x[part] + 0.3 * torch.randn(len(part), 1, 16, 16)
            self.passes[-1].append(images)
            yield images, self.y[part]


@dataclass
class CountedStep:
    """Stands for a progress bar, and for somebody who presses Ctrl-C after so many batches."""

    stop_after: float = float("inf")
    batches: float = 0
    notes: list[str] = field(default_factory=list)

    def advance(self, count: float = 1, *, note: str | None = None) -> None:
        """One more batch."""
        self.batches += count
        if note is not None:
            self.notes.append(note)
        if self.batches >= self.stop_after:
            raise KeyboardInterrupt


def tuning_of(**changed: Any) -> FineTune:
    """Options for so small a training, all of them given: the defaults may change."""
    settings: dict[str, Any] = {
        "epochs": 2, "batch_size": BATCH, "device": "cpu", "mixed_precision": False, "accumulate": 1,
        "lr": 0.02, "adamw_lr": 2e-3, "head_lr": 0.05, "head_adamw_lr": 4e-3, "weight_decay": 0.02,
        "freeze_batchnorm": False, "label_smoothing": 0.1, "teacher": 0.5, "self_distillation": 0.2,
        "temperature": 2.0, "mixup": 0.0, "focus": 0.0, "last_weight": 1.0,
    }  # fmt: skip
    return FineTune(**{**settings, **changed})


def tune(source: Any = None, *, seed: int = 0, step: CountedStep | None = None, **options: Any) -> Tuned:
    """Train the small network with two heads, or with those given.

    Args:
        source: Rows or a loader; None: forty rows.
        seed: Of the training and of torch's own generator.
        step: What is told of progress.
        options: Of ``tuning_of``; and ``program``, ``heads``, ``reads``, ``notes``.
    """
    program = options.pop("program", None) or small_program()
    heads, reads = linear_heads(program)
    heads, reads = options.pop("heads", heads), options.pop("reads", reads)
    notes = options.pop("notes", None)
    tuning = tuning_of(**options)
    data = TrainingData(stripe_rows() if source is None else source, tuple(program.inputs))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        extent = data.count(tuning.batch_size)
        return train_jointly(
            program, heads, reads, data.for_model(program), extent, tuning, seed=seed,
            step=CountedStep() if step is None else step, notes=notes,  # type: ignore[arg-type]
        )  # fmt: skip


def state_of(tuned: Tuned) -> dict[str, Tensor]:
    """All tensors of the network and of its heads."""
    state = dict(tuned.program.entry.body.state_dict())
    for key, head in tuned.heads.items():
        state |= {f"{'/'.join(key)}.{path}": tensor for path, tensor in head.state_dict().items()}
    return state


def same_state(one: Tuned, other: Tuned) -> bool:
    """Whether all tensors are equal, bit by bit."""
    first, second = state_of(one), state_of(other)
    assert list(first) == list(second)
    return all(torch.equal(first[path], second[path]) for path in first)


def as_floats(tensor: Tensor) -> np.ndarray:
    """As float64, for computing a formula anew."""
    return tensor.detach().numpy().astype(np.float64)
