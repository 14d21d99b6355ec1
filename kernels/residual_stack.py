"""A stack of residual units forward and backward: which layer kernel runs when, and what is kept between.

With ``L`` layers of one width in ``N`` units:

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
x                       [rows, width]       any        stored (it is the caller's)
inner                   [*, rows, width]    dot type   stored: raw outputs inside units (order "pre": L - N; "post": L)
stream                  [N - 1, rows, width] x's       stored: what the units pass on, but for the last
norms                   [L, 5, width]       fp32       stored: mean, rstd, unbiased variance, scale, shift
activations             [rows, width]       dot type   recomputed
======================  ==================  =========  ============================================================

Order "pre", layer l: ``y_l = activation(norm_l(y_{l-1})) @ W_l.T + b_l`` (+ the unit's input at a unit's end).
Order "post": ``y_l = a_l @ W_l.T + b_l`` with ``a_l = activation(norm_{l-1}(y_{l-1}))`` (+ the unit's input inside the
activation at a unit's start); the first layer takes x as it is and the result is the last such activation.

A layer runs fused (one pass each way) or by the library's product with pointwise passes, as ``configurations.strategy``
says for its shape.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configurations
from .batch_norm import Moments, column_moments, merge_gradients, merge_moments, running_norm
from .layer_backward import layer_backward
from .layer_forward import layer_forward
from .norm_activation import norm_activation, norm_activation_backward, norm_backward
from .plain_layer import plain_layer_backward, plain_layer_forward, plain_weight_gradient
from .weight_gradient import weight_gradient


class StackOptions(NamedTuple):
    """What does not depend on the tensors; ``layers`` are those of one unit.

    ``batch_stats`` normalises by the batch's statistics, otherwise by the running ones. ``dtype`` is the products'.
    """

    layers: int
    order: str
    activation: str
    negative_slope: float
    batch_stats: bool
    dtype: torch.dtype


class Kept(NamedTuple):
    """What a backward pass needs besides the input and the parameters; see the table above."""

    inner: Tensor
    stream: Tensor
    norms: Tensor


class StackGradients(NamedTuple):
    """Of x in its dtype, None if unwanted; of the parameters in fp32, one row a layer, unwanted weights unset."""

    x: Tensor | None
    weights: Tensor
    biases: Tensor
    norm_weights: Tensor
    norm_biases: Tensor


class _Layer(NamedTuple):
    forward: Callable[..., tuple[Tensor, Moments | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    weight: Callable[..., Tensor]


_LAYERS = {
    "fused": _Layer(layer_forward, layer_backward, weight_gradient),
    "plain": _Layer(plain_layer_forward, plain_layer_backward, plain_weight_gradient),
}


def _setting(options: StackOptions, rows: int, width: int) -> tuple[_Layer, dict[str, Any]]:
    layer = _LAYERS[configurations.strategy(options.dtype, rows, width)]
    return layer, {"activation": options.activation, "negative_slope": options.negative_slope}


def _cast(weights: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """The weights, contiguous, in the products' dtype: one kernel for all of them."""
    if all(w.dtype == dtype and w.is_contiguous() for w in weights):
        return weights
    cast = weights[0].new_empty((len(weights), *weights[0].shape), dtype=dtype).unbind(0)
    torch._foreach_copy_(cast, list(weights))
    return cast


def stack_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    eps: float,
    options: StackOptions,
    *,
    keep: bool = True,
) -> tuple[Tensor, Kept]:
    """Run the stack. Running statistics are read without ``batch_stats`` and never written: ``norms`` has the batch's.

    Parameters
    ----------
    x : [rows, width] contiguous, rows > 0 (> 1 with ``batch_stats``)
    weights : L tensors [width, width]
    biases, norm_weights, norm_biases, running_means, running_vars : L tensors [width], or none
    eps : float
    options : StackOptions
    keep : bool
        Keep what :func:`stack_backward` needs; without, ``inner`` and ``stream`` come out empty.

    Returns
    -------
    y : [rows, width] of x's dtype
    kept : Kept
    """
    rows, width = x.shape
    depth, layers = len(weights), options.layers
    layer, act = _setting(options, rows, width)
    cast = _cast(weights, options.dtype)
    inner = x.new_empty((0, rows, width), dtype=options.dtype)
    stream = x.new_empty((0, rows, width))
    if keep:
        inner = inner.new_empty((depth - depth // layers if options.order == "pre" else depth, rows, width))
        stream = stream.new_empty((depth // layers - 1, rows, width))
    norms = x.new_empty((depth, 5, width), dtype=torch.float32)

    def entry(tensors: Sequence[Tensor], i: int) -> Tensor | None:
        return tensors[i] if tensors else None

    def finish_norm(i: int, moments: Moments | None) -> Tensor:
        weight, bias = entry(norm_weights, i), entry(norm_biases, i)
        if moments is not None:
            return merge_moments(*moments, rows, weight, bias, eps, out=norms[i])
        return running_norm(running_means[i], running_vars[i], weight, bias, eps, out=norms[i])

    result = torch.empty_like(x)
    used_inner = used_stream = 0
    y, unit_input = x, x
    if options.order == "pre":
        moments = column_moments(x) if options.batch_stats else None
        for i in range(depth):
            ends_unit = (i + 1) % layers == 0
            if i + 1 == depth:
                out = result
            elif not keep:
                out = x.new_empty((rows, width), dtype=x.dtype if ends_unit else options.dtype)
            elif ends_unit:
                out, used_stream = stream[used_stream], used_stream + 1
            else:
                out, used_inner = inner[used_inner], used_inner + 1
            y, moments = layer.forward(
                y, cast[i], entry(biases, i), norm=finish_norm(i, moments), residual=unit_input if ends_unit else None,
                moments=i + 1 < depth and options.batch_stats, out=out, **act,
            )  # fmt: skip
            if ends_unit:
                unit_input = y
        return result, Kept(inner, stream, norms)
    norm: Tensor | None = None
    for i in range(depth):
        skip = h = None
        if i % layers == 0 and i > 0:
            skip, h = unit_input, stream[i // layers - 1] if keep else torch.empty_like(x)
            unit_input = h
        y, moments = layer.forward(
            y, cast[i], entry(biases, i), norm=norm, skip=skip, h=h, moments=options.batch_stats,
            out=inner[i] if keep else None, **act,
        )  # fmt: skip
        norm = finish_norm(i, moments)
    norm_activation(y, norms[depth - 1], skip=unit_input, out=result, **act)
    return result, Kept(inner, stream, norms)


def stack_backward(
    grad: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    kept: Kept,
    options: StackOptions,
    *,
    need_x: bool = True,
    need_weights: Sequence[bool] | None = None,
) -> StackGradients:
    """Gradients of :func:`stack_forward`.

    Parameters
    ----------
    grad : [rows, width] contiguous, of x's dtype
        Gradient of the result.
    x, weights, options
        The forward's.
    kept : Kept
        From a forward pass with ``keep``.
    need_x, need_weights
        Which of the gradients that cost a pass of their own are wanted; all by default.
    """
    run = _backward_pre if options.order == "pre" else _backward_post
    need_weights = [True] * len(weights) if need_weights is None else need_weights
    return run(grad, x, _cast(weights, options.dtype), kept, options, need_x, need_weights)


def _empty_gradients(x: Tensor, depth: int) -> StackGradients:
    width = x.shape[1]
    weights = x.new_empty((depth, width, width), dtype=torch.float32)
    return StackGradients(None, weights, *x.new_empty((3, depth, width), dtype=torch.float32))


def _backward_pre(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: Kept, options: StackOptions, need_x: bool,
    need_weights: Sequence[bool],
) -> StackGradients:  # fmt: skip
    depth, layers = len(weights), options.layers
    layer, act = _setting(options, *x.shape)
    out = _empty_gradients(x, depth)
    # The input of layer i: x, a unit's output, or a raw output inside a unit.
    raws = [
        (x if i == 0 else kept.stream[i // layers - 1]) if i % layers == 0 else kept.inner[i - i // layers - 1]
        for i in range(depth)
    ]
    # g, with y and norm_grad: gradient at the activation of the layer above, whose BatchNorm is still to be passed.
    g, y, norm_grad, skip_grad = grad, None, None, None
    unit_grad = grad
    torch.sum(grad, 0, dtype=torch.float32, out=out.biases[depth - 1])
    first_bias = torch.empty_like(out.biases[0])  # where merge_gradients has no layer before to write to
    for i in reversed(range(depth)):
        raw, norm = raws[i], kept.norms[i]
        d, grad_y, tile_sums = layer.backward(
            g, weights[i], y=y, norm_grad=norm_grad, skip_grad=skip_grad, x=raw, norm=norm, **act
        )
        if need_weights[i]:
            layer.weight(grad_y, raw, norm=norm, dtype=options.dtype, out=out.weights[i], **act)
        if (i + 1) % layers == 0:
            unit_grad, unit_sum = grad_y, out.biases[i]
        starts_unit = i % layers == 0
        assert tile_sums is not None
        *_, norm_grad = merge_gradients(
            tile_sums, norm, x.shape[0], options.batch_stats, skip_sum=unit_sum if starts_unit else None,
            out=(out.norm_weights[i], out.norm_biases[i], out.biases[i - 1] if i else first_bias),
        )  # fmt: skip
        g, y, skip_grad = d, raw, unit_grad if starts_unit else None
    assert y is not None
    assert norm_grad is not None
    return out._replace(x=norm_backward(g, y, norm_grad, skip_grad=skip_grad) if need_x else None)


def _backward_post(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: Kept, options: StackOptions, need_x: bool,
    need_weights: Sequence[bool],
) -> StackGradients:  # fmt: skip
    depth, layers = len(weights), options.layers
    layer, act = _setting(options, *x.shape)
    out = _empty_gradients(x, depth)
    inputs = [x, *kept.stream]
    grad_x: Tensor | None = None
    tile_sums: Tensor | None
    d, tile_sums = norm_activation_backward(grad, kept.inner[-1], kept.norms[-1], skip=inputs[-1], **act)
    unit_d = d  # gradient inside the unit's last activation: it also goes over the skip
    for i in reversed(range(depth)):
        y = kept.inner[i]
        assert tile_sums is not None
        *_, norm_grad = merge_gradients(
            tile_sums, kept.norms[i], x.shape[0], options.batch_stats,
            out=(out.norm_weights[i], out.norm_biases[i], out.biases[i]),
        )  # fmt: skip
        before = {"x": kept.inner[i - 1], "norm": kept.norms[i - 1]} if i else {}
        if i % layers:
            d, grad_y, tile_sums = layer.backward(d, weights[i], y=y, norm_grad=norm_grad, **before, **act)
        elif i > 0:
            d, grad_y, tile_sums = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, skip=inputs[i // layers - 1], dtype=x.dtype,
                **before, **act,
            )  # fmt: skip
            unit_d = d
        elif need_x:
            grad_x, grad_y, _ = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, dtype=x.dtype, **act
            )
        else:
            grad_y = norm_backward(d, y, norm_grad)
        if need_weights[i]:
            source = {"x": inputs[i // layers]} if i % layers == 0 else before
            layer.weight(grad_y, **source, dtype=options.dtype, out=out.weights[i], **act)
    return out._replace(x=grad_x)
