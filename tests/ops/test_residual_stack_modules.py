"""Residual blocks and stacks on the native kernels: state, training, autocast, copies, processes and threads."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from rvae_fast import ResidualBlock, ResidualStack, _backend
from rvae_fast.ops import residual_stack as module

pytestmark = pytest.mark.usefixtures("native")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of each eager call that reached the kernels."""
    made: list[int] = []
    train = module.train_op

    def count(x, weights, *rest):
        made.append(len(weights))
        return train(x, weights, *rest)

    monkeypatch.setattr(module, "train_op", count)
    return made


@pytest.mark.parametrize("momentum", [0.1, None, 0.0, 1.0])
@pytest.mark.parametrize("order", ["pre", "post"])
def test_running_statistics_over_100_steps(order: str, momentum: float | None) -> None:
    stack = ResidualStack(24, 3, order=order, momentum=momentum)
    twin = copy.deepcopy(stack)
    for i in range(100):
        x = 3 + (1 + i / 50) * torch.randn(65, 24)
        with torch.no_grad():
            stack(x)
        with _backend.backend("reference"), torch.no_grad():
            twin(x)
    for (name, a), b in zip(stack.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_a_stack_is_one_call(calls: list[int]) -> None:
    ResidualStack(16, 5)(torch.randn(8, 16))
    assert calls == [10]


def test_a_stack_of_unlike_blocks_or_with_hooks_runs_block_by_block(calls: list[int]) -> None:
    stack = ResidualStack(16, 2)
    stack.append(ResidualBlock(16, order="post"))
    stack(torch.randn(8, 16))
    assert calls == [2, 2, 2]
    del calls[:]
    seen = []
    stack = ResidualStack(16, 3)
    stack[1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    out = stack(torch.randn(8, 16))
    assert calls == [2, 2, 2]
    assert len(seen) == 1
    assert seen[0].shape == out.shape


def test_dropout_runs_the_reference(calls: list[int]) -> None:
    stack = ResidualStack(16, 2, dropout=0.5)
    x = torch.randn(64, 16)
    torch.manual_seed(3)
    out = stack(x)
    assert calls == []
    torch.manual_seed(3)
    with _backend.backend("reference"):
        torch.testing.assert_close(stack(x), out)
    stack.eval()(x)
    assert calls == [4]


def test_one_row_is_an_error_in_training_alone() -> None:
    stack = ResidualStack(16, 2)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        stack(torch.randn(1, 16))
    assert stack.eval()(torch.randn(1, 16)).shape == (1, 16)


def test_no_rows() -> None:
    assert ResidualStack(16, 2).eval()(torch.randn(0, 16)).shape == (0, 16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_run_the_reference(calls: list[int], dtype: torch.dtype) -> None:
    out = ResidualStack(16, 2, dtype=dtype)(torch.randn(8, 16, dtype=dtype))
    assert out.dtype == dtype
    assert calls == []


@pytest.mark.skipif(not module.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")
@pytest.mark.parametrize("order", ["pre", "post"])
def test_autocast_trains_as_eager_autocast_does(calls: list[int], order: str) -> None:
    losses = []
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 32), ResidualStack(32, 4, order=order), nn.Linear(32, 20))
        optimizer = torch.optim.Adam(net.parameters(), 3e-3)
        x = torch.randn(256, 4) @ torch.randn(4, 20)
        for _ in range(30):
            with _backend.backend(backend), torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(net(x).float(), x)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in net.parameters())
        losses.append(loss.item())
    assert calls == [8] * 30
    assert losses[0] == pytest.approx(losses[1], rel=0.1)


@pytest.mark.slow
def test_trains_a_deep_net_as_the_reference_does() -> None:
    """200 layers, 300 steps: the loss reached is within the spread that the seed makes."""

    def final_loss(seed: int, backend: str) -> float:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(12, 8), ResidualStack(8, 100, zero_init=True), nn.Linear(8, 12))
        data = torch.Generator().manual_seed(99)
        x = torch.tanh(torch.randn(64, 3, generator=data) @ torch.randn(3, 12, generator=data))
        optimizer = torch.optim.Adam(net.parameters(), 1e-3, fused=True)
        with _backend.backend(backend):
            for _ in range(300):
                optimizer.zero_grad()
                loss = F.mse_loss(net(x), x)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                optimizer.step()
        return loss.item()

    native = torch.tensor([final_loss(seed, "native") for seed in range(3)])
    reference = final_loss(0, "reference")
    assert native.max() < 0.1  # they did learn
    assert abs(native[0] - reference) <= native.max() - native.min()


def test_copies_and_pickles() -> None:
    stack = ResidualStack(16, 2).eval()
    x = torch.randn(8, 16)
    expected = stack(x)
    assert torch.equal(copy.deepcopy(stack)(x), expected)
    assert torch.equal(pickle.loads(pickle.dumps(stack))(x), expected)
    expected.sum().backward()
    copy.deepcopy(stack)(x).sum().backward()


def test_many_threads_at_once() -> None:
    """Each with its own rows and gradients; the results are those of one thread."""
    stack = ResidualStack(48, 3).eval()
    inputs = [torch.randn(50 + i, 48) for i in range(8)]

    def work(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        with _backend.backend("native"):
            return torch.autograd.grad(stack(x).square().sum(), x)[0]

    expected = [work(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for a, b in zip(pool.map(work, inputs * 5), expected * 5, strict=True):
            torch.testing.assert_close(a, b)


def _child(stack: nn.Module, x: torch.Tensor, queue: multiprocessing.Queue) -> None:
    torch.set_num_threads(1)  # after a fork OpenMP has no pool; PyTorch's own ops need this too
    with torch.no_grad():
        queue.put(stack(x).numpy().tobytes())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system cannot fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork.*:DeprecationWarning")
def test_in_a_forked_process() -> None:
    stack, x = ResidualStack(32, 2).eval(), torch.randn(20, 32)
    with torch.no_grad():
        expected = stack(x)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(stack, x, queue))
    process.start()
    got = torch.frombuffer(bytearray(queue.get(timeout=60)), dtype=torch.float32).view(20, 32)
    process.join()
    torch.testing.assert_close(got, expected)
