"""The fused step against torch.optim and clip_grad_norm_."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rvae_fast import _optimizer
from rvae_fast._optimizer import Optimizer
from rvae_fast.training import TrainingConfig


def network(dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 33), nn.Tanh(), nn.Linear(33, 7)).to(dtype)


def gradients(net: nn.Module, step: int, size: float) -> None:
    torch.manual_seed(100 + step)
    for parameter in net.parameters():
        parameter.grad = size * torch.randn_like(parameter)


@pytest.fixture(params=["fused", "plain"])
def path(request: Any, monkeypatch: Any) -> str:
    if request.param == "plain":  # what devices without fused kernels take
        monkeypatch.setattr(_optimizer, "_FUSED", ())
    return str(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
@pytest.mark.parametrize("max_norm", [None, 1.0, 30.0])
def test_equals_torch(path: str, dtype: torch.dtype, name: str, max_norm: float | None) -> None:
    config = TrainingConfig(
        optimizer=name, learning_rate=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, max_grad_norm=max_norm
    )
    net, oracle = network(dtype), network(dtype)
    ours = Optimizer(list(net.parameters()), config)
    cls = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[name]
    theirs = cls(oracle.parameters(), lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6, foreach=False)
    for step in range(8):
        size = 0.01 if step % 2 else 10.0  # now and then above the limit
        rate = 1e-2 / (step + 1)
        gradients(net, step, size)
        gradients(oracle, step, size)
        theirs.param_groups[0]["lr"] = rate
        limit = float("inf") if max_norm is None else max_norm
        expected = nn.utils.clip_grad_norm_(oracle.parameters(), limit)
        theirs.step()
        norm = ours.norm()
        torch.testing.assert_close(norm, expected)
        ours.step(rate, norm)
    for one, other in zip(net.parameters(), oracle.parameters(), strict=True):
        tolerance = 1e-12 if dtype == torch.float64 else 2e-6
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_blocked_step_does_nothing(path: str, dtype: torch.dtype) -> None:
    net = network(dtype)
    optimizer = Optimizer(list(net.parameters()), TrainingConfig(weight_decay=0.1))
    gradients(net, 0, 1.0)
    optimizer.step(1e-2, optimizer.norm(), torch.zeros(()))
    weights = copy.deepcopy(net.state_dict())
    state = copy.deepcopy(optimizer.tensors())
    gradients(net, 1, float("nan"))
    optimizer.step(1e-2, optimizer.norm(), torch.ones(()))
    assert all(torch.equal(weights[k], v) for k, v in net.state_dict().items())
    assert all(torch.equal(state[k], v) for k, v in optimizer.tensors().items())
    assert float(state["steps"].min()) == 1.0


def test_a_parameter_without_gradient_keeps_its_own_count(path: str) -> None:
    """torch.optim skips it and does not age its bias correction."""
    net, oracle = network(torch.float32), network(torch.float32)
    ours = Optimizer(list(net.parameters()), TrainingConfig(max_grad_norm=None, learning_rate=1e-2))
    theirs = torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    for step in range(4):
        gradients(net, step, 1.0)
        gradients(oracle, step, 1.0)
        if step < 2:
            net[0].bias.grad = oracle[0].bias.grad = None
        ours.step(1e-2, ours.norm())
        theirs.step()
    for one, other in zip(net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_a_blocked_step_counts_for_no_parameter_with_or_without_gradient() -> None:
    """Nor does it make a tensor from numbers on the host: on a GPU it may be captured."""
    net = network(torch.float32)
    ours = Optimizer(list(net.parameters()), TrainingConfig())
    ours._native = False  # torch's kernels, as on a GPU
    made: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for blocked in (0.0, 1.0, 0.0):
        gradients(net, 0, 1.0)
        net[0].weight.grad = None
        norm, flag, rate = ours.norm(), torch.tensor(blocked), torch.tensor(1e-3)
        with Watch():
            ours.step(rate, norm, flag)
    assert ours._steps.tolist() == [0.0, 2.0, 2.0, 2.0]
    assert not {"index_put_", "_to_copy", "lift_fresh"} & {*made}, made


def test_mixed_dtypes(path: str) -> None:
    net, oracle = network(torch.float32), network(torch.float32)
    net[2].double()
    oracle[2].double()
    ours = Optimizer(list(net.parameters()), TrainingConfig(max_grad_norm=0.5, learning_rate=1e-2))
    theirs = torch.optim.AdamW(oracle.parameters(), lr=1e-2, weight_decay=0.0, foreach=False)
    gradients(net, 0, 1.0)
    gradients(oracle, 0, 1.0)
    ours.step(1e-2, ours.norm())
    nn.utils.clip_grad_norm_(oracle.parameters(), 0.5)
    theirs.step()
    for one, other in zip(net.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-6, atol=2e-6)


def test_state_round_trip(path: str) -> None:
    net = network(torch.float32)
    first = Optimizer(list(net.parameters()), TrainingConfig())
    gradients(net, 0, 1.0)
    first.step(1e-2, first.norm())
    twin = copy.deepcopy(net)
    second = Optimizer(list(twin.parameters()), TrainingConfig())
    second.load(first.tensors())
    for each, optimizer in ((net, first), (twin, second)):
        gradients(each, 1, 1.0)
        optimizer.step(1e-2, optimizer.norm())
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


LAYOUTS = {
    "transposed": lambda p: p.detach().t().contiguous().t(),
    "with gaps": lambda p: p.detach().repeat_interleave(2, 1)[:, ::2],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["adam", "adamw", "radam"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("gradient", ["contiguous", "transposed"])
def test_values_are_paired_by_their_indices(layout: str, gradient: str, name: str, dtype: torch.dtype) -> None:
    """torch's fused kernels pair them by their places in memory: weights moved by the gradients of others."""
    net, plain = network(dtype), network(dtype)
    for module in net:
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(LAYOUTS[layout](module.weight))
    config = TrainingConfig(optimizer=name, max_grad_norm=1.0)
    for one in (net, plain):
        ours = Optimizer(list(one.parameters()), config)
        for step in range(4):
            torch.manual_seed(100 + step)
            for p in one.parameters():
                p.grad = torch.randn(p.shape, dtype=dtype)
                if gradient == "transposed" and p.dim() == 2:
                    p.grad = p.grad.t().contiguous().t()
            ours.step(1e-2, ours.norm())
    for one, other in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
