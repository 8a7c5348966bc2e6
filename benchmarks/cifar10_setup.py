"""How much the CIFAR-10 benchmarks do, what they work on, and where their figures go."""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from cifar import Split, load_split

__all__ = [
    "FULL",
    "QUICK",
    "SEED",
    "THREADS",
    "Array",
    "Effort",
    "Figures",
    "Job",
    "begin",
    "open_job",
    "parser_of",
    "start",
]

logger = logging.getLogger("cifar10")

Array: TypeAlias = npt.NDArray[Any]

SEED: Final = 0
THREADS: Final = 1
"""Of every engine that is compared."""


@dataclass(frozen=True)
class Effort:
    """How many rows, repeats and epochs.

    Args:
        train_images: For exit heads, or for a network and its exits where these are tuned.
        epochs: Of the exit heads; None: the compiler's own choice.
        calibration_rows: Of the development rows.
        final_rows: Of the final rows, for accuracies.
        timed_rows: Final rows that every contender of a table is timed on.
        headline_rows: Final rows that the final speed-up is timed on.
        batches: Timed batches of 32 and of 64.
        resplits: Random re-splits of the test rows.
        sweep_steps: Trade-offs of each re-split's sweep.
        networks: Depths of the cascade's networks.
        part_steps: Trade-offs where much is learned: in every sub-topology of a cascade, and in the re-splits
            of one with exits inside.
        starts: Fresh processes that load the artifact.
        earlyon_epochs: Of earlyon's heads.
        max_drop: The accuracy drop that the compiler is asked to keep.
        cascade_drop: The same for cascades.
    """

    train_images: int = 30_000
    epochs: int | None = None
    calibration_rows: int = 5000
    final_rows: int = 5000
    timed_rows: int = 2000
    headline_rows: int = 4000
    batches: int = 100
    resplits: int = 20
    sweep_steps: int = 20
    networks: tuple[int, ...] = (20, 32, 44, 56)
    part_steps: int = 10
    starts: int = 5
    earlyon_epochs: int = 3
    max_drop: float = 0.01
    cascade_drop: float = 0.01


FULL: Final = Effort()
QUICK: Final = Effort(
    train_images=2000,
    epochs=3,
    calibration_rows=1500,
    final_rows=600,
    timed_rows=60,
    headline_rows=120,
    batches=4,
    resplits=2,
    sweep_steps=6,
    networks=(20, 32, 56),
    part_steps=3,
    starts=1,
    earlyon_epochs=1,
    max_drop=0.05,  # so that heads of this little training are of some use
)


@dataclass(frozen=True)
class Job:
    """What the benchmark works on.

    Args:
        data: The folder with CIFAR-10.
        weights: The folder with the ResNets.
        out: Where artifacts, caches and figures go.
        effort: How much to do.
        split: Rows by what they may be used for, cut to ``effort``.
    """

    data: Path
    weights: Path
    out: Path
    effort: Effort
    split: Split

    @property
    def timed(self) -> Array:
        """Final images that contenders are timed on, drawn at random, ``[rows, 3, 32, 32]``."""
        return self.draw(self.effort.timed_rows, SEED)

    def draw(self, rows: int, seed: int) -> Array:
        """Final images in random order, none twice."""
        order = np.random.default_rng(seed).permutation(len(self.split.final_x))
        return self.split.final_x[order[:rows]]


def open_job(data: Path, weights: Path, out: Path, effort: Effort) -> Job:
    """Read the data and make the output folder."""
    split = load_split(data, effort.train_images)
    cut = replace(
        split,
        x=split.x[: effort.calibration_rows],
        y=split.y[: effort.calibration_rows],
        final_x=split.final_x[: effort.final_rows],
        final_y=split.final_y[: effort.final_rows],
    )
    out.mkdir(parents=True, exist_ok=True)
    return Job(data, weights, out, effort, cut)


@dataclass
class Figures:
    """Everything that was measured, written to a file after every stage, so that nothing is lost.

    Args:
        path: The JSON file.
        values: Stage -> figures.
        seconds: Stage -> how long it took.
    """

    path: Path
    values: dict[str, Any]
    seconds: dict[str, float]

    @contextmanager
    def stage(self, name: str) -> Iterator[dict[str, Any]]:
        """Run a stage, which fills in the dict it is given."""
        logger.info("%s ...", name)
        started = time.monotonic()
        figures: dict[str, Any] = {}
        yield figures
        self.values[name] = figures
        self.seconds[name] = round(time.monotonic() - started, 1)
        logger.info("%s: %.1f s", name, self.seconds[name])
        self.path.write_text(
            json.dumps({**self.values, "stage_seconds": self.seconds}, indent=1, default=plain)
        )

    def resume(self) -> None:
        """Take over the stages that the file has.

        Raises:
            SystemExit: They are of a run with another effort.
        """
        if not self.path.exists():
            return
        found = json.loads(self.path.read_text())
        effort = json.loads(json.dumps(self.values["effort"]))
        if found["effort"] != effort:
            raise SystemExit(f"{self.path} is of a run with another effort: give another --out")
        self.seconds |= found.pop("stage_seconds", {})
        self.values |= found

    def __getitem__(self, name: str) -> dict[str, Any]:
        figures = self.values[name]
        assert isinstance(figures, dict)
        return figures


def plain(value: object) -> Any:
    """Numpy numbers and arrays as JSON has them."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is not plain data")


def begin(description: str, out: Path) -> tuple[Job, Figures, bool]:
    """Read the command line and the data: what a benchmark works on.

    Args:
        description: What it does; the first line is shown by ``--help``.
        out: Where artifacts and figures go by default.

    Returns:
        The job, where its figures go, and whether it is a quick run, which only checks the script.
    """
    return start(parser_of(description, out).parse_args())


def parser_of(description: str, out: Path) -> argparse.ArgumentParser:
    """The options that all of these benchmarks have."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10_{train,test}.npz")
    parser.add_argument(
        "--weights", type=Path, required=True, help="folder with resnet{20,32,44,56}.safetensors"
    )
    parser.add_argument("--out", type=Path, default=out, help="folder for what is made")
    parser.add_argument("--quick", action="store_true", help="few rows and epochs: checks the script itself")
    return parser


def start(
    arguments: argparse.Namespace, full: Effort = FULL, quick: Effort = QUICK
) -> tuple[Job, Figures, bool]:
    """Read the data.

    Args:
        arguments: Of ``parser_of``.
        full: How much to do.
        quick: The same for a quick run.

    Returns:
        As ``begin``.
    """
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logger.setLevel(logging.INFO)
    effort = quick if arguments.quick else full
    job = open_job(arguments.data, arguments.weights, arguments.out, effort)
    return job, Figures(job.out / "figures.json", {"effort": asdict(effort)}, {}), arguments.quick
