"""``autoencoder_gradients``: the loss of an autoencoder on a batch and the gradient of every parameter, in one call.

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

# Encoder and decoder are parts, the first ``encoder_parts`` the encoder's: residual stacks of units of so many layers,
# and plain stacks, which have 0 (a transition is one of a single layer). Of each part come the six lists of
# ``plain_stack``, cut from ``tensors`` by ``counts``. ``gradient`` has a place for every parameter, part by part and
# list by list, each part padded to a multiple of :data:`ALIGNMENT`. The result is loss, error and divergence, sums over
# the batch divided by ``n``.
library.define(
    "autoencoder_gradients(Tensor x, Tensor[] tensors, int[] counts, float[] momentum, int[] layers_per_unit, "
    "int encoder_parts, str order, str activation, float negative_slope, float eps, ScalarType dtype, str likelihood, "
    "bool variational, float low, float high, float kld_weight, int n, bool add, Tensor(a!) gradient) -> Tensor"
)
library.define("gradient_norm(Tensor[] tensors) -> Tensor")
# A step of Adam (AdamW if decoupled) on gradients divided by max(1, norm / max_norm); none if blocked is not zero.
library.define(
    "clipped_adam(Tensor(a!)[] parameters, Tensor[] gradients, Tensor(b!)[] means, Tensor(c!)[] squares, "
    "Tensor(d!) steps, Tensor learning_rate, float beta1, float beta2, float eps, float weight_decay, bool decoupled, "
    "Tensor norm, float? max_norm, Tensor? blocked) -> ()"
)

#: Values of a cache line.
ALIGNMENT = 16

#: Whether this build has the kernels.
IS_AVAILABLE: bool = torch._C._dispatch_has_kernel_for_dispatch_key("rvae_fast::gradient_norm", "CPU")

autoencoder_gradients = torch.ops.rvae_fast.autoencoder_gradients.default
clipped_adam = torch.ops.rvae_fast.clipped_adam.default
_norm = torch.ops.rvae_fast.gradient_norm.default


def gradient_norm(tensors: list[Tensor]) -> Tensor:
    """L2 norm of all elements of fp32 tensors on the CPU, a scalar tensor; the same bits whatever the threads."""
    norm: Tensor = _norm(tensors)
    return norm
