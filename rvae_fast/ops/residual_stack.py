"""``residual_stack``: a run of residual units of one width, forward and backward, as one op.

With ``B`` rows, width ``W``, ``L`` linear layers in ``N`` units, and ``Wp`` = W rounded up to a multiple of 32:

===============  ======================  =============================================================================
tensor           shape                   stored between forward and backward
===============  ======================  =============================================================================
x, out           [B, W]                  ``x`` as it is; ``out`` is not needed again
inner            [*, B, W]               raw outputs inside units (``pre``: L - N; ``post``: L), in the products' dtype
stream           [N - 1, B, W]           what the units pass on, but for the last; in the dtype of ``x``
statistics       [L, 3, Wp] fp32         mean, 1 / sqrt(var + eps) and unbiased variance of each BatchNorm
parameters       L x [W, W], L x [W]     saved as they are
activations      [B, W] each             never written: the backward computes them again
===============  ======================  =============================================================================

Eager PyTorch keeps three ``[B, W]`` tensors a layer. Layers in this file, to be read apart: schema and fakes, autograd,
the test of whether the kernels cover a call, the function that :mod:`rvae_fast.nn` calls. The native kernels are in
``csrc/cpu/stack_*.cpp``; whatever they do not cover (other dtypes and devices, dropout, norms that differ within a
stack) runs in plain PyTorch, :func:`rvae_fast.reference.residual_unit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rvae_fast import _backend, _native, reference

# --- schema, fakes ---

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define(
    "residual_stack(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor[] running_means, Tensor[] running_vars, int layers, str order, str activation, float negative_slope, "
    "float eps, bool batch_stats, bool bf16, bool keep) -> (Tensor out, Tensor inner, Tensor stream, Tensor statistics)"
)
_library.define(
    "residual_stack_backward(Tensor gradient, Tensor x, Tensor[] weights, Tensor[] norm_weights, Tensor[] norm_biases, "
    "Tensor inner, Tensor stream, Tensor statistics, int layers, str order, str activation, float negative_slope, "
    "bool batch_stats, bool bf16, bool need_x, bool[] need_weights, bool[] need_biases, bool[] need_norms) "
    "-> (Tensor x, Tensor weights, Tensor biases, Tensor norm_weights, Tensor norm_biases)"
)

_forward_op = torch.ops.rvae_fast.residual_stack.default
_backward_op = torch.ops.rvae_fast.residual_stack_backward.default

_native.is_available()  # loads the kernels
_HAS_KERNELS: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::residual_stack", "CPU")
_IMPLEMENTED: dict[str, tuple[str, ...]] = {"native": ("cpu",)} if _HAS_KERNELS else {}

#: Whether the native kernels have bf16 products on this machine (AVX512_BF16 or AMX); they are tried once, at import.
HAS_BF16_PRODUCTS: bool = _HAS_KERNELS and torch.ops.rvae_fast.cpu_has_bf16_products()


@torch.library.register_fake("rvae_fast::residual_stack", lib=_library)
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
    bf16: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, width = x.shape
    units = len(weights) // layers
    inner = len(weights) - units if order == "pre" else len(weights)
    return (
        x.new_empty((rows, width)),
        x.new_empty((inner if keep else min(inner, 1), rows, width), dtype=torch.bfloat16 if bf16 else torch.float32),
        x.new_empty((units - 1 if keep else 0, rows, width)),
        x.new_empty((len(weights), 3, -(-width // 32) * 32), dtype=torch.float32),
    )


@torch.library.register_fake("rvae_fast::residual_stack_backward", lib=_library)
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
    bf16: bool,
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


# --- autograd ---
#
# Parameters come as four lists in the order of the schema (weights, biases, norm_weights, norm_biases), whole or empty.

_Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]
_Flags = tuple[list[bool], list[bool], list[bool], list[bool]]
_Gradients = tuple[Tensor | None, list[list[Tensor | None]]]


def _gradients(
    gradient: Tensor,
    x: Tensor,
    parameters: _Lists,
    kept: tuple[Tensor, Tensor, Tensor],
    options: tuple[int, str, str, float, bool, bool],
    need_x: bool,
    needs: _Flags,
) -> _Gradients:
    weights, _, norm_weights, norm_biases = parameters
    count = len(weights)
    need_norms = [bool(a or b) for a, b in zip(needs[2] or [False] * count, needs[3] or [False] * count, strict=True)]
    grad_x, *grads = _backward_op(
        gradient, x, weights, norm_weights, norm_biases, *kept, *options,
        need_x, needs[0], needs[1] or [False] * count, need_norms,
    )  # fmt: skip
    split: list[list[Tensor | None]] = []
    for need, grad in zip(needs, grads, strict=True):
        parts = grad.unbind(0) if any(need) else (None,) * len(need)
        split.append([part if wanted else None for wanted, part in zip(need, parts, strict=True)])
    return (grad_x if need_x else None), split


def _differentiable_gradients(
    gradient: Tensor,
    x: Tensor,
    parameters: _Lists,
    running: tuple[list[Tensor], list[Tensor]],
    options: tuple[int, str, str, float, bool, bool],
    eps: float,
    need_x: bool,
    needs: _Flags,
) -> _Gradients:
    """The same through the reference, for gradients that will be differentiated themselves (``create_graph=True``)."""
    layers, order, activation, slope, batch_stats, bf16 = options
    with torch.enable_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        # Aliases: a parameter that is in the stack twice has a gradient at each place.
        x = x.view_as(x)
        lists = [[p.view_as(p) for p in tensors] for tensors in parameters]
        out = _reference(
            x,
            [*lists, *(([], []) if batch_stats else running)],
            layers=layers, order=order, activation=activation, negative_slope=slope, eps=eps,
            momentum=[0.0] * len(lists[0]), batch_stats=[batch_stats] * len(lists[0]), dropout=0.0,
        )  # fmt: skip
    flat = [(p, n) for ps, need in zip(lists, needs, strict=True) for p, n in zip(ps, need, strict=True)]
    wanted = [x] * need_x + [p for p, needed in flat if needed]
    grads = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True, allow_unused=True))
    grad_x = next(grads) if need_x else None
    return grad_x, [[next(grads) if n else None for n in need] for need in needs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, *lists = inputs[:7]
    layers, order, activation, slope, ctx.eps, batch_stats, bf16, _ = inputs[7:]
    if batch_stats:
        lists[4:] = [], []
    ctx.options = (layers, order, activation, slope, batch_stats, bf16)
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
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        return _differentiable_gradients(
            gradient, x, parameters, (lists[4], lists[5]), ctx.options, ctx.eps, need_x, needs
        )
    return _gradients(gradient, x, parameters, (inner, stream, statistics), ctx.options, need_x, needs)


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


# Differentiates the op itself, for graphs (torch.compile, torch.export) and for callers of torch.ops.
torch.library.register_autograd("rvae_fast::residual_stack", _op_backward, setup_context=_save, lib=_library)


class _ResidualStack(torch.autograd.Function):
    """The same for eager calls, which need not pay for the op's generated autograd layer."""

    @staticmethod
    def forward(ctx: Any, inputs: tuple[Any, ...], x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        with torch._C._AutoDispatchBelowAutograd():
            output = _forward_op(x, *inputs)
        _save(ctx, (x, *inputs), output)
        return output[0], output[3]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
        needs = _needs(ctx, ctx.needs_input_grad[2:])
        grad_x, grads = _run_backward(ctx, gradient, ctx.needs_input_grad[1], needs)
        return (None, grad_x, *(grad for part in grads for grad in part))


# --- what the kernels cover ---


def _whole(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The tensors if all are there, an empty list if none is, None for a mixture."""
    there = [t for t in tensors if t is not None]
    return there if len(there) in (0, len(tensors)) else None


def _autocast_bf16(x: Tensor) -> bool | None:
    """Whether products are to run in bf16; None where the combination of dtypes is the reference's business."""
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != torch.bfloat16 or x.dtype not in (torch.float32, torch.bfloat16):
            return None
        return True if HAS_BF16_PRODUCTS else None
    return False if x.dtype == torch.float32 else None


def _reference(
    x: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    *,
    layers: int,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
    **options: Any,
) -> Tensor:
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


def _update_running(
    running_means: list[Tensor], running_vars: list[Tensor], statistics: Tensor, momentum: Sequence[float], width: int
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, layer by layer: shared norms see each in turn."""
    with torch.no_grad():
        means, variances = statistics[:, 0, :width].unbind(0), statistics[:, 2, :width].unbind(0)
        distinct = len({id(t) for t in running_means}) == len(running_means)
        if distinct and len(set(momentum)) == 1:
            for running, batch in ((running_means, means), (running_vars, variances)):
                torch._foreach_mul_(running, 1.0 - momentum[0])
                torch._foreach_add_(running, list(batch), alpha=momentum[0])
            return
        for i, weight in enumerate(momentum):
            running_means[i].mul_(1.0 - weight).add_(means[i], alpha=weight)
            running_vars[i].mul_(1.0 - weight).add_(variances[i], alpha=weight)


# --- the function ---


def residual_stack(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    norm_weights: Sequence[Tensor | None],
    norm_biases: Sequence[Tensor | None],
    running_means: Sequence[Tensor | None],
    running_vars: Sequence[Tensor | None],
    *,
    layers: int,
    order: str,
    activation: str,
    negative_slope: float,
    eps: float,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
    dropout: float = 0.0,
) -> Tensor:
    """A run of residual units of one width: :func:`rvae_fast.reference.residual_unit`, unit after unit, in one call.

    Parameters
    ----------
    x : Tensor [batch, W]
    weights : L tensors [W, W], as ``nn.Linear.weight``; ``layers`` of them a unit
    biases, norm_weights, norm_biases : L tensors [W] or None
    running_means, running_vars : L tensors [W] or None
        Updated in place where ``batch_stats`` holds; used to normalise where it does not.
    layers : int
        Linear layers of a unit.
    order : {"pre", "post"}
    activation, negative_slope
        See :class:`rvae_fast.ResidualBlock`.
    eps : float
    momentum : L floats
        Weight of this batch in each running average.
    batch_stats : L bools
        Normalise by the statistics of this batch.
    dropout : float, default 0.0
        Above zero the plain PyTorch implementation runs.

    Returns
    -------
    Tensor [batch, W]
        In the dtype of ``x``.

    Raises
    ------
    ValueError
        A single row where statistics of the batch are to be taken, as in ``nn.BatchNorm1d``.
    RuntimeError
        A backend was forced (see :class:`rvae_fast.backend`) that does not cover the device of ``x``.

    Notes
    -----
    The native kernels run for fp32 parameters and fp32 rows, or under CPU autocast in bf16 (then products and the
    tensors inside units are bf16; statistics, parameters and their gradients fp32). The plain PyTorch implementation
    serves everything else: fp64, other devices, dropout, norms that differ within the stack, transforms of
    ``torch.func``, forward-mode AD, and gradients of gradients.
    """
    options: dict[str, Any] = {"order": order, "activation": activation, "negative_slope": negative_slope, "eps": eps}
    whole = [_whole(ts) for ts in (biases, norm_weights, norm_biases, running_means, running_vars)]
    bf16 = _autocast_bf16(x) if x.device.type == "cpu" else None
    native = (
        _backend.choose("residual_stack", x.device.type, _IMPLEMENTED) == "native"
        and bf16 is not None
        and dropout == 0.0
        and all(tensors is not None for tensors in whole)
        and len(set(batch_stats)) == 1
        and x.shape[0] > int(batch_stats[0])
        and all(t.dtype == torch.float32 and t.device == x.device for ts in (weights, *whole) for t in ts or ())
        and (torch.compiler.is_compiling() or not _transformed())
    )
    if not native:
        return _reference(
            x,
            (weights, biases, norm_weights, norm_biases, running_means, running_vars),
            layers=layers,
            momentum=momentum,
            batch_stats=batch_stats,
            dropout=dropout,
            **options,
        )
    lists = [list(weights), *(tensors or [] for tensors in whole)]
    parameters = [p for tensors in lists[:4] for p in tensors]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    inputs = (*lists, layers, order, activation, float(negative_slope), float(eps), batch_stats[0], bool(bf16), keep)
    if keep and not torch.compiler.is_compiling():
        out, statistics = _ResidualStack.apply(inputs, x, *parameters)
    else:
        out, _, _, statistics = _forward_op(x, *inputs)
    if batch_stats[0] and lists[4]:
        _update_running(lists[4], lists[5], statistics, momentum, x.shape[1])
    return out


def _transformed() -> bool:
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
