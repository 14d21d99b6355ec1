"""One optimiser step: global gradient norm, clipping and Adam, by torch's fused kernels, skippable on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rvae_fast._training_config import TrainingConfig
from rvae_fast.ops.autoencoder_gradients import IS_AVAILABLE as HAS_KERNELS
from rvae_fast.ops.autoencoder_gradients import clipped_adam, gradient_norm

#: Devices on which torch has fused Adam kernels that honour ``grad_scale`` and ``found_inf``.
_FUSED = ("cpu", "cuda")


class Optimizer:
    """Adam (Kingma and Ba 2015), AdamW (Loshchilov and Hutter 2019) or RAdam (Liu et al. 2020), gradients clipped.

    It calls the kernels of ``torch.optim``'s ``fused=True`` itself, for three reasons. They divide every gradient by a
    scalar as they read it (there for loss scaling): that scalar is max(1, norm / max_grad_norm) here, so clipping costs
    no pass of its own. Their ``found_inf`` makes a step do nothing, decided on the device. And making a ``torch.optim``
    optimiser imports torch's compiler, some 800 modules, which takes seconds. On devices without these kernels, and for
    RAdam, which has none, the step is ``torch.optim``'s functional one. fp32 parameters on the CPU, if all have a
    gradient, are stepped by the package's own kernel, which does the same for all tensors at once.

    Parameters
    ----------
    parameters : sequence of nn.Parameter
        All on one device.
    config : TrainingConfig
    """

    def __init__(self, parameters: Sequence[nn.Parameter], config: TrainingConfig) -> None:
        self.parameters = list(parameters)
        self.config = config
        device = self.parameters[0].device
        self._exp_avg = [torch.zeros_like(p) for p in self.parameters]
        self._exp_avg_sq = [torch.zeros_like(p) for p in self.parameters]
        # One tensor, so that counting is one kernel; the fused kernels read each parameter's count through its view.
        self._steps = torch.zeros(len(self.parameters), dtype=torch.float32, device=device)
        self._step = list(self._steps.unbind())
        self.fused = device.type in _FUSED and config.optimizer != "radam"
        self._kernel = torch._fused_adamw_ if config.optimizer == "adamw" else torch._fused_adam_
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i, parameter in enumerate(self.parameters):
            by_dtype.setdefault(parameter.dtype, []).append(i)
        self._groups = list(by_dtype.values())
        # The kernels' divisor is fp32: enough for fp32 and below, too coarse and too short of range for fp64.
        self._fold = torch.float64 not in by_dtype
        #: Whether norm and step run as the package's own kernels.
        self._native = HAS_KERNELS and device.type == "cpu" and list(by_dtype) == [torch.float32]
        self._rate = torch.zeros((), dtype=torch.float64, device="cpu")

    def norm(self) -> Tensor:
        """Global L2 norm of the gradients, a scalar on their device."""
        gradients = self._gradients()
        if self._is_native(gradients):
            return gradient_norm(gradients)
        norms = torch._foreach_norm(gradients)
        if len(self._groups) > 1:
            norms = tuple(norm.to(self.parameters[0].dtype) for norm in norms)
        return torch.linalg.vector_norm(torch.stack(norms))

    def _gradients(self) -> list[Tensor]:
        """Those that are there."""
        return [gradient for p in self.parameters if (gradient := p.grad) is not None]

    def _is_native(self, tensors: Sequence[Tensor]) -> bool:
        return self._native and all(map(Tensor.is_contiguous, tensors))

    @torch.no_grad()
    def step(self, learning_rate: float | Tensor, norm: Tensor, blocked: Tensor | None = None) -> None:
        """Update the parameters that have a gradient, clipped to ``max_grad_norm``.

        Parameters
        ----------
        learning_rate : float or Tensor [] float32
            A tensor on the parameters' device is read there, so that a captured step follows it.
        norm : Tensor []
            From :meth:`norm`.
        blocked : Tensor [] float32, optional
            1.0 makes the step do nothing, without the host knowing.
        """
        config = self.config
        gradients = self._gradients()
        whole = len(gradients) == len(self.parameters)
        if self.fused and whole and self._is_native(gradients) and self._is_native(self.parameters):
            rate = learning_rate if isinstance(learning_rate, Tensor) else self._rate.fill_(learning_rate)
            clipped_adam(
                self.parameters, gradients, self._exp_avg, self._exp_avg_sq, self._steps, rate, *config.betas,
                config.eps, config.weight_decay, config.optimizer == "adamw", norm, config.max_grad_norm, blocked,
            )  # fmt: skip
            return
        laid_out = self._laid_out(gradients) if self.fused else None
        fused = laid_out is not None
        gradients = laid_out or gradients
        scale = None
        if self.config.max_grad_norm is not None:
            # 1e-6 as torch.nn.utils.clip_grad_norm_ has it.
            scale = torch.clamp((norm + 1e-6) / self.config.max_grad_norm, min=1.0)
        if not (fused and self._fold) and scale is not None:
            torch._foreach_div_(gradients, scale)
            scale = None
        if not fused:
            if blocked is None or not bool(blocked):
                self._unfused(float(learning_rate))
            return
        taken = 1.0 if blocked is None else 1.0 - blocked
        if whole:
            self._steps += taken
        elif present := [step for step, p in zip(self._step, self.parameters, strict=True) if p.grad is not None]:
            # Not by a mask: to make one is a copy from the host, which a captured step must not have.
            torch._foreach_add_(present, taken)
        for group in self._groups:
            group = [i for i in group if self.parameters[i].grad is not None] if not whole else group
            if group:
                self._kernel(
                    [self.parameters[i] for i in group],
                    [self.parameters[i].grad for i in group],  # type: ignore[misc]
                    [self._exp_avg[i] for i in group],
                    [self._exp_avg_sq[i] for i in group],
                    [],
                    [self._step[i] for i in group],
                    lr=learning_rate,  # type: ignore[arg-type]
                    beta1=config.betas[0],
                    beta2=config.betas[1],
                    weight_decay=config.weight_decay,
                    eps=config.eps,
                    amsgrad=False,
                    maximize=False,
                    grad_scale=None if scale is None else scale.float(),
                    found_inf=blocked,
                )

    def _laid_out(self, gradients: list[Tensor]) -> list[Tensor] | None:
        """The gradients laid out as their parameters: torch's fused kernels pair values by their places in memory.

        None of parameters with gaps or overlaps in memory, which these kernels would leave.
        """
        if all(map(Tensor.is_contiguous, self.parameters)) and all(map(Tensor.is_contiguous, gradients)):
            return gradients  # nearly always, and known in a quarter of the time
        if any(p.stride() != state.stride() for p, state in zip(self.parameters, self._exp_avg, strict=True)):
            return None  # ``zeros_like`` keeps the strides where all is dense
        for p in self.parameters:
            if p.grad is not None and p.grad.stride() != p.stride():
                p.grad = torch.empty_like(p).copy_(p.grad)
        return self._gradients()

    def _unfused(self, learning_rate: float) -> None:
        from torch.optim.adam import adam
        from torch.optim.radam import radam

        chosen = [i for i, p in enumerate(self.parameters) if p.grad is not None]
        config = self.config
        arguments: dict[str, Any] = {
            "params": [self.parameters[i] for i in chosen],
            "grads": [self.parameters[i].grad for i in chosen],
            "exp_avgs": [self._exp_avg[i] for i in chosen],
            "exp_avg_sqs": [self._exp_avg_sq[i] for i in chosen],
            "state_steps": [self._step[i] for i in chosen],
            "beta1": config.betas[0],
            "beta2": config.betas[1],
            "lr": learning_rate,
            "weight_decay": config.weight_decay,
            "eps": config.eps,
        }
        if config.optimizer == "radam":
            radam(**arguments, foreach=True)
            return
        decoupled = config.optimizer == "adamw"
        adam(
            **arguments, max_exp_avg_sqs=[], foreach=False, amsgrad=False, maximize=False,
            decoupled_weight_decay=decoupled,
        )  # fmt: skip

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for parameter in self.parameters:
            parameter.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """The state, by position of the parameter: ``{"steps": ..., "exp_avg.3": ...}``."""
        state = {"steps": self._steps}
        for i in range(len(self.parameters)):
            state[f"exp_avg.{i}"], state[f"exp_avg_sq.{i}"] = self._exp_avg[i], self._exp_avg_sq[i]
        return state

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take the state that :meth:`tensors` gave."""
        for name, own in self.tensors().items():
            own.copy_(tensors[name])
