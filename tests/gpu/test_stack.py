"""Residual stacks on the GPU: the error bound in every dtype, drift over 100 layers, repetition, graphs, compiler."""

from __future__ import annotations

import copy

import pytest
import torch
from stack_errors import assert_within_bound, make, step
from torch import nn

import rvae_fast
from rvae_fast import ResidualStack

ORDERS = ("pre", "post")


def sizes(device: torch.device, *small: tuple[int, int]) -> list[tuple[int, int]]:
    """(width, batch): on the GPU those that have several tiles of every kind as well."""
    return [*small] if device.type == "cpu" else [*small, (31, 1001), (100, 4097), (257, 999), (512, 2048), (1000, 301)]


@pytest.mark.parametrize("order", ORDERS)
def test_fp32(order: str, triton: torch.device) -> None:
    for width, batch in sizes(triton, (1, 37), (65, 51)):
        module = make(width, 2, order=order, activation="silu").to(triton)
        assert_within_bound(module, (1 + 2 * torch.randn(batch, width, device=triton)).requires_grad_())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(half: torch.dtype, order: str, triton: torch.device) -> None:
    if triton.type == "cpu" and half == torch.bfloat16:
        pytest.skip("the interpreter does not round bf16")
    for width, batch in sizes(triton, (33, 40)):
        module = make(width, 2, order=order).to(triton)
        assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_(), autocast=half)


def test_a_hundred_layers_do_not_drift(triton: torch.device) -> None:
    """Ours against fp64 as PyTorch's fp32 against fp64, output and state, after 100 layers."""
    layers, width, batch = (100, 128, 1024) if triton.type == "cuda" else (10, 16, 48)
    module = make(width, layers // 2, zero_init=False).to(triton)
    assert_within_bound(module, torch.randn(batch, width, device=triton).requires_grad_())


def test_running_statistics_over_many_steps(triton: torch.device) -> None:
    width, steps = (256, 50) if triton.type == "cuda" else (12, 5)
    one = make(width, 2).to(triton)
    two = copy.deepcopy(one)
    with torch.no_grad():
        for i in range(steps):
            x = torch.randn(301 if triton.type == "cuda" else 31, width, device=triton) * (1 + 0.1 * i) + i
            one(x)
            with rvae_fast.backend("reference"):
                two(x)
    for (name, a), b in zip(one.named_buffers(), two.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_repeats_bit_for_bit(triton: torch.device) -> None:
    width, batch = (512, 3001) if triton.type == "cuda" else (20, 41)
    module = make(width, 2).to(triton)
    x = torch.randn(batch, width, device=triton).requires_grad_()
    up = torch.randn(batch, width, device=triton)
    one, two = (step(module, x, up, "triton") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


# --- CUDA itself ---


@pytest.mark.parametrize("order", ORDERS)
def test_training_step_in_a_graph(order: str, cuda: torch.device, triton: torch.device) -> None:
    module = make(128, 4, order=order).to(cuda)
    eager = copy.deepcopy(module)
    static = torch.randn(1024, 128, device=cuda)
    start = copy.deepcopy(module.state_dict())

    def run(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        grads = torch.autograd.grad(net(x).square().mean(), list(net.parameters()))
        return [g.detach() for g in grads]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(module, static)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(module, static)
    module.load_state_dict(start)
    for _ in range(3):
        x = torch.randn(1024, 128, device=cuda)
        static.copy_(x)
        graph.replay()
        for a, b in zip(captured, run(eager, x), strict=True):
            assert torch.equal(a, b)
    for a, b in zip(module.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), "running statistics"


@pytest.mark.parametrize("training", [True, False])
def test_compiled_by_value(training: bool, cuda: torch.device) -> None:
    torch.compiler.reset()
    module = make(65, 2).to(cuda).train(training)
    twin = copy.deepcopy(module)
    compiled = torch.compile(twin, fullgraph=True)
    for batch in (33, 64):
        x = torch.randn(batch, 65, device=cuda)
        a, b = module(x), compiled(x)
        torch.testing.assert_close(b, a)
        for g, h in zip(
            torch.autograd.grad(a.square().sum(), list(module.parameters())),
            torch.autograd.grad(b.square().sum(), list(twin.parameters())),
            strict=True,
        ):
            torch.testing.assert_close(h, g)
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(b, a)


def test_what_is_kept_for_the_backward(cuda: torch.device, triton: torch.device) -> None:
    """One [batch, width] tensor a layer in the products' dtype, half of it in fp32 streams; eager keeps three."""
    module, batch = ResidualStack(512, 10).to(cuda), 8192
    x = torch.randn(batch, 512, device=cuda)

    def kept(backend: str) -> int:
        with rvae_fast.backend(backend), torch.autocast("cuda", torch.bfloat16):
            module(x)  # caches and workspaces
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            out = module(x)
            return torch.cuda.memory_allocated() - before - out.numel() * out.element_size()

    ours, theirs = kept("triton"), kept("reference")
    assert ours <= 0.55 * theirs, (ours, theirs)
    assert ours <= 1.1 * 20 * batch * 512 * 4
