"""Which steps of a frozen network the places of a pathway are, for ``csrc/cpu/score_pathway.cpp``."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast._activations import Activation
from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualBlock, ResidualStack

#: The pathways whose places are values of single steps. Those of ``linears`` and ``activations`` are not: a BatchNorm
#: that reads a layer's output and nothing else is folded into the layer.
COVERED = ("stages", "units", "branches")


def taps(model: Autoencoder, pathway: str) -> Tensor:
    """The places of one of :data:`COVERED`, as :func:`rvae_fast.pathway.hidden` yields them.

    Returns
    -------
    Tensor [places, 4] int64
        Step, first column among all places', width, and whether the value is the one before the step's addition and
        activation. The steps are those of a model that the kernels cover (:mod:`rvae_fast._covered`); the columns are
        any model's.
    """
    found: list[list[int]] = []
    columns = 0

    def add(step: int, width: int, before: bool = False) -> None:
        nonlocal columns
        found.append([step, columns, width, int(before)])
        columns += width

    walked = list(_walk(model))
    for i, (module, step, width) in enumerate(walked):
        if isinstance(module, ResidualStack):
            at = step - sum(_steps(unit) for unit in module)
            for unit in module if model.is_residual and pathway != "stages" else ():
                at += _steps(unit)
                add(at, width, before=pathway == "branches")
        elif i + 1 == len(walked):
            add(step, model.latent_features)
        elif model.is_residual or isinstance(module, Activation):
            add(step, width)
    return torch.tensor(found, dtype=torch.int64, device="cpu")


def ends(model: Autoencoder) -> dict[int, tuple[int, int]]:
    """By a number of modules of the encoder, the step that ends with what they make of a row, and its width.

    Only those that end where a step does. In a plain network a norm and an activation belong to the step of the layer
    before them.
    """
    walked = list(_walk(model))
    found: dict[int, tuple[int, int]] = {}
    for i, (_, step, width) in enumerate(walked):
        following = walked[i + 1][0] if i + 1 < len(walked) else None
        if model.is_residual or not isinstance(following, (nn.BatchNorm1d, Activation)):
            found[i + 1] = (step, width)
    return found


def _walk(model: Autoencoder) -> Iterator[tuple[Any, int, int]]:
    """The encoder's modules, each with the step and the width that it ends with; step 0 loads the rows."""
    step, width = 0, model.in_features
    encoder: Any = model.encoder
    for module in encoder if isinstance(encoder, nn.Sequential) else [encoder]:
        if isinstance(module, ResidualStack):
            step += sum(_steps(unit) for unit in module)
        elif isinstance(module, nn.Linear):
            step, width = step + 1, module.out_features
        yield module, step, width


def _steps(unit: Any) -> int:
    return len(unit.linears) if isinstance(unit, ResidualBlock) else 0
