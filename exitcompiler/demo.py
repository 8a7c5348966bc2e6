"""The demonstration: a small residual network on images of digits, compiled, measured, asked.

Nothing is downloaded: the 1,797 images come with scikit-learn.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import torch
from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import exitcompiler
from exitcompiler.benchmarking import Answers, answer_rows, benchmark, logits_of
from exitcompiler.cli_tables import bench_tables
from exitcompiler.errors import InputError
from exitcompiler.progress import reporting
from exitcompiler.training import HeadRecipe

if TYPE_CHECKING:
    from exitcompiler.runtime.compiled import CompiledModel

__all__ = ["DigitsResNet", "Rows", "Split", "disturb", "load_rows", "run_demo", "show_image", "train_network"]

SIZE: Final = 16
"""The 8 x 8 images are enlarged to this height and width: the network is then worth leaving early."""

_EPOCHS: Final = 14
_BATCH_ROWS: Final = 32
_SHADES: Final = " .:-=+*#%@"


@dataclass(frozen=True, slots=True)
class Rows:
    """Images ``float32 [rows, 1, 16, 16]`` in 0..1 and the digits they show, ``int64 [rows]``."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Split:
    """Disjoint rows.

    Args:
        train: What the network and its exit heads are trained on.
        calibration: What gates learn on, and are certified on.
        held_out: What every figure shown comes from.
    """

    train: Rows
    calibration: Rows
    held_out: Rows


class _ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Identity() if stride == 1 else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = functional.relu(self.norm1(self.conv1(x)))
        return functional.relu(self.norm2(self.conv2(h)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for images ``[batch, 1, 16, 16]``; returns logits ``[batch, 10]``.

    Args:
        blocks: Residual blocks in each of the three stages.
        width: Channels of the first stage; doubled from stage to stage.
    """

    def __init__(self, blocks: int = 4, width: int = 32) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.layer1 = self._stage(width, width, 1, blocks)
        self.layer2 = self._stage(width, 2 * width, 2, blocks)
        self.layer3 = self._stage(2 * width, 4 * width, 2, blocks)
        self.classifier = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(inputs: int, outputs: int, stride: int, blocks: int) -> nn.Sequential:
        first = _ResidualBlock(inputs, outputs, stride)
        return nn.Sequential(first, *(_ResidualBlock(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Logits of a batch of images."""
        x = self.layer3(self.layer2(self.layer1(self.stem(x))))
        logits: Tensor = self.classifier(x.mean((2, 3)))
        return logits


def load_rows(seed: int = 0) -> Split:
    """Load the images and split them at random: 800 to train, 600 to calibrate, 397 held out.

    Calibration and held-out images are disturbed, each once.

    Args:
        seed: Of the split and of the disturbance.
    """
    data = load_digits()
    small = torch.from_numpy(data.images.astype(np.float32) / 16.0).unsqueeze(1)
    images = functional.interpolate(small, (SIZE, SIZE), mode="bilinear", align_corners=False).numpy()
    labels = data.target.astype(np.int64)
    order = np.random.default_rng(seed).permutation(len(labels))
    train, calibration, held_out = (Rows(images[part], labels[part]) for part in np.split(order, [800, 1400]))
    return Split(train, disturb(calibration, seed), disturb(held_out, seed + 1))


def disturb(rows: Rows, seed: int) -> Rows:
    """Turn, shrink and move every image by an amount of its own: some stay easy, some become hard.

    An image of strength ``s``, drawn from 0..1, is turned by up to 40 degrees times ``s``, shrunk by up to
    half times ``s``, and moved within the room that this leaves.

    Args:
        rows: What to disturb; left as it is.
        seed: Of all that is drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    count = len(rows.labels)
    strength, shrink = torch.rand(2, count, generator=generator)
    turn, down, right = 2.0 * torch.rand(3, count, generator=generator) - 1.0
    angle, scale = math.radians(40.0) * strength * turn, 1.0 - 0.5 * strength * shrink
    cosine, sine, room = angle.cos() / scale, angle.sin() / scale, 1.0 / scale - 1.0
    rotation = torch.stack([cosine, -sine, room * right, sine, cosine, room * down], 1).reshape(count, 2, 3)
    grid = functional.affine_grid(rotation, [count, 1, SIZE, SIZE], align_corners=False)
    images = functional.grid_sample(torch.from_numpy(rows.images), grid, align_corners=False)
    return Rows(images.numpy(), rows.labels)


def train_network(network: nn.Module, rows: Rows, *, epochs: int = _EPOCHS, seed: int = 0) -> nn.Module:
    """Train a network with SGD on a one-cycle schedule, on images that are disturbed anew in every epoch.

    Args:
        network: Trained in place; in ``eval()`` mode afterwards.
        rows: What to train on.
        epochs: Passes over the rows.
        seed: Of the order and of the disturbance.

    Returns:
        The network.
    """
    generator = torch.Generator().manual_seed(seed)
    labels = torch.from_numpy(rows.labels)
    steps = len(labels) // _BATCH_ROWS
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    _set_memory_format(network.train(), torch.channels_last)  # several times faster on a CPU
    with reporting() as reporter, reporter.step("training the network", total=epochs) as bar:
        for epoch in range(epochs):
            images = torch.from_numpy(disturb(rows, seed + epoch).images)
            order = torch.randperm(len(labels), generator=generator)
            for chosen in order[: steps * _BATCH_ROWS].reshape(steps, _BATCH_ROWS):
                loss = functional.cross_entropy(network(images[chosen]), labels[chosen])
                optimizer.zero_grad()
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
            bar.advance()
    _set_memory_format(network, torch.contiguous_format)
    return network.eval()


def _set_memory_format(network: nn.Module, memory_format: torch.memory_format) -> None:
    for parameter in network.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=memory_format)


def run_demo(folder: Path, console: Console, *, seed: int = 0) -> dict[str, Any]:
    """Train, compile, measure, save, load again and ask.

    Args:
        folder: Gets ``digits.exit``, ``report.html``, and the held-out rows as ``held_out.npz``.
        console: Where to show it.
        seed: Of everything random.

    Returns:
        The figures shown, JSON-able: ``training_s``, ``compile_s`` and those of ``benchmark``.

    Raises:
        InputError: The folder cannot be made.
        ExitCompilerError: Compiling failed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot be made: {error.strerror}", where=str(folder)) from error
    split = load_rows(seed)
    network, training_s = _train(split, console, seed)

    console.print("\n[bold]2. Compile it[/]  exits are found, their heads and gates learned, all is measured")
    console.print("   at most one point of accuracy may be lost; heads are trained briefly")
    heads_rows = disturb(split.train, seed + 2)
    start = time.perf_counter()
    compiled = exitcompiler.compile(
        network,
        (split.calibration.images, split.calibration.labels),
        train_data=(heads_rows.images, heads_rows.labels),
        max_accuracy_drop=0.01,
        recipe=HeadRecipe(epochs=5),
        threads=1,
        seed=seed,
    )
    compile_s = time.perf_counter() - start
    console.print(f"   took {compile_s:.1f} s\n")
    console.print(compiled.explain(), markup=False, highlight=False, soft_wrap=True)

    console.print(
        f"\n[bold]3. Measure it[/]  on {len(split.held_out.labels)} images that nothing has seen, one thread"
    )
    held_out = (split.held_out.images, split.held_out.labels)
    figures = benchmark(compiled, held_out, passes=5, seed=seed)
    console.print(*bench_tables(figures), sep="\n")
    speedup = figures["speedup"]
    console.print(
        f"   [bold]{speedup['value']:.2f}x[/] as fast as the whole network "
        f"(95% interval {speedup['lower']:.2f} to {speedup['upper']:.2f})"
    )

    artifact, report, rows = folder / "digits.exit", folder / "report.html", folder / "held_out.npz"
    compiled.save(artifact)
    compiled.report(report)
    np.savez(rows, x=split.held_out.images, y=split.held_out.labels)
    console.print(f"\n[bold]4. Save it, load it, ask it[/]  {artifact}, {report}")
    _ask(exitcompiler.load(artifact), split.held_out, console)
    console.print(f"\nMore: exitcompiler bench {artifact} --data {rows}   (docs/cli.md)", highlight=False)
    return {"training_s": training_s, "compile_s": compile_s, **figures}


def _train(split: Split, console: Console, seed: int) -> tuple[nn.Module, float]:
    rows = len(split.train.labels)
    console.print(f"[bold]1. Train a small ResNet[/]  on {rows} images of digits, well under a minute")
    console.print("   each is turned, shrunk and moved at random: some are easy, some hard")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network: nn.Module = DigitsResNet()
    start = time.perf_counter()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on so small batches a second thread waits more than it works
    try:
        train_network(network, split.train, seed=seed)
    finally:
        torch.set_num_threads(threads)
    seconds = time.perf_counter() - start
    with torch.inference_mode():
        answers = network(torch.from_numpy(split.held_out.images)).argmax(1).numpy()
    right = float(np.mean(answers == split.held_out.labels))
    console.print(f"   took {seconds:.1f} s; {100 * right:.1f}% of the held-out images right")
    return network, seconds


def _ask(compiled: CompiledModel, rows: Rows, console: Console) -> None:
    """Show the surest image of each exit, and the one the program is least sure of."""
    answers = answer_rows(compiled, (rows.images, rows.labels), 64)
    panels = []
    for index in _worth_showing(answers):
        result = compiled.run(rows.images[index : index + 1])
        answer = int(logits_of(result.outputs).argmax())
        exit_name = compiled.exits[int(result.exit_index[0])]
        verdict = "right" if answer == rows.labels[index] else f"it is a {rows.labels[index]}"
        said = f"says {answer} ({float(result.confidence[0]):.2f}): {verdict}"
        text = f"{show_image(rows.images[index, 0])}\n\n{said}"
        panels.append(Panel(Text(text), title=f"left at {exit_name}", width=26))
    console.print(Columns(panels))


def _worth_showing(answers: Answers) -> list[int]:
    chosen = []
    for index in range(len(answers.exits)):
        here = np.flatnonzero(answers.exit_index == index)
        if len(here):
            chosen.append(int(here[answers.confidence[here].argmax()]))
    least_sure = int(answers.confidence.argmin())
    return [*chosen, *([least_sure] if least_sure not in chosen else [])]


def show_image(image: npt.NDArray[np.float32]) -> str:
    """An image ``[16, 16]`` in 0..1 as eight lines of text: a character is two pixels high, as it looks."""
    tall = image.reshape(SIZE // 2, 2, SIZE).mean(1)
    shades = np.clip(tall * len(_SHADES), 0, len(_SHADES) - 1).astype(int)
    return "\n".join("".join(_SHADES[shade] for shade in line) for line in shades)
