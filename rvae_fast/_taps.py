"""Which steps of a frozen network the places of a pathway are, for ``csrc/cpu/score_pathway.cpp``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast._activations import Activation
from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualStack

#: The pathways whose places are values of single steps. Those of ``linears`` and ``activations`` are not: a BatchNorm
#: that reads a layer's output and nothing else is folded into the layer.
COVERED = ("stages", "units", "branches")


def taps(model: Autoencoder, pathway: str) -> Tensor:
    """The places of one of :data:`COVERED`, as :func:`rvae_fast.pathway.hidden` yields them.

    Returns
    -------
    Tensor [places, 4] int64
        Step, first column among all places', width, and whether the value is the one before the step's addition and
        activation.
    """
    found: list[list[int]] = []
    step, columns = 0, 0  # step 0 loads the rows

    def add(width: int, before: bool = False) -> None:
        nonlocal columns
        found.append([step, columns, width, int(before)])
        columns += width

    modules: list[Any] = list(model.encoder)
    for module in modules:
        if isinstance(module, ResidualStack):
            units: list[Any] = list(module)
            for unit in units:
                step += len(unit.linears)
                if pathway != "stages":
                    add(unit.features, before=pathway == "branches")
        elif isinstance(module, nn.Linear):
            step += 1
            if module is modules[-1]:
                add(model.latent_features)
            elif model.is_residual:
                add(module.out_features)
        elif isinstance(module, Activation):
            add(modules[modules.index(module) - 2].out_features)
    return torch.tensor(found, dtype=torch.int64)


def ends(model: Autoencoder) -> dict[int, tuple[int, int]]:
    """By a number of modules of the encoder, the step that ends with what they make of a row, and its width.

    Only those that end where a step does: with a stack of residual units, an activation, or a linear layer that nothing
    but the next stage or the code reads.
    """
    found: dict[int, tuple[int, int]] = {}
    step, width = 0, model.in_features
    modules: list[Any] = list(model.encoder)
    for i, module in enumerate(modules):
        if isinstance(module, ResidualStack):
            units: list[Any] = list(module)
            step += sum(len(unit.linears) for unit in units)
        elif isinstance(module, nn.Linear):
            step, width = step + 1, module.out_features
        following = modules[i + 1] if i + 1 < len(modules) else None
        folded = isinstance(module, nn.Linear) and not isinstance(following, (ResidualStack, nn.Linear, type(None)))
        if not folded and not isinstance(module, nn.BatchNorm1d):
            found[i + 1] = (step, width)
    return found
