"""The same ResNet-56 with earlyon's exits, in a virtual environment and a process of its own."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import numpy as np
from cifar10_setup import SEED, Job

from exitcompiler.statistics import ratio_interval

__all__ = ["measure_earlyon"]

logger = logging.getLogger("cifar10")

PACKAGES: Final = ("earlyon==0.3.0", "torch==2.13.0", "safetensors")
FALLBACK_EXITS: Final = ("layer1.8", "layer2.4")


def measure_earlyon(job: Job, exits: Sequence[str]) -> dict[str, Any]:
    """Figures of earlyon 0.3.0, or why there are none.

    Args:
        job: Data, weights, where to put the environment, how much to do.
        exits: Where exits stand: where this project's compiler put heads.

    Returns:
        With "measured" true: accuracies, times in milliseconds, the speed-up over the plain network
        in the same process; else "reason".
    """
    folder = job.out / "earlyon"
    python = folder / "env" / "bin" / "python"
    try:
        _make_environment(folder / "env", python)
        figures = _run(job, python, folder / "figures.json", exits or FALLBACK_EXITS)
    except subprocess.CalledProcessError as error:
        lines = str(error.stderr or error).strip().splitlines()
        logger.warning("earlyon is not measured: %s", lines[-1] if lines else error)
        return {"measured": False, "reason": lines[-1] if lines else str(error)}
    plain, routed = (np.array(figures.pop(f"{name}_times_ms")) for name in ("plain", "routed"))
    return {
        "measured": True,
        **figures,
        "drop": figures["backbone_accuracy"] - figures["accuracy"],
        "speedup": asdict(ratio_interval(plain, routed, seed=SEED)),
        "median_speedup": float(np.median(plain) / np.median(routed)),
    }


def _make_environment(folder: Path, python: Path) -> None:
    """Make it once; a half-made one is not marked and is made again."""
    mark = folder / "installed"
    if mark.exists():
        return
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], **_QUIET)
    subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], **_QUIET)
    mark.touch()


_QUIET: Final[dict[str, Any]] = {"check": True, "capture_output": True, "text": True}


def _run(job: Job, python: Path, out: Path, exits: Sequence[str]) -> dict[str, Any]:
    effort = job.effort
    options = {
        "data": job.data,
        "weights": job.weights,
        "out": out,
        "epochs": effort.earlyon_epochs,
        "train-images": effort.train_images,
        "calibration-rows": effort.calibration_rows,
        "final-rows": effort.final_rows,
        "timed-rows": effort.timed_rows,
        "max-drop": effort.max_drop,
    }
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    chosen = {**{name: str(value) for name, value in options.items()}, "exits": list(exits)}
    if out.exists() and json.loads(out.read_text()).get("options") == chosen:
        logger.info("  as measured before: %s", out)
        return dict(json.loads(out.read_text()))
    script = Path(__file__).with_name("earlyon_job.py")
    subprocess.run([str(python), str(script), *arguments, "--exits", *exits], **_QUIET)
    figures = json.loads(out.read_text())
    assert isinstance(figures, dict)
    out.write_text(json.dumps({**figures, "options": chosen}))
    return figures
