"""The networks of the zoo: every classifier of torchvision, architectures of timm, encoders of transformers.

Weights are random, nothing is downloaded. Images are as small as a network takes them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from gpu_programs import rows_like_images
from torch import Tensor, nn
from zoo_compile import ROWS
from zoo_imports import import_timm, import_torchvision
from zoo_timm import ARCHITECTURES
from zoo_transformers import ENCODERS, build_encoder
from zoo_weights import liven, settle

__all__ = ["LIBRARIES", "Model", "build", "find_models"]

LIBRARIES: Final = ("torchvision", "timm", "transformers")
_SIDES: Final = (64, 96, 128, 160, 192, 224, 240, 256, 299, 331)
"""Of images, in pixels; the first that a network takes is used."""
_FEWER_LAYERS: Final = {
    "deepseek_vit_412m": {"depth": 6},
    "gemma4_vit_167m": {"depth": 6},
    "qwen3_vit_88m": {"depth": 6},
}
"""Networks of timm that would take gigabytes."""


@dataclass(frozen=True)
class Model:
    """A network of the zoo.

    Args:
        library: One of ``LIBRARIES``.
        family: The module of the library that it is in; of transformers the model type.
        name: As the library calls it.
    """

    library: str
    family: str
    name: str

    def __str__(self) -> str:
        return f"{self.library}/{self.name}"


def find_models(library: str) -> list[Model]:
    """All networks of a library that are in the zoo; of timm the first ones are one per family."""
    if library == "transformers":
        return [Model(library, name, name) for name in ENCODERS]
    if library == "timm":
        timm = import_timm()
        family = {name: module for module in timm.list_modules() for name in timm.list_models(module=module)}
        return [Model(library, family[name], name) for name in ARCHITECTURES]
    models = import_torchvision().models
    found = []
    for name in models.list_models(module=models):
        builder = models.get_model_builder(name)
        found.append(Model(library, builder.__module__.rpartition(".")[2], name))
    return found


def build(model: Model, seed: int = 0) -> tuple[nn.Module, dict[str, Tensor]]:
    """A network with random weights in eval mode, and ``ROWS`` rows by the names of its parameters."""
    torch.manual_seed(seed)
    if model.library == "transformers":
        module, inputs = build_encoder(model.name, ROWS)
    else:
        module, side = next(_fitting(model))
        inputs = {"x": rows_like_images(ROWS, side)}
    liven(module)
    settle(module, inputs)
    return module, inputs


def _fitting(model: Model) -> Iterator[tuple[nn.Module, int]]:
    """The network at every image size that it takes, the smallest first."""
    error: Exception | None = None
    for side in _SIDES:
        try:
            module = (
                _torchvision(model.name, side) if model.library == "torchvision" else _timm(model.name, side)
            )
            with torch.no_grad():
                module(torch.zeros(2, 3, side, side))
        except (RuntimeError, ValueError, AssertionError, TypeError, IndexError) as failed:
            error = failed
            continue
        yield module, side
    raise ValueError(f"{model} takes none of the image sizes {_SIDES}") from error


def _torchvision(name: str, side: int) -> nn.Module:
    models = import_torchvision().models
    sized = {"vit": {"image_size": side}, "maxvit": {"input_size": (side, side)}}
    options: dict[str, Any] = sized.get(name.partition("_")[0], {})
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # of how weights are initialised
        module: nn.Module = models.get_model(name, weights=None, **options)
    return module.eval()


def _timm(name: str, side: int) -> nn.Module:
    timm = import_timm()
    options: dict[str, Any] = dict(_FEWER_LAYERS.get(name, {}))
    try:
        module = timm.create_model(name, num_classes=1000, img_size=side, **options)
    except TypeError:  # a network that takes images of any size has no such option
        module = timm.create_model(name, num_classes=1000, **options)
    assert isinstance(module, nn.Module)
    return module.eval()
