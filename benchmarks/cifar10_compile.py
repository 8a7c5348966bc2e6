"""Compiles ResNet-56, or a cascade, and says how long each step took."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any, Final

from cifar import AugmentedImages, load_resnet
from cifar10_setup import SEED, THREADS, Job

from exitcompiler.cascades import CascadeOptions, cascade_in_detail
from exitcompiler.compiler import Details, compile_in_detail
from exitcompiler.settings import Settings
from exitcompiler.training import HeadRecipe

__all__ = ["compile_cascade", "compile_frozen", "compile_resnet56", "compiled_figures", "settings_of"]


FROZEN_IMAGES: Final = 30_000
"""What the first benchmark fits heads on."""


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


def compile_resnet56(
    job: Job, *, with_training_images: bool, precision: str = "fp32"
) -> tuple[Details, dict[str, Any]]:
    """Compile for ONNX Runtime, one thread, batch 1.

    Args:
        job: Development rows calibrate.
        with_training_images: Fit heads on augmented training images; else on a share of the
            calibration rows.
        precision: What the program computes in.

    Returns:
        What the compiler made, and figures: seconds in all and by step, what was kept or refused.
    """
    model = load_resnet(job.weights, 56)
    images = _training_images(job) if with_training_images else None
    started = time.monotonic()
    settings = settings_of(job, precision=precision)
    details = compile_in_detail(model, (job.split.x, job.split.y), images, settings)
    return details, compiled_figures(details, time.monotonic() - started)


def compile_frozen(job: Job, precision: str = "fp32") -> tuple[Details, dict[str, Any]]:
    """As ``compile_resnet56`` in the first benchmark, out of more training images than it takes."""
    images, labels = job.split.train_pixels, job.split.train_labels
    few = replace(job.split, train_pixels=images[:FROZEN_IMAGES], train_labels=labels[:FROZEN_IMAGES])
    return compile_resnet56(replace(job, split=few), with_training_images=True, precision=precision)


def compile_cascade(
    job: Job, *, early_exits: bool, backend: str = "onnxruntime", precision: str = "fp32"
) -> tuple[Details, dict[str, Any]]:
    """Compile a cascade of the ResNets, one thread, batch 1, every forward edge.

    Args:
        job: Development rows calibrate.
        early_exits: With exits inside the networks, on augmented training images.
        backend: What for.
        precision: What the program computes in.

    Returns:
        As ``compile_resnet56``.
    """
    depths = job.effort.networks
    models = [load_resnet(job.weights, depth) for depth in depths]
    options = CascadeOptions(names=[f"resnet{depth}" for depth in depths], early_exits=early_exits)
    settings = replace(
        settings_of(job, backend, precision),
        max_accuracy_drop=job.effort.cascade_drop,
        max_exits=1,  # as ``exitcompiler.cascade`` has it
    )
    images = _training_images(job) if early_exits else None
    started = time.monotonic()
    details = cascade_in_detail(models, (job.split.x, job.split.y), images, settings, options)
    return details, compiled_figures(details, time.monotonic() - started)


def _training_images(job: Job) -> AugmentedImages:
    return AugmentedImages(job.split.train_pixels, job.split.train_labels, seed=SEED)


def compiled_figures(details: Details, seconds: float) -> dict[str, Any]:
    """What came out, and how long each step took."""
    return {
        "seconds": seconds,
        "steps_seconds": details.compiled.artifact.report["seconds"],
        "exits": list(details.compiled.exits),
        "points": [point.name for point in details.compiled.operating_points],
        "refused": details.compiled.artifact.report.get("refused"),
        "execution": details.compiled.execution,
        "notes": list(details.compiled.notes),
    }
