"""Imports the libraries of the zoo, whatever torch they were built for."""

from __future__ import annotations

import warnings
from functools import cache
from types import ModuleType
from typing import Any

import torch

__all__ = ["import_timm", "import_torchvision", "import_transformers"]


@cache
def import_torchvision() -> Any:
    """Torchvision.

    The wheel on PyPI is one for GPUs, whose own library does not load beside a torch for CPUs; two operators
    that it registers shapes for are then not declared.
    """
    _declare_operators()
    import torchvision

    return torchvision


def import_timm() -> Any:
    """Timm, which imports torchvision."""
    import_torchvision()
    import timm

    return timm


def import_transformers() -> Any:
    """Transformers, which imports torchvision where it is installed."""
    import_torchvision()
    with warnings.catch_warnings(action="ignore"):  # of its own dependencies
        import transformers

    return transformers


@cache
def _declare_operators() -> torch.library.Library | ModuleType:
    # Cached to be kept: what a library object declares goes with it.
    try:
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # somebody has imported torchvision already
        return torch
    return library
