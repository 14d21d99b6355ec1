"""The activations a residual unit can have, by name: one table for modules, functions and kernels."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F

#: Names accepted wherever an ``activation`` argument is.
ACTIVATIONS = ("identity", "relu", "leaky_relu", "elu", "silu", "gelu", "tanh")

_FUNCTIONS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "identity": lambda x, slope: x,
    "relu": lambda x, slope: F.relu(x),
    "leaky_relu": F.leaky_relu,
    "elu": lambda x, slope: F.elu(x),
    "silu": lambda x, slope: F.silu(x),
    "gelu": lambda x, slope: F.gelu(x),  # the exact one, by erf
    "tanh": lambda x, slope: x.tanh(),
}


def check_activation(activation: str, negative_slope: float) -> None:
    """Raise an error that names ``activation`` or ``negative_slope`` when it is not a usable value."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    is_number = isinstance(negative_slope, (int, float)) and not isinstance(negative_slope, bool)
    if not is_number or not math.isfinite(negative_slope):
        raise ValueError(f"negative_slope must be a finite number, got {negative_slope!r}")


def activate(x: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    """Apply an activation by name; ``negative_slope`` is LeakyReLU's and unused by the others."""
    return _FUNCTIONS[activation](x, negative_slope)


class Activation(nn.Module):
    """An activation by name as a module, for plain layers."""

    def __init__(self, activation: str = "leaky_relu", negative_slope: float = 0.01) -> None:
        super().__init__()
        check_activation(activation, negative_slope)
        self.activation = activation
        self.negative_slope = float(negative_slope)

    def forward(self, input: Tensor) -> Tensor:
        return activate(input, self.activation, self.negative_slope)

    def extra_repr(self) -> str:
        return self.activation + (f", negative_slope={self.negative_slope}" if self.activation == "leaky_relu" else "")
