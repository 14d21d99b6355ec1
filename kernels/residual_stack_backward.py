"""The way back through a stack of residual units, recorded and played as :mod:`.residual_stack` is."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .batch_norm import merge_gradients
from .deferred import DeferredGradient
from .launch import call, on_device
from .norm_activation import activation_sums, norm_activation_backward, norm_backward
from .plain_layer import in_dtype, plain_input_gradient, plain_weight_gradient
from .residual_stack import (
    Kept,
    Key,
    StackOptions,
    aligned,
    cast_weights,
    choice,
    finish_gradient,
    kept_shapes,
    needs_cast,
    setting,
)
from .tape import Tape


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
    strategy: str | None = None,
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
    strategy : str, optional
        As in the forward pass.
    """
    (rows, width), depth = x.shape, len(weights)
    need = (True,) * depth if need_weights is None else tuple(need_weights)
    key = Key(
        x.device, aligned(x, [grad], weights, kept), rows, width, depth, options, 0.0, x.dtype, weights[0].dtype,
        needs_cast(weights, options.dtype), None, None, None, None, True, False, need_x, need,
        *choice(options, x, strategy),
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
        cast = cast_weights(tape, weights, key)
        if options.order == "pre" and key.strategy in ("plain", "hopper"):
            _backward_pre_plain(grad, x, cast, kept, out, key)
        else:
            run = _backward_pre if options.order == "pre" else _backward_post
            weight_gradients = _WeightGradients(tape, key, out.weights, kept)
            run(grad, x, cast, kept, out, weight_gradients, key)
    return tape


class _WeightGradients:
    """The launches for the gradients of the weights: one a layer at once, or few when a group of units is done.

    In a group the gradients of the layers' outputs are kept in stacked temporaries, as the forward's tensors are.
    Layers whose tensors follow each other at equal distances share a launch.
    """

    def __init__(self, tape: Tape, key: Key, out: list[Tensor], kept: _KeptLayers) -> None:
        self._tape, self._key, self._out = tape, key, out
        self._layer, self._act = setting(key)
        self._stacks: list[list[Tensor]] = [*kept]
        self._slots: dict[int, Tensor] = {}
        self._waiting: dict[int, tuple[Tensor, Tensor, Tensor | None]] = {}

    def place(self, i: int) -> dict[str, Tensor]:
        """Where layer i's backward shall write the gradient of its output, as an argument; none if anywhere."""
        key, layers = self._key, self._key.options.layers
        if key.group == 1 or not key.need_weights[i]:
            return {}
        if i not in self._slots:
            start = i - i % (key.group * layers)
            group = range(start, min(start + key.group * layers, key.depth))
            ends = [k for k in group if (k + 1) % layers == 0]
            narrow = key.options.dtype
            for numbers, dtype in (
                ([k for k in group if k not in ends], narrow),
                (ends, key.x if key.options.order == "pre" else narrow),
            ):
                stack = torch.empty((len(numbers), key.rows, key.width), dtype=dtype, device="meta")
                parts = self._tape.unbind(stack)
                self._stacks.append(parts)
                self._slots |= dict(zip(numbers, parts, strict=True))
        return {"grad_y": self._slots[i]}

    def add(self, i: int, grad_y: Tensor, x: Tensor, norm: Tensor | None) -> None:
        """Layer i, whose input is ``activation(norm(x))``, or x without a norm. The last layer comes first."""
        key = self._key
        if key.need_weights[i]:
            self._waiting[i] = (grad_y, x, norm)
        if key.group == 1 or i % (key.group * key.options.layers) == 0:
            self._launch()

    def _launch(self) -> None:
        layers = self._key.options.layers
        places = {id(part): (n, k) for n, parts in enumerate(self._stacks) for k, part in enumerate(parts)}
        # By a layer's number in its unit: runs of units.
        for number in range(layers):
            run: list[int] = []
            for i in (i for i in sorted(self._waiting) if i % layers == number):
                if run and not self._follows(places, [*run[-2:], i]):
                    self._launch_run(places, run)
                    run = []
                run.append(i)
            if run:
                self._launch_run(places, run)
        self._waiting = {}

    def _steps(self, places: dict[int, tuple[int, int]], i: int, k: int) -> tuple[int, ...] | None:
        """How many parts on layer k's tensors lie than layer i's: grad_y, x, norm, result; None if in other stacks."""
        steps = []
        for a, b in zip(self._waiting[i], self._waiting[k], strict=True):
            if a is None or b is None:
                if a is not b:
                    return None
                steps.append(0)
                continue
            if id(a) not in places or id(b) not in places or places[id(a)][0] != places[id(b)][0]:
                return None
            steps.append(places[id(b)][1] - places[id(a)][1])
        return (*steps, k - i)

    def _follows(self, places: dict[int, tuple[int, int]], run: list[int]) -> bool:
        steps = {self._steps(places, i, k) for i, k in itertools.pairwise(run)}
        return len(steps) == 1 and None not in steps

    def _launch_run(self, places: dict[int, tuple[int, int]], run: list[int]) -> None:
        grad_y, x, norm = self._waiting[run[0]]
        several = {"layers": len(run), "steps": self._steps(places, *run[:2])} if len(run) > 1 else {}
        self._layer.weight(
            grad_y, x, norm=norm, dtype=self._key.options.dtype, out=self._out[run[0]], **several, **self._act
        )


def _column_sums(out: Tensor, grad: Tensor) -> None:
    torch.sum(grad, 0, dtype=torch.float32, out=out)


def _raws(x: Tensor, kept: _KeptLayers, key: Key) -> list[Tensor]:
    """The input of each layer of order "pre": x, a unit's output, or a raw output inside a unit."""
    layers = key.options.layers
    return [
        (x if i == 0 else kept.stream[i // layers - 1]) if i % layers == 0 else kept.inner[i - i // layers - 1]
        for i in range(key.depth)
    ]


def _backward_pre(
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: _KeptLayers, out: _Gradients,
    weight_gradients: _WeightGradients, key: Key,
) -> None:  # fmt: skip
    depth, layers = key.depth, key.options.layers
    layer, act = setting(key)
    raws = _raws(x, kept, key)
    # g, with y and norm_grad: gradient at the activation of the layer above, whose BatchNorm is still to be passed.
    g, y, skip_grad = grad, None, None
    norm_grad: Tensor | DeferredGradient | None = None
    unit_grad = grad
    call(_column_sums, out.biases[depth - 1], grad)
    first_bias = torch.empty_like(out.biases[0])  # where merge_gradients has no layer before to write to
    for i in reversed(range(depth)):
        raw, norm = raws[i], kept.norms[i]
        d, grad_y, tile_sums = layer.backward(
            g, weights[i], y=y, norm_grad=norm_grad, skip_grad=skip_grad, x=raw, norm=norm,
            **(weight_gradients.place(i) if i + 1 < depth else {}), **act,
        )  # fmt: skip
        weight_gradients.add(i, grad_y, raw, norm)
        if (i + 1) % layers == 0:
            unit_grad, unit_sum = grad_y, out.biases[i]
        starts_unit = i % layers == 0
        assert tile_sums is not None
        norm_grad = finish_gradient(
            key, tile_sums, norm, (out.norm_weights[i], out.norm_biases[i], out.biases[i - 1] if i else first_bias),
            skip_sum=unit_sum if starts_unit else None, deferred=i > 0,
        )  # fmt: skip
        g, y, skip_grad = d, raw, unit_grad if starts_unit else None
    assert y is not None
    assert isinstance(norm_grad, Tensor)
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
    grad: Tensor, x: Tensor, weights: Sequence[Tensor], kept: _KeptLayers, out: _Gradients,
    weight_gradients: _WeightGradients, key: Key,
) -> None:  # fmt: skip
    layers = key.options.layers
    layer, act = setting(key)
    inputs = [x, *kept.stream]
    tile_sums: Tensor | None
    d, tile_sums = norm_activation_backward(grad, kept.inner[-1], kept.norms[-1], skip=inputs[-1], **act)
    unit_d = d  # gradient inside the unit's last activation: it also goes over the skip
    for i in reversed(range(key.depth)):
        y = kept.inner[i]
        assert tile_sums is not None
        norm_grad = finish_gradient(
            key, tile_sums, kept.norms[i], (out.norm_weights[i], out.norm_biases[i], out.biases[i]),
            deferred=i > 0 or out.x is not None,
        )  # fmt: skip
        before = {"x": kept.inner[i - 1], "norm": kept.norms[i - 1]} if i else {}
        place = weight_gradients.place(i)
        if i % layers:
            d, grad_y, tile_sums = layer.backward(d, weights[i], y=y, norm_grad=norm_grad, **before, **place, **act)
        elif i > 0:
            d, grad_y, tile_sums = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, skip=inputs[i // layers - 1], dtype=key.x,
                **before, **place, **act,
            )  # fmt: skip
            unit_d = d
        elif out.x is not None:
            _, grad_y, _ = layer.backward(
                d, weights[i], y=y, norm_grad=norm_grad, residual=unit_d, dtype=key.x, out=out.x, **place, **act
            )
        else:
            assert isinstance(norm_grad, Tensor)
            grad_y = norm_backward(d, y, norm_grad, out=place.get("grad_y"))
        source: tuple[Tensor, Tensor | None] = (inputs[i // layers], None)
        if i % layers:
            source = (kept.inner[i - 1], kept.norms[i - 1])
        weight_gradients.add(i, grad_y, *source)
