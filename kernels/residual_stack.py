"""A stack of residual units forward: which layer kernel runs when, and what is kept for the way back.

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

A layer runs fused (one pass each way), fused but for the forward's column moments ("two-pass"), by the library's
product with pointwise passes ("plain"), or forward by a kernel in CUDA C++ that is fused as well and backward plain
("hopper"), as ``configurations.strategy`` says for its shape.

The driver below runs once for a set of shapes and options, on stand-ins, and records a :class:`.tape.Tape`; a call
plays it. Nothing in it may look at a value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import configurations, hopper_layer
from .batch_norm import Moments, column_moments, merge_gradients, merge_moments, running_norm
from .deferred import DeferredGradient, DeferredNorm
from .launch import Number, call, on_device
from .layer_backward import layer_backward
from .layer_forward import layer_forward
from .norm_activation import norm_activation
from .plain_layer import plain_layer_backward, plain_layer_forward, plain_weight_gradient
from .tape import Tape
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


class Layer(NamedTuple):
    """The three passes of a layer, by a strategy."""

    forward: Callable[..., tuple[Tensor, Moments | None]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor | None]]
    weight: Callable[..., Tensor]


def _two_pass_forward(*args: Any, moments: bool, **kwargs: Any) -> tuple[Tensor, Moments | None]:
    """The fused layer with the moments in a pass of their own."""
    y, _ = layer_forward(*args, moments=False, **kwargs)
    return y, column_moments(y) if moments else None


LAYERS = {
    "fused": Layer(layer_forward, layer_backward, weight_gradient),
    "two-pass": Layer(_two_pass_forward, layer_backward, weight_gradient),
    "hopper": Layer(hopper_layer.hopper_layer_forward, plain_layer_backward, plain_weight_gradient),
    "plain": Layer(plain_layer_forward, plain_layer_backward, plain_weight_gradient),
}


class Key(NamedTuple):
    """All that a recording depends on."""

    device: torch.device
    aligned: bool
    rows: int
    width: int
    depth: int
    options: StackOptions
    eps: float
    x: torch.dtype
    weight: torch.dtype
    cast: bool
    bias: torch.dtype | None
    norm_weight: torch.dtype | None
    norm_bias: torch.dtype | None
    running: torch.dtype | None
    keep: bool
    update: bool
    need_x: bool
    need_weights: tuple[bool, ...]
    strategy: str
    deferred: int  # of how many row tiles at most statistics are merged by their consumer
    group: int  # of how many units the gradients of the weights share launches
    policy: tuple[Any, ...]  # what the choice of tiles depends on besides shape, dtype and device


def _dtype_of(tensors: Sequence[Tensor]) -> torch.dtype | None:
    return tensors[0].dtype if tensors else None


def aligned(x: Tensor, *lists: Sequence[Tensor]) -> bool:
    # Of a width that is no multiple of 8, rows start anywhere and the address of the first one is of no use.
    if x.shape[1] % 8 or x.data_ptr() % 16:
        return False
    return not any(t.data_ptr() % 16 for tensors in lists for t in tensors)


def needs_cast(weights: Sequence[Tensor], dtype: torch.dtype) -> bool:
    return weights[0].dtype != dtype or not all(w.is_contiguous() for w in weights)


def cast_weights(tape: Tape, weights: list[Tensor], key: Key, *, packed: bool = False) -> list[Tensor]:
    """The weights, contiguous, in the products' dtype, or packed for the CUDA C++ kernel, by a kernel or two."""
    if not key.cast and not packed:
        return weights
    stack = weights[0].new_empty((key.depth, key.width, key.width), dtype=key.options.dtype)
    cast = tape.unbind(stack)
    call(torch._foreach_copy_, cast, weights)
    if not packed:
        return cast
    blocks = torch.empty_like(stack)
    call(hopper_layer.pack, blocks, stack)
    return tape.unbind(blocks)


def cast_biases(tape: Tape, biases: list[Tensor], key: Key) -> list[Tensor]:
    """The biases as the library's products take them, in their dtype: one kernel for all of them."""
    if not biases or key.strategy != "plain" or key.bias == key.options.dtype:
        return biases
    cast = tape.unbind(biases[0].new_empty((key.depth, key.width), dtype=key.options.dtype))
    call(torch._foreach_copy_, cast, biases)
    return cast


def kept_shapes(key: Key) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Of inner, stream and norms."""
    units = key.depth // key.options.layers
    inner = (key.depth - units if key.options.order == "pre" else key.depth) if key.keep else 0
    rows = (key.rows, key.width)
    return (inner, *rows), (units - 1 if key.keep else 0, *rows), (key.depth, 5, key.width)


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
    momentum: Sequence[float] = (),
    strategy: str | None = None,
) -> tuple[Tensor, Kept]:
    """Run the stack.

    Parameters
    ----------
    x : [rows, width] contiguous, rows > 0 (> 1 with ``batch_stats``)
    weights : L tensors [width, width]
    biases, norm_weights, norm_biases, running_means, running_vars : L tensors [width] contiguous, or none
        One dtype a list.
    eps : float
    options : StackOptions
    keep : bool
        Keep what :func:`stack_backward` needs; without, ``inner`` and ``stream`` come out empty.
    momentum : L floats, or none
        With ``batch_stats``, weights of this batch in the running statistics, which are then updated, layer after
        layer; without, they stay as they are (``norms`` has the batch's).
    strategy : str, optional
        One of ``configurations.STRATEGIES``; by default the one that is chosen for the shape.

    Returns
    -------
    y : [rows, width] of x's dtype
    kept : Kept
    """
    rows, width = x.shape
    key = Key(
        x.device, aligned(x, weights), rows, width, len(weights), options, eps, x.dtype, weights[0].dtype,
        needs_cast(weights, options.dtype), _dtype_of(biases), _dtype_of(norm_weights), _dtype_of(norm_biases),
        _dtype_of(running_means), keep, bool(momentum), False, (),
        *choice(options, x, strategy),
    )  # fmt: skip
    inner_shape, stream_shape, norms_shape = kept_shapes(key)
    result = torch.empty_like(x)
    kept = Kept(
        x.new_empty(inner_shape, dtype=options.dtype),
        x.new_empty(stream_shape),
        x.new_empty(norms_shape, dtype=torch.float32),
    )
    values = [x, result, *kept, *weights, *biases, *norm_weights, *norm_biases]
    if not options.batch_stats or momentum:
        values += [*running_means, *running_vars]
    with torch.no_grad(), on_device(x.device):
        _forward_tape(key).play([*values, *momentum])
    return result, kept


def hopper_why_not(options: StackOptions, x: Tensor) -> str | None:
    """Why strategy "hopper" does not cover a stack, or None."""
    return hopper_layer.why_not(x.device, options.order, options.dtype, x.dtype, x.shape[1], not x.data_ptr() % 16)


def choice(options: StackOptions, x: Tensor, strategy: str | None = None) -> tuple[str, int, int, tuple[Any, ...]]:
    rows, width = x.shape
    kind = "layer" if options.batch_stats else "eval"
    if strategy is None:
        strategy = configurations.strategy(options.dtype, rows, width, x.device, kind)
    if strategy == "hopper" and hopper_why_not(options, x) is not None:
        strategy = configurations.default_strategy(configurations.arithmetic_of(options.dtype), rows, width)
    # Each layer's gradient is of its output's dtype; in order "pre" the last one's is the stream's.
    last = x.dtype if options.order == "pre" else options.dtype
    unit_bytes = rows * width * ((options.layers - 1) * options.dtype.itemsize + last.itemsize)
    group = configurations.grouped_units(strategy, rows, width, unit_bytes)
    deferred = configurations.deferred_tiles(strategy, configurations.arithmetic_of(options.dtype), width)
    return strategy, deferred, group, configurations.policy(options.dtype)


@functools.lru_cache(maxsize=128)
def _forward_tape(key: Key) -> Tape:
    options, depth, square, column = key.options, key.depth, (key.width, key.width), (key.width,)
    with Tape(key.device, key.aligned).recording() as tape:
        x, result = (tape.input((key.rows, key.width), key.x) for _ in range(2))
        kept = [
            tape.input(shape, dtype)
            for shape, dtype in zip(kept_shapes(key), (options.dtype, key.x, torch.float32), strict=True)
        ]
        weights = tape.inputs(depth, square, key.weight)
        vectors = [tape.inputs(depth, column, dtype) for dtype in (key.bias, key.norm_weight, key.norm_bias)]
        running: list[tuple[Tensor, Tensor]] = []
        if not options.batch_stats or key.update:
            running = list(zip(*(tape.inputs(depth, column, key.running) for _ in range(2)), strict=True))
        momentum = [tape.number() for _ in range(depth)] if key.update else []
        norms = _Norms(key, vectors[1], vectors[2], running, momentum, tape.unbind(kept[2]))
        run: Callable[..., None] = _forward_pre if options.order == "pre" else _forward_post
        inner, stream = (tape.unbind(t) for t in kept[:2])
        cast = cast_weights(tape, weights, key, packed=key.strategy == "hopper")
        biases = cast_biases(tape, vectors[0], key)
        run(x, result, cast, biases or [None] * depth, norms, inner, stream, key)
    return tape


class _Norms:
    """Turns the statistics of a layer's input into ``norm``."""

    def __init__(
        self, key: Key, weights: list[Tensor], biases: list[Tensor], running: list[tuple[Tensor, Tensor]],
        momentum: list[Number], out: list[Tensor],
    ) -> None:  # fmt: skip
        self.key, self.out = key, out
        self.weights: Sequence[Tensor | None] = weights or [None] * key.depth
        self.biases: Sequence[Tensor | None] = biases or [None] * key.depth
        self.running, self.momentum = running, momentum

    def known(self, i: int) -> Tensor:
        """``norm`` by the running statistics."""
        return running_norm(*self.running[i], self.weights[i], self.biases[i], self.key.eps, out=self.out[i])

    def finish(self, i: int, moments: Moments | None, *, deferred: bool = True) -> Tensor | DeferredNorm:
        """``norm``, or what a layer needs to merge it itself."""
        key, weight, bias = self.key, self.weights[i], self.biases[i]
        if moments is None:
            return self.known(i)
        if deferred and moments[0].shape[0] <= key.deferred:
            changes = (self.running[i], self.momentum[i]) if key.update else ()
            return DeferredNorm(moments, weight, bias, key.eps, self.out[i], *changes)
        update: dict[str, Any] = {"running": self.running[i], "momentum": self.momentum[i]} if key.update else {}
        return merge_moments(*moments, key.rows, weight, bias, key.eps, out=self.out[i], **update)


def finish_gradient(
    key: Key, tile_sums: Tensor, norm: Tensor, out: tuple[Tensor, Tensor, Tensor], *, skip_sum: Tensor | None = None,
    deferred: bool = True,
) -> Tensor | DeferredGradient:  # fmt: skip
    """``norm_grad``, or what a layer needs to merge it itself."""
    if deferred and tile_sums.shape[1] <= key.deferred:
        return DeferredGradient(tile_sums, norm, key.options.batch_stats, skip_sum, out)
    *_, norm_grad = merge_gradients(tile_sums, norm, key.rows, key.options.batch_stats, skip_sum=skip_sum, out=out)
    return norm_grad


def setting(key: Key) -> tuple[Layer, dict[str, Any]]:
    return LAYERS[key.strategy], {"activation": key.options.activation, "negative_slope": key.options.negative_slope}


def _forward_pre(
    x: Tensor, result: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: _Norms,
    inner: list[Tensor], stream: list[Tensor], key: Key,
) -> None:  # fmt: skip
    layers, batch_stats = key.options.layers, key.options.batch_stats
    layer, act = setting(key)
    y, unit_input = x, x
    free_inner, free_stream = iter(inner), iter(stream)
    moments = column_moments(x) if batch_stats else None
    for i in range(key.depth):
        ends_unit, last = (i + 1) % layers == 0, i + 1 == key.depth
        if last:
            out = result
        elif not key.keep:
            out = torch.empty_like(x, dtype=key.x if ends_unit else key.options.dtype)
        else:
            out = next(free_stream if ends_unit else free_inner)
        y, moments = layer.forward(
            y, weights[i], biases[i], norm=norms.finish(i, moments), residual=unit_input if ends_unit else None,
            moments=batch_stats and not last, out=out, **act,
        )  # fmt: skip
        if ends_unit:
            unit_input = y


def _forward_post(
    x: Tensor, result: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], norms: _Norms,
    inner: list[Tensor], stream: list[Tensor], key: Key,
) -> None:  # fmt: skip
    layers = key.options.layers
    layer, act = setting(key)
    y, unit_input = x, x
    norm: Tensor | DeferredNorm | None = None
    for i in range(key.depth):
        skip = h = None
        if i % layers == 0 and i > 0:
            skip, h = unit_input, stream[i // layers - 1] if key.keep else torch.empty_like(x)
            unit_input = h
        y, moments = layer.forward(
            y, weights[i], biases[i], norm=norm, skip=skip, h=h, moments=key.options.batch_stats,
            out=inner[i] if key.keep else None, **act,
        )  # fmt: skip
        norm = norms.finish(i, moments, deferred=i + 1 < key.depth)
    norm_activation(y, norms.out[-1], skip=unit_input, out=result, **act)
