"""What the BatchNorms and Linears of a stack hand to one op: their parameters, and how each norm is to run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


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
        if all(moving) and not cumulative and len(set(map(id, counts))) == len(counts):
            torch._foreach_add_(counts, 1)  # on a GPU one launch, not one a norm
        else:
            for i, norm in enumerate(norms):  # a norm that is there twice counts twice
                if moving[i]:
                    counts[i].add_(1)
                    if norm.momentum is None:
                        momentum[i] = 1.0 / float(counts[i])
    means = values(norms, "running_mean")
    return [norm.training or mean is None for norm, mean in zip(norms, means, strict=True)], momentum


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
