"""The last layer with its error: the reference op, its gradients, its checks, and who asks for it."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rvae_fast import AE, RVAE, _backend, models, reference
from rvae_fast.ops.decoder_error import decoder_error, is_fused
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

op = torch.ops.rvae_fast.decoder_error.default


def make(dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = ((5, 4), (7, 4), (7,), (5, 7), (7,))
    tensors = [torch.rand(*shape, generator=g, dtype=torch.float64) for shape in shapes]
    return [t.to(dtype).requires_grad_(requires_grad) for t in tensors]


@pytest.mark.parametrize("reduction", reference.REDUCTIONS)
@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_is_the_error_of_the_linear_layer(likelihood: str, reduction: str) -> None:
    h, weight, bias, x, feature_weight = make(requires_grad=True)
    options = {"likelihood": likelihood, "reduction": reduction, "feature_weight": feature_weight}
    inputs = (h, weight, bias, x, feature_weight)
    expected = reconstruction_kld(x, F.linear(h, weight, bias), **options)[0]
    torch.testing.assert_close(decoder_error(h, weight, bias, x, **options), expected)
    torch.testing.assert_close(op(*inputs, likelihood, reduction), expected)
    grad = torch.rand(5, dtype=torch.float64)
    theirs = torch.autograd.grad(expected, inputs, grad)
    for a, b in zip(torch.autograd.grad(op(*inputs, likelihood, reduction), inputs, grad), theirs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_opcheck_and_gradcheck(likelihood: str) -> None:
    h, weight, bias, x, feature_weight = make(requires_grad=True)
    torch.library.opcheck(op, (h, weight, bias, x, feature_weight, likelihood, "sum"))
    torch.library.opcheck(op, (h.detach(), weight, None, x.detach(), None, likelihood, "mean"))
    assert torch.autograd.gradcheck(lambda *t: op(*t, likelihood, "mean"), (h, weight, bias, x, feature_weight))


def test_under_autocast_the_product_is_half_precision() -> None:
    h, weight, bias, x, _ = make(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        error = decoder_error(h, weight, bias, x)
    product = torch.mm(h.bfloat16(), weight.bfloat16().t()).float() + bias
    assert error.dtype == torch.float32
    torch.testing.assert_close(error, (product - x).square().sum(1))


def test_bad_input_is_named() -> None:
    h, weight, bias, x, _ = make()
    with pytest.raises(ValueError, match="likelihood must be one of squared, absolute, bernoulli; got 'huber'"):
        decoder_error(h, weight, bias, x, likelihood="huber")
    with pytest.raises(ValueError, match="reduction must be one of sum, mean; got 'max'"):
        decoder_error(h, weight, bias, x, reduction="max")
    with pytest.raises(ValueError, match=r"h and weight must have shapes .*, got \[5, 4\] and \[4, 7\]"):
        decoder_error(h, weight.t(), bias, x)
    with pytest.raises(ValueError, match=r"x must have shape \[batch, features\] = \[5, 7\], got \[5, 6\]"):
        decoder_error(h, weight, bias, x[:, 1:])
    with pytest.raises(ValueError, match=r"bias must have shape \[features\] = \[7\], got \[6\]"):
        decoder_error(h, weight, bias[1:], x)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_a_model_scores_the_same_with_and_without(likelihood: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net = RVAE(10, latent_features=3, widths=[16], blocks=[2], likelihood=likelihood, init="default")
    x = torch.rand(9, 10)
    net(x)  # running statistics other than the first ones
    assert not is_fused(x), "auto never takes the interpreter"
    expected = net.anomaly_score(x), net.anomaly_score(x, kld_weight=0.5)
    monkeypatch.setattr(models, "has_decoder_error", lambda x: True)
    calls = []
    monkeypatch.setattr(models, "decoder_error", lambda *a, **k: (calls.append(1), decoder_error(*a, **k))[1])
    torch.testing.assert_close((net.anomaly_score(x), net.anomaly_score(x, kld_weight=0.5)), expected)
    assert len(calls) == 2
    assert net.training
    ae = AE(10, latent_features=3, n_layers=3, likelihood=likelihood)
    torch.testing.assert_close(ae.anomaly_score(x), ae.eval().loss_terms(x)[0])
    assert len(calls) == 3


def test_a_decoder_that_ends_otherwise_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "has_decoder_error", lambda x: True)
    monkeypatch.setattr(models, "decoder_error", None)
    x = torch.rand(4, 10)
    assert RVAE(10, latent_features=3, n_layers=4).anomaly_score(x).shape == (4,)
    hooked = RVAE(10, latent_features=3, widths=[16], blocks=[1])
    hooked.decoder[-1].register_forward_hook(lambda module, args, out: out + 1)
    assert hooked.anomaly_score(x).shape == (4,)
    assert isinstance(hooked.decoder[-1], nn.Linear)


def test_without_a_backend_that_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    h, weight, bias, x, _ = make()
    monkeypatch.setattr(_backend, "_availability", {"native": True, "triton": True})
    with _backend.backend("native"), pytest.raises(RuntimeError, match="decoder_error: backend 'native' was asked for"):
        decoder_error(h, weight, bias, x)


def test_old_gpus_multiply_by_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's products know no tensor cores of before compute capability 8.0, and spill kilobytes there."""
    from rvae_fast.ops import residual_stack_triton

    module = sys.modules[decoder_error.__module__]

    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.float16)
    monkeypatch.setattr(_backend, "_availability", {"triton": True})
    monkeypatch.setattr(residual_stack_triton, "_chips", {0: None})
    with _backend.backend("auto"):
        assert is_fused(x)
        assert module._triton_covers(x, x)
        monkeypatch.setattr(residual_stack_triton, "_chips", {0: "devices below compute capability 8.0"})
        assert not is_fused(x)
        assert not module._triton_covers(x, x)


def test_on_the_meta_device() -> None:
    h, weight, x = (torch.empty(shape, device="meta") for shape in ((5, 3), (7, 3), (5, 7)))
    assert decoder_error(h, weight, None, x).shape == (5,)
