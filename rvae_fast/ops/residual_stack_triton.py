"""``residual_stack`` on Triton: which calls the kernels cover, and their registration for CUDA.

With ``TRITON_INTERPRET=1`` in the environment the same kernels also serve CPU tensors, in Triton's interpreter, as the
op ``rvae_fast::residual_stack_interpreted``: slow, and made for tests.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rvae_fast._activations import ACTIVATIONS
from rvae_fast.ops.residual_stack_op import Kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_HALF = (torch.float16, torch.bfloat16)

_Outputs = tuple[Tensor, Tensor, Tensor, Tensor]
_Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


# --- what the kernels cover ---


_chips: dict[int, str | None] = {}


def chip_why_not(index: int) -> str | None:
    """Why no product runs by Triton on a CUDA device, or None."""
    if index not in _chips:
        _chips[index] = _ask_chip(index)
    return _chips[index]


def _ask_chip(index: int) -> str | None:
    if torch.version.hip is not None:
        return "ROCm devices"
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"devices below compute capability 8.0 (this one has {major}.{minor})"
    return None


# What torch.compiler.assume_constant_result sets; calling it would import the whole compiler, and Triton with it, into
# every process that only wants a model.
chip_why_not._dynamo_marked_constant = True  # type: ignore[attr-defined]


def products_dtype(x: Tensor) -> torch.dtype | str:
    """The dtype in which the products of a stack on ``x`` run, or the reason that they are the reference's business."""
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        if dtype not in _HALF or x.dtype not in (torch.float32, dtype):
            return f"rows of {x.dtype} under autocast to {dtype}"
    else:
        dtype = x.dtype
        if dtype not in (torch.float32, *_HALF):
            return f"rows of {dtype}"
    if INTERPRETED and dtype == torch.bfloat16:
        return "products in bfloat16 in the interpreter, which gets them wrong"
    return dtype


def why_not(
    x: Tensor, lists: Sequence[Sequence[Tensor]], dtype: torch.dtype, batch_stats: bool, autocast: bool
) -> str | None:
    """Why the kernels do not cover a call (``lists`` as in the schema, each whole or empty), or None if they do."""
    if x.device.type == "cuda":
        reason = chip_why_not(x.device.index)
        if reason is not None:
            return reason
    width, device = x.shape[1], x.device
    linear = lists[0][0].dtype
    if linear != dtype and not (autocast and linear == torch.float32):
        return f"weights of {linear} on rows of {x.dtype}"
    norm = next((tensors[0].dtype for tensors in lists[2:] if tensors), torch.float32)
    if norm != torch.float32 and (norm != x.dtype or autocast):
        return f"BatchNorms in {norm} on rows of {x.dtype}"
    for name, tensors, wanted, shape in (
        ("weights", lists[0], linear, (width, width)),
        ("biases", lists[1], lists[1][0].dtype if lists[1] else linear, (width,)),
        *(("BatchNorms", tensors, norm, (width,)) for tensors in lists[2:]),
    ):
        # Quicker than all() over generators, and what a deep stack costs the host besides launches is half this.
        alike = {t.dtype for t in tensors} <= {wanted} and {t.device for t in tensors} <= {device}
        if not (alike and {t.shape for t in tensors} <= {torch.Size(shape)}):
            return f"{name} that differ in dtype, shape or device"
    if lists[1] and lists[1][0].dtype != linear and not (autocast and lists[1][0].dtype == torch.float32):
        return f"biases of {lists[1][0].dtype} beside weights of {linear}"
    if False in {t.is_contiguous() for tensors in lists[1:] for t in tensors}:
        return "vectors with strides"
    return None


# --- the kernels' signatures to the schema's ---


def _driver() -> Any:
    from rvae_fast.kernels import residual_stack

    return residual_stack


def forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
    running_means: Sequence[Tensor],
    running_vars: Sequence[Tensor],
    layers: int,
    order: str,
    activation: str,
    negative_slope: float,
    eps: float,
    batch_stats: bool,
    dtype: torch.dtype,
    keep: bool,
    *,
    momentum: Sequence[float] = (),
) -> _Outputs:
    """The schema's forward, unchecked; with ``momentum`` the running statistics are updated as well."""
    driver = _driver()
    options = driver.StackOptions(layers, order, activation, negative_slope, batch_stats, dtype)
    out, kept = driver.stack_forward(
        x.contiguous(), weights, biases, norm_weights, norm_biases, running_means, running_vars, eps, options,
        keep=keep, momentum=momentum,
    )  # fmt: skip
    if momentum:
        torch.autograd.graph.increment_version([*running_means, *running_vars])
    return out, *kept


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Sequence[Tensor],
    norm_weights: Sequence[Tensor],
    norm_biases: Sequence[Tensor],
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
    need_weights: Sequence[bool],
    need_biases: Sequence[bool],
    need_norms: Sequence[bool],
) -> _Gradients:
    """The schema's backward, unchecked."""
    from rvae_fast.kernels.residual_stack_backward import stack_backward

    driver = _driver()
    options = driver.StackOptions(layers, order, activation, negative_slope, batch_stats, dtype)
    kept = driver.Kept(inner, stream, statistics)
    grads = stack_backward(
        gradient.to(x.dtype).contiguous(), x.contiguous(), weights, kept, options,
        need_x=need_x, need_weights=need_weights,
    )  # fmt: skip
    biases, *norms = (
        grad if any(need) else grad.new_empty((0, x.shape[1]))
        for grad, need in zip(grads[2:], (need_biases, need_norms, need_norms), strict=True)
    )
    return x.new_empty((0, x.shape[1])) if grads.x is None else grads.x, grads.weights, biases, *norms


#: For eager calls that :func:`why_not` has let through.
DIRECT = Kernels(forward, backward)


# --- registration ---


def _check(x: Tensor, lists: dict[str, Sequence[Tensor]], layers: int, order: str, activation: str) -> None:
    if x.dim() != 2 or x.shape[1] == 0:
        raise ValueError(f"residual_stack: x must have shape [batch, features], got {list(x.shape)}")
    if x.dtype not in (torch.float32, *_HALF):
        raise TypeError(f"residual_stack: x must be float32, float16 or bfloat16, got {x.dtype}")
    count, width = len(lists["weights"]), x.shape[1]
    if count == 0 or layers < 1 or count % layers:
        raise ValueError(f"residual_stack: {count} layers are not whole units of {layers}")
    if order not in ("pre", "post"):
        raise ValueError(f"residual_stack: order must be 'pre' or 'post', got {order!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"residual_stack: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    for name, tensors in lists.items():
        shape = (width, width) if name == "weights" else (width,)
        if len(tensors) not in (0, count):
            raise ValueError(f"residual_stack: {name} has {len(tensors)} tensors, expected {count}")
        for t in tensors:
            if t.shape != shape:
                raise ValueError(f"residual_stack: {name} must have shape {list(shape)}, got {list(t.shape)}")
            if t.device != x.device or t.dtype != tensors[0].dtype or t.dtype not in (torch.float32, *_HALF):
                raise TypeError(
                    f"residual_stack: {name} must be on {x.device} and all float32, float16 or bfloat16, "
                    f"got {t.dtype} on {t.device}"
                )


def _checked_forward(
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
) -> _Outputs:
    vectors = {"biases": biases, "norm_weights": norm_weights, "norm_biases": norm_biases}
    running = {} if batch_stats else {"running_means": running_means, "running_vars": running_vars}
    _check(x, {"weights": weights, **vectors, **running}, layers, order, activation)
    if x.shape[0] <= int(batch_stats):
        rows = "more than one row for statistics of the batch" if batch_stats else "at least one row"
        raise ValueError(f"residual_stack: x must have {rows}, got {list(x.shape)}")
    if not batch_stats and not (running_means and running_vars):
        raise ValueError("residual_stack: running_means has 0 tensors, and there are no statistics of the batch")
    columns = (biases, norm_weights, norm_biases, running_means, running_vars)
    lists: Any = [[t.contiguous() for t in tensors] for tensors in columns]
    options: Any = (layers, order, activation, negative_slope, eps, batch_stats, dtype, keep)
    return forward(x, weights, *lists, *options)


def _checked_backward(
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
) -> _Gradients:
    _check(x, {"weights": weights}, layers, order, activation)
    if gradient.shape != x.shape:
        raise ValueError(
            f"residual_stack_backward: the gradient must have shape {list(x.shape)}, got {list(gradient.shape)}"
        )
    units, (rows, width) = len(weights) // layers, x.shape
    count = len(weights) - units if order == "pre" else len(weights)
    kept = ((inner, count, dtype), (stream, units - 1, x.dtype))
    if (
        any(t.shape != (n, rows, width) or t.dtype != d or not t.is_contiguous() for t, n, d in kept)
        or statistics.shape != (len(weights), 5, width)
        or statistics.dtype != torch.float32
        or not statistics.is_contiguous()
    ):
        raise RuntimeError("residual_stack_backward: the kept tensors are not those of a forward pass with keep=True")
    if not len(need_weights) == len(need_biases) == len(need_norms) == len(weights):
        raise ValueError("residual_stack_backward: one flag a layer is expected")
    return backward(
        gradient, x, weights, norm_weights, norm_biases, inner, stream, statistics, layers, order, activation,
        negative_slope, batch_stats, dtype, need_x, need_weights, need_biases, need_norms,
    )  # fmt: skip


def register(library: torch.library.Library, name: str, key: str) -> None:
    """Make these kernels the implementation of the op for a dispatch key. Triton is imported when one first runs."""
    library.impl(name, _checked_forward, key)
    library.impl(name + "_backward", _checked_backward, key)
