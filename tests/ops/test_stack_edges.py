"""Both stacks where batch or state are unusual: rows with NaN, columns that are constant or far from zero, averages of
a norm that are somebody's view, take no part, or change between forward and backward."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rvae_fast import ResidualStack, _backend
from rvae_fast._activations import Activation
from rvae_fast.nn import PlainStack

pytestmark = pytest.mark.usefixtures("native")
KINDS = ("pre", "post", "plain")


def make(kind: str, width: int = 20) -> nn.Sequential:
    if kind != "plain":
        return ResidualStack(width, 3, order=kind)
    modules: list[nn.Module] = []
    for before, after in pairwise((width, 16, 33, width)):
        modules += [nn.Linear(before, after), nn.BatchNorm1d(after), Activation("leaky_relu", 0.01)]
    return PlainStack(*modules[:-2])


def norms(stack: nn.Module) -> list[nn.BatchNorm1d]:
    return [m for m in stack.modules() if isinstance(m, nn.BatchNorm1d)]


class Recorded(TorchDispatchMode):
    """Sees the ops that are called, so that they come through the dispatcher."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_is_not_finite_leaves_the_gradients_of_the_others_alone(kind: str, value: float) -> None:
    """By running statistics rows have nothing to do with each other, backward too."""
    stack = make(kind).eval()
    x = torch.randn(12, 20)
    x[3, 2] = value
    others = [i for i in range(12) if i != 3]
    mixed, alone = x.clone().requires_grad_(), x[others].clone().requires_grad_()
    stack(mixed).sum().backward()
    stack(alone).sum().backward()
    assert mixed.grad is not None
    assert alone.grad is not None
    torch.testing.assert_close(mixed.grad[others], alone.grad)


@pytest.mark.parametrize("rows", [14, 52, 60, 95, 97])
def test_a_constant_column_of_large_numbers_has_no_negative_variance(rows: int) -> None:
    """What rounding leaves of its sum of squares may have either sign."""
    x = (10 ** torch.linspace(3, 11, 256)).expand(rows, 256).clone()
    stack = ResidualStack(256, 1, layers=1, momentum=1.0)
    assert bool(torch.isfinite(stack(x)).all())
    assert float(norms(stack)[0].running_var.min()) >= 0
    x[0, 0] = float("nan")
    stack(x)
    assert bool(norms(stack)[0].running_var[0].isnan())
    assert not bool(norms(stack)[0].running_var[1:].isnan().any())


@pytest.mark.parametrize("kind", KINDS)
def test_running_averages_that_are_strided_views(kind: str) -> None:
    stack = make(kind)
    twin = copy.deepcopy(stack)
    for norm in norms(stack):
        width = norm.num_features
        norm.running_mean, norm.running_var = torch.zeros(2 * width)[::2], torch.ones(width, 3)[:, 1]
    for _ in range(2):
        x = torch.randn(9, 20)
        torch.testing.assert_close(stack(x), twin(x))
    for a, b in zip(stack.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("some", [False, True], ids=["all", "some"])
@pytest.mark.parametrize("kind", KINDS)
def test_track_running_stats_switched_off(kind: str, some: bool) -> None:
    """As in nn.BatchNorm1d: its averages then stay as they are while training, and are used behind it."""
    stack = make(kind)
    stack(torch.randn(9, 20))
    for norm in norms(stack)[1 if some else 0 :]:
        norm.track_running_stats = False
    before = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms(stack)]
    counts = [int(norm.num_batches_tracked) for norm in norms(stack)]
    stack(3 + 2 * torch.randn(9, 20))
    for i, norm in enumerate(norms(stack)):
        moves = some and i == 0
        assert int(norm.num_batches_tracked) == counts[i] + moves
        assert torch.equal(norm.running_mean, before[i][0]) != moves
        assert torch.equal(norm.running_var, before[i][1]) != moves
    stack.eval()
    x = torch.randn(9, 20)
    out = stack(x)
    with _backend.backend("reference"):
        torch.testing.assert_close(out, stack(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("mode", [contextlib.nullcontext, Recorded], ids=["eager", "recorded"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_training_between_forward_and_backward_by_running_statistics(
    kind: str, mode: Callable[..., Any], twice: bool
) -> None:
    """The gradients are those of the pass, whatever has become of the running averages since."""
    stack = make(kind).eval()
    for norm in norms(stack):
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    x = torch.randn(9, 20, requires_grad=True)

    def gradients(between: bool) -> tuple[torch.Tensor, ...]:
        own = copy.deepcopy(stack)
        with mode():
            out = own(x)
        if between:
            own.train()(3 + 2 * torch.randn(9, 20))
        first = torch.autograd.grad(out.square().sum(), [x, *own.parameters()], create_graph=twice)
        return torch.autograd.grad(sum(g.square().sum() for g in first), x) if twice else first

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e5])
@pytest.mark.parametrize("rows", [150, 1000])
def test_variance_of_columns_far_from_zero(rows: int, ratio: float) -> None:
    """A tile's mean in one fp32 number would be off by a part of their deviation."""
    x = torch.randn(rows, 33) + ratio
    stack = ResidualStack(33, 1, layers=1, momentum=1.0)
    stack(x)
    torch.testing.assert_close(norms(stack)[0].running_var.double(), x.double().var(0), rtol=2e-6, atol=0)


@pytest.mark.parametrize("outliers", [[0], [0, 1, 2, 3, 4, 5, 6, 7], [3, 149], [96]])
@pytest.mark.parametrize("size", [10.0, 1e3, 1e6])
def test_variance_with_outliers_among_a_tile_s_first_rows(size: float, outliers: list[int]) -> None:
    """A tile's moments are taken about the mean of its first rows."""
    x = torch.randn(150, 33) + 100
    x[outliers] += size
    stack = ResidualStack(33, 1, layers=1, momentum=1.0)
    stack(x)
    torch.testing.assert_close(norms(stack)[0].running_var.double(), x.double().var(0), rtol=3e-6, atol=0)
    off = norms(stack)[0].running_mean.double() - x.double().mean(0)
    assert (off.abs() <= 2e-7 * x.double().mean(0).abs() + 1e-6 * x.double().std(0)).all()
