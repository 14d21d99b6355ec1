"""What the kernels of the loss, the sampling and the last layer compile to; see :mod:`rvae_fast.kernels.resources`."""

from __future__ import annotations

from typing import Any

from . import decoder_error, feature_weight_gradient, reconstruction_kld, reparameterise
from .resources import Resources, compile_kernel

#: Features of a row: a short one; a long one; and one that 16-byte loads do not divide, in two steps.
FEATURES = (20, 784, 1785)
LATENT = 20


def _compile(kernel: Any, known: dict[str, Any], capability: int, num_warps: int, num_stages: int = 3) -> Resources:
    """``known`` by parameter; the other pointers are fp32, the other sizes i32."""
    arguments = {p.name: known.get(p.name, "*fp32" if p.name.endswith("_ptr") else "i32") for p in kernel.params}
    return compile_kernel(kernel, arguments, capability, num_warps=num_warps, num_stages=num_stages)


def compile_losses(capability: int) -> dict[str, Resources]:
    """Every kernel in every tile it can be launched with on a chip, by a name that says which.

    Bernoulli needs the most registers of the likelihoods; all operands are present, bf16 beside fp32 as under autocast.
    """
    found: dict[str, Resources] = {}
    loss: dict[str, Any] = {"divisor": "fp32", "LIKELIHOOD": "bernoulli"}
    loss |= {"x_hat_ptr": "*bf16", "grad_x_hat_ptr": "*bf16"}
    for features in FEATURES:
        for direction in ("forward", "backward"):
            steps = reconstruction_kld.loss_walk(65536, features, direction)
            kld_m, kld_n = reconstruction_kld.kld_tile(LATENT)
            known: dict[str, Any] = {**loss, **steps.constants, "WHOLE": features <= steps.block_n}
            known |= {"KLD_M": kld_m, "KLD_N": kld_n}
            if features % 8:
                known |= dict.fromkeys(("N", "L", "stride_x", "stride_x_hat", "stride_mu", "stride_logvar"), "i32 odd")
            name = f"_{direction}_kernel"
            kernel = getattr(reconstruction_kld, name)
            found[f"loss{name}, {features}"] = _compile(kernel, known, capability, steps.num_warps)
    block_m, block_l = reparameterise.tiles(LATENT)
    known = {"seed_ptr": "*i64", "L": "i32 odd", "BLOCK_M": block_m, "BLOCK_L": block_l}
    for name in ("_forward_kernel", "_backward_kernel"):
        kernel = getattr(reparameterise, name)
        found[f"sample{name}"] = _compile(kernel, known, capability, reparameterise.NUM_WARPS)
    known = {**loss, "BLOCK_M": feature_weight_gradient.BLOCK_M, "BLOCK_N": feature_weight_gradient.BLOCK_N}
    kernel = feature_weight_gradient._weight_gradient_kernel
    found["loss_weight_gradient"] = _compile(kernel, known, capability, feature_weight_gradient.NUM_WARPS)
    for arithmetic in ("half", "tf32", "ieee"):
        config = decoder_error.config_for(arithmetic, capability)
        operand = "*bf16" if arithmetic == "half" else "*fp32"
        known = {
            "h_ptr": operand, "weight_ptr": operand, "divisor": "fp32", "LIKELIHOOD": "bernoulli",
            "PRECISION": "tf32" if arithmetic == "tf32" else "ieee", "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n, "BLOCK_K": config.block_k, "GROUP_M": config.group_m,
        }  # fmt: skip
        kernel = decoder_error._decoder_error_kernel
        found[f"decoder_error, {arithmetic}"] = _compile(kernel, known, capability, config.num_warps, config.num_stages)
    return found
