"""Which models the native scorer runs: the package's own, of its own modules in the orders that the models build.

:mod:`rvae_fast._program` folds a norm and an activation into the layer before them, and :mod:`rvae_fast._taps` counts
the steps that this leaves. Both hold for these orders alone; whatever else runs as a network, a model can run itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rvae_fast._activations import Activation
from rvae_fast.models import LIKELIHOODS, MODELS, Autoencoder
from rvae_fast.nn import PlainStack, ResidualBlock, ResidualStack, Transition

#: Methods that say what a model's scores are; one that an object has for itself is somebody's own.
METHODS = (
    "forward", "encode", "decode", "loss_terms", "feature_errors", "anomaly_score",
    "_forward", "_encode", "_fused_score_terms",
)  # fmt: skip

_LINEARS = (nn.Linear, Transition)
_PLAIN: tuple[tuple[type[nn.Module], ...], ...] = (_LINEARS, (nn.BatchNorm1d,), (Activation,))


def covers(model: Autoencoder) -> bool:
    """Whether the kernels run this model as it is now.

    One of the package's own, all of it fp32 (a copy goes to the CPU), of modules that they know in an order that they
    know, with the options that the model was made with; no hook waiting for one of them to be called, and no method
    replaced on the object.
    """
    if type(model) not in MODELS.values() or any(name in model.__dict__ for name in METHODS):
        return False
    if model.likelihood not in LIKELIHOODS:  # set since, and the model's to refuse
        return False
    if any(t.dtype != torch.float32 for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()):
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in m.__dict__ for m in model.modules()):
        return False
    options = {name: model.config()[name] for name in ("order", "activation", "negative_slope")}
    code = model.latent_features * (2 if model.is_variational else 1)
    networks: list[Any] = [model.encoder, model.decoder]
    if not all(type(network) in (nn.Sequential, PlainStack) and len(network) for network in networks):
        return False
    encoder, decoder = map(list, networks)
    # Between the two are layers: the code of a variational model is wider than what its decoder reads, and a layer can
    # leave columns out where a unit cannot.
    return (
        type(encoder[-1]) in _LINEARS
        and type(decoder[0]) in _LINEARS
        and _is_network(encoder, model.is_residual, model.in_features, code, options)
        and _is_network(decoder, model.is_residual, model.latent_features, model.in_features, options)
    )


def _is_network(modules: list[Any], is_residual: bool, width: int, out: int, options: dict[str, Any]) -> bool:
    """Layers and stacks of units, or layers with norm and activation up to a last one without."""
    if not is_residual and len(modules) % 3 != 1:
        return False
    for i, module in enumerate(modules):
        if type(module) not in ((*_LINEARS, ResidualStack) if is_residual else _PLAIN[i % 3]):
            return False
        if type(module) in _LINEARS:
            if module.weight.shape[1] != width:
                return False
            width = module.weight.shape[0]
        elif type(module) is nn.BatchNorm1d:
            if not _is_norm(module, width):
                return False
        elif type(module) is Activation:
            if not _has(module, options, "activation", "negative_slope"):
                return False
        elif module.features != width or not all(_is_unit(unit, width, options) for unit in module):
            return False
    return width == out


def _is_unit(unit: Any, width: int, options: dict[str, Any]) -> bool:
    if type(unit) is not ResidualBlock or unit.features != width or not _has(unit, options, *options):
        return False
    if not len(unit.linears) == len(unit.norms) == unit.layers:
        return False
    linears: list[Any] = list(unit.linears)
    return all(_is_norm(norm, width) for norm in unit.norms) and all(
        type(linear) in _LINEARS and list(linear.weight.shape) == [width, width] for linear in linears
    )


def _is_norm(norm: Any, width: int) -> bool:
    if type(norm) is not nn.BatchNorm1d or (norm.running_mean is None) != (norm.running_var is None):
        return False
    tensors = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return all(list(t.shape) == [width] for t in tensors if t is not None)


def _has(module: nn.Module, options: dict[str, Any], *names: str) -> bool:
    return all(getattr(module, name) == options[name] for name in names)
