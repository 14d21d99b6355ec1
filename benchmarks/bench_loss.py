"""``reconstruction_kld`` against the same written in PyTorch, eager and compiled: forward, and forward with backward.

4096 x 784 with 20 latent variables, MNIST's shape. What must be moved: forward reads x and x_hat; the backward reads
both again and writes the gradient of x_hat. Each is timed with its inputs in the last-level cache, as far as they fit
(so it is in a training step: the decoder has just written x_hat), and in memory (rows streamed past). Eager and
compiled variants are what a user would write; for bf16 the eager ones stay in bf16 until the sum, which is quicker for
them and less accurate than ours. Of torch.compile's settings the quickest counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rvae_fast import _backend
from rvae_fast.ops.reconstruction_kld import reconstruction_kld

BATCH, FEATURES, LATENT = 4096, 784, 20


def kld(mu: Tensor, logvar: Tensor) -> Tensor:
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1, dtype=torch.float32)


def by_mse_loss(x: Tensor, x_hat: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return F.mse_loss(x_hat, x, reduction="none").sum(1, dtype=torch.float32), kld(mu, logvar)


def by_square(x: Tensor, x_hat: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return (x_hat - x).square().sum(1, dtype=torch.float32), kld(mu, logvar)


def by_float_square(x: Tensor, x_hat: Tensor, mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return (x_hat.float() - x.float()).square().sum(1), kld(mu.float(), logvar.float())


def forward(function: Callable[..., Any]) -> Callable[[Any], Any]:
    def run(inputs: tuple[Tensor, ...]) -> Any:
        with torch.no_grad():
            return function(*inputs)

    return run


def forward_backward(function: Callable[..., Any]) -> Callable[[Any], Any]:
    def run(inputs: tuple[Tensor, ...]) -> Any:
        error, kld = function(*inputs)
        return torch.autograd.grad((error + kld).mean(), inputs[1:])

    return run


def compiled(function: Callable[..., Any], mode: str | None) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=False, mode=mode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("passes", ["forward", "forward+backward"])
@pytest.mark.parametrize("where", ["cache", "memory"])
def test_reconstruction_kld(
    where: str,
    passes: str,
    dtype: torch.dtype,
    compare: Callable[..., harness.Comparison],
    device: torch.device,
    full: bool,
) -> None:
    grad = passes != "forward"
    timed = forward_backward if grad else forward

    def make(seed: int) -> tuple[Tensor, ...]:
        torch.manual_seed(seed)
        x = torch.rand(BATCH, FEATURES, device=device, dtype=dtype)
        rest = [torch.randn(BATCH, n, device=device, dtype=dtype) for n in (FEATURES, LATENT, LATENT)]
        return (x, *(t.requires_grad_(grad) for t in rest))

    variants = [harness.Variant("rvae_fast", timed(reconstruction_kld))]
    variants += [harness.Variant(f"eager, {f.__name__[3:]}", timed(f)) for f in (by_mse_loss, by_square)]
    modes = (None, "max-autotune") if full else (None,)
    for mode in modes:
        for f in (by_float_square, by_mse_loss) if full else (by_float_square,):
            name = f"compile{'' if mode is None else ' ' + mode}, {f.__name__[3:]}"
            variants.append(harness.Variant(name, timed(compiled(f, mode))))

    matrix = BATCH * FEATURES * dtype.itemsize
    latents = 2 * BATCH * LATENT * dtype.itemsize
    floor = (2 * matrix + latents) + (3 * matrix + 2 * latents if grad else 0)
    options: dict[str, Any] = {"floor_bytes": floor}
    if where == "memory":
        inputs = harness.rotation(make, 2 * matrix + latents, device)
    else:
        inputs = [make(0)]
        options |= {"untimed": 20, "copied": matrix}
    chosen = _backend.choose("reconstruction_kld", device.type, {"native": ("cpu",)})
    case = {
        "shape": f"{BATCH} x {FEATURES}",
        "dtype": str(dtype).removeprefix("torch."),
        "passes": passes,
        "inputs in": where,
        "backend": chosen,
    }
    compare(case, variants, inputs, **options)
