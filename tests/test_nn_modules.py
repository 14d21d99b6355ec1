"""Blocks whose inner modules were replaced, hooked or changed: what the block written by hand does with them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrizations, prune, spectral_norm

import rvae_fast
from rvae_fast import AE, ResidualBlock, ResidualStack
from rvae_fast._activations import activate

ORDERS = ("pre", "post")


def by_hand(block: Any, x: Tensor) -> Tensor:
    """The unit by calls of its modules."""
    h, last = x, block.layers - 1
    for i, (norm, linear) in enumerate(zip(block.norms, block.linears, strict=True)):
        if block.order == "pre":
            h = linear(activate(norm(h), block.activation, block.negative_slope))
        else:
            h = norm(linear(h))
            h = h if i == last else activate(h, block.activation, block.negative_slope)
    return x + h if block.order == "pre" else activate(x + h, block.activation, block.negative_slope)


class Wrapped(nn.Module):
    """An adapter around a linear layer, with its weight and bias as properties."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.adapter = base, nn.Linear(base.in_features, base.out_features, bias=False)

    weight = property(lambda self: self.base.weight)
    bias = property(lambda self: self.base.bias)

    def forward(self, input: Tensor) -> Tensor:
        return self.base(input) + self.adapter(input)


class Adapted(nn.Linear):
    """An adapter that is a linear layer itself."""

    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def wrapped(block: Any) -> None:
    block.linears[1] = Wrapped(block.linears[1])


def adapted(block: Any) -> None:
    block.linears[0] = Adapted(8, 8)


def own_forward(block: Any) -> None:
    norm = block.norms[1]
    norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x) + 1, norm)


def hooked(block: Any) -> None:
    block.linears[1].register_forward_hook(lambda module, args, out: out + 1)


def another_eps(block: Any) -> None:
    for norm in block.norms:
        norm.eps = 0.5


def eps_of_one(block: Any) -> None:
    block.norms[1].eps = 0.5


def spectral(block: Any) -> None:
    spectral_norm(block.linears[0])


def parametrised(block: Any) -> None:
    parametrizations.weight_norm(block.linears[0])


def narrowed(block: Any) -> None:
    """A bottleneck: layers of the kind they were, of other widths."""
    block.linears[0], block.linears[1] = nn.Linear(8, 5), nn.Linear(5, 8)
    block.norms[1 if block.order == "pre" else 0] = nn.BatchNorm1d(5)


CHANGES = (wrapped, adapted, own_forward, hooked, another_eps, eps_of_one, spectral, parametrised, narrowed)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES)
def test_changed_modules_take_part(change: Callable[[Any], None], order: str) -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, order=order)
    untouched = copy.deepcopy(block)
    change(block)
    hand, x = copy.deepcopy(block), torch.randn(16, 8)
    for _ in range(3):
        ours, theirs = block(x), by_hand(hand, x)
        torch.testing.assert_close(ours, theirs)
        names = [name for name, _ in hand.named_parameters()]
        found, expected = (
            dict(zip(names, torch.autograd.grad(out.square().sum(), list(net.parameters())), strict=True))
            for out, net in ((ours, block), (theirs, hand))
        )
        for name in names:
            torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-4, msg=name)
    for ours, theirs in zip(block.buffers(), hand.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(block.eval()(x), by_hand(hand.eval(), x))
    if change is not parametrised:
        assert not torch.allclose(block(x), untouched.eval()(x), atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("change", CHANGES)
def test_and_in_a_stack(change: Callable[[Any], None], order: str) -> None:
    stack = ResidualStack(8, 3, order=order)
    change(stack[1])
    hand, x = copy.deepcopy(stack), torch.randn(16, 8)
    expected = x
    for block in hand:
        expected = by_hand(block, expected)
    torch.testing.assert_close(stack(x), expected)


@pytest.mark.parametrize("hooked", ["pruned", "spectral"])
def test_weights_that_a_hook_makes_are_trained(hooked: str) -> None:
    block = ResidualBlock(8)
    if hooked == "pruned":
        prune.l1_unstructured(block.linears[0], "weight", 0.5)
    else:
        spectral_norm(block.linears[0])
    trained = block.linears[0].weight_orig
    before, optimizer, x = trained.detach().clone(), torch.optim.SGD(block.parameters(), 0.1), torch.randn(16, 8)
    for _ in range(3):
        optimizer.zero_grad()
        block(x).square().mean().backward()
        optimizer.step()
    assert not torch.equal(trained, before)
    if hooked == "pruned":
        assert (block.linears[0].weight == 0).sum() == 32


def test_a_frozen_network_with_adapters_trains_the_adapters() -> None:
    model = rvae_fast.RAE(12, 3, widths=[12, 8], blocks=1)
    model.requires_grad_(False)
    for stack in (m for m in model.modules() if isinstance(m, ResidualStack)):
        for block in stack:
            block.linears[0] = Wrapped(block.linears[0])
    model.loss(torch.randn(16, 12)).backward()
    grads = [p.grad for name, p in model.named_parameters() if "adapter" in name]
    assert grads
    assert all(g is not None for g in grads)


def test_what_replaces_a_norm_is_called() -> None:
    class Synchronised(nn.SyncBatchNorm):  # what ``convert_sync_batchnorm`` puts there
        calls = 0

        def forward(self, input: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(input)

    block = ResidualBlock(8)
    block.norms[0] = Synchronised(8)
    block(torch.randn(4, 8))
    assert block.norms[0].calls == 1


@pytest.mark.parametrize(
    "net", [ResidualBlock(8), ResidualStack(8, 2), AE(12, 3, n_layers=3)], ids=lambda m: type(m).__name__
)
def test_hooks_of_the_process_see_every_module(net: nn.Module) -> None:
    x = torch.randn(16, 12 if isinstance(net, AE) else 8)
    seen: list[nn.Module] = []
    with register_module_forward_hook(lambda module, args, out: seen.append(module)):
        net(x)
    assert {m for m in net.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))} <= set(seen)


def test_an_overridden_forward_in_a_plain_stack() -> None:
    model, calls = AE(12, 3, n_layers=3), []
    inner = model.encoder[0].forward
    model.encoder[0].forward = lambda x: calls.append(1) or inner(x)
    model(torch.randn(16, 12))
    model.loss(torch.randn(16, 12)).backward()
    rvae_fast.training.train(model, torch.randn(64, 12), rvae_fast.training.TrainingConfig(epochs=1, batch_size=32))
    assert len(calls) >= 4


def test_kernels_that_are_ordered_by_name_say_what_they_do_not_cover() -> None:
    block = ResidualBlock(8)
    hooked(block)
    with pytest.raises(RuntimeError, match="does not cover a ResidualBlock with replaced modules"):
        force_triton(block, torch.randn(4, 8))


def force_triton(block: nn.Module, x: Tensor) -> None:
    outer = rvae_fast._backend.current_backend
    rvae_fast._backend.current_backend = lambda: "triton"
    try:
        block(x)
    finally:
        rvae_fast._backend.current_backend = outer


def test_a_slice_is_a_stack_of_the_same_blocks() -> None:
    stack, x = ResidualStack(8, 4).eval(), torch.randn(5, 8)
    first, rest = stack[:1], stack[1:]
    assert type(rest) is ResidualStack
    assert [*rest] == [*stack][1:]
    assert set(rest.state_dict()) < set(stack.state_dict())
    torch.testing.assert_close(rest(first(x)), stack(x))
    assert stack[4:](x) is x
    assert stack[-1] is [*stack][-1]
    with pytest.raises(ValueError, match=r"input must have shape \[batch, 8\]"):
        rest(torch.randn(2, 7))


def test_an_ensemble_by_vmap_trains() -> None:
    blocks, x = [ResidualBlock(8) for _ in range(3)], torch.randn(16, 8)
    alone = [copy.deepcopy(block)(x) for block in blocks]
    parameters, buffers = torch.func.stack_module_state(blocks)  # type: ignore[arg-type]

    def run(p: Any, b: Any) -> Tensor:
        return torch.func.functional_call(blocks[0], (p, b), (x,))

    together = torch.vmap(run)(parameters, buffers)
    torch.testing.assert_close(together, torch.stack(alone))
    assert buffers["norms.0.num_batches_tracked"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("change", [wrapped, adapted, hooked, another_eps, parametrised])
def test_changed_modules_compile(change: Callable[[Any], None]) -> None:
    torch.compiler.reset()
    stack, x = ResidualStack(8, 2).eval(), torch.randn(16, 8)
    change(stack[1])
    compiled = torch.compile(stack, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), stack(x))
