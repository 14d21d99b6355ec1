"""What the BatchNorms and Linears of a stack hand to one op: their parameters, and how each norm is to run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from rvae_fast.ops.residual_stack import transformed


def advance(norms: Sequence[nn.BatchNorm1d]) -> tuple[list[bool], list[float]]:
    """Count the batch and say how each norm is to run: (by batch statistics?, weight of the batch in the averages).

    The rules are ``nn.BatchNorm1d.forward``'s, each norm by its own training flag, so that freezing some norms with
    ``norm.eval()`` works as it does there.
    """
    momentum = [0.0 if norm.momentum is None else norm.momentum for norm in norms]
    counts = values(norms, "num_batches_tracked")
    moving = [
        norm.training and norm.track_running_stats and count is not None
        for norm, count in zip(norms, counts, strict=True)
    ]
    if any(moving):
        cumulative = any(norm.momentum is None for norm in norms)
        distinct = len(set(map(id, counts))) == len(counts)
        if all(moving) and not cumulative and distinct and (torch.compiler.is_compiling() or not transformed()):
            torch._foreach_add_(counts, 1)  # on a GPU one launch, not one a norm; torch.func cannot batch it
        else:
            for i, norm in enumerate(norms):  # a norm that is there twice counts twice
                if moving[i]:
                    counts[i].add_(1)
                    if norm.momentum is None:
                        momentum[i] = 1.0 / float(counts[i])
    means = values(norms, "running_mean")
    return [norm.training or mean is None for norm, mean in zip(norms, means, strict=True)], momentum


def untouched(modules: Iterable[nn.Module], kind: type[nn.Module]) -> bool:
    """Whether to call these modules would be to do what ``kind`` does, with nobody waiting for the call.

    Not so where a module was replaced (by an adapter, a synchronised norm), has a ``forward`` of its own, or hooks, by
    which pruning and the older forms of spectral and weight normalisation set the weight just before it is used.
    """
    if torch.compiler.is_compiling():
        return all(_runs_as(kind, type(module)) and not has_hooks(module) for module in modules)
    for module in modules:  # of a deep stack many: past ``nn.Module.__getattr__``
        own = module.__dict__
        if type(module) is not kind and not _runs_as(kind, type(module)):
            return False
        if own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
            return False
        if "forward" in own:
            return False
    return True


def _runs_as(kind: type[nn.Module], own: type[nn.Module]) -> bool:
    return own is kind or (issubclass(own, kind) and own.forward is kind.forward)  # parametrised, say


def has_hooks(module: nn.Module) -> bool:
    """Whether someone waits for the module to be called."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )


def watched() -> bool:
    """Whether someone waits for every module of the process to be called."""
    return not torch.compiler.is_compiling() and bool(has_global_hooks())


def values(modules: Sequence[nn.Module], name: str) -> list[Any]:
    """The parameter or buffer of each module, past ``nn.Module.__getattr__``, whose toll deep stacks would notice."""
    if not torch.compiler.is_compiling():
        try:
            kind = "_parameters" if name in ("weight", "bias") else "_buffers"
            return [module.__dict__[kind][name] for module in modules]
        except KeyError:  # parametrised, pruned
            pass
    return [getattr(module, name) for module in modules]


def averages(norms: Sequence[nn.BatchNorm1d], name: str) -> list[Any]:
    """A running average of each norm; None where it takes no part, with ``track_running_stats`` off while training."""
    unused = [norm.training and not norm.track_running_stats for norm in norms]
    return [None if u else value for u, value in zip(unused, values(norms, name), strict=True)]
