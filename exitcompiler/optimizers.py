"""Muon for hidden matrices, AdamW for all other parameters, both on one cycle of the learning rate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

__all__ = ["MuonAdamW", "OptimizerState", "ParameterGroup"]

FEWEST_STEPS: Final = 6
"""OneCycleLR's warm-up of 20 % has no length at 5 steps, and divides by it."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained at the same rates.

    Args:
        matrices: Weights of convolutions and hidden layers, two dimensions or more; for Muon.
        others: All else: norms, biases, classifiers, embeddings; for AdamW.
        muon_lr: Peak learning rate of ``matrices``.
        adamw_lr: Peak learning rate of ``others``.
        weight_decay: Of ``matrices``.
    """

    matrices: Sequence[nn.Parameter]
    others: Sequence[nn.Parameter]
    muon_lr: float
    adamw_lr: float
    weight_decay: float


@dataclass(frozen=True)
class OptimizerState:
    """Everything an optimiser remembers.

    Args:
        tensors: Path -> tensor.
        numbers: The rest, as JSON has it.
    """

    tensors: dict[str, Tensor]
    numbers: dict[str, Any]


class MuonAdamW:
    """Muon for hidden matrices, AdamW for the rest; both on one cycle with a warm-up of 20 %.

    Args:
        groups: What to train.
        steps: How many there will be.
    """

    def __init__(self, groups: Sequence[ParameterGroup], steps: int) -> None:
        self._parameters = [p for group in groups for p in (*group.matrices, *group.others)]
        self._viewed: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._optimizers: list[torch.optim.Optimizer] = []
        self._schedules: list[torch.optim.lr_scheduler.LRScheduler] = []
        for group in groups:
            if group.others:
                adamw = torch.optim.AdamW(group.others, lr=group.adamw_lr, betas=(0.9, 0.99), weight_decay=0)
                self._add(adamw, group.adamw_lr, steps)
            if group.matrices:
                # torch's Muon takes matrices only: a convolution is given to it as a view of one.
                views = [nn.Parameter(p.detach().view(len(p), -1)) for p in group.matrices]
                self._viewed += zip(group.matrices, views, strict=True)
                muon = torch.optim.Muon(views, lr=group.muon_lr, weight_decay=group.weight_decay)
                self._add(muon, group.muon_lr, steps)

    def _add(self, optimizer: torch.optim.Optimizer, peak: float, steps: int) -> None:
        self._optimizers.append(optimizer)
        self._schedules.append(
            torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=peak, total_steps=max(steps, FEWEST_STEPS), pct_start=0.2,
                div_factor=10, final_div_factor=1000, cycle_momentum=False,
            )
        )  # fmt: skip

    def step(self) -> None:
        """Follow the gradients, and clear them."""
        for matrix, view in self._viewed:
            view.grad = None if matrix.grad is None else matrix.grad.reshape(view.shape)
        for optimizer in self._optimizers:
            optimizer.step()
        for schedule in self._schedules:
            schedule.step()
        for parameter in self._parameters:
            parameter.grad = None

    def state(self) -> OptimizerState:
        """What has to be kept for training to go on as if it had not stopped."""
        tensors: dict[str, Tensor] = {}
        numbers: dict[str, Any] = {"schedules": [_numbers_of(schedule) for schedule in self._schedules]}
        for index, optimizer in enumerate(self._optimizers):
            saved = optimizer.state_dict()
            groups = [{k: v for k, v in group.items() if k != "params"} for group in saved["param_groups"]]
            numbers[f"groups.{index}"] = groups
            for position, values in saved["state"].items():
                for name, value in values.items():
                    tensors[f"{index}.{position}.{name}"] = torch.as_tensor(value)
        return OptimizerState(tensors, numbers)

    def restore(self, state: OptimizerState) -> None:
        """Go on from a state of an optimiser made in the same way.

        Raises:
            KeyError, ValueError: The state is of another optimiser.
        """
        entries: list[dict[int, dict[str, Tensor]]] = [{} for _ in self._optimizers]
        for path, tensor in state.tensors.items():
            number, position, name = path.split(".", 2)
            entries[int(number)].setdefault(int(position), {})[name] = tensor
        for index, optimizer in enumerate(self._optimizers):
            groups = optimizer.state_dict()["param_groups"]
            for group, saved in zip(groups, state.numbers[f"groups.{index}"], strict=True):
                group.update(_same_names(saved, group.keys() - {"params"}))
            optimizer.load_state_dict({"state": entries[index], "param_groups": groups})
        for schedule, saved in zip(self._schedules, state.numbers["schedules"], strict=True):
            schedule.load_state_dict(_same_names(saved, _numbers_of(schedule).keys()))


def _same_names(saved: Mapping[str, Any], names: Set[str]) -> dict[str, Any]:
    """What was saved, which a schedule takes for its own attributes whatever their names."""
    if saved.keys() != names:
        raise ValueError(f"{sorted(saved.keys() ^ names)} are in one of both only")
    return dict(saved)


def _numbers_of(schedule: torch.optim.lr_scheduler.LRScheduler) -> Mapping[str, Any]:
    kinds = (int, float, str, bool, list, type(None))
    return {name: value for name, value in schedule.state_dict().items() if isinstance(value, kinds)}
