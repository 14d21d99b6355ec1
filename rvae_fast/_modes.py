"""A model in eval mode for a while, whatever mode it is in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from rvae_fast._threads import ForkLock

#: Of each model that is in eval mode for now: by how many, and the modes of its modules before.
_modes: dict[nn.Module, tuple[int, dict[nn.Module, bool]]] = {}
_lock = ForkLock()


@contextlib.contextmanager
def in_eval(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; on leaving, every module's mode is as it was.

    Of several threads at once the last to leave restores what the first has found.
    """
    if torch.compiler.is_compiling():  # a graph knows of one thread
        modes = _training(model)
        model.eval()
        try:
            yield
        finally:
            _restore(modes)
        return
    with _lock():
        count, modes = _modes.get(model, (0, {}))
        is_shared = count > 0 or any(module.training for module in model.modules())
        if is_shared:
            if count == 0:
                modes = _training(model)
                model.eval()
            _modes[model] = (count + 1, modes)
    try:
        yield
    finally:
        if is_shared:
            with _lock():
                count, modes = _modes.pop(model)
                if count > 1:
                    _modes[model] = (count - 1, modes)
                else:
                    _restore(modes)


def _training(model: nn.Module) -> dict[nn.Module, bool]:
    return {module: module.training for module in model.modules()}


def _restore(modes: dict[nn.Module, bool]) -> None:
    for module, mode in modes.items():
        module.training = mode
