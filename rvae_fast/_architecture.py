"""Where the layers of a network sit: stages, widths and residual units from one number, ``n_layers``.

The article counts the linear layers of the encoder (``n_layers``); the decoder mirrors them. A residual network is a
sequence of stages: in a stage the width is constant and residual units of ``K`` layers skip over it; one plain linear
layer (a transition) leads to the next stage and, after the last, to the bottleneck. A plain network is one layer per
count, with widths spaced linearly from the input to the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

# Every transition interrupts the identity path, so depth beyond a few stages goes into more units a stage instead.
MAX_STAGES = 4


@dataclass(frozen=True)
class Stages:
    """Stages of an encoder: ``widths[i]`` features held by ``blocks[i]`` residual units, then a transition."""

    widths: tuple[int, ...]
    blocks: tuple[int, ...]

    def n_layers(self, layers: int, in_features: int) -> int:
        """Linear layers of the encoder, counted as the article counts them (an input projection included)."""
        return sum(self.blocks) * layers + len(self.widths) + (self.widths[0] != in_features)


def positive_int(name: str, value: object, minimum: int = 1) -> int:
    """Return ``value`` as an int of at least ``minimum``, or raise an error that names it."""
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an integer of at least {minimum}, got {value!r}")
    number = int(value.__index__())
    if number < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {number}")
    return number


def one_of(name: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError that names the argument unless ``value`` is one of ``allowed``."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def check_number(name: str, value: object, which: str) -> None:
    """Raise a TypeError that names the argument unless ``value`` is a number; ``which`` says of what range."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number {which}, got {value!r}")


def finite_range(name: str, value: object) -> tuple[float, float]:
    """Return two numbers, the lower first, or raise an error that names the argument."""
    wanted = f"{name} must be two finite numbers, the lower first, got {value!r}"
    try:
        low, high = map(float, value)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise TypeError(wanted) from None
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(wanted)
    return low, high


def check_norm_options(eps: Any, momentum: Any) -> None:
    """Raise an error that names the argument unless ``nn.BatchNorm1d`` can do with these."""
    check_number("eps", eps, "above 0")
    if not eps > 0:
        raise ValueError(f"eps must be above 0, got {eps!r}")
    if momentum is not None:
        check_number("momentum", momentum, "in [0, 1], or None")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum must be None or in [0, 1], got {momentum!r}")


def _positive_ints(name: str, values: object, minimum: int) -> tuple[int, ...]:
    if isinstance(values, str) or not isinstance(values, Sequence) or len(values) == 0:
        raise TypeError(f"{name} must be a non-empty sequence of integers, got {values!r}")
    return tuple(positive_int(f"{name}[{i}]", v, minimum) for i, v in enumerate(values))


def linear_widths(first: int, last: int, steps: int) -> tuple[int, ...]:
    """``steps + 1`` widths spaced linearly from ``first`` to ``last``, both included."""
    return tuple(round(first + (last - first) * i / steps) for i in range(steps + 1))


def residual_stages(
    in_features: int,
    latent_features: int,
    *,
    n_layers: int,
    layers: int,
    widths: Sequence[int] | None = None,
    blocks: int | Sequence[int] | None = None,
    stages: int = MAX_STAGES,
) -> Stages:
    """Plan the encoder of a residual network.

    Without ``widths``, ``n_layers`` is divided into as many stages as it fills, at most ``stages``: each gets one unit
    of ``layers`` linear layers and one transition, the last stage may be a bare transition, and what is left over
    becomes further units, the widest stages first. Ten layers with units of two: four transitions and three units. The
    widths fall linearly from the input's to the bottleneck's, as the plain networks' do.

    Parameters
    ----------
    in_features, latent_features : int
        Width of a row and of the bottleneck.
    n_layers : int
        Linear layers of the encoder; ignored when ``widths`` is given.
    layers : int
        Linear layers of one unit (the article's K).
    widths : sequence of int, optional
        Explicit width of each stage. When the first differs from ``in_features``, a projection is put before it.
    blocks : int or sequence of int, optional
        Units of each stage (with ``widths``: 1 each by default).
    stages : int, default 4
        At most so many, but for layers that fill no unit, each of which is a stage more; ignored when ``widths`` is
        given.

    Raises
    ------
    TypeError, ValueError
        Naming the argument that is not a positive integer, or sequences that differ in length.
    """
    layers = positive_int("layers", layers)
    if widths is not None:
        stage_widths = _positive_ints("widths", widths, 1)
        if blocks is None:
            stage_blocks: tuple[int, ...] = (1,) * len(stage_widths)
        elif hasattr(blocks, "__index__"):
            stage_blocks = (positive_int("blocks", blocks, 0),) * len(stage_widths)
        else:
            stage_blocks = _positive_ints("blocks", blocks, 0)
        if len(stage_blocks) != len(stage_widths):
            raise ValueError(
                f"blocks has {len(stage_blocks)} entries but widths {len(stage_widths)}: expected one per stage"
            )
        return Stages(stage_widths, stage_blocks)
    if blocks is not None:
        raise ValueError("blocks needs widths: without explicit stages the units are placed by n_layers")
    n_layers = positive_int("n_layers", n_layers)
    count, units = _divide(n_layers, layers, positive_int("stages", stages))
    stage_widths = linear_widths(in_features, latent_features, count)[:-1]
    stage_blocks = tuple(units // count + (i < units % count) for i in range(count))
    return Stages(stage_widths, stage_blocks)


def _divide(n_layers: int, layers: int, most: int) -> tuple[int, int]:
    """Split a layer count into (stages, units): every stage but the last has a unit where the count allows it."""
    for stages in range(min(most, n_layers), 0, -1):
        units, rest = divmod(n_layers - stages, layers)
        if rest == 0 and units >= stages - 1:
            return stages, units
    # Too few layers for that (two layers, say): as many units as fit, every other layer a transition.
    units = max(n_layers - 1, 0) // layers
    return n_layers - units * layers, units


def plain_widths(
    in_features: int, latent_features: int, *, n_layers: int, widths: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Widths of a plain encoder from input to bottleneck, both included: linear spacing, or the given hidden widths."""
    if widths is not None:
        return (in_features, *_positive_ints("widths", widths, 1), latent_features)
    return linear_widths(in_features, latent_features, positive_int("n_layers", n_layers))
