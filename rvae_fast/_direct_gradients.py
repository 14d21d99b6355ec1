"""Gradients of a model on the CPU by one native call, for steps that would be mostly overhead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook as has_global_hooks

from rvae_fast import _backend
from rvae_fast._parts import Part, parts_of
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.nn import BARE
from rvae_fast.ops.autoencoder_gradients import ALIGNMENT, IS_AVAILABLE, autoencoder_gradients
from rvae_fast.ops.residual_stack import can_skip_dispatch


class DirectGradients:
    """Fills the ``grad`` of a model's parameters as ``loss.backward()`` would, where it can; else says so.

    It can for the four models of :mod:`rvae_fast.models` on the CPU whose stacks the native kernels cover, in training
    mode, without dropout, with nothing frozen or shared, and without hooks on modules or parameters, each of which
    autograd alone knows how to serve. That is looked at when :meth:`look` is called, once an epoch: within one nobody
    else has a say.

    Parameters
    ----------
    model : nn.Module
    parameters : sequence of nn.Parameter
        Those that the optimiser updates.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters)
        self._ours = IS_AVAILABLE and type(model) in MODELS.values()
        self._places: list[Tensor] = []  # the parameters, in the kernel's order
        self._flat = torch.empty(0, device="cpu")
        self._views: list[Tensor] = []
        self._before: tuple[Any, ...] | None = None  # the kernel's arguments before and behind those of a batch
        self._behind: tuple[Any, ...] = ()
        self._counts: list[Tensor] = []  # of the batches that the norms have seen

    def look(self, x: Tensor) -> None:
        """See what batches like ``x`` are to go through, as things are now."""
        self._before = None
        sides = self._parts(x) if self._ours else None
        if sides is None or not self._place(parts := [*chain(*sides)]):
            return
        model = self._model
        assert isinstance(model, Autoencoder)
        norms = [norm for part in parts for norm in part.norms]
        lists = [tensors for part in parts for tensors in part.lists]
        layers = [part.layers for part in parts]
        self._before = ([*chain(*lists)], [*map(len, lists)], [norm.momentum for norm in norms], layers, len(sides[0]))
        counts = [norm.num_batches_tracked for norm in norms if norm.track_running_stats]
        self._counts = [count for count in counts if count is not None]
        order = next((part.order for part in parts if part.order is not None), "pre")
        options = next((part.options for part in parts if part.options is not None), BARE)
        self._behind = (
            order, *options, parts[0].dtype, model.likelihood, model.is_variational, *model.logvar_range,
        )  # fmt: skip

    def __call__(self, x: Tensor, n: int, kld_weight: float, *, add: bool) -> Tensor | None:
        """Loss, error and divergence ``[3]`` of a batch, its share of ``n`` rows; None if autograd has to do it.

        Parameters
        ----------
        x : Tensor [batch, in_features]
        n : int
            Rows that sums are divided by.
        kld_weight : float
        add : bool
            Add to the gradients of the batches before, rather than replace them.
        """
        if self._before is None or x.shape[0] < 2:
            return None
        if self._counts:
            torch._foreach_add_(self._counts, 1)
        terms: Tensor = autoencoder_gradients(x, *self._before, *self._behind, kld_weight, n, add, self._flat)
        for parameter, view in zip(self._places, self._views, strict=True):
            parameter.grad = view
        return terms

    def _parts(self, x: Tensor) -> list[list[Part]] | None:
        """Of the encoder and of the decoder; None unless all are covered, and alike in what the call has but once."""
        model = self._model
        if any(name in model.__dict__ for name in ("loss_terms", "_forward", "_encode")) or not model.training:
            return None
        if x.dtype != torch.float32 or not can_skip_dispatch([x]) or has_global_hooks():
            return None
        if _backend.current_backend() not in ("auto", "native"):
            return None
        sides = []
        assert isinstance(model, Autoencoder)
        for network in (model.encoder, model.decoder):
            parts = parts_of(network, x)
            if not parts:
                return None
            sides.append(parts)
        every = [*chain(*sides)]
        norms = [norm for part in every for norm in part.norms]
        if any(norm.momentum is None for norm in norms) or len({*map(id, norms)}) != len(norms):
            return None  # that weight is a step's own; or a norm that is there twice
        if any(len({getattr(part, name) for part in every} - {None}) > 1 for name in ("order", "options", "dtype")):
            return None
        # A norm with a weight and no bias is the modules' to run.
        return None if any(len(part.lists[2]) != len(part.lists[3]) for part in every) else sides

    def _place(self, parts: Sequence[Part]) -> bool:
        """Give every parameter its place in the flat gradient; False if some have none, or a say of their own."""
        places = [*chain(*(tensors for part in parts for tensors in part.lists[:4]))]
        if any(p._backward_hooks or not p.requires_grad or p._post_accumulate_grad_hooks for p in places):
            return False
        if len(places) == len(self._places) and all(a is b for a, b in zip(places, self._places, strict=True)):
            return True
        if len(places) != len(self._parameters) or {*map(id, places)} != {*map(id, self._parameters)}:
            return False
        self._places = places
        sizes = [[p.numel() for tensors in part.lists[:4] for p in tensors] for part in parts]
        padded = [sum(own) + -sum(own) % ALIGNMENT for own in sizes]
        self._flat = torch.zeros(sum(padded), dtype=torch.float32, device="cpu")
        wholes = self._flat.split(padded)
        pieces = chain(*(whole[: sum(own)].split(own) for whole, own in zip(wholes, sizes, strict=True)))
        self._views = [piece.view(p.shape) for piece, p in zip(pieces, places, strict=True)]
        return True
