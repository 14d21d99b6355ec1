"""Scorers kept beside the models they were frozen from, for as long as the weights stay as they were.

They are kept here and not on the model or the detector, so that pickles, copies and clones know nothing of them, and
they go when the model goes. What they were made of is compared before every use: the modules, hooks, parameters and
buffers by identity, of each tensor the version that autograd counts and the place in memory, and the options that are
plain attributes of the model and its modules. Training, ``load_state_dict``, ``.to(...)``, replaced modules, parameters
or methods and changed options are all noticed. A write past autograd's counter, into ``parameter.data`` or a NumPy
view, is noticed only where it touches the entries that are sampled.
"""

from __future__ import annotations

import operator
from itertools import chain
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rvae_fast import _backend
from rvae_fast._norms import watched
from rvae_fast.models import Autoencoder
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS
from rvae_fast.scorer import IMPLEMENTED, Scorer, freezable, freeze

_state = torch.ops.rvae_fast.score_state.default

#: Attributes, of a model or of modules in it, that say what is computed with the tensors.
_OPTIONS = ("eps", "activation", "negative_slope", "order", "layers", "likelihood", "latent_features")


class _Ingredients:
    """What a model's scores are made of, as it was at one moment; it holds the tensors, so that no other can take
    their place in memory unnoticed, but not the model."""

    def __init__(self, model: nn.Module) -> None:
        places: list[dict[Any, Any]] = []
        for module in model.modules():
            places += [module._modules, module._parameters, module._buffers]
            places += [module._forward_hooks, module._forward_pre_hooks]
        self._empty = [place for place in places if not place]
        self._filled = [place.values() for place in places if place]  # views: they follow what becomes of the places
        self._held = self._found()
        self._tensors = [value for value in self._held if isinstance(value, Tensor)]
        self._mark = _state(self._tensors)
        self._attributes = [module.__dict__ for module in model.modules()]
        self._numbers = list(map(len, self._attributes))
        owners: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for own in self._attributes:
            owners.setdefault(tuple(name for name in _OPTIONS if name in own), []).append(own)
        self._readers = [(operator.itemgetter(*names), found) for names, found in owners.items() if names]
        self._options = self._read()

    def _found(self) -> list[Any]:
        return list(chain.from_iterable(self._filled))

    def _read(self) -> list[list[Any]]:
        return [list(map(reader, owners)) for reader, owners in self._readers]

    def unchanged(self) -> bool:
        """Whether the model is as it was; looked at before every use, so it is lookups and comparisons in C alone."""
        # A method replaced on a module is an attribute more.
        if any(self._empty) or list(map(len, self._attributes)) != self._numbers or self._read() != self._options:
            return False
        found = self._found()
        same = len(found) == len(self._held) and all(map(operator.is_, found, self._held))
        return same and _state(self._tensors) == self._mark


# By model and precision; None stands for a model that has no native scorer. Two threads that find nothing both freeze,
# and either result will do.
_kept: WeakKeyDictionary[nn.Module, dict[str, tuple[_Ingredients, Scorer | None]]] = WeakKeyDictionary()


def frozen(model: nn.Module, precision: str) -> Scorer | None:
    """The native scorer of a model on the CPU as it is now, or None if the model has to run itself.

    It has to where :func:`rvae_fast.scorer.freezable` says so (a subclass, custom modules or hooks, parameters that are
    not fp32, a BatchNorm without running statistics, no bf16 products for ``"bf16"``), where its parameters are
    inference tensors, whose changes nobody counts, where a hook waits for every module of the process, and where
    another backend than the native one is in force.

    Parameters
    ----------
    model : nn.Module
    precision : {"auto", "fp32", "bf16"}
        ``"auto"`` is fp32.
    """
    if not isinstance(model, Autoencoder) or _backend.choose("score", "cpu", IMPLEMENTED) != "native":
        return None
    if watched() or (precision == "bf16" and not HAS_BF16_PRODUCTS):
        return None
    precision = "bf16" if precision == "bf16" else "fp32"
    by_precision = _kept.setdefault(model, {})
    kept = by_precision.get(precision)
    if kept is not None and kept[0].unchanged():
        return kept[1]
    if any(t.is_inference() for t in (*model.parameters(), *model.buffers())):
        return None
    ingredients = _Ingredients(model)
    scorer = freeze(model, precision) if freezable(model, precision) else None
    by_precision[precision] = (ingredients, scorer)
    return scorer
