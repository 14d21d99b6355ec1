"""``autoencoder_gradients``: the loss of a plain AE or VAE on a batch and the gradient of every parameter, in one call.

It does what the model's ``loss_terms`` and autograd do, on the same kernels and in the same order, so the numbers are
the same; what it leaves out is the graph and the Python between some thirty small ops, which take longer than the
kernels of a network of a few small layers. The kernel is ``csrc/cpu/autoencoder_gradients.cpp``; GPUs have none, where
steps run as CUDA graphs. Beside it, for the rest of a step: ``gradient_norm``, the norm of a list of gradients in
one pass, and ``clipped_adam``, which torch's fused kernel does in a parallel region a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rvae_fast.ops.residual_stack_op import library

# Tensors of a stack come as one list, cut into the six of ``plain_stack`` by ``counts``. ``gradient`` has a place for
# every parameter: those of the encoder, list by list, then the decoder's. The result is loss, error and divergence,
# sums over the batch divided by ``n``.
library.define(
    "autoencoder_gradients(Tensor x, Tensor[] encoder, int[] encoder_counts, float[] encoder_momentum, "
    "Tensor[] decoder, int[] decoder_counts, float[] decoder_momentum, str activation, float negative_slope, "
    "float eps, ScalarType dtype, str likelihood, bool variational, float low, float high, float kld_weight, int n, "
    "bool add, Tensor(a!) gradient) -> Tensor"
)
library.define("gradient_norm(Tensor[] tensors) -> Tensor")
# A step of Adam (AdamW if decoupled) on gradients divided by max(1, norm / max_norm); none if blocked is not zero.
library.define(
    "clipped_adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, "
    "Tensor(d!) steps, Tensor learning_rate, float beta1, float beta2, float eps, float weight_decay, bool decoupled, "
    "Tensor norm, float? max_norm, Tensor? blocked) -> ()"
)

#: Whether this build has the kernels.
IS_AVAILABLE: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::gradient_norm", "CPU")

autoencoder_gradients = torch.ops.rvae_fast.autoencoder_gradients.default
clipped_adam = torch.ops.rvae_fast.clipped_adam.default
_norm = torch.ops.rvae_fast.gradient_norm.default


def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all elements of fp32 tensors on the CPU, a scalar tensor; the same bits whatever the threads."""
    norm: Tensor = _norm(tensors)
    return norm
