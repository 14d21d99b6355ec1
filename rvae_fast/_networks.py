"""Encoders and decoders as modules, from their widths or stages (:mod:`rvae_fast._architecture`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import nn

from rvae_fast._activations import Activation
from rvae_fast._architecture import Stages
from rvae_fast.nn import PlainStack, ResidualStack, Transition


def plain_net(
    widths: Sequence[int], activation: str, negative_slope: float, eps: float, momentum: float | None
) -> PlainStack:
    """Linear, BatchNorm and activation from each width to the next; the last layer is bare."""
    modules: list[nn.Module] = []
    for i, (before, after) in enumerate(pairwise(widths)):
        modules.append(nn.Linear(before, after))
        if i < len(widths) - 2:
            modules += [nn.BatchNorm1d(after, eps, momentum), Activation(activation, negative_slope)]
    return PlainStack(*modules)


def residual_net(
    in_features: int, latent_features: int, code: int, stages: Stages, options: dict[str, Any]
) -> tuple[nn.Sequential, nn.Sequential]:
    """Encoder and decoder: (stack, transition) per stage, mirrored; a stage without units has no stack."""
    projected = stages.widths[0] != in_features
    encoder: list[nn.Module] = [Transition(in_features, stages.widths[0])] if projected else []
    decoder: list[nn.Module] = [Transition(stages.widths[0], in_features)] if projected else []
    for i, (width, blocks) in enumerate(zip(stages.widths, stages.blocks, strict=True)):
        last = i + 1 == len(stages.widths)
        narrower = latent_features if last else stages.widths[i + 1]
        if blocks:
            encoder.append(ResidualStack(width, blocks, **options))
            decoder.insert(0, ResidualStack(width, blocks, **options))
        encoder.append(Transition(width, code if last else narrower))
        decoder.insert(0, Transition(narrower, width))
    return nn.Sequential(*encoder), nn.Sequential(*decoder)
