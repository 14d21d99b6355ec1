"""Where an encoder looks different for a row and for its reconstruction: the differences that SAP and NAP are made of.

RaPP (Kim et al., "RaPP: Novelty Detection with Reconstruction along Projection Pathway", ICLR 2020) sends a row and its
reconstruction through the encoder and compares what they become on the way. In a plain network that is the output of
every layer. A residual network has more places to look, and :data:`PATHWAYS` names them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from rvae_fast._activations import Activation, activate
from rvae_fast._taps import taps
from rvae_fast._validation import check_choice
from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualStack

#: Places to compare at. A plain network has no units: there the first three mean every layer's output, after BatchNorm
#: and activation, which is the paper's choice.
PATHWAYS: dict[str, str] = {
    "stages": "what each stage hands on to the next, the last being the code",
    "units": "that and the output of every residual unit",
    "branches": "what each stage hands on, and what every residual unit adds to its input",
    "linears": "the output of every linear layer, before BatchNorm, activation and addition",
    "activations": "the input of every linear layer, after BatchNorm and activation, and the code",
}


#: Columns of the places of ``"units"`` beyond which they are too many for NAP to take by default: its covariance is of
#: their square, and so are its scores.
MOST_COLUMNS = 2000


def default_pathway(model: Autoencoder, score: str) -> tuple[str, bool]:
    """Where SAP and NAP (``score``: "sap" or "nap") compare unless told otherwise, and whether the input counts.

    SAP, and NAP of a plain network: as in the paper. NAP of a residual one does better without the input, and after
    every unit where they have no more than :data:`MOST_COLUMNS` columns (``docs/results/README.md``, "Where to look").
    """
    if score != "nap" or not model.is_residual:
        return "stages", True
    columns = int(taps(model, "units")[:, 2].sum())
    return ("units" if columns <= MOST_COLUMNS else "stages"), False


def hidden(model: Autoencoder, x: Tensor, pathway: str = "stages") -> Iterator[Tensor]:
    """What rows become on their way through the encoder, place by place; the last is the code (of a VAE the mean).

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE in eval mode
    x : Tensor [n, in_features]
    pathway : str
        One of :data:`PATHWAYS`.

    Yields
    ------
    Tensor [n, width of the place]
        Each is only valid until the next is asked for; no other is kept.
    """
    check_choice("pathway", pathway, tuple(PATHWAYS))
    steps = _residual(model, x, pathway) if model.is_residual else _plain(model, x, pathway)
    for place, is_code in steps:
        # A VAE's last layer gives the mean and the log variance side by side.
        yield place[:, : model.latent_features] if is_code else place


def _plain(model: Autoencoder, h: Tensor, pathway: str) -> Iterator[tuple[Tensor, bool]]:
    modules: list[Any] = list(model.encoder)
    for i, module in enumerate(modules):
        last = i + 1 == len(modules)
        h = module(h)
        is_layer = isinstance(module, torch.nn.Linear) if pathway == "linears" else isinstance(module, Activation)
        if is_layer or last:
            yield h, last


def _residual(model: Autoencoder, h: Tensor, pathway: str) -> Iterator[tuple[Tensor, bool]]:
    modules: list[Any] = list(model.encoder)
    row = h
    for i, module in enumerate(modules):
        last = i + 1 == len(modules)
        if not isinstance(module, ResidualStack):
            if pathway == "activations" and i > 0:  # a transition's input; that of the first is the row itself
                yield h, False
            h = module(h)
            if pathway != "activations" or last:
                yield h, last
        elif pathway == "stages":
            h = module(h)
        else:
            for unit in module:
                if pathway == "units":
                    h = unit(h)
                    yield h, False
                    continue
                h, inner = _unit(unit, h)
                for place, name in inner:
                    # A post-activation unit's first layer reads the stream as it is, in the first unit the row itself.
                    if name == pathway and place is not row:
                        yield place, False


def _unit(unit: Any, h: Tensor) -> tuple[Tensor, list[tuple[Tensor, str]]]:
    """A residual unit in eval mode, layer by layer: its output, and what passed inside it."""

    def norm(i: int, value: Tensor) -> Tensor:
        bn = unit.norms[i]
        return F.batch_norm(value, bn.running_mean, bn.running_var, bn.weight, bn.bias, False, 0.0, bn.eps)

    inner: list[tuple[Tensor, str]] = []
    value, final = h, len(unit.linears) - 1
    for i, linear in enumerate(unit.linears):
        if unit.order == "pre":
            value = activate(norm(i, value), unit.activation, unit.negative_slope)
            inner.append((value, "activations"))
            value = linear(value)
            inner.append((value, "linears"))
        else:
            inner.append((value, "activations"))
            value = linear(value)
            inner.append((value, "linears"))
            value = norm(i, value)
            if i < final:
                value = activate(value, unit.activation, unit.negative_slope)
    inner.append((value, "branches"))
    out = h + value
    return out if unit.order == "pre" else activate(out, unit.activation, unit.negative_slope), inner


def reconstruct(model: Autoencoder, x: Tensor) -> Tensor:
    """What the model makes of rows ``[n, in_features]``, from the mean of the code, in the input's units."""
    code = model.encode(x)
    return model.decode(code[0] if isinstance(code, tuple) else code)


def differences(
    model: Autoencoder, x: Tensor, x_hat: Tensor, pathway: str = "stages", include_input: bool = True
) -> Iterator[Tensor]:
    """``hidden(x_hat) - hidden(x)``, place by place: both go through the encoder as one stacked batch.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE in eval mode
    x, x_hat : Tensor [n, in_features]
        Rows and their reconstructions (:func:`reconstruct`, or whatever else computes the same).
    pathway : str
        One of :data:`PATHWAYS`.
    include_input : bool, default True
        Whether ``x_hat - x`` comes first: the paper's sum begins at the input.

    Yields
    ------
    Tensor [n, width of the place]
    """
    n = x.shape[0]
    if include_input:
        yield x_hat - x
    for place in hidden(model, torch.cat([x, x_hat]), pathway):
        yield place[n:] - place[:n]
