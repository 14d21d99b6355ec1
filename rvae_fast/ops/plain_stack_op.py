"""``plain_stack``: Linear -> BatchNorm -> activation, layer after layer, the last bare; forward and backward, one op.

With ``B`` rows, ``L`` layers of widths ``W[0]`` (of the input) to ``W[L]``, and ``Wp`` = the widest, rounded up to a
multiple of 32:

===============  =========================  ==========================================================================
tensor           shape                      stored between forward and backward
===============  =========================  ==========================================================================
x, out           [B, W[0]], [B, W[L]]       ``x`` as it is; ``out``, in the products' dtype, is not needed again
inner            [B (W[1] + ... + W[L-1])]  raw outputs of all layers but the last, in the products' dtype
statistics       [L - 1, 3, Wp] fp32        mean, 1 / sqrt(var + eps) and unbiased variance of each BatchNorm
parameters       L x [W[l+1], W[l]], ...    saved as they are
activations      [B, W[l]] each             never written: the backward computes them again
===============  =========================  ==========================================================================

Here are the schema, the fakes and autograd; which call runs it is decided in :mod:`.plain_stack`. The kernels are the
residual stack's, ``csrc/cpu/stack_*.cpp``; there are none for GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rvae_fast import reference
from rvae_fast.ops.residual_stack_op import library, running_of

# --- schema, fakes ---

library.define(
    "plain_stack(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor[] running_means, Tensor[] running_vars, str activation, float negative_slope, float eps, "
    "bool batch_stats, ScalarType dtype, bool keep) -> (Tensor out, Tensor inner, Tensor statistics)"
)
library.define(
    "plain_stack_backward(Tensor gradient, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor inner, Tensor statistics, str activation, float negative_slope, bool batch_stats, ScalarType dtype, "
    "bool need_x, bool[] need_weights, bool[] need_biases, bool[] need_norms) "
    "-> (Tensor x, Tensor weights, Tensor biases, Tensor norm_weights, Tensor norm_biases)"
)

# Forward with its own autograd node in C++, which updates the running statistics too: for eager calls.
library.define(
    "plain_stack_train(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, str activation, float negative_slope, float eps, "
    "float[] momentum, bool batch_stats, ScalarType dtype) -> Tensor"
)


@torch.library.register_fake("rvae_fast::plain_stack", lib=library)
def _fake_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    activation: str,
    negative_slope: float,
    eps: float,
    batch_stats: bool,
    dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, widths = x.shape[0], [weight.shape[0] for weight in weights]
    widest = max(x.shape[1], *widths)
    inner = sum(widths[:-1]) if keep else min(2, len(widths) - 1) * widest
    return (
        x.new_empty((rows, widths[-1]), dtype=dtype),
        x.new_empty((rows * inner,), dtype=dtype),
        x.new_empty((len(weights) - 1, 3, -(-widest // 32) * 32), dtype=torch.float32),
    )


@torch.library.register_fake("rvae_fast::plain_stack_backward", lib=library)
def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    inner: Tensor,
    statistics: Tensor,
    activation: str,
    negative_slope: float,
    batch_stats: bool,
    dtype: torch.dtype,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    need_norms: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    outputs = [weight.shape[0] for weight in weights]

    def flat(needs: list[bool], size: int) -> Tensor:
        return x.new_empty((size if any(needs) else 0,), dtype=torch.float32)

    return (
        x.new_empty((x.shape[0] if need_x else 0, x.shape[1])),
        flat(need_weights, sum(weight.shape[0] * weight.shape[1] for weight in weights)),
        flat(need_biases, sum(outputs)),
        flat(need_norms, sum(outputs[:-1])),
        flat(need_norms, sum(outputs[:-1])),
    )


forward_op = torch.ops.rvae_fast.plain_stack.default
backward_op = torch.ops.rvae_fast.plain_stack_backward.default
train_op = torch.ops.rvae_fast.plain_stack_train.default

# --- autograd ---
#
# Of the op itself: for graphs, for callers of torch.ops, and for gradients of gradients. Eager training differentiates
# in C++, csrc/cpu/stack_autograd.cpp.
#
# Parameters come as four lists in the order of the schema (weights, biases, norm_weights, norm_biases), whole or empty.


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, *lists = inputs[:5]  # not the running averages: see residual_stack_op
    running = inputs[5]
    activation, slope, ctx.eps, batch_stats, dtype, _ = inputs[7:]
    ctx.running_dtype = running[0].dtype if running and not batch_stats else None
    ctx.options = (activation, slope, batch_stats, dtype)
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], *(t for tensors in lists for t in tensors))


def _lists(values: Sequence[Any], counts: Sequence[int]) -> list[list[Any]]:
    """A flat sequence cut into lists of so many values each."""
    lists, start = [], 0
    for count in counts:
        lists.append(list(values[start : start + count]))
        start += count
    return lists


def _run_backward(
    ctx: Any, gradient: Tensor | None, need_x: bool, needs: list[list[bool]]
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """The gradients of ``x`` and of the four lists of parameters; None where none is needed."""
    if gradient is None:
        return None, [[None] * len(need) for need in needs]
    x, inner, statistics, *tensors = ctx.saved_tensors
    lists = _lists(tensors, ctx.counts)
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        running = running_of(statistics, [weight.shape[0] for weight in lists[0][:-1]], ctx.running_dtype)
        return _differentiable_gradients(ctx, gradient, x, [*lists, *running], need_x, needs)
    weights, _, norm_weights, norm_biases, *_ = lists
    count = len(weights)
    none = [False] * (count - 1)
    need_norms = [a or b for a, b in zip(needs[2] or none, needs[3] or none, strict=True)]
    grad_x, *grads = backward_op(
        gradient, x, weights, norm_weights, norm_biases, inner, statistics, *ctx.options,
        need_x, needs[0], needs[1] or [False] * count, need_norms,
    )  # fmt: skip
    split: list[list[Tensor | None]] = []
    for need, grad, own in zip(needs, grads, lists, strict=False):
        if not any(need):
            split.append([None] * len(need))
            continue
        parts = grad.split_with_sizes([t.numel() for t in own])
        split.append([part.view(t.shape) if wanted else None for wanted, part, t in zip(need, parts, own, strict=True)])
    return (grad_x if need_x else None), split


def _differentiable_gradients(
    ctx: Any, gradient: Tensor, x: Tensor, lists: list[list[Tensor]], need_x: bool, needs: list[list[bool]]
) -> tuple[Tensor | None, list[list[Tensor | None]]]:
    """The same through the reference, for gradients that will be differentiated themselves (``create_graph=True``)."""
    activation, slope, batch_stats, dtype = ctx.options
    half = dtype != torch.float32
    norms = len(lists[0]) - 1
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        # Aliases: a parameter that is in the stack twice has a gradient at each place.
        x = x.view_as(x)
        taken = [[p.view_as(p) for p in tensors] for tensors in lists[:4]]
        counts = (norms + 1, norms + 1, norms, norms, norms, norms)
        every: Any = [tensors or [None] * n for tensors, n in zip((*taken, *lists[4:]), counts, strict=True)]
        out = reference.plain_stack(
            x, *every,
            activation=activation, negative_slope=slope, eps=ctx.eps,
            momentum=[0.0] * norms, batch_stats=[batch_stats] * norms,
        )  # fmt: skip
    flat = [(p, n) for ps, need in zip(taken, needs, strict=True) for p, n in zip(ps, need, strict=True)]
    wanted = [x] * need_x + [p for p, needed in flat if needed]
    grads = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True, allow_unused=True))
    grad_x = next(grads) if need_x else None
    return grad_x, [[next(grads) if n else None for n in need] for need in needs]


def _op_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    needs = [[bool(flag) for flag in flags] for flags in ctx.needs_input_grad[1:5]]
    grad_x, grads = _run_backward(ctx, gradient, ctx.needs_input_grad[0], needs)
    return (grad_x, *grads, [None] * len(ctx.needs_input_grad[5]), [None] * len(ctx.needs_input_grad[6]), *(None,) * 6)


torch.library.register_autograd("rvae_fast::plain_stack", _op_backward, setup_context=_save, lib=library)
