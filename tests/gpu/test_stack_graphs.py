"""Residual stacks in CUDA graphs: a whole training step, and a stage behind autograd."""

from __future__ import annotations

import copy

import pytest
import torch
from stack_errors import make
from torch import nn

ORDERS = ["pre", "post"]


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


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_graphed_callables(order: str, half: bool, cuda: torch.device, triton: torch.device) -> None:
    """The recipe of docs/notes/performance.md: a stage as two CUDA graphs behind autograd, in a loop of one's own."""
    stack, batch = make(128, 4, order=order).to(cuda), 1024
    eager, before = copy.deepcopy(stack), copy.deepcopy(stack.state_dict())
    sample = torch.randn(batch, 128, device=cuda, requires_grad=True)
    with torch.autocast("cuda", torch.bfloat16, enabled=half, cache_enabled=False):
        graphed = torch.cuda.make_graphed_callables(stack, (sample,))
    stack.load_state_dict(before)  # the calls that warm up have moved the running statistics
    for _ in range(3):
        x, up = torch.randn(batch, 128, device=cuda), torch.randn(batch, 128, device=cuda)
        found = []
        for net in (graphed, eager):
            rows = x.clone().requires_grad_()
            net.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                out = net(rows)
            out.backward(up)
            found.append([out.detach().clone(), rows.grad, *(p.grad.clone() for p in net.parameters())])
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    for a, b in zip(stack.buffers(), eager.buffers(), strict=True):
        assert torch.equal(a, b), "running statistics"
    with torch.no_grad():  # in evaluation the module runs as it is, whatever the number of rows
        torch.testing.assert_close(graphed.eval()(x[:7]), eager.eval()(x[:7]))
