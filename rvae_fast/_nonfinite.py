"""NaN and infinity while training: the error, which tensor it began in, and buffers that survive it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(RuntimeError):
    """A NaN or infinity in the loss or the gradient.

    The model keeps the weights, and its BatchNorms the statistics, of the last good step.

    Attributes
    ----------
    epoch, step : int
        Where, both from 1; ``step`` counts optimiser steps over the whole run.
    tensor : str
        Where it began: ``"data"``, a parameter, ``"error"``, ``"kld"``, ``"<parameter>.grad"``, or ``"gradient norm"``.
    history : History
        The run up to the last good step.
    """

    def __init__(self, message: str, *, epoch: int = 0, step: int = 0, tensor: str = "", history: Any = None) -> None:
        super().__init__(message)
        self.epoch, self.step, self.tensor, self.history = epoch, step, tensor, history


class BufferGuard:
    """A copy of a model's buffers (running means and variances) as of the last good step.

    A forward pass writes them before anybody can know that it went wrong. One flat copy a dtype, so that keeping them
    costs two kernels, not two a layer.
    """

    def __init__(self, model: nn.Module) -> None:
        by_dtype: dict[torch.dtype, list[Tensor]] = {}
        for buffer in model.buffers():
            if buffer.numel():
                by_dtype.setdefault(buffer.dtype, []).append(buffer)
        self._buffers = list(by_dtype.values())
        # Views are made once: to make them anew took four fifths of the time of a save.
        self._views = [
            [buffer.view(-1) for buffer in buffers] if all(map(Tensor.is_contiguous, buffers)) else None
            for buffers in self._buffers
        ]
        self._flat = [self._joined(i) for i in range(len(self._buffers))]

    def _joined(self, group: int, out: Tensor | None = None) -> Tensor:
        views = self._views[group]
        return torch.cat([b.reshape(-1) for b in self._buffers[group]] if views is None else views, out=out)

    def save(self, blocked: Tensor | None = None) -> None:
        """Take the buffers as they are, unless ``blocked`` (a scalar on their device) is non-zero."""
        for i, flat in enumerate(self._flat):  # in place: a captured step must find it again
            if blocked is None:
                self._joined(i, out=flat)
            else:
                flat.copy_(torch.where(blocked != 0, flat, self._joined(i)))

    def restore(self) -> None:
        """Put the buffers back as they were at the last :meth:`save`."""
        with torch.no_grad():
            for buffers, flat in zip(self._buffers, self._flat, strict=True):
                for buffer, part in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
                    buffer.copy_(part.view_as(buffer))


def non_finite_weight(model: nn.Module) -> str | None:
    """Name of the first parameter or buffer with a NaN or infinity."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            return name
    return None


def find_in_rows(x: Tensor, index: Tensor) -> tuple[int, int, float] | None:
    """Row (by ``index``), column and value of the first non-finite element of a batch."""
    bad = (~torch.isfinite(x)).nonzero()
    if not len(bad):
        return None
    row, column = (int(v) for v in bad[0])
    return int(index[row]), column, float(x[row, column])


class ActivationWatch:
    """While open, notes the first module of a model whose output is not finite."""

    def __init__(self, model: nn.Module) -> None:
        self.first: str | None = None
        self._handles = [
            module.register_forward_hook(self._hook(name)) for name, module in model.named_modules() if name
        ]

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            for tensor in tensors:
                if self.first is None and isinstance(tensor, Tensor) and not bool(torch.isfinite(tensor).all()):
                    self.first = name

        return hook

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
