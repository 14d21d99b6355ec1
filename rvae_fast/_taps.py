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
