"""The mathematics of every op in plain PyTorch: the oracle of the tests and the path that always works.

Nothing here is fast on purpose; what is, must agree with it. Everything differentiates under autograd, to any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from rvae_fast._activations import activate

LIKELIHOODS = ("squared", "absolute", "bernoulli")
REDUCTIONS = ("sum", "mean")


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Dtype in which sums over these tensors are kept: fp64 if any of them is fp64, else fp32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


# --- posterior ---


def posterior(code: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the posterior, ``[batch, latent]`` each, from a code ``[batch, 2 latent]``.

    The raw log variance is kept in (``low``, ``high``) by a softplus at either end. A 16-bit code gives fp32, as under
    autocast: exp(logvar) in bf16 is off by up to 1.6 % at abs(logvar) = 8.
    """
    if code.dtype in (torch.bfloat16, torch.float16):
        code = code.float()
    mu, raw = code.chunk(2, dim=1)
    below = high - F.softplus(high - raw)
    return mu, low + F.softplus(below - low)


# --- reconstruction error and KL divergence ---


def reconstruction_kld(
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    feature_weight: Tensor | None = None,
    likelihood: str = "squared",
    reduction: str = "sum",
) -> tuple[Tensor, Tensor]:
    r"""Per-sample reconstruction error and per-sample KL divergence to the standard normal.

    .. math::
        \mathrm{error}_b = s \sum_f w_f\, \ell(x_{bf}, \hat x_{bf}), \qquad
        \mathrm{kld}_b = \tfrac12 \sum_l \left(\mu_{bl}^2 + e^{v_{bl}} - 1 - v_{bl}\right)

    with :math:`\ell` the squared difference, the absolute difference, or the cross-entropy of a Bernoulli variable with
    logit :math:`\hat x`; :math:`s` is 1 for a sum and 1/features for a mean; :math:`v` is ``logvar``.  The KL term is
    equation 10 of Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), with the opposite sign.

    Arguments and results are those of :func:`rvae_fast.reconstruction_kld`, which checks them.
    """
    dtype = accumulation_dtype(x, x_hat, mu, logvar, feature_weight)
    x, x_hat = x.to(dtype), x_hat.to(dtype)
    terms = _error_terms(x, x_hat, likelihood)
    if feature_weight is not None:
        terms = terms * feature_weight.to(dtype)
    error = terms.sum(1)
    if reduction == "mean":
        error = error / x.shape[1]
    if mu is None or logvar is None:
        return error, torch.zeros_like(error.detach())
    return error, _kld(mu.to(dtype), logvar.to(dtype))


def kld(mu: Tensor, logvar: Tensor) -> Tensor:
    """Divergence ``[batch]`` of the posterior from the standard normal, as in :func:`reconstruction_kld`."""
    dtype = accumulation_dtype(mu, logvar)
    return _kld(mu.to(dtype), logvar.to(dtype))


def _kld(mu: Tensor, logvar: Tensor) -> Tensor:
    return 0.5 * (mu.square() + logvar.exp() - 1.0 - logvar).sum(1)


def reconstruction_kld_backward(
    grad_error: Tensor | None,
    grad_kld: Tensor | None,
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of :func:`reconstruction_kld`, written out.

    Parameters
    ----------
    grad_error, grad_kld : Tensor [batch] or None
        Gradients of the two results; None where a result was not used, and then nothing that depends on it may be in
        ``needs``.
    needs : sequence of 5 bool
        Which gradients to return, in the order x, x_hat, mu, logvar, feature_weight.

    Returns
    -------
    list of Tensor
        The gradients asked for, in that order, each in the shape and dtype of its input.
    """
    dtype = accumulation_dtype(x, x_hat, mu, logvar, feature_weight)
    grads: list[Tensor] = []
    if grad_error is not None:
        wide_x, wide_x_hat = x.to(dtype), x_hat.to(dtype)
        row = grad_error.to(dtype).unsqueeze(1)
        if reduction == "mean":
            row = row / x.shape[1]
        weighted = row if feature_weight is None else row * feature_weight.to(dtype)
        if needs[0]:
            grads.append((weighted * _error_slope_x(wide_x, wide_x_hat, likelihood)).to(x.dtype))
        if needs[1]:
            grads.append((weighted * _error_slope_x_hat(wide_x, wide_x_hat, likelihood)).to(x_hat.dtype))
    if grad_kld is not None:
        row = grad_kld.to(dtype).unsqueeze(1)
        if mu is not None and needs[2]:
            grads.append((row * mu.to(dtype)).to(mu.dtype))
        if logvar is not None and needs[3]:
            grads.append((row * (0.5 * torch.expm1(logvar.to(dtype)))).to(logvar.dtype))
    if grad_error is not None and feature_weight is not None and needs[4]:
        row = grad_error.to(dtype).unsqueeze(1)
        if reduction == "mean":
            row = row / x.shape[1]
        grads.append((row * _error_terms(x.to(dtype), x_hat.to(dtype), likelihood)).sum(0).to(feature_weight.dtype))
    return grads


def _error_terms(x: Tensor, x_hat: Tensor, likelihood: str) -> Tensor:
    if likelihood == "squared":
        return (x_hat - x).square()
    if likelihood == "absolute":
        return (x_hat - x).abs()
    return F.binary_cross_entropy_with_logits(x_hat, x, reduction="none")


def _error_slope_x_hat(x: Tensor, x_hat: Tensor, likelihood: str) -> Tensor:
    if likelihood == "squared":
        return 2.0 * (x_hat - x)
    if likelihood == "absolute":
        return torch.sign(x_hat - x)
    return torch.sigmoid(x_hat) - x


def _error_slope_x(x: Tensor, x_hat: Tensor, likelihood: str) -> Tensor:
    return -x_hat if likelihood == "bernoulli" else -_error_slope_x_hat(x, x_hat, likelihood)


def decoder_error(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    feature_weight: Tensor | None = None,
    likelihood: str = "squared",
    reduction: str = "sum",
) -> Tensor:
    """The error of :func:`reconstruction_kld` with ``x_hat = h @ weight.T + bias``, the bias added in the sum's dtype.

    The product runs in the dtype of h, which must be the weight's, and its result is rounded to that.
    """
    product = torch.mm(h, weight.t())
    if bias is not None:
        product = product.to(accumulation_dtype(h, bias)) + bias.to(accumulation_dtype(h, bias))
    return reconstruction_kld(x, product, None, None, feature_weight, likelihood, reduction)[0]


# --- a sample of the posterior, by counted random numbers ---


def philox(key: Tensor, counter: Tensor) -> list[Tensor]:
    """The four 32-bit words (as int64) of Philox-4x32-10 for each counter, an int64 tensor, under a 64-bit key.

    Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3" (2011). torch has no unsigned 32-bit
    products, so the high word of one is put together from two halves.
    """
    low = 0xFFFFFFFF
    c0, c1 = counter & low, (counter >> 32) & low
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = key & low, (key >> 32) & low
    for _ in range(10):
        (high_a, low_a), (high_b, low_b) = _product(c0, 0xD2511F53), _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return [c0, c1, c2, c3]


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low word of the product of two 32-bit numbers."""
    low = 0xFFFFFFFF
    upper, lower = (a >> 16) * b, (a & 0xFFFF) * b
    return (upper + (lower >> 16)) >> 16, (((upper & 0xFFFF) << 16) + lower) & low


def philox_normal(seed: Tensor, rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers ``[rows, columns]`` of a seed (int64, one element), by position: Box and Muller (1958).

    Uniform numbers are the words' intervals' middles in fp32, in (0, 1]; the transform runs in ``dtype``.
    """
    positions = torch.arange(rows * columns, device=seed.device).view(rows, columns)
    a, b, _, _ = philox(seed, positions)
    u, v = ((word.float() * 2.0**-32 + 2.0**-33).to(dtype) for word in (a, b))
    return torch.sqrt(-2.0 * torch.log(u)) * torch.cos(2.0 * math.pi * v)


def reparameterise(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    """``mu + exp(logvar / 2) * eps`` with ``eps = philox_normal(seed, ...)``, and the divergence of each row."""
    dtype = accumulation_dtype(mu, logvar)
    eps = philox_normal(seed, mu.shape[0], mu.shape[1], dtype)
    z = mu.to(dtype) + torch.exp(0.5 * logvar.to(dtype)) * eps
    return z.to(mu.dtype), kld(mu, logvar)


def reparameterise_backward(
    grad_z: Tensor | None, grad_kld: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of :func:`reparameterise` by mu and logvar, written out."""
    dtype = accumulation_dtype(mu, logvar)
    wide_mu, wide_logvar = mu.to(dtype), logvar.to(dtype)
    grad_mu, grad_logvar = torch.zeros_like(wide_mu), torch.zeros_like(wide_logvar)
    if grad_z is not None:
        grad_mu = grad_mu + grad_z.to(dtype)
        eps = philox_normal(seed, mu.shape[0], mu.shape[1], dtype)
        grad_logvar = grad_mu * (0.5 * torch.exp(0.5 * wide_logvar) * eps)
    if grad_kld is not None:
        row = grad_kld.to(dtype).unsqueeze(1)
        grad_mu = grad_mu + row * wide_mu
        grad_logvar = grad_logvar + row * (0.5 * torch.expm1(wide_logvar))
    return grad_mu.to(mu.dtype), grad_logvar.to(logvar.dtype)


# --- residual units ---


def plain_stack(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    norm_weight: Sequence[Tensor | None],
    norm_bias: Sequence[Tensor | None],
    running_mean: Sequence[Tensor | None],
    running_var: Sequence[Tensor | None],
    *,
    activation: str,
    negative_slope: float,
    eps: float,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
) -> Tensor:
    """Linear -> BatchNorm -> activation, ``L - 1`` times, then a bare Linear, in plain PyTorch.

    ``weight`` and ``bias`` have L entries (biases may be None), what belongs to the norms L - 1; the arguments mean
    what they mean in :func:`residual_unit`. Widths may differ from layer to layer.
    """
    for i in range(len(weight) - 1):
        h = F.batch_norm(
            F.linear(x, weight[i], bias[i]),
            running_mean[i], running_var[i], norm_weight[i], norm_bias[i], batch_stats[i], momentum[i], eps,
        )  # fmt: skip
        x = activate(h, activation, negative_slope)
    return F.linear(x, weight[-1], bias[-1])


def residual_unit(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    norm_weight: Sequence[Tensor | None],
    norm_bias: Sequence[Tensor | None],
    running_mean: Sequence[Tensor | None],
    running_var: Sequence[Tensor | None],
    *,
    order: str,
    activation: str,
    negative_slope: float,
    eps: float,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
    dropout: float = 0.0,
) -> Tensor:
    """One residual unit of ``K = len(weight)`` layers, in plain PyTorch.

    ``order="pre"`` (He et al. 2016b): ``x + F(x)``, F = (BatchNorm -> activation -> Linear) K times.
    ``order="post"`` (He et al. 2016a): ``activation(x + F(x))``, F = Linear -> BatchNorm,
    with the activation between layers.

    Parameters
    ----------
    x : Tensor [batch, W]
    weight : K tensors [W, W], as ``nn.Linear.weight``
    bias, norm_weight, norm_bias : K tensors [W] or None
    running_mean, running_var : K tensors [W] or None
        With ``batch_stats[i]`` they are updated in place where given; without, they normalise.
    momentum : K floats
        Weight of the batch in each running average (for a cumulative average, 1 / batches seen).
    batch_stats : K bools
        Normalise layer i by this batch's mean and biased variance rather than by the running ones.
    dropout : float
        Probability of zeroing an element of the branch; pass 0 outside training.

    Returns
    -------
    Tensor [batch, W]
    """

    def norm(h: Tensor, i: int) -> Tensor:
        return F.batch_norm(
            h, running_mean[i], running_var[i], norm_weight[i], norm_bias[i], batch_stats[i], momentum[i], eps
        )

    h = x
    last = len(weight) - 1
    for i in range(len(weight)):
        if order == "pre":
            h = F.linear(activate(norm(h, i), activation, negative_slope), weight[i], bias[i])
        else:
            h = norm(F.linear(h, weight[i], bias[i]), i)
            if i < last:
                h = activate(h, activation, negative_slope)
    if dropout > 0:
        h = F.dropout(h, dropout, training=True)
    h = x + h
    return h if order == "pre" else activate(h, activation, negative_slope)
