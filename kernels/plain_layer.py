"""One layer by the library's matrix product and fused pointwise passes: for widths where the product dominates.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
h                       [rows, in]          dot type   written and read in both directions, kept in neither
y                       [rows, out]         chosen     stored; read once more for the residual and the moments
grad_y, d               as in ``layer_backward.py``    written; the product between them is a temporary
======================  ==================  =========  ============================================================

The functions take and return what :mod:`.layer_forward`, :mod:`.layer_backward` and :mod:`.weight_gradient` do. Next to
them a forward pass moves about four more ``[rows, width]`` tensors, and the product runs at cuBLAS's rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_norm import Moments, column_moments
from .norm_activation import norm_activation, norm_activation_backward, norm_backward


def plain_layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    skip: Tensor | None = None,
    residual: Tensor | None = None,
    h: Tensor | None = None,
    moments: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """As :func:`.layer_forward.layer_forward`."""
    operand = x
    if norm is not None:
        operand = norm_activation(
            x, norm, skip=skip, activation=activation, negative_slope=negative_slope, dtype=weight.dtype, out=h
        )
    operand = operand.to(weight.dtype)
    y = weight.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    product = y if y.dtype == weight.dtype else torch.empty_like(y, dtype=weight.dtype)
    if bias is None:
        torch.mm(operand, weight.t(), out=product)
    else:
        torch.addmm(bias.to(weight.dtype), operand, weight.t(), out=product)
    if moments and (residual is not None or product is y):
        return y, column_moments(product, residual, None if residual is None else y)
    if residual is not None:
        torch.add(product, residual, out=y)
    elif product is not y:
        y.copy_(product)
    return y, column_moments(y) if moments else None


def plain_layer_backward(
    g: Tensor,
    weight: Tensor,
    *,
    y: Tensor | None = None,
    norm_grad: Tensor | None = None,
    skip_grad: Tensor | None = None,
    residual: Tensor | None = None,
    x: Tensor | None = None,
    norm: Tensor | None = None,
    skip: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.layer_backward.layer_backward`."""
    dtype = weight.dtype if dtype is None else dtype
    grad_y = g if y is None or norm_grad is None else norm_backward(g, y, norm_grad, skip_grad=skip_grad)
    grad = torch.mm(grad_y.to(weight.dtype), weight)
    if residual is not None:
        grad = grad + residual
    if x is None or norm is None:
        return grad.to(dtype), grad_y, None
    d, tile_sums = norm_activation_backward(
        grad, x, norm, skip=skip, activation=activation, negative_slope=negative_slope, dtype=dtype
    )
    return d, grad_y, tile_sums


def plain_weight_gradient(
    grad_y: Tensor,
    x: Tensor,
    *,
    norm: Tensor | None = None,
    activation: str = "identity",
    negative_slope: float = 0.01,
    dtype: torch.dtype | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """As :func:`.weight_gradient.weight_gradient`, but rounded to the product's dtype on the way."""
    dtype = x.dtype if dtype is None else dtype
    if norm is not None:
        x = norm_activation(x, norm, activation=activation, negative_slope=negative_slope, dtype=dtype)
    product = torch.mm(grad_y.to(dtype).t(), x.to(dtype))
    return product.float() if out is None else out.copy_(product)
