"""One optimiser step: global norm, clipping and Adam, by torch's fused kernels, skippable on the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from rvae_fast._training_config import TrainingConfig

#: Devices on which torch has fused Adam kernels that honour ``grad_scale`` and ``found_inf``.
_FUSED = ("cpu", "cuda")


class Optimizer:
    """Adam or AdamW with clipping folded in.

    torch's fused Adam divides every gradient by a device scalar as it reads it (there for loss scaling). That scalar
    is max(1, norm / max_grad_norm) here, so clipping costs no pass of its own; and its ``found_inf`` flag makes the
    step do nothing, decided on the device.

    Parameters
    ----------
    parameters : sequence of nn.Parameter
        All on one device.
    config : TrainingConfig
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = list(parameters)
        self.max_norm = config.max_grad_norm
        device = self.parameters[0].device
        self.fused = device.type in _FUSED
        # The fused kernel's divisor is fp32: enough for fp32 and below, too coarse (and too short of range) for fp64.
        self._fold = self.fused and all(p.dtype != torch.float64 for p in self.parameters)
        cls = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
        self.torch = cls(
            self.parameters, lr=config.learning_rate, betas=config.betas, eps=config.eps,
            weight_decay=config.weight_decay, fused=self.fused or None,
        )  # fmt: skip

    def norm(self) -> Tensor:
        """Global L2 norm of the gradients, a scalar on their device."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads)

    def step(self, learning_rate: float, norm: Tensor, blocked: Tensor | None = None) -> None:
        """Update the parameters by gradients clipped to ``max_grad_norm``.

        Parameters
        ----------
        learning_rate : float
        norm : Tensor []
            From :meth:`norm`.
        blocked : Tensor [] float32, optional
            1.0 makes the step do nothing, without the host knowing.
        """
        for group in self.torch.param_groups:
            group["lr"] = learning_rate
        scale = None
        if self.max_norm is not None:
            # 1e-6 as torch.nn.utils.clip_grad_norm_ has it.
            scale = torch.clamp((norm + 1e-6) / self.max_norm, min=1.0)
        if self.fused:
            fold = scale is not None and self._fold
            self.torch.grad_scale = scale.float() if scale is not None and fold else None  # type: ignore[attr-defined]
            self.torch.found_inf = blocked  # type: ignore[attr-defined]
            scale = None if fold else scale
        elif blocked is not None and bool(blocked):
            return
        if scale is not None:
            torch._foreach_div_([p.grad for p in self.parameters if p.grad is not None], scale)
        self.torch.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        self.torch.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """The state, by position of the parameter: ``{"3.exp_avg": ...}``."""
        return {
            f"{i}.{name}": value
            for i, parameter in enumerate(self.parameters)
            for name, value in self.torch.state.get(parameter, {}).items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state that :meth:`tensors` gave."""
        self.torch.state.clear()
        for key, value in tensors.items():
            position, name = key.split(".", 1)
            parameter = self.parameters[int(position)]
            where = parameter.device if self.fused or name != "step" else torch.device("cpu")
            self.torch.state[parameter][name] = value.to(where, copy=True)
