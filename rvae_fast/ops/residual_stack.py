"""``residual_stack``: which call runs on which kernels, and what is left to plain PyTorch.

The function at the end is what :mod:`rvae_fast.nn` calls. The op itself (schema, fakes, autograd) is in
:mod:`.residual_stack_op`, what Triton covers in :mod:`.residual_stack_triton`; what no kernel covers (fp64, dropout,
norms that differ within a stack) runs through :func:`rvae_fast.reference.residual_unit`.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rvae_fast import _backend
from rvae_fast.ops import residual_stack_triton as triton_kernels
from rvae_fast.ops.residual_stack_op import _ResidualStack, define, library, run_reference, train_op

_OP = define("residual_stack")
triton_kernels.register(library, "residual_stack", "CUDA")
_HAS_KERNELS: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::residual_stack", "CPU")
_IMPLEMENTED: dict[str, tuple[str, ...]] = {"native": ("cpu",)} if _HAS_KERNELS else {}
_IMPLEMENTED["triton"] = ("cuda",)
_TRITON_OPS = {"cuda": _OP}
if triton_kernels.INTERPRETED:
    _TRITON_OPS["cpu"] = define("residual_stack_interpreted", triton=True)
    triton_kernels.register(library, "residual_stack_interpreted", "CPU")
    _IMPLEMENTED["triton"] = ("cuda", "cpu")

#: Whether the native kernels have bf16 products on this machine (AVX512_BF16 or AMX); they are tried once, at import.
HAS_BF16_PRODUCTS: bool = _HAS_KERNELS and torch.ops.rvae_fast.cpu_has_bf16_products()

# --- what the kernels cover ---


def all_or_none(tensors: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The tensors if all are there, an empty list if none is, None for a mixture."""
    there = [t for t in tensors if t is not None]
    return there if len(there) in (0, len(tensors)) else None


def transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode AD is at work, which no kernel knows."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def native_dtype(x: Tensor, lists: Sequence[Sequence[Tensor]]) -> torch.dtype | str:
    """The dtype of the products on the native kernels, or why they do not cover the call."""
    dtype = torch.float32
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        if dtype != torch.bfloat16 or x.dtype not in (torch.float32, torch.bfloat16):
            return f"rows of {x.dtype} under autocast to {dtype}"
        if not HAS_BF16_PRODUCTS:
            return "products in bfloat16 on this CPU"
    elif x.dtype != torch.float32:
        return f"rows of {x.dtype}"
    if not all(t.dtype == torch.float32 and t.device == x.device for tensors in lists for t in tensors):
        return "parameters and buffers that are not float32 on the CPU"
    return dtype


def _triton_dtype(x: Tensor, lists: Sequence[Sequence[Tensor]], batch_stats: bool) -> torch.dtype | str:
    """The same for the Triton kernels."""
    dtype = triton_kernels.products_dtype(x)
    if isinstance(dtype, str):
        return dtype
    autocast = torch.is_autocast_enabled(x.device.type)
    return triton_kernels.why_not(x, lists, dtype, batch_stats, autocast) or dtype


def _are_square(weights: Sequence[Tensor]) -> bool:
    """Whether the weights are those of layers of one width; they are not where somebody has made a bottleneck."""
    shapes = [weight.shape for weight in weights]
    return shapes[0][0] == shapes[0][1] and shapes.count(shapes[0]) == len(shapes)


def choose(
    x: Tensor, lists: Sequence[list[Tensor] | None], batch_stats: Sequence[bool], dropout: float
) -> tuple[str, torch.dtype]:
    """The backend of a call, by name, and the dtype of its products.

    The rules in order: calls that are an error or have nothing to do, what no kernel does, what each leaves out.
    """
    name = _backend.choose("residual_stack", x.device.type, _IMPLEMENTED)
    if name == "reference":
        return name, x.dtype
    chosen: torch.dtype | str
    whole = [tensors for tensors in lists if tensors is not None]
    if x.shape[0] <= int(batch_stats[0]):
        return "reference", x.dtype  # which raises what PyTorch raises, or has nothing to do
    if dropout > 0:
        chosen = "dropout"
    elif len(whole) < len(lists):
        chosen = "layers of which some have a bias, weight or buffer and some have not"
    elif len(set(batch_stats)) > 1:
        chosen = "norms of which some take the statistics of the batch and some do not"
    elif not _are_square(whole[0]):
        chosen = "layers of more than one width"
    elif not torch.compiler.is_compiling() and transformed():
        chosen = "transforms of torch.func and forward-mode AD"
    elif name == "native":
        chosen = native_dtype(x, whole)
    else:
        chosen = _triton_dtype(x, whole, batch_stats[0])
    if isinstance(chosen, torch.dtype):
        return name, chosen
    if name == "triton" and _backend.current_backend() == "triton":
        raise RuntimeError(
            f"residual_stack: backend 'triton' was asked for and does not cover {chosen}; use backend('auto') or "
            f"backend('reference')"
        )
    return "reference", x.dtype


_PLAIN = {Tensor, torch.nn.Parameter}


def can_skip_dispatch(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing listens between a call of the op and its implementation: no subclass, no dispatch mode."""
    return torch._C._len_torch_dispatch_stack() == 0 and _PLAIN.issuperset(map(type, tensors))


def update_running(
    running_means: list[Tensor], running_vars: list[Tensor], statistics: Tensor, momentum: Sequence[float]
) -> None:
    """``running = (1 - momentum) * running + momentum * batch``, layer by layer: shared norms see each in turn."""
    native = _HAS_KERNELS and statistics.device.type == "cpu" and not torch.compiler.is_compiling()
    if native and _are_fp32(running_means, running_vars):
        # Through the dispatcher, so that who records ops (a dispatch mode) has this one too, with the same bits.
        torch.ops.rvae_fast.update_running.default(running_means, running_vars, statistics, momentum)
        return
    with torch.no_grad():
        statistics = statistics.to(running_means[0].dtype)
        means, variances = (
            [row[: running.shape[0]] for row, running in zip(statistics[:, kind].unbind(0), running_means, strict=True)]
            for kind in (0, 2)
        )
        distinct = len({id(t) for t in running_means}) == len(running_means)
        if distinct and len(set(momentum)) == 1:
            for running, batch in ((running_means, means), (running_vars, variances)):
                torch._foreach_mul_(running, 1.0 - momentum[0])
                torch._foreach_add_(running, batch, alpha=momentum[0])
            return
        for i, weight in enumerate(momentum):
            running_means[i].mul_(1.0 - weight).add_(means[i], alpha=weight)
            running_vars[i].mul_(1.0 - weight).add_(variances[i], alpha=weight)


def _every(lists: Sequence[list[Tensor]]) -> list[Tensor]:
    return [tensor for tensors in lists for tensor in tensors]


def _are_fp32(*lists: list[Tensor]) -> bool:
    """Whether the native kernel takes them: fp32, contiguous, and no subclass of a tensor."""
    every = [t for tensors in lists for t in tensors]
    return _PLAIN.issuperset(map(type, every)) and all(t.dtype == torch.float32 and t.is_contiguous() for t in every)


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
    tensors inside units are bf16; statistics, parameters and their gradients fp32). The Triton kernels run for fp32,
    bf16 and fp16 rows with parameters of the same dtype (BatchNorms also in fp32) and under autocast to bf16 or fp16;
    fp32 products follow ``torch.backends.cuda.matmul`` (TF32 or IEEE). The plain PyTorch implementation serves
    everything else: fp64, other devices, dropout, norms that differ within the stack, transforms of ``torch.func``,
    forward-mode AD, and gradients of gradients. Asked for by name, the Triton kernels raise instead.
    """
    lists = [all_or_none(ts) for ts in (weights, biases, norm_weights, norm_biases, running_means, running_vars)]
    name, dtype = choose(x, lists, batch_stats, dropout)
    if name == "reference":
        return run_reference(
            x, (weights, biases, norm_weights, norm_biases, running_means, running_vars), layers=layers, order=order,
            activation=activation, negative_slope=negative_slope, eps=eps, momentum=momentum, batch_stats=batch_stats,
            dropout=dropout,
        )  # fmt: skip
    whole: Any = lists
    parameters = [p for tensors in whole[:4] for p in tensors]
    keep = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in parameters))
    options = (layers, order, activation, float(negative_slope), float(eps), batch_stats[0], dtype, keep)
    if name == "native" and not torch.compiler.is_compiling() and can_skip_dispatch([x, *_every(whole)]):
        return train_op(x, *whole, *options[:5], momentum, *options[5:7])
    kernels = _OP
    update = batch_stats[0] and len(whole[4]) > 0  # torch 2.11's Dynamo cannot take the truth of a list
    if name == "triton":
        kernels = _TRITON_OPS[x.device.type]
        x = x.contiguous()
        if not torch.compiler.is_compiling() and can_skip_dispatch([x, *parameters]):
            kernels = triton_kernels.DIRECT
            if update:
                kernels = kernels._replace(forward=functools.partial(kernels.forward, momentum=momentum))
                update = False
    if keep and not torch.compiler.is_compiling():
        out, statistics = _ResidualStack.apply(kernels, (*whole, *options), x, *parameters)
    else:
        out, _, _, statistics = kernels.forward(x, *whole, *options)
    if update:
        update_running(whole[4], whole[5], statistics, momentum)
    return out
