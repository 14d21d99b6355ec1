"""One layer by the library's matrix product and fused pointwise passes: for widths where the product dominates.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
h                       [rows, in]          dot type   written and read in both directions, kept in neither
y                       [rows, out]         chosen     stored; read once more for the residual and the moments
grad_y, d               as in ``layer_backward.py``    written; the product between them is a temporary (order "pre"
                                                       has no d, see ``residual_stack_backward.py``)
======================  ==================  =========  ============================================================

The functions take and return what :mod:`.layer_forward`, :mod:`.layer_backward` and :mod:`.weight_gradient` do. Next to
them a forward pass moves about four more ``[rows, width]`` tensors, and the product runs at cuBLAS's rate.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .batch_norm import Moments, column_moments
from .launch import call, place
from .norm_activation import norm_activation, norm_activation_backward, norm_backward

#: Whether torch can write a half-precision product in fp32, as the tensor cores have it (CUDA, from 2.8).
_WIDE_PRODUCTS = hasattr(torch.ops.aten.mm, "dtype_out")


def _linear(out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if bias is None:
        torch.mm(x, weight.t(), out=out)
    else:
        torch.addmm(bias.to(weight.dtype), x, weight.t(), out=out)


def _product(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b, out=out)


def _product_of_transposed(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a.t(), b, out=out)


def _wide_product_of_transposed(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.ops.aten.mm.dtype_out(a.t(), b, out.dtype, out=out)


def _sum(out: Tensor, a: Tensor, b: Tensor) -> None:
    torch.add(a, b, out=out)


def in_dtype(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x itself, or a copy in ``dtype``."""
    if x.dtype == dtype:
        return x
    cast = torch.empty_like(x, dtype=dtype)
    call(Tensor.copy_, cast, x)
    return cast


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
    operand = in_dtype(operand, weight.dtype)
    y = weight.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    product = y if y.dtype == weight.dtype else torch.empty_like(y, dtype=weight.dtype)
    call(_linear, product, operand, weight, bias)
    if moments and (residual is not None or product is y):
        return y, column_moments(product, residual, None if residual is None else y)
    if residual is not None:
        call(_sum, y, product, residual)
    elif product is not y:
        call(Tensor.copy_, y, product)
    return y, column_moments(y) if moments else None


def plain_input_gradient(grad_y: Tensor, weight: Tensor) -> Tensor:
    """``grad_y @ weight`` in the weight's dtype."""
    product = weight.new_empty((grad_y.shape[0], weight.shape[1]))
    call(_product, product, in_dtype(grad_y, weight.dtype), weight)
    return product


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
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """As :func:`.layer_backward.layer_backward`."""
    dtype = weight.dtype if dtype is None else dtype
    grad_y = g if y is None or norm_grad is None else norm_backward(g, y, norm_grad, skip_grad=skip_grad)
    product = plain_input_gradient(grad_y, weight)
    grad = product
    if residual is not None:
        grad = torch.empty_like(product, dtype=torch.promote_types(product.dtype, residual.dtype))
        call(_sum, grad, product, residual)
    if x is None or norm is None:
        if out is None:
            return in_dtype(grad, dtype), grad_y, None
        call(Tensor.copy_, out, grad)
        return out, grad_y, None
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
    """As :func:`.weight_gradient.weight_gradient`; where torch cannot write fp32, rounded to the product's dtype."""
    dtype = x.dtype if dtype is None else dtype
    if norm is not None:
        x = norm_activation(x, norm, activation=activation, negative_slope=negative_slope, dtype=dtype)
    total = x.new_empty((grad_y.shape[1], x.shape[1]), dtype=torch.float32) if out is None else out
    if dtype != torch.float32 and _WIDE_PRODUCTS and place(total).type == "cuda":
        call(_wide_product_of_transposed, total, in_dtype(grad_y, dtype), in_dtype(x, dtype))
        return total
    product = total if dtype == torch.float32 else torch.empty_like(total, dtype=dtype)
    call(_product_of_transposed, product, in_dtype(grad_y, dtype), in_dtype(x, dtype))
    if product is not total:
        call(Tensor.copy_, total, product)
    return total
