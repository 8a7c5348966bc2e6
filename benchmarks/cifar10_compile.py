"""Compiles ResNet-56, and says how long each step took."""

from __future__ import annotations

import time
from typing import Any

from cifar import AugmentedImages, load_resnet
from cifar10_setup import SEED, THREADS, Job

from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

__all__ = ["compile_resnet56", "settings_of"]


def settings_of(job: Job, backend: str = "onnxruntime", precision: str = "fp32") -> Settings:
    """What the compiler is asked for."""
    return Settings(
        max_accuracy_drop=job.effort.max_drop,
        backend=backend,
        precision=precision,
        threads=THREADS,
        seed=SEED,
        recipe=HeadRecipe(epochs=job.effort.epochs),
    )


def compile_resnet56(job: Job, *, with_training_images: bool) -> tuple[Details, dict[str, Any]]:
    """Compile for ONNX Runtime fp32, one thread, batch 1.

    Args:
        job: Development rows calibrate.
        with_training_images: Fit heads on augmented training images; else on a share of the
            calibration rows.

    Returns:
        What the compiler made, and figures: seconds in all and by step, what was kept or refused.
    """
    model = load_resnet(job.weights, 56)
    images = None
    if with_training_images:
        images = AugmentedImages(job.split.train_pixels, job.split.train_labels, seed=SEED)
    started = time.monotonic()
    details = compile_in_detail(model, (job.split.x, job.split.y), images, settings_of(job))
    figures = {
        "seconds": time.monotonic() - started,
        "steps_seconds": details.compiled.artifact.report["seconds"],
        "exits": list(details.compiled.exits),
        "points": [point.name for point in details.compiled.operating_points],
        "refused": details.compiled.artifact.report.get("refused"),
        "execution": details.compiled.execution,
        "notes": list(details.compiled.notes),
    }
    return details, figures
