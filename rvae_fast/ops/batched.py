"""Gradients of many outputs at once: what comes in then are batches under a vmap, whose memory no kernel can read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_BATCHED: Any = torch._C._parse_dispatch_key("Batched")


def is_batched(tensor: Tensor | None) -> bool:
    """Whether it is a batch under autograd's own vmap (``is_grads_batched``) or torch.func's."""
    if tensor is None or torch.compiler.is_compiling():
        return False
    keys = torch._C._dispatch_keys(tensor)
    return bool(keys.has(_BATCHED) or keys.has(torch._C.DispatchKey.FuncTorchBatched))
