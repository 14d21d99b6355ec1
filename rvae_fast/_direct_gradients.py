"""Gradients of a plain model on the CPU by one native call, for steps that would be mostly overhead."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast import _backend
from rvae_fast.models import AE, VAE, Autoencoder
from rvae_fast.nn import PlainCall, PlainStack
from rvae_fast.ops.autoencoder_gradients import IS_AVAILABLE, autoencoder_gradients
from rvae_fast.ops.residual_stack import can_skip_dispatch


class DirectGradients:
    """Fills the ``grad`` of a model's parameters as ``loss.backward()`` would, where it can; else says so.

    It can for an :class:`~rvae_fast.AE` or :class:`~rvae_fast.VAE` on the CPU whose stacks the native kernels cover, in
    training mode, with nothing frozen or shared, and without hooks on modules or parameters, each of which autograd
    alone knows how to serve. That is looked at when :meth:`look` is called, once an epoch: within one nobody else has a
    say.

    Parameters
    ----------
    model : nn.Module
    parameters : sequence of nn.Parameter
        Those that the optimiser updates.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self._model, self._parameters = model, list(parameters)
        self._ours = IS_AVAILABLE and type(model) in (AE, VAE)
        self._places: list[Tensor] = []  # the parameters, in the kernel's order
        self._flat = torch.empty(0)
        self._views: list[Tensor] = []
        self._before: tuple[Any, ...] | None = None  # the kernel's arguments before and behind those of a batch
        self._behind: tuple[Any, ...] = ()
        self._counts: list[Tensor] = []  # of the batches that the norms have seen

    def look(self, x: Tensor) -> None:
        """See what batches like ``x`` are to go through, as things are now."""
        self._before = None
        calls = self._calls(x) if self._ours else None
        if calls is None or not self._place(*calls):
            return
        model = self._model
        assert isinstance(model, Autoencoder)
        self._before = tuple(
            argument
            for call in calls
            for argument in ([*chain(*call.lists)], [*map(len, call.lists)], [norm.momentum for norm in call.norms])
        )
        counts = [norm.num_batches_tracked for call in calls for norm in call.norms if norm.track_running_stats]
        self._counts = [count for count in counts if count is not None]
        self._behind = (
            *calls[0].options, calls[0].dtype, model.likelihood, model.is_variational, *model.logvar_range,
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

    def _calls(self, x: Tensor) -> tuple[PlainCall, PlainCall] | None:
        model = self._model
        encoder, decoder = model.encoder, model.decoder
        if type(encoder) is not PlainStack or type(decoder) is not PlainStack:
            return None
        if encoder._forward_hooks or encoder._forward_pre_hooks or decoder._forward_hooks or decoder._forward_pre_hooks:
            return None
        if any(name in model.__dict__ for name in ("loss_terms", "_forward", "_encode")) or not model.training:
            return None
        if x.dtype != torch.float32 or not can_skip_dispatch([x]):
            return None
        if _backend.current_backend() not in ("auto", "native"):
            return None
        first = encoder.as_one_op(x)
        second = None if first is None else decoder.as_one_op(x)
        if first is None or second is None or not (first.batch_stats and second.batch_stats):
            return None
        norms = [*first.norms, *second.norms]
        if first.options != second.options or len({*map(id, norms)}) != len(norms):
            return None
        return None if any(norm.momentum is None for norm in norms) else (first, second)  # that weight is a step's own

    def _place(self, encoder: PlainCall, decoder: PlainCall) -> bool:
        """Give every parameter its place in the flat gradient; False if some have none, or a say of their own."""
        places = [*chain(*encoder.lists[:4], *decoder.lists[:4])]
        if any(p._backward_hooks or not p.requires_grad or p._post_accumulate_grad_hooks for p in places):
            return False
        if len(places) == len(self._places) and all(a is b for a, b in zip(places, self._places, strict=True)):
            return True
        if len(places) != len(self._parameters) or {*map(id, places)} != {*map(id, self._parameters)}:
            return False
        self._places = places
        self._flat = torch.empty(sum(p.numel() for p in places))
        parts = self._flat.split([p.numel() for p in places])
        self._views = [part.view(p.shape) for part, p in zip(parts, places, strict=True)]
        return True
