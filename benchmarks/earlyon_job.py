"""Runs ResNet-56 with earlyon's exits; started by ``cifar10_earlyon`` in an environment of its own.

Heads are trained on the training images and thresholds calibrated on the development rows, as
earlyon's own documentation has it; the routed network and the plain one are then timed in turns on
final rows, in eager torch, which is all that earlyon routes.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import torch
from cifar import AugmentedImages, load_resnet, load_split
from torch.utils.data import DataLoader, TensorDataset

__all__ = ["main"]


def main() -> None:
    """Train, calibrate, judge, time; write the figures as JSON."""
    arguments = _parse()
    _stand_in_for_torchvision()
    from earlyon.core.thresholds import calibrate_thresholds  # type: ignore[import-not-found]
    from earlyon.models import custom_ee  # type: ignore[import-not-found]
    from earlyon.training import stage2_train_exits  # type: ignore[import-not-found]

    torch.manual_seed(0)
    split = load_split(arguments.data)
    wrapper = custom_ee(
        load_resnet(arguments.weights, 56), arguments.exits, num_classes=10, input_shape=(1, 3, 32, 32)
    )
    train = AugmentedImages(
        split.train_pixels[: arguments.train_images], split.train_labels[: arguments.train_images]
    )
    started = time.monotonic()
    stage2_train_exits(wrapper, train, epochs=arguments.epochs, on_epoch_end=lambda log: None)
    trained_seconds = time.monotonic() - started
    x, y = (torch.from_numpy(a[: arguments.calibration_rows]) for a in (split.x, split.y))
    rows = DataLoader(TensorDataset(x, y), batch_size=128)
    calibrated = calibrate_thresholds(wrapper.eval(), rows, target_accuracy_drop=arguments.max_drop)
    torch.set_num_threads(1)
    final = torch.from_numpy(split.final_x[: arguments.final_rows])
    labels = torch.from_numpy(split.final_y[: arguments.final_rows])
    figures = {
        "exits": arguments.exits,
        "enabled": calibrated.enabled_exits,
        "thresholds": calibrated.thresholds,
        "training_seconds": trained_seconds,
        "epochs": arguments.epochs,
        **_judge(wrapper, load_resnet(arguments.weights, 56), final, labels),
        **_time(wrapper, load_resnet(arguments.weights, 56), final, arguments.timed_rows),
    }
    arguments.out.write_text(json.dumps(figures, indent=1))


def _stand_in_for_torchvision() -> None:
    """Replace torchvision where its operators, built for CUDA, do not load beside a CPU torch.

    earlyon imports torchvision's networks with its own factories; none of them is used here.
    """
    try:
        importlib.import_module("torchvision.models")
    except (ImportError, RuntimeError):
        sys.modules["torchvision"] = sys.modules["torchvision.models"] = MagicMock()


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("data", "weights", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    for name in ("epochs", "train-images", "calibration-rows", "final-rows", "timed-rows"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--max-drop", type=float, required=True)
    parser.add_argument("--exits", nargs="+", required=True)
    return parser.parse_args()


@torch.inference_mode()
def _judge(wrapper: Any, plain: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
    taken, right = [], []
    for row, label in zip(x, y, strict=True):
        result = wrapper(row[None], mode="inference")
        taken.append(result.exit_taken)
        right.append(int(result.prediction.argmax()) == int(label))
    backbone = torch.cat([plain(part).argmax(dim=1) for part in torch.split(x, 128)]) == y
    rates = {str(exit_index): float(np.mean(np.array(taken) == exit_index)) for exit_index in set(taken)}
    return {
        "accuracy": float(np.mean(right)),
        "backbone_accuracy": float(backbone.double().mean()),
        "exit_rates": rates,
    }


@torch.inference_mode()
def _time(wrapper: Any, plain: torch.nn.Module, x: torch.Tensor, rows: int) -> dict[str, Any]:
    """Milliseconds of both on the same random rows, in turns, in random order."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))[:rows]
    calls = [lambda row: wrapper(row, mode="inference"), plain]
    times_ms = np.empty((2, len(order)))
    for turn, index in enumerate([*order[:10], *order]):
        row = x[int(index)][None]
        for which in rng.permutation(2).tolist():
            start = time.perf_counter()
            calls[which](row)
            if turn >= 10:
                times_ms[which, turn - 10] = 1000.0 * (time.perf_counter() - start)
    routed, whole = times_ms
    return {
        "mean_ms": float(routed.mean()),
        "median_ms": float(np.median(routed)),
        "plain_mean_ms": float(whole.mean()),
        "plain_median_ms": float(np.median(whole)),
        "routed_times_ms": routed.tolist(),
        "plain_times_ms": whole.tolist(),
    }


if __name__ == "__main__":
    main()
