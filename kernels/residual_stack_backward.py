"""The way back through a stack of residual units, recorded and played as :mod:`.residual_stack` is."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_norm import merge_gradients
from .launch import Tape, call
from .norm_activation import activation_sums, norm_activation_backward, norm_backward
from .plain_layer import in_dtype, plain_input_gradient, plain_weight_gradient
from .residual_stack import (
    Kept,
    Key,
    Layer,
    StackOptions,
    aligned,
    cast_weights,
    choice,
    kept_shapes,
    needs_cast,
    on_device,
    setting,
)


class StackGradients(NamedTuple):
    """Of x in its dtype, None if unwanted; of the parameters in fp32, one row a layer.

    ``weights`` has no rows where none is wanted, and zeros for those that are not.
    """

    x: Tensor | None
    weights: Tensor
    biases: Tensor
    norm_weights: Tensor
    norm_biases: Tensor


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
    """Gradients of :func:`.residual_stack.stack_forward`.

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
    (rows, width), depth = x.shape, len(weights)
    need = (True,) * depth if need_weights is None else tuple(need_weights)
    key = Key(
        x.device, aligned(x, [grad], weights), rows, width, depth, options, 0.0, x.dtype, weights[0].dtype,
        needs_cast(weights, options.dtype), None, None, None, None, True, False, need_x, need,
        *choice(options, x),
    )  # fmt: skip
    grads = StackGradients(
        torch.empty_like(x) if need_x else None,
        (x.new_empty if all(need) else x.new_zeros)((depth if any(need) else 0, width, width), dtype=torch.float32),
        *(x.new_empty((depth, width), dtype=torch.float32) for _ in range(3)),
    )
    with torch.no_grad(), on_device(x.device):
        _backward_tape(key).play([grad, x, *kept, *weights, *(g for g in grads if g is not None)])
    return grads


class _Gradients(NamedTuple):
    """Stand-ins of :class:`StackGradients`, by layer."""

    x: Tensor | None
    weights: list[Tensor]
    biases: list[Tensor]
    norm_weights: list[Tensor]
    norm_biases: list[Tensor]


class _KeptLayers(NamedTuple):
    """Stand-ins of :class:`Kept`, by layer."""

    inner: list[Tensor]
    stream: list[Tensor]
    norms: list[Tensor]


@functools.lru_cache(maxsize=128)
def _backward_tape(key: Key) -> Tape:
    options, depth, square = key.options, key.depth, (key.width, key.width)
    with Tape(key.device, key.aligned).recording() as tape:
        grad, x = (tape.input((key.rows, key.width), key.x) for _ in range(2))
        dtypes = (options.dtype, key.x, torch.float32)
        kept = _KeptLayers(*(tape.unbind(tape.input(s, d)) for s, d in zip(kept_shapes(key), dtypes, strict=True)))
        weights = tape.inputs(depth, square, key.weight)
        out = _Gradients(
            tape.input((key.rows, key.width), key.x) if key.need_x else None,
            tape.unbind(tape.input((depth if any(key.need_weights) else 0, *square), torch.float32)),
            *(tape.unbind(tape.input((depth, key.width), torch.float32)) for _ in range(3)),
        )
        run = _backward_post
        if options.order == "pre":
            run = _backward_pre_plain if key.strategy == "plain" else _backward_pre
        run(grad, x, cast_weights(tape, weights, key), kept, out, key)
    return tape


def _column_sums(out: Tensor, grad: Tensor) -> None:
    torch.sum(grad, 0, dtype=torch.float32, out=out)


def _raws(x: Tensor, kept: _KeptLayers, key: Key) -> list[Tensor]:
    """The input of each layer of order "pre": x, a unit's output, or a raw output inside a unit."""
    layers = key.options.layers
    return [
        (x if i == 0 else kept.stream[i // layers - 1]) if i % layers == 0 else kept.inner[i - i // layers - 1]
        for i in range(key.depth)
    ]


def _operand(layer: Layer, raw: Tensor, i: int, key: Key) -> dict[str, Tensor]:
    """Where the backward pass of layer ``i`` is to leave the layer's operand, if it can and somebody wants it."""
    wanted = layer.leaves_h and key.need_weights[i]
    return {"h": torch.empty_like(raw, dtype=key.options.dtype)} if wanted else {}


def _backward_pre(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: _KeptLayers, out: _Gradients, key: Key
) -> None:
    depth, layers = key.depth, key.options.layers
    layer, act = setting(key)
    raws = _raws(x, kept, key)
    # g, with y and norm_grad: gradient at the activation of the layer above, whose BatchNorm is still to be passed.
    g, y, norm_grad, skip_grad = grad, None, None, None
    unit_grad = grad
    call(_column_sums, out.biases[depth - 1], grad)
    first_bias = torch.empty_like(out.biases[0])  # where merge_gradients has no layer before to write to
    for i in reversed(range(depth)):
        raw, norm = raws[i], kept.norms[i]
        h = _operand(layer, raw, i, key)
        d, grad_y, tile_sums = layer.backward(
            g, weights[i], y=y, norm_grad=norm_grad, skip_grad=skip_grad, x=raw, norm=norm, **h, **act
        )
        if key.need_weights[i]:
            source = {"x": h["h"]} if h else {"x": raw, "norm": norm}
            layer.weight(grad_y, **source, dtype=key.options.dtype, out=out.weights[i], **act)
        if (i + 1) % layers == 0:
            unit_grad, unit_sum = grad_y, out.biases[i]
        starts_unit = i % layers == 0
        assert tile_sums is not None
        *_, norm_grad = merge_gradients(
            tile_sums, norm, key.rows, key.options.batch_stats, skip_sum=unit_sum if starts_unit else None,
            out=(out.norm_weights[i], out.norm_biases[i], out.biases[i - 1] if i else first_bias),
        )  # fmt: skip
        g, y, skip_grad = d, raw, unit_grad if starts_unit else None
    assert y is not None
    assert norm_grad is not None
    if out.x is not None:
        norm_backward(g, y, norm_grad, skip_grad=skip_grad, out=out.x)


def _backward_pre_plain(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: _KeptLayers, out: _Gradients, key: Key
) -> None:
    """The same with the library's products, where passes are what costs: 6 tensors a layer read or written, not 8.

    d is not stored between the pass that sums it up and the one that needs the sums: both work it out from the product.
    The former also writes h, which the weight gradient needs, so that this takes no pass of its own.
    """
    depth, layers = key.depth, key.options.layers
    _, act = setting(key)
    raws = _raws(x, kept, key)
    grad_y, unit_grad = grad, grad
    call(_column_sums, out.biases[depth - 1], grad)
    first_bias = torch.empty_like(out.biases[0])  # where merge_gradients has no layer before to write to
    for i in reversed(range(depth)):
        raw, norm = raws[i], kept.norms[i]
        if (i + 1) % layers == 0:
            unit_grad, unit_sum = grad_y, out.biases[i]
        narrow = in_dtype(grad_y, weights[i].dtype)
        product = plain_input_gradient(narrow, weights[i])
        h = torch.empty_like(raw, dtype=key.options.dtype) if key.need_weights[i] else None
        tile_sums = activation_sums(product, raw, norm, h=h, **act)
        if h is not None:
            plain_weight_gradient(narrow, h, dtype=key.options.dtype, out=out.weights[i])
        starts_unit = i % layers == 0
        *_, norm_grad = merge_gradients(
            tile_sums, norm, key.rows, key.options.batch_stats, skip_sum=unit_sum if starts_unit else None,
            out=(out.norm_weights[i], out.norm_biases[i], out.biases[i - 1] if i else first_bias),
        )  # fmt: skip
        if i > 0 or out.x is not None:
            grad_y = norm_backward(
                product, raw, norm_grad, skip_grad=unit_grad if starts_unit else None, norm=norm,
                out=None if i else out.x, **act,
            )  # fmt: skip


def _backward_post(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: _KeptLayers, out: _Gradients, key: Key
) -> None:
    layers = key.options.layers
    layer, act = setting(key)
    inputs = [x, *kept.stream]
    tile_sums: Tensor | None
    d, tile_sums = norm_activation_backward(grad, kept.inner[-1], kept.norms[-1], skip=inputs[-1], **act)
    unit_d = d  # gradient inside the unit's last activation: it also goes over the skip
    for i in reversed(range(key.depth)):
        y = kept.inner[i]
        assert tile_sums is not None
        *_, norm_grad = merge_gradients(
            tile_sums, kept.norms[i], key.rows, key.options.batch_stats,
            out=(out.norm_weights[i], out.norm_biases[i], out.biases[i]),
        )  # fmt: skip
        before = {"x": kept.inner[i - 1], "norm": kept.norms[i - 1]} if i else {}
        h: dict[str, Tensor] = {}
        if i % layers:
            h = _operand(layer, kept.inner[i - 1], i, key)
            d, grad_y, tile_sums = layer.backward(d, weights[i], y=y, norm_grad=norm_grad, **before, **h, **act)
        elif i > 0:
            d, grad_y, tile_sums = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, skip=inputs[i // layers - 1], dtype=key.x,
                **before, **act,
            )  # fmt: skip
            unit_d = d
        elif out.x is not None:
            _, grad_y, _ = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, dtype=key.x, out=out.x, **act
            )
        else:
            grad_y = norm_backward(d, y, norm_grad)
        if key.need_weights[i]:
            source = {"x": inputs[i // layers]} if i % layers == 0 else {"x": h["h"]} if h else before
            layer.weight(grad_y, **source, dtype=key.options.dtype, out=out.weights[i], **act)
