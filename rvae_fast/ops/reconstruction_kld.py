"""``reconstruction_kld``: what a row costs an autoencoder: its reconstruction error and its KL divergence.

===============  ====================  ==============================================================
tensor           shape                 stored between forward and backward
===============  ====================  ==============================================================
x, x_hat         [batch, features]     saved as they are; no ``[batch, features]`` temporary is made
mu, logvar       [batch, latent]       saved as they are
feature_weight   [features]            saved as it is
error, kld       [batch]               not saved: no gradient needs them
===============  ====================  ==============================================================

Four layers that can be read apart: the schema with its fake and reference kernels, autograd, the argument checks, the
public function.  The native kernel is in ``csrc/cpu/reconstruction_kld.cpp``, the Triton kernels in
``kernels/reconstruction_kld.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rvae_fast import _backend, reference
from rvae_fast.ops.batched import is_batched

_IMPLEMENTED = {"native": ("cpu",), "triton": _backend.triton_devices()}

# --- schema, fake, reference kernel ---

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define(
    "reconstruction_kld(Tensor x, Tensor x_hat, Tensor? mu, Tensor? logvar, Tensor? feature_weight, "
    "str likelihood, str reduction) -> (Tensor error, Tensor kld)"
)
# Only the gradients that are asked for, in the order x, x_hat, mu, logvar, feature_weight.
_library.define(
    "reconstruction_kld_backward(Tensor? grad_error, Tensor? grad_kld, Tensor x, Tensor x_hat, Tensor? mu, "
    "Tensor? logvar, Tensor? feature_weight, str likelihood, str reduction, bool[5] needs) -> Tensor[]"
)
# The reference serves every device; a device's own kernel takes precedence over it.
_library.impl("reconstruction_kld", reference.reconstruction_kld, "CompositeExplicitAutograd")
_library.impl("reconstruction_kld_backward", reference.reconstruction_kld_backward, "CompositeExplicitAutograd")


def _triton_covers(*tensors: Tensor | None) -> bool:
    """The Triton kernels compute in fp32."""
    return all(t is None or t.dtype in (torch.float32, torch.bfloat16, torch.float16) for t in tensors)


def _triton_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from rvae_fast.kernels import reconstruction_kld as kernels

    with _backend.device_guard(inputs[0]):
        return kernels.forward(*inputs)


def _triton_backward(*inputs: Any) -> list[Tensor]:
    from rvae_fast.kernels import reconstruction_kld as kernels

    with _backend.device_guard(inputs[2]):
        return kernels.backward(*inputs)


def _cuda_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    """For graphs and for callers of torch.ops; eager calls that choose Triton come to it directly."""
    triton = _backend.is_available("triton") and _triton_covers(*inputs[:5])
    return (_triton_forward if triton else reference.reconstruction_kld)(*inputs)


def _cuda_backward(*inputs: Any) -> list[Tensor]:
    triton = _backend.is_available("triton") and _triton_covers(*inputs[2:7])
    return (_triton_backward if triton else reference.reconstruction_kld_backward)(*inputs)


_library.impl("reconstruction_kld", _cuda_forward, "CUDA")
_library.impl("reconstruction_kld_backward", _cuda_backward, "CUDA")

_forward_op = torch.ops.rvae_fast.reconstruction_kld.default
_backward_op = torch.ops.rvae_fast.reconstruction_kld_backward.default


@torch.library.register_fake("rvae_fast::reconstruction_kld", lib=_library)
def _fake_forward(
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(x, x_hat, mu, logvar, feature_weight)
    return x.new_empty((x.shape[0],), dtype=dtype), x.new_empty((x.shape[0],), dtype=dtype)


@torch.library.register_fake("rvae_fast::reconstruction_kld_backward", lib=_library)
def _fake_backward(
    grad_error: Tensor | None,
    grad_kld: Tensor | None,
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None,
    logvar: Tensor | None,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (x, x_hat, mu, logvar, feature_weight)
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed and t is not None]


# --- autograd ---


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, x_hat, mu, logvar, feature_weight, ctx.likelihood, ctx.reduction = inputs
    ctx.save_for_backward(x, x_hat, mu, logvar, feature_weight)
    ctx.set_materialize_grads(False)
    needs = ctx.needs_input_grad
    constant = []
    if not (needs[0] or needs[1] or needs[4]):
        constant.append(output[0])
    if not (needs[2] or needs[3]):
        constant.append(output[1])
    ctx.mark_non_differentiable(*constant)


def _backward(ctx: Any, grad_error: Tensor | None, grad_kld: Tensor | None) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    needs = [
        bool(need) and (grad_error if i in (0, 1, 4) else grad_kld) is not None
        for i, need in enumerate(ctx.needs_input_grad[:5])
    ]
    if not any(needs):
        return (None,) * 7
    # Under create_graph=True the gradients must themselves be differentiable, with is_grads_batched come many at once:
    # the reference's can be both.
    run: Any = getattr(ctx, "run_backward", _backward_op)
    if torch.is_grad_enabled() or is_batched(grad_error) or is_batched(grad_kld):
        run = reference.reconstruction_kld_backward
    grads = iter(run(grad_error, grad_kld, *inputs, ctx.likelihood, ctx.reduction, needs))
    return (*(next(grads) if need else None for need in needs), None, None)


# Differentiates the op itself, for graphs (torch.compile, torch.export) and for callers of torch.ops.
torch.library.register_autograd("rvae_fast::reconstruction_kld", _backward, setup_context=_save, lib=_library)


def _run_forward(*inputs: Any) -> tuple[Tensor, Tensor]:
    # Past the op's generated autograd layer, which is Python and costs more than the rest of a call.
    with torch._C._AutoDispatchBelowAutograd():
        return _forward_op(*inputs)


class _ReconstructionKLD(torch.autograd.Function):
    """The same for eager calls."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run_forward(*inputs)
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


class _TritonReconstructionKLD(torch.autograd.Function):
    """The same by the Triton kernels, past the dispatcher: on CPU tensors it would choose the native ones."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _triton_forward(*inputs)
        _save(ctx, inputs, output)
        ctx.run_backward = _triton_backward
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)


# --- checks ---


def _check_tensor(name: str, tensor: Any, x: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"reconstruction_kld: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if not tensor.is_floating_point():
        raise TypeError(
            f"reconstruction_kld: {name} must have a floating-point dtype, got {tensor.dtype}; convert it with .float()"
        )
    if tensor.device != x.device:
        raise ValueError(f"reconstruction_kld: {name} is on {tensor.device}, expected the device of x, {x.device}")


def _check(x: Tensor, x_hat: Tensor, mu: Tensor | None, logvar: Tensor | None, weight: Tensor | None) -> None:
    _check_tensor("x", x, x)
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(
            f"reconstruction_kld: x must have shape [batch, features] with at least one feature, got {list(x.shape)}; "
            f"flatten images with .flatten(1)"
        )
    _check_tensor("x_hat", x_hat, x)
    if x_hat.shape != x.shape:
        raise ValueError(
            f"reconstruction_kld: x_hat must have the shape of x, {list(x.shape)}, got {list(x_hat.shape)}"
        )
    if (mu is None) != (logvar is None):
        missing = "mu" if mu is None else "logvar"
        raise ValueError(f"reconstruction_kld: {missing} is None; pass both of mu and logvar, or neither")
    if mu is not None and logvar is not None:
        _check_tensor("mu", mu, x)
        if mu.dim() != 2 or mu.shape[0] != x.shape[0] or mu.shape[1] == 0:
            raise ValueError(
                f"reconstruction_kld: mu must have shape [batch, latent] with batch {x.shape[0]} and latent >= 1, "
                f"got {list(mu.shape)}"
            )
        _check_tensor("logvar", logvar, x)
        if logvar.shape != mu.shape:
            raise ValueError(
                f"reconstruction_kld: logvar must have the shape of mu, {list(mu.shape)}, got {list(logvar.shape)}"
            )
    if weight is not None:
        _check_tensor("feature_weight", weight, x)
        if weight.dim() != 1 or weight.shape[0] != x.shape[1]:
            raise ValueError(
                f"reconstruction_kld: feature_weight must have shape [features] = [{x.shape[1]}], "
                f"got {list(weight.shape)}"
            )


# --- the public function ---


def reconstruction_kld(
    x: Tensor,
    x_hat: Tensor,
    mu: Tensor | None = None,
    logvar: Tensor | None = None,
    *,
    likelihood: str = "squared",
    reduction: str = "sum",
    feature_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Per-sample reconstruction error and per-sample KL divergence of a (variational) autoencoder, in one pass.

    .. math::
        \mathrm{error}_b = s \sum_f w_f\, \ell(x_{bf}, \hat x_{bf}), \qquad
        \mathrm{kld}_b = \tfrac12 \sum_l \left(\mu_{bl}^2 + e^{\mathrm{logvar}_{bl}} - 1 - \mathrm{logvar}_{bl}\right)

    The negative evidence lower bound of Kingma and Welling, "Auto-Encoding Variational Bayes" (2014), is their sum (up
    to a constant that depends on the likelihood); the anomaly score of a row is its error, or both.

    Parameters
    ----------
    x : Tensor [batch, features]
        The rows. Floating point; dtypes may differ between arguments (under autocast ``x`` is usually fp32 and
        ``x_hat`` bf16).
    x_hat : Tensor [batch, features]
        Their reconstructions; logits for ``likelihood="bernoulli"``.
    mu, logvar : Tensor [batch, latent], optional
        Mean and log-variance of the approximate posterior; both or neither.
    likelihood : {"squared", "absolute", "bernoulli"}, default "squared"
        Error of one feature: :math:`(\hat x - x)^2`, :math:`|\hat x - x|`, or the cross-entropy of ``x`` in [0, 1]
        under the probability :math:`1/(1 + e^{-\hat x})`.
    reduction : {"sum", "mean"}, default "sum"
        Over features: :math:`s = 1` or :math:`s = 1/\mathrm{features}` (also with weights). The KL is a sum always.
    feature_weight : Tensor [features], optional
        Weight of each feature's error.

    Returns
    -------
    error : Tensor [batch]
    kld : Tensor [batch]
        Zeros without ``mu``. Both fp32, or fp64 if an argument is fp64: sums are kept in that dtype whatever the
        inputs'.

    Raises
    ------
    TypeError
        An argument is not a floating-point tensor.
    ValueError
        Shapes or devices that do not fit, no features, an unknown ``likelihood`` or ``reduction``.
    RuntimeError
        A backend was forced (see :class:`rvae_fast.backend`) that does not cover the tensors' device.

    Notes
    -----
    Differentiable in all five tensors, twice as well (``create_graph=True`` runs the gradients in plain PyTorch), and
    inside ``torch.compile(fullgraph=True)`` and ``torch.export``. Under the transforms of ``torch.func`` and
    forward-mode AD the plain PyTorch implementation runs. Non-finite inputs give non-finite results in their row and in
    no other.
    """
    if likelihood not in reference.LIKELIHOODS:
        raise ValueError(
            f"reconstruction_kld: likelihood must be one of {', '.join(reference.LIKELIHOODS)}; got {likelihood!r}"
        )
    if reduction not in reference.REDUCTIONS:
        raise ValueError(
            f"reconstruction_kld: reduction must be one of {', '.join(reference.REDUCTIONS)}; got {reduction!r}"
        )
    _check(x, x_hat, mu, logvar, feature_weight)
    inputs = (x, x_hat, mu, logvar, feature_weight, likelihood, reduction)
    chosen = _backend.choose("reconstruction_kld", x.device.type, _IMPLEMENTED)
    if chosen == "reference" or (chosen == "triton" and not _triton_covers(*inputs[:5])):
        return reference.reconstruction_kld(*inputs)
    if torch.compiler.is_compiling():
        return _forward_op(*inputs)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return reference.reconstruction_kld(*inputs)
    triton = chosen == "triton"
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):
        return (_TritonReconstructionKLD if triton else _ReconstructionKLD).apply(*inputs)
    return _triton_forward(*inputs) if triton else _run_forward(*inputs)
