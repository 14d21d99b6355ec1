"""The pictures about training: loss and gradient-norm curves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.report.theme import Picture, Theme, number, plain_log_ticks, render

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

__all__ = ["column", "plot_gradient_norm", "plot_loss"]

_SEGMENTS = 600


def column(epochs: list[Mapping[str, Any]], name: str) -> NDArray[np.float64] | None:
    """Return one column of the history as floats (NaN where absent), or None if no epoch has a finite value in it."""
    values = np.array([np.nan if row.get(name) is None else float(row[name]) for row in epochs], dtype=np.float64)
    return values if np.isfinite(values).any() else None


def _spread(curves: list[NDArray[np.float64]]) -> float:
    """Return the ratio of the largest to the smallest positive value, 0 where a value is not positive."""
    values = np.concatenate([curve[np.isfinite(curve)] for curve in curves])
    return float(values.max() / values.min()) if values.min() > 0 else 0.0


def plot_loss(epochs: list[Mapping[str, Any]], best_epoch: int | None) -> Picture | None:
    """Draw training and validation loss, and the parts of the training loss where there is more than one."""
    train, validation = column(epochs, "train_loss"), column(epochs, "val_loss")
    if train is None:
        return None
    error, kld = column(epochs, "train_error"), column(epochs, "train_kld")
    x = column(epochs, "epoch")
    x = np.arange(1, len(epochs) + 1, dtype=np.float64) if x is None else x
    parts = kld is not None and error is not None and bool(np.nanmax(kld) > 0)
    curves = [train] + ([validation] if validation is not None else [])
    logarithmic = _spread(curves + ([error, kld] if parts and error is not None and kld is not None else [])) > 8
    marker = "o" if len(epochs) <= 3 else None

    def draw(axes: Axes, theme: Theme) -> None:
        from matplotlib.ticker import MaxNLocator

        if parts and error is not None and kld is not None:
            axes.plot(x, error, color=theme.faint, lw=1.2, ls="-.", marker=marker, label="reconstruction error")
            axes.plot(x, kld, color=theme.faint, lw=1.2, ls=":", marker=marker, label="KL divergence")
        axes.plot(x, train, color=theme.normal, lw=2, marker=marker, label="training loss")
        if validation is not None:
            axes.plot(x, validation, color=theme.anomaly, lw=2, ls="--", marker=marker, label="validation loss")
        if best_epoch is not None:
            axes.axvline(best_epoch, color=theme.mark, lw=1, ls=(0, (1, 2)), label=f"best epoch {best_epoch}")
        if logarithmic:
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlabel("epoch")
        axes.set_ylabel("loss per row" + (", log scale" if logarithmic else ""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="best")

    caption = "Per row, summed over features."
    if parts:
        caption += " The KL divergence is drawn without its weight."
    if validation is not None:
        caption += " Training and validation curves that part mean overfitting."
    end = f"from {number(train[0])} to {number(train[-1])}" if np.isfinite(train[[0, -1]]).all() else "recorded"
    checked = "" if validation is None else f", lowest validation loss {number(float(np.nanmin(validation)))}"
    return render(
        draw,
        name="loss",
        title="Loss",
        alt=f"Loss over {len(epochs):,} epochs: the training loss goes {end}{checked}.",
        caption=caption,
    )


def plot_gradient_norm(norms: NDArray[np.float64], max_grad_norm: float | None) -> Picture | None:
    """Draw the gradient's global norm, step by step, with the clipping threshold.

    A long run is drawn as the median and the range of stretches of steps, so that a single spike still shows.
    """
    steps = np.arange(1, norms.size + 1)
    finite = np.isfinite(norms)
    lost = norms.size - int(finite.sum())
    steps, norms = steps[finite], norms[finite]
    if norms.size == 0:
        return None
    clipped = None if max_grad_norm is None else float((norms > max_grad_norm).mean())
    stretches = np.array_split(np.arange(norms.size), _SEGMENTS) if norms.size > 3 * _SEGMENTS else None
    positive = norms[norms > 0]
    logarithmic = positive.size > 0 and float(positive.max() / positive.min()) > 8

    def draw(axes: Axes, theme: Theme) -> None:
        if stretches is None:
            marker = "o" if norms.size <= 3 else None
            axes.plot(steps, norms, color=theme.normal, lw=1.2, marker=marker, label="gradient norm")
        else:
            at = [steps[part].mean() for part in stretches]
            low, high = [norms[part].min() for part in stretches], [norms[part].max() for part in stretches]
            axes.fill_between(at, low, high, color=theme.normal, alpha=0.4, lw=1, label="range of the steps")
            axes.plot(at, [np.median(norms[part]) for part in stretches], color=theme.normal, lw=1.6, label="median")
        if max_grad_norm is not None:
            axes.axhline(
                max_grad_norm, color=theme.anomaly, lw=1.5, ls="--", label=f"clipped above {number(max_grad_norm)}"
            )
        if logarithmic:
            axes.set_yscale("log")
            plain_log_ticks(axes.yaxis, *axes.get_ylim())
        axes.set_xlabel("optimiser step")
        axes.set_ylabel("global gradient norm" + (", log scale" if logarithmic else ""))
        axes.legend(loc="best")

    text = f"Gradient norm over {norms.size:,} steps, from {number(norms.min())} to {number(norms.max())}"
    caption = "The norm before clipping."
    if clipped is not None:
        text += f"; clipped above {number(max_grad_norm)}, which happened in {clipped:.1%} of the steps"
        caption = f"The norm before clipping; {clipped:.1%} of the steps were clipped."
    if lost:
        caption += f" {lost:,} steps with a non-finite norm are left out."
    return render(draw, name="gradient-norm", title="Gradient norm", alt=text + ".", caption=caption)
