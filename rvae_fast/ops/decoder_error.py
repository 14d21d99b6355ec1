"""``decoder_error``: a decoder's last linear layer and the error of what it reconstructs, as one op.

===================  ====================  ==============================================================
tensor               shape                 stored between forward and backward
===================  ====================  ==============================================================
h, weight, bias, x   see the function      saved as they are
x_hat                [batch, features]     never written; the backward computes it again
error                [batch]               not saved
===================  ====================  ==============================================================

It is for scoring. Training goes through ``reconstruction_kld`` (docs/notes/performance.md has the arithmetic), so the
gradients here, though right, are plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvae_fast import _backend, reference
from rvae_fast.ops.residual_stack_triton import chip_why_not

_IMPLEMENTED = {"triton": _backend.triton_devices()}
_COVERED = (torch.float32, torch.bfloat16, torch.float16)

# --- schema, fake, kernels ---

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define(
    "decoder_error(Tensor h, Tensor weight, Tensor? bias, Tensor x, Tensor? feature_weight, str likelihood, "
    "str reduction) -> Tensor"
)
_library.impl("decoder_error", reference.decoder_error, "CompositeExplicitAutograd")


def _multiplies(x: Tensor) -> bool:
    """Whether Triton's products are for this device: they know no tensor cores of before compute capability 8.0."""
    return x.device.type != "cuda" or chip_why_not(x.device.index) is None


def _triton_covers(h: Tensor, weight: Tensor, *others: Tensor | None) -> bool:
    covered = h.dtype == weight.dtype and all(t is None or t.dtype in _COVERED for t in (h, weight, *others))
    return covered and _multiplies(h)


def _triton(*inputs: Any) -> Tensor:
    from rvae_fast.kernels import decoder_error as kernels

    with _backend.device_guard(inputs[0]):
        return kernels.decoder_error(*inputs)


def _cuda(*inputs: Any) -> Tensor:
    triton = _backend.is_available("triton") and _triton_covers(*inputs[:5])
    return (_triton if triton else reference.decoder_error)(*inputs)


_library.impl("decoder_error", _cuda, "CUDA")
_op = torch.ops.rvae_fast.decoder_error.default


@torch.library.register_fake("rvae_fast::decoder_error", lib=_library)
def _fake(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    feature_weight: Tensor | None,
    likelihood: str,
    reduction: str,
) -> Tensor:
    dtype = reference.accumulation_dtype(h, weight, bias, x, feature_weight)
    return x.new_empty((x.shape[0],), dtype=dtype)


# --- autograd ---


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    h, weight, bias, x, feature_weight, ctx.likelihood, ctx.reduction = inputs
    ctx.save_for_backward(h, weight, bias, x, feature_weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    h, weight, bias, x, feature_weight = ctx.saved_tensors
    needs = ctx.needs_input_grad
    dtype = reference.accumulation_dtype(*ctx.saved_tensors)
    x_hat = F.linear(h.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    inner = any(needs[:3])
    asked = [needs[3], inner, False, False, needs[4]]
    grads = iter(
        reference.reconstruction_kld_backward(
            grad, None, x, x_hat, None, None, feature_weight, ctx.likelihood, ctx.reduction, asked
        )
    )
    grad_x = next(grads) if needs[3] else None
    d = next(grads) if inner else x_hat
    grad_feature_weight = next(grads) if needs[4] else None
    return (
        (d @ weight.to(dtype)).to(h.dtype) if needs[0] else None,
        (d.t() @ h.to(dtype)).to(weight.dtype) if needs[1] else None,
        d.sum(0).to(bias.dtype) if needs[2] and bias is not None else None,
        grad_x,
        grad_feature_weight,
        None,
        None,
    )


torch.library.register_autograd("rvae_fast::decoder_error", _backward, setup_context=_save, lib=_library)


# --- the function ---


def is_fused(x: Tensor) -> bool:
    """Whether :func:`decoder_error` has a kernel for ``x``'s device and dtype under the backend now chosen."""
    name = _backend.current_backend()
    if name not in ("auto", "triton") or x.dtype not in _COVERED or (x.device.type == "cpu" and name == "auto"):
        return False
    return x.device.type in _IMPLEMENTED["triton"] and _backend.is_available("triton") and _multiplies(x)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on for a device; never on "meta", of which torch refuses the question."""
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def decoder_error(
    h: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    x: Tensor,
    *,
    likelihood: str = "squared",
    reduction: str = "sum",
    feature_weight: Tensor | None = None,
) -> Tensor:
    """Per-sample error of ``x`` under the reconstruction ``h @ weight.T + bias``, which is not written to memory.

    Parameters
    ----------
    h : Tensor [batch, in]
        Input of the decoder's last layer.
    weight : Tensor [features, in]
    bias : Tensor [features] or None
    x : Tensor [batch, features]
    likelihood, reduction, feature_weight
        As in :func:`rvae_fast.reconstruction_kld`, whose error this is.

    Returns
    -------
    Tensor [batch]
        fp32, or fp64 if an argument is fp64.

    Raises
    ------
    ValueError
        Shapes that do not fit, an unknown ``likelihood`` or ``reduction``.

    Notes
    -----
    Under autocast the product runs in its dtype, as that of ``nn.Linear`` does; the reconstruction is not rounded to
    it.
    """
    if likelihood not in reference.LIKELIHOODS:
        raise ValueError(
            f"decoder_error: likelihood must be one of {', '.join(reference.LIKELIHOODS)}; got {likelihood!r}"
        )
    if reduction not in reference.REDUCTIONS:
        raise ValueError(
            f"decoder_error: reduction must be one of {', '.join(reference.REDUCTIONS)}; got {reduction!r}"
        )
    if h.dim() != 2 or weight.dim() != 2 or h.shape[1] != weight.shape[1]:
        raise ValueError(
            f"decoder_error: h and weight must have shapes [batch, in] and [features, in], got {list(h.shape)} and "
            f"{list(weight.shape)}"
        )
    if x.shape != (h.shape[0], weight.shape[0]):
        raise ValueError(
            f"decoder_error: x must have shape [batch, features] = {[h.shape[0], weight.shape[0]]}, got {list(x.shape)}"
        )
    for name, vector in (("bias", bias), ("feature_weight", feature_weight)):
        if vector is not None and vector.shape != (weight.shape[0],):
            raise ValueError(
                f"decoder_error: {name} must have shape [features] = [{weight.shape[0]}], got {list(vector.shape)}"
            )
    if autocasts(x.device):
        dtype = torch.get_autocast_dtype(x.device.type)
        if h.dtype != torch.float64 and weight.dtype != torch.float64:
            h, weight = h.to(dtype), weight.to(dtype)
    inputs = (h, weight, bias, x, feature_weight, likelihood, reduction)
    chosen = _backend.choose("decoder_error", x.device.type, _IMPLEMENTED)
    if chosen == "reference" or not _triton_covers(*inputs[:5]):  # type: ignore[arg-type]
        return reference.decoder_error(*inputs)
    if torch.compiler.is_compiling():
        return _op(*inputs)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return reference.decoder_error(*inputs)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs[:5]):  # type: ignore[union-attr]
        return _op(*inputs)
    return _triton(*inputs)
