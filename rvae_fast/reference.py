"""The mathematics of every op in plain PyTorch: the oracle of the tests and the path that always works.

Nothing here is fast on purpose; what is, must agree with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.nn import functional as F

from rvae_fast._activations import activate


def residual_unit(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    norm_weight: Sequence[Tensor | None],
    norm_bias: Sequence[Tensor | None],
    running_mean: Sequence[Tensor | None],
    running_var: Sequence[Tensor | None],
    *,
    order: str,
    activation: str,
    negative_slope: float,
    eps: float,
    momentum: Sequence[float],
    batch_stats: Sequence[bool],
    dropout: float = 0.0,
) -> Tensor:
    """One residual unit of ``K = len(weight)`` layers, in plain PyTorch.

    ``order="pre"`` (He et al. 2016b): ``x + F(x)``, F = (BatchNorm -> activation -> Linear) K times.
    ``order="post"`` (He et al. 2016a): ``activation(x + F(x))``, F = Linear -> BatchNorm, with the activation between layers.

    Parameters
    ----------
    x : Tensor [batch, W]
    weight : K tensors [W, W], as ``nn.Linear.weight``
    bias, norm_weight, norm_bias : K tensors [W] or None
    running_mean, running_var : K tensors [W] or None
        With ``batch_stats[i]`` they are updated in place where given; without, they normalise.
    momentum : K floats
        Weight of the batch in each running average (for a cumulative average, 1 / batches seen).
    batch_stats : K bools
        Normalise layer i by this batch's mean and biased variance rather than by the running ones.
    dropout : float
        Probability of zeroing an element of the branch; pass 0 outside training.

    Returns
    -------
    Tensor [batch, W]
    """

    def norm(h: Tensor, i: int) -> Tensor:
        return F.batch_norm(
            h, running_mean[i], running_var[i], norm_weight[i], norm_bias[i], batch_stats[i], momentum[i], eps
        )

    h = x
    last = len(weight) - 1
    for i in range(len(weight)):
        if order == "pre":
            h = F.linear(activate(norm(h, i), activation, negative_slope), weight[i], bias[i])
        else:
            h = norm(F.linear(h, weight[i], bias[i]), i)
            if i < last:
                h = activate(h, activation, negative_slope)
    if dropout > 0:
        h = F.dropout(h, dropout, training=True)
    h = x + h
    return h if order == "pre" else activate(h, activation, negative_slope)
