"""The four networks that the model benchmarks run, and the matrix products that are their floor.

=========  ========  =================================  =====
name       inputs    encoder (the decoder mirrors it)   batch
=========  ========  =================================  =====
article    784       10 layers                            256
table      40        32 units of width 128               4096
deep       256       50 units of width 256               4096
wide       512       16 units of width 512               4096
=========  ========  =================================  =====

Units have two layers. The short form of the benchmarks takes an eighth of the units, the full form all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn

from rvae_fast import RVAE, _backend

BATCH = {"article": 256, "table": 4096, "deep": 4096, "wide": 4096}
_STAGE = {"table": (40, 128, 32), "deep": (256, 256, 50), "wide": (512, 512, 16)}


def blocks(name: str, full: bool) -> int:
    """Residual units a side of a workload of constant width."""
    units = _STAGE[name][2]
    return units if full else max(1, units // 8)


def model(name: str, full: bool) -> RVAE:
    """The workload's network, its norms and weights as training leaves them: none the identity, none zero."""
    torch.manual_seed(0)
    if name == "article":
        net = RVAE(784, 20, n_layers=10)
    else:
        features, width, _ = _STAGE[name]
        net = RVAE(features, 20, widths=[width], blocks=[blocks(name, full)])
    with torch.no_grad():
        for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
            tensor.add_(0.05 * (torch.rand_like(tensor) - 0.5))
    return net


def rows(name: str, device: torch.device, batch: int | None = None) -> list[Tensor]:
    """Batches, more of them than the caches hold."""
    features = 784 if name == "article" else _STAGE[name][0]
    count = batch or BATCH[name]

    def make(seed: int) -> Tensor:
        return torch.randn(count, features, generator=torch.Generator().manual_seed(seed)).to(device)

    return harness.rotation(make, count * features * 4, device)


def products(net: nn.Module, batch: int, dtype: torch.dtype, training: bool) -> Callable[[Any], None]:
    """The network's matrix products alone, by ``torch.mm``: one a layer, and two more for the gradients in training."""
    weights = [m.weight.detach().to(dtype) for m in net.modules() if isinstance(m, nn.Linear)]
    inputs = {w.shape[1]: torch.randn(batch, w.shape[1]).to(dtype) for w in weights}
    grads = {w.shape[0]: torch.randn(batch, w.shape[0]).to(dtype) for w in weights}

    def run(_: Any) -> None:
        for w in weights:
            torch.mm(inputs[w.shape[1]], w.t())
            if training:
                torch.mm(grads[w.shape[0]], w)
                torch.mm(grads[w.shape[0]].t(), inputs[w.shape[1]])

    return run


def on(backend: str, run: Callable[[Any], Any], bf16: bool = False) -> Callable[[Any], Any]:
    """``run`` under a backend, and under bf16 autocast where asked for."""

    def wrapped(inputs: Any) -> Any:
        with _backend.backend(backend), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return run(inputs)

    return wrapped
