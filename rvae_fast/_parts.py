"""What the parts of a network are to the native kernels: stacks whose parameters one call can take gradients of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rvae_fast._norms import averages, has_hooks, values
from rvae_fast.nn import PlainStack, ResidualStack, Transition, alike
from rvae_fast.ops.plain_stack import Lists, Options, products_dtype
from rvae_fast.ops.residual_stack import all_or_none, choose


class Part(NamedTuple):
    """A plain stack, a transition (a plain stack of one layer) or a residual stack, by batch statistics."""

    #: Weights, biases, norm weights, norm biases, running means, running variances; a list may be empty.
    lists: Lists
    norms: Sequence[nn.BatchNorm1d]
    #: Linear layers of a residual unit; 0 for a plain stack.
    layers: int
    #: Of the residual units, if there are any.
    order: str | None
    #: None where there is neither norm nor activation.
    options: Options | None
    #: Of the products.
    dtype: torch.dtype


def parts_of(network: nn.Module, rows: Tensor) -> list[Part] | None:
    """The parts of an encoder or decoder, in order, as things are now; None if one of them is something else.

    Parameters
    ----------
    network : nn.Module
    rows : Tensor
        Like those that are to come, whatever their width.
    """
    if has_hooks(network) or "forward" in network.__dict__:
        return None
    if type(network) is PlainStack:
        parts = [_plain(network, rows)]
    elif type(network) is nn.Sequential:
        parts = [_part(module, rows) for module in network]
    else:
        return None
    found = [part for part in parts if part is not None]
    return found if len(found) == len(parts) else None


def _part(module: nn.Module, rows: Tensor) -> Part | None:
    if has_hooks(module) or "forward" in module.__dict__:
        return None
    if type(module) is Transition:
        return _transition(module, rows)
    return _residual(module, rows) if type(module) is ResidualStack else None


def _plain(stack: PlainStack, rows: Tensor) -> Part | None:
    call = stack.as_one_op(rows)
    if call is None or not call.batch_stats:
        return None
    return Part(call.lists, call.norms, 0, None, call.options, call.dtype)


def _transition(linear: Transition, rows: Tensor) -> Part | None:
    lists: Lists = ([linear.weight], [] if linear.bias is None else [linear.bias], [], [], [], [])
    dtype = products_dtype(rows, lists, (True,))
    return None if dtype is None else Part(lists, (), 0, None, None, dtype)


def _residual(stack: ResidualStack, rows: Tensor) -> Part | None:
    blocks: list[Any] = list(stack)
    if not alike(blocks):  # nor is an empty stack, which is the identity
        return None
    first = blocks[0]
    norms: list[Any] = [norm for block in blocks for norm in block.norms]
    linears: list[Any] = [linear for block in blocks for linear in block.linears]
    lists = [all_or_none(values(linears, name)) for name in ("weight", "bias")]
    lists += [all_or_none(values(norms, name)) for name in ("weight", "bias")]
    lists += [all_or_none(averages(norms, name)) for name in ("running_mean", "running_var")]
    batch_stats = [norm.training or norm.running_mean is None for norm in norms]
    name, dtype = choose(rows, lists, batch_stats, first.dropout if first.training else 0.0)
    if name != "native" or not all(batch_stats):
        return None
    found: Any = tuple(lists)
    options = Options(first.activation, first.negative_slope, norms[0].eps)
    return Part(found, norms, first.layers, first.order, options, dtype)
