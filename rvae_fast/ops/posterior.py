"""``posterior``: from an encoder's output to mean, log variance and sample of the posterior, one autograd node.

=================  ================  ==================================================================
tensor             shape             stored between forward and backward
=================  ================  ==================================================================
code               [batch, 2 L]      saved as it is; fp32 or bf16. The means, then the raw log variances
noise              [batch, L] fp32   saved: standard normal numbers, drawn by the caller
mu, logvar, z      [batch, L] fp32   not saved
slope, spread      [batch, L] fp32   saved: d logvar / d raw, and d z / d logvar
=================  ================  ==================================================================

For eager training on the CPU, where the dozen small ops that it replaces, and as many backward, take longer than the
layers beside them in a small network. The kernel is ``csrc/cpu/posterior.cpp``, which also serves
:mod:`.autoencoder_gradients`. Everything else (graphs, transforms, GPUs) goes by :func:`rvae_fast.reference.posterior`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rvae_fast import _backend
from rvae_fast.ops.residual_stack import transformed
from rvae_fast.ops.residual_stack_op import library

# Without derivatives: slope and spread, empty unless kept, are for the backward.
library.define(
    "posterior(Tensor code, Tensor noise, float low, float high, bool keep) "
    "-> (Tensor mu, Tensor logvar, Tensor z, Tensor slope, Tensor spread)"
)
library.define(
    "posterior_backward(Tensor? of_mu, Tensor? of_logvar, Tensor? of_z, Tensor slope, Tensor spread, ScalarType dtype) "
    "-> Tensor"
)
# Both, with an autograd node in C++ (csrc/cpu/posterior_autograd.cpp): for eager calls.
library.define(
    "posterior_train(Tensor code, Tensor noise, float low, float high) -> (Tensor mu, Tensor logvar, Tensor z)"
)

_HAS_KERNELS: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::posterior_train", "CPU")
_op = torch.ops.rvae_fast.posterior_train.default


@torch.library.register_fake("rvae_fast::posterior", lib=library)
def _fake_forward(code: Tensor, noise: Tensor, low: float, high: float, keep: bool) -> tuple[Tensor, ...]:
    kept = noise.shape[0] if keep else 0
    return (
        *(noise.new_empty(noise.shape) for _ in range(3)),
        *(noise.new_empty((kept, noise.shape[1])) for _ in range(2)),
    )


@torch.library.register_fake("rvae_fast::posterior_backward", lib=library)
def _fake_backward(
    of_mu: Tensor | None,
    of_logvar: Tensor | None,
    of_z: Tensor | None,
    slope: Tensor,
    spread: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    return slope.new_empty((slope.shape[0], 2 * slope.shape[1]), dtype=dtype)


def covers(code: Tensor) -> bool:
    """Whether :func:`sample_posterior` can take this ``code``, under the backend in force. It asks, and never fails."""
    if not _HAS_KERNELS or torch.compiler.is_compiling() or code.device.type != "cpu":
        return False
    if code.dtype not in (torch.float32, torch.bfloat16) or _backend.current_backend() not in ("auto", "native"):
        return False
    return code.dim() == 2 and type(code) in (Tensor, torch.nn.Parameter) and not transformed()


def sample_posterior(code: Tensor, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, log variance in (``low``, ``high``) and a sample of the posterior, of a ``code`` that is covered.

    Parameters
    ----------
    code : Tensor [batch, 2 latent]
        fp32 or bf16, on the CPU: the means, then the raw log variances.
    low, high : float
        See ``logvar_range`` of :class:`rvae_fast.models.Autoencoder`.

    Returns
    -------
    mu, logvar, z : Tensor [batch, latent]
        fp32. The sample is drawn from torch's global generator, and the same that ``torch.randn_like(mu)`` gives.
    """
    # Not by torch's defaults, which somebody may have set to another dtype or device.
    noise = torch.randn(code.shape[0], code.shape[1] // 2, dtype=torch.float32, device=code.device)
    return _op(code, noise, low, high)
