"""Muon and AdamW side by side: what they move, and going on from a saved state."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

from exitcompiler.optimizers import FEWEST_STEPS, MuonAdamW, OptimizerState, ParameterGroup

STEPS = 12


class _Net(nn.Module):
    """A convolution and a hidden layer, a norm, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)
        self.hidden = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.out(self.norm(torch.relu(self.hidden(self.conv(x).mean((2, 3))))))
        return answer


def _made(steps: int = STEPS) -> tuple[_Net, MuonAdamW]:
    torch.manual_seed(0)
    net = _Net()
    early = ParameterGroup([net.conv.weight], [net.conv.bias], 0.02, 0.01, 0.1)
    chosen = {net.hidden.weight}
    rest = [p for child in (net.hidden, net.norm, net.out) for p in child.parameters() if p not in chosen]
    return net, MuonAdamW([early, ParameterGroup([net.hidden.weight], rest, 0.05, 0.004, 0.0)], steps)


def _train(net: _Net, optimizer: MuonAdamW, steps: range) -> None:
    for step in steps:
        x = torch.randn(8, 1, 5, 5, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        optimizer.step()


def _kept(state: OptimizerState) -> OptimizerState:
    """As it comes back from a file."""
    return OptimizerState(
        {p: t.clone() for p, t in state.tensors.items()}, json.loads(json.dumps(state.numbers))
    )


@pytest.mark.parametrize("stop", [0, 1, 5, STEPS - 1])
def test_an_interrupted_training_goes_on_as_if_it_had_not_stopped(stop: int) -> None:
    whole, optimizer = _made()
    _train(whole, optimizer, range(STEPS))

    half, optimizer = _made()
    _train(half, optimizer, range(stop))
    weights, state = {p: t.clone() for p, t in half.state_dict().items()}, _kept(optimizer.state())
    resumed, optimizer = _made()
    resumed.load_state_dict(weights)
    optimizer.restore(state)
    _train(resumed, optimizer, range(stop, STEPS))

    for path, expected in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[path], expected), path


def test_without_its_state_it_would_go_on_otherwise() -> None:
    whole, optimizer = _made()
    _train(whole, optimizer, range(STEPS))
    half, optimizer = _made()
    _train(half, optimizer, range(5))
    _train(half, _made()[1], range(5, STEPS))
    assert not torch.equal(half.conv.weight, whole.conv.weight)


def test_every_parameter_moves_and_gradients_are_cleared() -> None:
    net, optimizer = _made()
    before = {path: value.clone() for path, value in net.state_dict().items()}
    _train(net, optimizer, range(3))
    assert not any(torch.equal(value, before[path]) for path, value in net.state_dict().items())
    assert all(parameter.grad is None for parameter in net.parameters())


def test_the_rate_rises_to_its_peak_and_falls() -> None:
    net, optimizer = _made(steps=50)
    moved = []
    for step in range(50):
        before = net.conv.weight.detach().clone()
        _train(net, optimizer, range(step, step + 1))
        moved.append(float((net.conv.weight.detach() - before).norm()))
    assert moved[0] < 0.3 * max(moved)
    assert moved[-1] < 0.05 * max(moved)
    assert 5 <= moved.index(max(moved)) <= 20


def test_very_few_steps_are_enough() -> None:
    for steps in range(1, FEWEST_STEPS + 1):
        net, optimizer = _made(steps)
        _train(net, optimizer, range(steps))
        assert all(parameter.isfinite().all() for parameter in net.parameters())


def test_the_state_of_another_optimiser_is_refused() -> None:
    net, optimizer = _made()
    _train(net, optimizer, range(2))
    state = _kept(optimizer.state())
    alone = MuonAdamW(
        [ParameterGroup([net.hidden.weight], [net.out.bias, net.out.weight], 0.1, 0.1, 0.0)], STEPS
    )
    with pytest.raises((KeyError, ValueError, IndexError)):
        alone.restore(state)


@pytest.mark.parametrize("part", ["groups.1", "schedules"])
def test_a_state_that_says_too_much_or_too_little_is_refused(part: str) -> None:
    """What a schedule is given it takes for its own attributes, methods included."""
    net, optimizer = _made()
    _train(net, optimizer, range(2))
    for change in ("more", "less"):
        state = _kept(optimizer.state())
        entry = state.numbers[part][0]
        if change == "more":
            entry["step"] = 1
        else:
            entry.popitem()
        _, other = _made()
        with pytest.raises(ValueError, match="in one of both only"):
            other.restore(state)
