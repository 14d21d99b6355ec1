"""``plain_stack``: the layers of a plain network in one call, where the native kernels cover them.

The function at the end is what :class:`rvae_fast.nn.PlainStack` calls, after it has asked :func:`products_dtype`; what
the kernels do not cover, its modules do one by one. The op itself is in :mod:`.plain_stack_op`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rvae_fast import _backend
from rvae_fast.ops.plain_stack_op import forward_op, train_op
from rvae_fast.ops.residual_stack import can_skip_dispatch, native_dtype, transformed, update_running

_HAS_KERNELS: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::plain_stack", "CPU")

#: Weights, biases, norm weights, norm biases, running means, running variances; a list may be empty.
Lists = tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor], list[Tensor]]


class Options(NamedTuple):
    """What the layers of a stack have in common."""

    activation: str
    negative_slope: float
    eps: float


def products_dtype(x: Tensor, lists: Lists, batch_stats: Sequence[bool]) -> torch.dtype | None:
    """The dtype of the products if :func:`plain_stack` covers the call under the backend in force; else None.

    It asks, and never fails: a backend without this op leaves it to the modules. Covered are fp32 parameters and fp32
    rows on the CPU, and under autocast to bf16 fp32 and bf16 rows. Of ``x`` all but the width is looked at.
    """
    if not _HAS_KERNELS or x.device.type != "cpu" or _backend.current_backend() not in ("auto", "native"):
        return None
    if x.dim() != 2 or len(set(batch_stats)) != 1:
        return None
    if x.shape[0] <= int(batch_stats[0]) or (not batch_stats[0] and not lists[4]):
        return None  # an error, or nothing to do
    if not torch.compiler.is_compiling():
        every = [x, *(t for tensors in lists for t in tensors)]
        # Subclasses (a distributed tensor) know PyTorch's ops; those of a dispatch mode (a fake tensor) know ours too.
        if transformed() or (torch._C._len_torch_dispatch_stack() == 0 and not can_skip_dispatch(every)):
            return None
    dtype = native_dtype(x, lists)
    return dtype if isinstance(dtype, torch.dtype) else None


def plain_stack(
    x: Tensor,
    lists: Lists,
    options: Options,
    *,
    momentum: Sequence[float],
    batch_stats: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Linear -> BatchNorm -> activation, ``L - 1`` times, then Linear: :func:`rvae_fast.reference.plain_stack`.

    Parameters
    ----------
    x : Tensor [batch, W[0]]
        fp32; with ``dtype`` bf16 also bf16.
    lists : six lists of fp32 tensors
        L weights ``[W[l + 1], W[l]]``; L or no biases ``[W[l + 1]]``; L - 1 or none of norm weights, norm biases,
        running means and running variances ``[W[l + 1]]``. The last two are updated in place with ``batch_stats``, and
        used to normalise without.
    options : Options
        See :class:`rvae_fast.ResidualBlock`.
    momentum : L - 1 floats
        Weight of this batch in each running average.
    batch_stats : bool
        Normalise by the statistics of this batch.
    dtype : torch.dtype
        Of the products and of what is kept for the backward, from :func:`products_dtype`.

    Returns
    -------
    Tensor [batch, W[L]]
        In ``dtype``, like the output of the linear layer that ends the stack.
    """
    every = [x, *(t for tensors in lists for t in tensors)]
    if not torch.compiler.is_compiling() and can_skip_dispatch(every):
        return train_op(x, *lists, *options, momentum, batch_stats, dtype)
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in every)
    out, _, statistics = forward_op(x, *lists, *options, batch_stats, dtype, keep)
    if batch_stats and lists[4]:
        update_running(lists[4], lists[5], statistics, momentum)
    return out
