"""Differentiation and graphs: gradcheck, opcheck, torch.compile, torch.export, autocast, torch.func, frozen inputs."""

from __future__ import annotations

import pytest
import torch

from rvae_fast import _backend, reference
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

CASES = [(likelihood, reduction) for likelihood in reference.LIKELIHOODS for reduction in reference.REDUCTIONS]
forward_op = torch.ops.rvae_fast.reconstruction_kld.default
backward_op = torch.ops.rvae_fast.reconstruction_kld_backward.default


def loss(x, x_hat, mu, logvar, weight):
    error, kld = reconstruction_kld(x, x_hat, mu, logvar, feature_weight=weight)
    return (error + 0.5 * kld).mean()


@pytest.mark.parametrize(("likelihood", "reduction"), CASES)
def test_gradcheck(backend, sample, likelihood, reduction) -> None:
    inputs = sample(dtype=torch.float64, requires_grad=True)

    def function(x, x_hat, mu, logvar, weight):
        return reconstruction_kld(
            x, x_hat, mu, logvar, likelihood=likelihood, reduction=reduction, feature_weight=weight
        )

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize(("likelihood", "reduction"), CASES)
def test_written_out_gradients(sample, likelihood, reduction) -> None:
    """The reference's gradients by formula are autograd's of its forward."""
    inputs = sample(dtype=torch.float64, requires_grad=True)
    grads = torch.rand(2, 5, dtype=torch.float64)
    by_autograd = torch.autograd.grad(
        reference.reconstruction_kld(*inputs, likelihood, reduction), inputs, tuple(grads)
    )
    by_formula = reference.reconstruction_kld_backward(*grads, *inputs, likelihood, reduction, [True] * 5)
    for a, b in zip(by_formula, by_autograd, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_opcheck(sample, likelihood) -> None:
    torch.library.opcheck(forward_op, (*sample(requires_grad=True), likelihood, "sum"))
    x, x_hat, mu, logvar, weight = sample(dtype=torch.bfloat16)
    torch.library.opcheck(forward_op, (x.float(), x_hat.requires_grad_(), None, None, None, likelihood, "mean"))
    needs = [True, False, True, True, True]
    grads = torch.rand(2, 5)
    torch.library.opcheck(backward_op, (*grads, x, x_hat.detach(), mu, logvar, weight, likelihood, "sum", needs))


def test_op_by_itself_differentiates(sample) -> None:
    """For callers of torch.ops, whatever the backend: the registered autograd is the public function's."""
    inputs = sample(dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: forward_op(*t, "bernoulli", "sum"), inputs)


def assert_compiles(sample, compiler, shapes) -> None:
    torch.compiler.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
    for batch, features in shapes:
        inputs = sample(batch, features, requires_grad=True)
        expected, got = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            assert a.abs().sum() > 0
            torch.testing.assert_close(a, b)


def test_compile_by_value(backend, sample) -> None:
    assert_compiles(sample, "aot_eager", [(33, 100), (1, 1), (257, 65)])


def test_compile_with_inductor(native, sample) -> None:
    assert_compiles(sample, "inductor", [(33, 100), (6, 31)])


def test_compiled_graph_holds_the_op_and_follows_the_backend(native, sample) -> None:
    torch.compiler.reset()
    targets = []

    def record(graph, example_inputs):
        targets.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, backend=record)
    inputs = sample()
    compiled(*inputs)
    with _backend.backend("reference"):
        compiled(*inputs)
    compiled(*inputs)
    name = "rvae_fast.reconstruction_kld.default"
    assert [name in t for t in targets] == [True, False]


def test_compiled_backward_is_the_fused_one(native, sample) -> None:
    torch.compiler.reset()
    seen = []

    def record(graph, example_inputs):
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    compiler = aot_autograd(fw_compiler=lambda g, i: make_boxed_func(record(g, i)))
    inputs = sample(requires_grad=True)
    torch.compile(loss, fullgraph=True, backend=compiler)(*inputs).backward()
    assert any("rvae_fast.reconstruction_kld_backward.default" in t for t in seen)


def test_export(backend, sample) -> None:
    class Loss(torch.nn.Module):
        def forward(self, x, x_hat, mu, logvar, weight):
            return loss(x, x_hat, mu, logvar, weight)

    rows = {0: torch.export.Dim("batch")}
    program = torch.export.export(Loss(), sample(), dynamic_shapes=(rows, rows, rows, rows, None))
    other = sample(batch=11, seed=1)
    torch.testing.assert_close(program.module()(*other), loss(*other))


def test_autocast(backend, sample) -> None:
    """fp32 rows, bf16 reconstruction: sums in fp32, and each gradient in its input's dtype."""
    x, _, _, _, _ = sample(64, 100)
    layer = torch.nn.Linear(100, 100)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        x_hat = layer(x)
        x_hat.retain_grad()
        error, kld = reconstruction_kld(x, x_hat, x_hat[:, :9], x_hat[:, 9:18])
    assert x_hat.dtype == torch.bfloat16
    assert error.dtype == kld.dtype == torch.float32
    exact = reference.reconstruction_kld(x.double(), x_hat.double(), x_hat[:, :9].double(), x_hat[:, 9:18].double())
    torch.testing.assert_close(error, exact[0].float())
    torch.testing.assert_close(kld, exact[1].float())
    (error + kld).mean().backward()
    assert x_hat.grad.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    assert layer.weight.grad.abs().sum() > 0


def test_gradients_of_one_number_are_not_spread_out(native, sample) -> None:
    """.sum() sends back one number with stride 0, and that is how it reaches the kernel."""
    strides = []
    x, x_hat, _, _, _ = sample(50, 20)
    x_hat.requires_grad_()
    error, _ = reconstruction_kld(x, x_hat)
    error.register_hook(lambda grad: strides.append(grad.stride()))
    error.sum().backward()
    assert strides == [(0,)]
    torch.testing.assert_close(x_hat.grad, 2 * (x_hat.detach() - x))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (3,), (4,), (1, 3), (0, 2, 4)])
def test_frozen_inputs(backend, sample, wanted) -> None:
    inputs = sample()
    exact = sample(dtype=torch.float64, requires_grad=True)
    for i in wanted:
        inputs[i].requires_grad_()
    error, kld = reconstruction_kld(*inputs[:4], feature_weight=inputs[4])
    assert error.requires_grad == any(i in (0, 1, 4) for i in wanted)
    assert kld.requires_grad == any(i in (2, 3) for i in wanted)
    torch.autograd.backward([o.sum() for o in (error, kld) if o.requires_grad])
    sum(o.sum() for o in reference.reconstruction_kld(*exact)).backward()
    for i, (t, e) in enumerate(zip(inputs, exact, strict=True)):
        assert (t.grad is not None) == (i in wanted)
        if t.grad is not None:
            torch.testing.assert_close(t.grad, e.grad.float())


def test_one_result_unused(backend, sample) -> None:
    inputs = sample(requires_grad=True)
    reconstruction_kld(*inputs[:4])[1].sum().backward()
    assert inputs[1].grad is None or not inputs[1].grad.any()
    torch.testing.assert_close(inputs[2].grad, inputs[2].detach())


def test_no_grad_saves_nothing(backend, sample) -> None:
    inputs = sample(requires_grad=True)
    with torch.no_grad():
        error, kld = reconstruction_kld(*inputs[:4])
    assert not error.requires_grad
    assert not kld.requires_grad
    with torch.inference_mode():
        torch.testing.assert_close(reconstruction_kld(*inputs[:4])[0], error)


def test_torch_func(backend, sample) -> None:
    """vmap, per-sample gradients and forward-mode AD: right values, by plain PyTorch."""
    x, x_hat, mu, logvar, _ = sample(6, 5)
    stacked = torch.func.vmap(lambda a, b: reconstruction_kld(a, b)[0])(x.view(2, 3, 5), x_hat.view(2, 3, 5))
    torch.testing.assert_close(stacked.flatten(), reconstruction_kld(x, x_hat)[0])
    gradient = torch.func.grad(lambda h: reconstruction_kld(x, h, mu, logvar)[0].sum())(x_hat)
    torch.testing.assert_close(gradient, 2 * (x_hat - x))
    _, slope = torch.func.jvp(lambda h: reconstruction_kld(x, h)[0], (x_hat,), (torch.ones_like(x_hat),))
    torch.testing.assert_close(slope, 2 * (x_hat - x).sum(1))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x_hat, torch.ones_like(x_hat))
        tangent = torch.autograd.forward_ad.unpack_dual(reconstruction_kld(x, dual)[0]).tangent
    torch.testing.assert_close(tangent, slope)
