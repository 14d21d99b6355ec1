"""``residual_stack``: a run of residual units of one width, forward and backward, as one op.

With ``B`` rows, width ``W``, ``L`` linear layers in ``N`` units, and ``Wp`` = W rounded up to a multiple of 32:

===============  ======================  =============================================================================
tensor           shape                   stored between forward and backward
===============  ======================  =============================================================================
x, out           [B, W]                  ``x`` as it is; ``out`` is not needed again
inner            [*, B, W]               raw outputs inside units (``pre``: L - N; ``post``: L), in the products' dtype
stream           [N - 1, B, W]           what the units pass on, but for the last; in the dtype of ``x``
statistics       [L, 3, Wp] fp32 (CPU)   mean, 1 / sqrt(var + eps) and unbiased variance of each BatchNorm
                 [L, 5, W] fp32 (CUDA)   the same, and the scale and shift that they make with the affine parameters
parameters       L x [W, W], L x [W]     saved as they are
activations      [B, W] each             never written: the backward computes them again
===============  ======================  =============================================================================

Eager PyTorch keeps three ``[B, W]`` tensors a layer. Here are the schema, the fakes and autograd; which call runs where
is in :mod:`.residual_stack`. The kernels are in ``csrc/cpu/stack_*.cpp`` (CPU) and ``kernels/residual_stack*.py``
(CUDA).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rvae_fast import _native, reference
from rvae_fast.ops.batched import is_batched

# --- schema, fakes ---

_FORWARD_SCHEMA = (
    "(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor[] running_means, Tensor[] running_vars, int layers, str order, str activation, float negative_slope, "
    "float eps, bool batch_stats, ScalarType dtype, bool keep) "
    "-> (Tensor out, Tensor inner, Tensor stream, Tensor statistics)"
)
_BACKWARD_SCHEMA = (
    "(Tensor gradient, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor inner, Tensor stream, Tensor statistics, int layers, str order, str activation, float negative_slope, "
    "bool batch_stats, ScalarType dtype, bool need_x, bool[] need_weights, bool[] need_biases, bool[] need_norms) "
    "-> (Tensor x, Tensor weights, Tensor biases, Tensor norm_weights, Tensor norm_biases)"
)

library = torch.library.Library("rvae_fast", "FRAGMENT")
# Forward with its own autograd node in C++, which updates the running statistics too: for eager calls on the CPU.
library.define(
    "residual_stack_train(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, int layers, str order, str activation, "
    "float negative_slope, float eps, float[] momentum, bool batch_stats, ScalarType dtype) -> Tensor"
)
train_op = torch.ops.rvae_fast.residual_stack_train.default
# Moves running averages towards a batch's statistics, as a forward op lays them out; fp32, contiguous, on the CPU.
library.define("update_running(Tensor(a!)[] means, Tensor(b!)[] variances, Tensor statistics, float[] momentum) -> ()")
torch.library.register_fake("rvae_fast::update_running", lambda *_: None, lib=library)
_native.is_available()  # loads the native kernels


class Kernels(NamedTuple):
    """A forward and a backward with the signatures of the schemas."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]


def _fake_forward(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    running_means: list[Tensor],
    running_vars: list[Tensor],
    layers: int,
    order: str,
    activation: str,
    negative_slope: float,
    eps: float,
    batch_stats: bool,
    dtype: torch.dtype,
    keep: bool,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    triton = triton or x.device.type == "cuda"
    rows, width = x.shape
    units = len(weights) // layers
    inner = len(weights) - units if order == "pre" else len(weights)
    return (
        x.new_empty((rows, width)),
        x.new_empty((inner if keep else 0 if triton else min(inner, 1), rows, width), dtype=dtype),
        x.new_empty((units - 1 if keep else 0, rows, width)),
        x.new_empty(
            (len(weights), 5, width) if triton else (len(weights), 3, -(-width // 32) * 32), dtype=torch.float32
        ),
    )


def _fake_backward(
    gradient: Tensor,
    x: Tensor,
    weights: list[Tensor],
    norm_weights: list[Tensor],
    norm_biases: list[Tensor],
    inner: Tensor,
    stream: Tensor,
    statistics: Tensor,
    layers: int,
    order: str,
    activation: str,
    negative_slope: float,
    batch_stats: bool,
    dtype: torch.dtype,
    need_x: bool,
    need_weights: list[bool],
    need_biases: list[bool],
    need_norms: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    count, width = len(weights), x.shape[1]

    def columns(needs: list[bool]) -> Tensor:
        return x.new_empty((count if any(needs) else 0, width), dtype=torch.float32)

    return (
        x.new_empty((x.shape[0] if need_x else 0, width)),
        x.new_empty((count if any(need_weights) else 0, width, width), dtype=torch.float32),
        columns(need_biases),
        columns(need_norms),
        columns(need_norms),
    )


# --- the reference ---


def run_reference(
    x: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    *,
    layers: int,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
    **options: Any,
) -> Tensor:
    """The stack in plain PyTorch, unit after unit; ``lists`` are those of the schema."""

    def part(values: Sequence[Any], start: int) -> Sequence[Any]:
        return values[start : start + layers] if values else [None] * layers

    for start in range(0, len(momentum), layers):
        x = reference.residual_unit(
            x,
            *(part(tensors, start) for tensors in lists),
            momentum=part(momentum, start),
            batch_stats=part(batch_stats, start),
            **options,
        )
    return x


# --- autograd ---
#
# Parameters come as four lists in the order of the schema (weights, biases, norm_weights, norm_biases), whole or empty.
# Running averages are not kept: what a forward pass by them has read is in its statistics, where no later batch changes
# it. Torch's BatchNorm moves them without counting that as a write, so that a graph may well outlive it.

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
_Flags = tuple[list[bool], list[bool], list[bool], list[bool]]
_Gradients = tuple[Tensor | None, list[list[Tensor | None]]]
_Options = tuple[int, str, str, float, bool, torch.dtype]


def _gradients(
    backward: Callable[..., Any],
    gradient: Tensor,
    x: Tensor,
    parameters: _Lists,
    kept: tuple[Tensor, Tensor, Tensor],
    options: _Options,
    need_x: bool,
    needs: _Flags,
) -> _Gradients:
    weights, _, norm_weights, norm_biases = parameters
    count = len(weights)
    need_norms = [bool(a or b) for a, b in zip(needs[2] or [False] * count, needs[3] or [False] * count, strict=True)]
    grad_x, *grads = backward(
        gradient, x, weights, norm_weights, norm_biases, *kept, *options,
        need_x, needs[0], needs[1] or [False] * count, need_norms,
    )  # fmt: skip
    split: list[list[Tensor | None]] = []
    for need, grad, tensors in zip(needs, grads, parameters, strict=True):
        if any(need) and all(t.dtype == tensors[0].dtype for t in tensors):
            grad = grad.to(tensors[0].dtype)  # all at once; autograd would do it one by one
        parts = grad.unbind(0) if any(need) else (None,) * len(need)
        split.append([part if wanted else None for wanted, part in zip(need, parts, strict=True)])
    return (grad_x if need_x else None), split


def _differentiable_gradients(
    gradient: Tensor,
    x: Tensor,
    parameters: _Lists,
    running: tuple[list[Tensor], list[Tensor]],
    options: _Options,
    eps: float,
    need_x: bool,
    needs: _Flags,
) -> _Gradients:
    """The same through the reference: for gradients that will be differentiated themselves (``create_graph=True``), and
    for those of many outputs at once."""
    layers, order, activation, slope, batch_stats, dtype = options
    half, again = dtype != torch.float32, torch.is_grad_enabled()
    autocast = torch.autocast(x.device.type, dtype if half else torch.bfloat16, enabled=half)
    with torch.enable_grad(), autocast:
        # Aliases: a parameter that is in the stack twice has a gradient at each place.
        x = x.view_as(x)
        lists = [[p.view_as(p) for p in tensors] for tensors in parameters]
        out = run_reference(
            x,
            [*lists, *(([], []) if batch_stats else running)],
            layers=layers, order=order, activation=activation, negative_slope=slope, eps=eps,
            momentum=[0.0] * len(lists[0]), batch_stats=[batch_stats] * len(lists[0]), dropout=0.0,
        )  # fmt: skip
    flat = [(p, n) for ps, need in zip(lists, needs, strict=True) for p, n in zip(ps, need, strict=True)]
    wanted = [x] * need_x + [p for p, needed in flat if needed]
    grads = iter(torch.autograd.grad(out, wanted, gradient, create_graph=again, allow_unused=True))
    grad_x = next(grads) if need_x else None
    return grad_x, [[next(grads) if n else None for n in need] for need in needs]


def running_of(
    statistics: Tensor, widths: Sequence[int], dtype: torch.dtype | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Running means and variances as a forward pass by them has found them; none without ``dtype``, theirs."""
    if dtype is None:
        return [], []
    rows = statistics.to(dtype)
    means, variances = ([norm[row, :width] for norm, width in zip(rows, widths, strict=True)] for row in (0, 2))
    return means, variances


def _save(
    ctx: Any, backward: Callable[..., Any], inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    ctx.backward_kernel = backward
    x, *lists = inputs[:5]
    running = inputs[5]
    layers, order, activation, slope, ctx.eps, batch_stats, dtype, _ = inputs[7:]
    ctx.running_dtype = running[0].dtype if running and not batch_stats else None
    ctx.options = (layers, order, activation, slope, batch_stats, dtype)
    ctx.counts = [len(tensors) for tensors in lists]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, *output[1:], *(t for tensors in lists for t in tensors))


def _run_backward(ctx: Any, gradient: Tensor | None, need_x: bool, needs: _Flags) -> _Gradients:
    if gradient is None:
        return None, [[None] * len(need) for need in needs]
    x, inner, stream, statistics, *tensors = ctx.saved_tensors
    lists: list[list[Tensor]] = []
    for count in ctx.counts:
        lists.append(tensors[:count])
        tensors = tensors[count:]
    parameters = (lists[0], lists[1], lists[2], lists[3])
    if (torch.is_grad_enabled() or is_batched(gradient)) and not torch.compiler.is_compiling():
        running = running_of(statistics, [x.shape[1]] * len(lists[0]), ctx.running_dtype)
        return _differentiable_gradients(gradient, x, parameters, running, ctx.options, ctx.eps, need_x, needs)
    kept = (inner, stream, statistics)
    return _gradients(ctx.backward_kernel, gradient, x, parameters, kept, ctx.options, need_x, needs)


def _needs(ctx: Any, flags: Sequence[bool]) -> _Flags:
    split, start = [], 0
    for count in ctx.counts[:4]:
        split.append([bool(flag) for flag in flags[start : start + count]])
        start += count
    return split[0], split[1], split[2], split[3]


def _op_backward(ctx: Any, gradient: Tensor | None, *_: Any) -> tuple[Any, ...]:
    flags = [flag for needs in ctx.needs_input_grad[1:5] for flag in needs]
    grad_x, grads = _run_backward(ctx, gradient, ctx.needs_input_grad[0], _needs(ctx, flags))
    return (grad_x, *grads, [None] * len(ctx.needs_input_grad[5]), [None] * len(ctx.needs_input_grad[6]), *(None,) * 8)


class _ResidualStack(torch.autograd.Function):
    """The same for eager calls, which need not pay for the op's generated autograd layer."""

    @staticmethod
    def forward(
        ctx: Any, kernels: Kernels, inputs: tuple[Any, ...], x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output = kernels.forward(x, *inputs)
        _save(ctx, kernels.backward, (x, *inputs), output)
        return output[0], output[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx, ctx.needs_input_grad[3:])
        grad_x, grads = _run_backward(ctx, gradient, ctx.needs_input_grad[2], needs)
        return (None, None, grad_x, *(grad for part in grads for grad in part))


def define(name: str, *, triton: bool = False) -> Kernels:
    """Declare the op ``rvae_fast::name`` and its backward: schemas, fakes, and derivatives for graphs (torch.compile,
    torch.export) and callers of torch.ops.

    ``triton``: its kernels keep what the Triton driver keeps whatever the device.
    """
    library.define(name + _FORWARD_SCHEMA)
    library.define(name + "_backward" + _BACKWARD_SCHEMA)
    fake = functools.partial(_fake_forward, triton=triton)
    torch.library.register_fake(f"rvae_fast::{name}", fake, lib=library)
    torch.library.register_fake(f"rvae_fast::{name}_backward", _fake_backward, lib=library)
    packets = getattr(torch.ops.rvae_fast, name), getattr(torch.ops.rvae_fast, name + "_backward")
    kernels = Kernels(packets[0].default, packets[1].default)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        _save(ctx, kernels.backward, inputs, output)

    torch.library.register_autograd(f"rvae_fast::{name}", _op_backward, setup_context=save, lib=library)
    return kernels
