"""Layouts that must give the same values, and inputs that must be refused by name."""

from __future__ import annotations

import pytest
import torch

from rvae_fast.ops.reconstruction_kld import reconstruction_kld

LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "row stride": lambda t: torch.cat([t, t.new_full(t.shape, 9.0)], dim=1)[:, : t.shape[1]],
    "column stride": lambda t: torch.stack([t, t.new_full(t.shape, 9.0)], dim=2)[:, :, 0],
    "every other row": lambda t: torch.stack([t, t.new_full(t.shape, 9.0)], dim=1).flatten(0, 1)[::2],
    "unaligned": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts(backend, sample, layout, dtype) -> None:
    plain = [t.requires_grad_() for t in sample(33, 31, latent=5, dtype=dtype)]
    laid = [LAYOUTS[layout](t.detach()).requires_grad_() for t in plain[:4]]
    weight = torch.stack([plain[4].detach()] * 2, dim=1)[:, 0].requires_grad_()
    assert all(torch.equal(a, b) for a, b in zip(plain, [*laid, weight], strict=True))
    expected = reconstruction_kld(*plain[:4], feature_weight=plain[4])
    got = reconstruction_kld(*laid, feature_weight=weight)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    grads = torch.rand(2, 33)
    ours = torch.autograd.grad(got, [*laid, weight], tuple(grads))
    theirs = torch.autograd.grad(expected, plain, tuple(grads))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_expanded_rows(backend) -> None:
    x, x_hat = torch.rand(1, 40).expand(7, 40), torch.rand(7, 1).expand(7, 40)
    error, _ = reconstruction_kld(x, x_hat)
    torch.testing.assert_close(error, (x - x_hat).square().sum(1))


def test_inputs_are_left_alone(backend, sample) -> None:
    inputs = sample(20, 30, requires_grad=True)
    before = [t.detach().clone() for t in inputs]
    error, kld = reconstruction_kld(*inputs[:4], feature_weight=inputs[4])
    (error + kld).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_empty_batch(backend, sample) -> None:
    inputs = sample(batch=0, requires_grad=True)
    error, kld = reconstruction_kld(*inputs[:4], feature_weight=inputs[4])
    assert error.shape == kld.shape == (0,)
    (error + kld).sum().backward()
    assert [tuple(t.grad.shape) for t in inputs] == [tuple(t.shape) for t in inputs]
    assert not inputs[4].grad.any()


REFUSED = [
    (TypeError, "x must be a torch.Tensor", {"x": [[1.0]]}),
    (TypeError, "x must have a floating-point dtype.*uint8", {"x": torch.zeros(5, 7, dtype=torch.uint8)}),
    (TypeError, "x_hat must have a floating-point dtype.*int64", {"x_hat": torch.zeros(5, 7, dtype=torch.int64)}),
    (TypeError, "mu must have a floating-point dtype.*complex64", {"mu": torch.zeros(5, 3, dtype=torch.complex64)}),
    (TypeError, "feature_weight must be a torch.Tensor.*float", {"feature_weight": 2.0}),
    (ValueError, r"x must have shape \[batch, features\].*\[5, 0\]", {"x": torch.zeros(5, 0)}),
    (ValueError, r"x must have shape \[batch, features\].*\[5, 7, 1\]", {"x": torch.zeros(5, 7, 1)}),
    (ValueError, r"x_hat must have the shape of x, \[5, 7\], got \[5, 1\]", {"x_hat": torch.zeros(5, 1)}),
    (ValueError, r"mu must have shape.*batch 5.*got \[4, 3\]", {"mu": torch.zeros(4, 3)}),
    (ValueError, r"mu must have shape.*got \[5, 0\]", {"mu": torch.zeros(5, 0), "logvar": torch.zeros(5, 0)}),
    (ValueError, r"logvar must have the shape of mu, \[5, 3\], got \[5, 2\]", {"logvar": torch.zeros(5, 2)}),
    (ValueError, "logvar is None", {"logvar": None}),
    (ValueError, "mu is None", {"mu": None}),
    (ValueError, r"feature_weight must have shape.*\[7\].*got \[8\]", {"feature_weight": torch.zeros(8)}),
    (ValueError, "likelihood must be one of.*got 'gauss'", {"likelihood": "gauss"}),
    (ValueError, "reduction must be one of.*got 'none'", {"reduction": "none"}),
    (ValueError, "x_hat is on meta, expected the device of x, cpu", {"x_hat": torch.zeros(5, 7, device="meta")}),
]


@pytest.mark.parametrize(("error", "message", "change"), REFUSED, ids=[message for _, message, _ in REFUSED])
def test_refused(backend, sample, error, message, change) -> None:
    x, x_hat, mu, logvar, weight = sample()
    arguments = {"x": x, "x_hat": x_hat, "mu": mu, "logvar": logvar, "feature_weight": weight} | change
    with pytest.raises(error, match=f"reconstruction_kld: {message}"):
        reconstruction_kld(**arguments)


@pytest.mark.parametrize(
    ("position", "replacement", "name"),
    [
        (1, torch.zeros(5, 6), "x_hat"),
        (2, torch.zeros(4, 3), "mu"),
        (3, torch.zeros(5, 2), "logvar"),
        (4, torch.zeros(6), "feature_weight"),
    ],
)
def test_the_native_op_checks_for_itself(native, sample, position, replacement, name) -> None:
    """A direct call of the op must not read past the end of anything."""
    inputs = list(sample())
    inputs[position] = replacement
    with pytest.raises(ValueError, match=f"reconstruction_kld: {name} must have"):
        torch.ops.rvae_fast.reconstruction_kld(*inputs, "squared", "sum")
    grads = torch.zeros(5), torch.zeros(5)
    with pytest.raises(ValueError, match=f"reconstruction_kld: {name} must have"):
        torch.ops.rvae_fast.reconstruction_kld_backward(*grads, *inputs, "squared", "sum", [True] * 5)


def test_the_native_backward_checks_its_gradients(native, sample) -> None:
    inputs = sample()
    with pytest.raises(ValueError, match="grad_error must have shape"):
        torch.ops.rvae_fast.reconstruction_kld_backward(
            torch.zeros(4), None, *inputs, "squared", "sum", [True] + [False] * 4
        )
    with pytest.raises(ValueError, match="grad_kld is None"):
        torch.ops.rvae_fast.reconstruction_kld_backward(
            torch.zeros(5), None, *inputs, "squared", "sum", [False, False, True, False, False]
        )
