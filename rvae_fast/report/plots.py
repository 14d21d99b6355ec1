"""The pictures about scores: histogram, ROC curve, precision-recall curve."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from rvae_fast.report.theme import Picture, Theme, number, plain_log_ticks, render

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from rvae_fast.report.metrics import Evaluation

__all__ = ["histogram_edges", "plot_histogram", "plot_precision_recall", "plot_roc"]


def histogram_edges(scores: NDArray[np.float64], threshold: float, bins: int = 70) -> tuple[NDArray[np.float64], bool]:
    """Choose bin edges that show both the bulk and the tail, and the threshold.

    Returns
    -------
    edges : ndarray of shape (bins + 1,)
    logarithmic : bool
        True when the bins grow geometrically: all scores positive, the largest at least 20 times the median.
    """
    if scores.size == 0:
        scores = np.array([threshold])
    low, high = float(scores.min()), float(scores.max())
    # Centre on the values; a sample's median is as good as the whole's for choosing an axis.
    sample = scores if scores.size <= 100_000 else scores[:: scores.size // 100_000]
    median = float(np.median(sample))
    if low > 0 and threshold > 0 and high > 20 * median:
        left, right = min(low, threshold * 0.9), max(high, threshold * 1.1)
        return np.geomspace(left, right, bins + 1), True
    left, right = min(low, threshold), max(high, threshold)
    margin = 0.02 * (right - left) or max(abs(left) * 0.05, 0.5)
    left = left - margin if left < 0 or low == high else max(0.0, left - margin)
    return np.linspace(left, right + margin, bins + 1), False


def plot_histogram(
    scores: NDArray[np.float64], threshold: float, labels: NDArray[np.bool_] | None, *, above: int
) -> Picture:
    """Draw the score distribution, by class where labels exist, with the threshold."""
    rows, infinite = scores.size, int(np.isinf(scores).sum())
    if infinite:
        finite = np.isfinite(scores)
        scores, labels = scores[finite], None if labels is None else labels[finite]
    edges, logarithmic = histogram_edges(scores, threshold)
    groups: list[tuple[str, NDArray[np.int64]]] = []
    if labels is None:
        groups.append(("all rows", np.histogram(scores, edges)[0]))
    else:
        for text, mask in (("normal", ~labels), ("anomaly", labels)):
            if mask.any():
                groups.append((f"{text} ({int(mask.sum()):,})", np.histogram(scores[mask], edges)[0]))
    peaks = [counts.max() for _, counts in groups]
    tall = max([*peaks, 1])
    # A rare class, or a long tail, would be a flat line on a linear axis.
    log_counts = tall > 50 and (min(peaks, default=0) < 0.04 * tall or (labels is None and scores.size > 100_000))

    def draw(axes: Axes, theme: Theme) -> None:
        for text, counts in groups:
            colour = theme.anomaly if text.startswith("anomaly") else theme.normal
            axes.stairs(counts, edges, fill=True, color=colour, alpha=0.32, lw=0)
            axes.stairs(counts, edges, color=colour, lw=1.5, label=text, ls="-")
        axes.axvline(threshold, color=theme.mark, ls=(0, (5, 2)), lw=1.4, label=f"threshold {number(threshold)}")
        if logarithmic:
            axes.set_xscale("log")
            plain_log_ticks(axes.xaxis, edges[0], edges[-1])
        axes.set_xlim(edges[0], edges[-1])
        if log_counts:
            axes.set_yscale("log")
            axes.set_ylim(0.8, tall * 1.6 * max(1.0, tall) ** 0.3)  # room for the legend
        else:
            axes.set_ylim(0, tall * 1.12)
        axes.set_xlabel("anomaly score" + (", log scale" if logarithmic else ""))
        axes.set_ylabel("rows" + (", log scale" if log_counts else ""))
        axes.legend(loc="upper right" if log_counts else "best", frameon=True)

    kinds = "" if labels is None else ", normal rows and labelled anomalies apart"
    span = f", from {number(scores.min())} to {number(scores.max())}" if scores.size else ""
    caption = "Rows right of the dashed line are flagged."
    if labels is not None:
        caption += " A good separation shows two hills with the line between them."
    if infinite:
        caption += f" {infinite:,} infinite scores are not drawn: the network overflows on those rows."
    return render(
        draw,
        name="score-histogram",
        title="Distribution",
        alt=f"Histogram of {rows:,} anomaly scores{kinds}{span}; {above:,} above the threshold {number(threshold)}.",
        caption=caption,
    )


def plot_roc(evaluation: Evaluation) -> Picture:
    """Draw the ROC curve with the threshold's point. ``evaluation`` must hold both classes."""
    assert evaluation.roc is not None
    fpr, tpr = evaluation.roc
    rate, recall = evaluation.false_positive_rate or 0.0, evaluation.recall or 0.0

    def draw(axes: Axes, theme: Theme) -> None:
        axes.plot([0, 1], [0, 1], color=theme.faint, lw=1, ls=":", label="chance")
        axes.plot(fpr, tpr, color=theme.normal, lw=2, label=f"AUROC {evaluation.auroc:.4f}")
        axes.plot(
            [rate], [recall], "o", ms=8, color=theme.anomaly, mec=theme.paper, label="at the threshold", ls="none"
        )
        axes.set(
            xlim=(-0.01, 1.01), ylim=(-0.01, 1.02), xlabel="false positive rate", ylabel="true positive rate (recall)"
        )
        axes.legend(loc="lower right")

    return render(
        draw,
        name="roc",
        title="ROC curve",
        alt=(
            f"ROC curve with area {evaluation.auroc:.4f}; at the threshold the true positive rate is {recall:.3f} "
            f"and the false positive rate {rate:.3f}."
        ),
        caption="The chance that an anomaly scores above a normal row is the area under this curve.",
    )


def plot_precision_recall(evaluation: Evaluation) -> Picture:
    """Draw precision against recall with the threshold's point. ``evaluation`` must hold both classes."""
    assert evaluation.precision_recall is not None
    recall, precision = evaluation.precision_recall
    base = evaluation.anomalies / evaluation.rows
    here, at_recall = evaluation.precision, evaluation.recall or 0.0

    def draw(axes: Axes, theme: Theme) -> None:
        axes.axhline(base, color=theme.faint, lw=1, ls=":", label=f"chance ({base:.1%} anomalies)")
        axes.step(
            recall,
            precision,
            where="pre",
            color=theme.normal,
            lw=2,
            label=f"average precision {evaluation.average_precision:.4f}",
        )
        if here is not None:
            axes.plot(
                [at_recall],
                [here],
                "o",
                ms=8,
                color=theme.anomaly,
                mec=theme.paper,
                ls="none",
                label="at the threshold",
            )
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.03), xlabel="recall", ylabel="precision")
        axes.legend(loc="best")

    at = "no row lies above the threshold" if here is None else f"at the threshold precision is {here:.3f}"
    return render(
        draw,
        name="precision-recall",
        title="Precision and recall",
        alt=f"Precision against recall, average precision {evaluation.average_precision:.4f}; {at}.",
        caption="Precision is the share of flagged rows that are anomalies; recall that of anomalies flagged.",
    )
