"""``reparameterise``: a sample of a VAE's posterior and its KL divergence, in one pass over ``mu`` and ``logvar``.

===============  ====================  ==============================================================
tensor           shape                 stored between forward and backward
===============  ====================  ==============================================================
mu, logvar       [batch, latent]       saved as they are
seed             [1] int64             saved: the random numbers are computed from it again
z, kld           [batch, latent], [batch]  not saved
===============  ====================  ==============================================================

Random numbers. The op is a pure function of ``seed``: its kernels count (Philox), so the backward pass makes the same
numbers again. The seed is one int64 drawn on the device from torch's own generator, hence ``torch.manual_seed`` decides
it, and so do ``fork_rng`` and a checkpoint of the generator's state. Torch's generators are made for CUDA graphs: a
captured draw reads seed and offset from device memory that each replay fills anew. So every replay of a graph samples
anew, and reseeding the generator before it gives the numbers that an eager step would have drawn. (Taking seed and
offset from the generator on the host instead would save the draw's small kernel, and freeze the numbers into the
graph.)

On devices without the Triton kernel, z is sampled with ``torch.randn``; the numbers differ from the kernel's then.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rvae_fast import _backend, reference
from rvae_fast.ops.batched import is_batched

_IMPLEMENTED = {"triton": _backend.triton_devices()}
_COVERED = (torch.float32, torch.bfloat16, torch.float16)

# --- schema, fake, kernels ---

_library = torch.library.Library("rvae_fast", "FRAGMENT")
_library.define("reparameterise(Tensor mu, Tensor logvar, Tensor seed) -> (Tensor z, Tensor kld)")
_library.define(
    "reparameterise_backward(Tensor? grad_z, Tensor? grad_kld, Tensor mu, Tensor logvar, Tensor seed) "
    "-> (Tensor mu, Tensor logvar)"
)
_library.impl("reparameterise", reference.reparameterise, "CompositeExplicitAutograd")
_library.impl("reparameterise_backward", reference.reparameterise_backward, "CompositeExplicitAutograd")


def _triton_forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    from rvae_fast.kernels import reparameterise as kernels

    with _backend.device_guard(mu):
        return kernels.forward(mu, logvar, seed)


def _triton_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    from rvae_fast.kernels import reparameterise as kernels

    with _backend.device_guard(inputs[2]):
        return kernels.backward(*inputs)


def _triton_covers(mu: Tensor, logvar: Tensor) -> bool:
    return mu.dtype in _COVERED and logvar.dtype in _COVERED


def _cuda_forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    triton = _backend.is_available("triton") and _triton_covers(mu, logvar)
    return (_triton_forward if triton else reference.reparameterise)(mu, logvar, seed)


def _cuda_backward(*inputs: Any) -> tuple[Tensor, Tensor]:
    triton = _backend.is_available("triton") and _triton_covers(inputs[2], inputs[3])
    return (_triton_backward if triton else reference.reparameterise_backward)(*inputs)


_library.impl("reparameterise", _cuda_forward, "CUDA")
_library.impl("reparameterise_backward", _cuda_backward, "CUDA")

_forward_op = torch.ops.rvae_fast.reparameterise.default
_backward_op = torch.ops.rvae_fast.reparameterise_backward.default


@torch.library.register_fake("rvae_fast::reparameterise", lib=_library)
def _fake_forward(mu: Tensor, logvar: Tensor, seed: Tensor) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), mu.new_empty(mu.shape[:1], dtype=reference.accumulation_dtype(mu, logvar))


@torch.library.register_fake("rvae_fast::reparameterise_backward", lib=_library)
def _fake_backward(
    grad_z: Tensor | None, grad_kld: Tensor | None, mu: Tensor, logvar: Tensor, seed: Tensor
) -> tuple[Tensor, Tensor]:
    return mu.new_empty(mu.shape), logvar.new_empty(logvar.shape)


# --- autograd ---


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Any) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_z: Tensor | None, grad_kld: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_z is None and grad_kld is None:
        return None, None, None
    run: Any = getattr(ctx, "run_backward", _backward_op)
    # create_graph=True: the reference's can be differentiated again; is_grads_batched: it takes many at once.
    if torch.is_grad_enabled() or is_batched(grad_z) or is_batched(grad_kld):
        run = reference.reparameterise_backward
    grad_mu, grad_logvar = run(grad_z, grad_kld, *ctx.saved_tensors)
    return grad_mu if ctx.needs_input_grad[0] else None, grad_logvar if ctx.needs_input_grad[1] else None, None


torch.library.register_autograd("rvae_fast::reparameterise", _backward, setup_context=_save, lib=_library)


class _Reparameterise(torch.autograd.Function):
    """For eager calls, past the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        output = _triton_forward(*inputs)  # type: ignore[call-arg]
        _save(ctx, inputs, output)  # type: ignore[arg-type]
        ctx.run_backward = _triton_backward
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return _backward(ctx, *grads)  # type: ignore[call-arg]


# --- the public functions ---


def is_fused(mu: Tensor, logvar: Tensor) -> bool:
    """Whether :func:`reparameterise` would run as one kernel on these tensors, under the backend now chosen.

    Where it would not, a caller may have a better way to the divergence (``reconstruction_kld`` takes it along), so
    this asks, and never fails: a backend that does not have the op is simply not fused.
    """
    name = _backend.current_backend()
    if name not in ("auto", "triton") or not _triton_covers(mu, logvar):
        return False
    if mu.device.type == "cpu" and (name == "auto" or torch.compiler.is_compiling()):
        return False
    if mu.device.type not in _IMPLEMENTED["triton"] or not _backend.is_available("triton"):
        return False
    return torch.compiler.is_compiling() or not (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def reparameterise(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    r"""Sample a diagonal Gaussian posterior, and its KL divergence from the standard normal.

    .. math::
        z = \mu + e^{v / 2} \epsilon, \quad \epsilon \sim \mathcal N(0, 1), \qquad
        \mathrm{kld}_b = \tfrac12 \sum_l \left(\mu_{bl}^2 + e^{v_{bl}} - 1 - v_{bl}\right)

    with v = ``logvar``: the reparameterisation trick and equation 10 of Kingma and Welling (2014).

    Parameters
    ----------
    mu, logvar : Tensor [batch, latent]
        Floating point.

    Returns
    -------
    z : Tensor [batch, latent]
        In the dtype of ``mu``. Drawn from torch's global generator of the device.
    kld : Tensor [batch]
        fp32, or fp64 if an argument is fp64.

    Raises
    ------
    TypeError, ValueError
        Not floating-point tensors, or shapes and devices that do not fit.
    """
    for name, tensor in (("mu", mu), ("logvar", logvar)):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise TypeError(f"reparameterise: {name} must be a floating-point torch.Tensor, got {got}")
    if mu.dim() != 2 or mu.shape[1] == 0:
        raise ValueError(f"reparameterise: mu must have shape [batch, latent] with latent >= 1, got {list(mu.shape)}")
    if logvar.shape != mu.shape or logvar.device != mu.device:
        raise ValueError(
            f"reparameterise: logvar must have the shape and device of mu, {list(mu.shape)} on {mu.device}, "
            f"got {list(logvar.shape)} on {logvar.device}"
        )
    if not is_fused(mu, logvar):
        z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
        return z, reference.kld(mu, logvar)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=mu.device)
    if torch.compiler.is_compiling():
        return _forward_op(mu, logvar, seed)
    if torch.is_grad_enabled() and (mu.requires_grad or logvar.requires_grad):
        return _Reparameterise.apply(mu, logvar, seed)
    return _triton_forward(mu, logvar, seed)
