"""Exact figures of merit of anomaly scores against labels, and at a threshold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["Evaluation", "check_labels", "check_scores", "evaluate_scores"]

_CURVE_POINTS = 1500


def check_scores(scores: ArrayLike) -> NDArray[np.float64]:
    """Return ``scores`` as a float64 vector.

    Parameters
    ----------
    scores : array-like of shape (n,)
        One score a row, higher meaning more anomalous.

    Raises
    ------
    ValueError
        If ``scores`` is not one-dimensional, is empty, or holds NaN or minus infinity (which are counted). Plus
        infinity is a score: that of a row on which the network overflows.
    """
    array = np.asarray(scores)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"scores must be numbers, got dtype {array.dtype}")
    array = array.astype(np.float64, copy=False)
    if array.ndim != 1:
        raise ValueError(f"scores must have one dimension, one score a row, got shape {array.shape}")
    if array.size == 0:
        raise ValueError("scores is empty: there is nothing to report")
    bad = int((np.isnan(array) | np.isneginf(array)).sum())
    if bad:
        raise ValueError(
            f"scores holds {bad:,} NaN or minus infinity in {array.size:,} values; a score must be a number"
        )
    return array


def check_labels(labels: ArrayLike, n: int) -> NDArray[np.bool_]:
    """Return ``labels`` as a boolean vector of length ``n``, true where a row is an anomaly.

    Raises
    ------
    ValueError
        If the length differs from ``n`` or a value is neither 0 (normal) nor 1 (anomaly).
    """
    array = np.asarray(labels)
    if array.shape != (n,):
        raise ValueError(f"labels must have shape ({n},), one label a score, got {array.shape}")
    if array.dtype.kind == "b":
        return array
    if array.dtype.kind not in "fiu":
        raise TypeError(f"labels must be 0 (normal) or 1 (anomaly), got dtype {array.dtype}")
    positive = array == 1
    strange = ~(positive | (array == 0))
    if strange.any():
        found = ", ".join(str(value) for value in np.unique(array[strange])[:5])
        raise ValueError(f"labels must be 0 (normal) or 1 (anomaly); also found: {found}")
    return positive


@dataclass(frozen=True)
class Evaluation:
    """How scores and a threshold agree with labels.

    The counts and rates are exact; the four curves are thinned to at most a few thousand points for drawing. A figure
    that the labels leave undefined (AUROC with one class, precision with no row flagged) is ``None``, never NaN.

    Attributes
    ----------
    rows, anomalies : int
        Number of rows, and of rows labelled as anomalies.
    threshold : float
        Rows whose score is above it are flagged.
    auroc, average_precision : float or None
        Area under the ROC curve; mean precision weighted by the increase in recall.
    precision, recall, f1, false_positive_rate, accuracy : float or None
        At the threshold.
    true_positives, false_positives, true_negatives, false_negatives : int
        The confusion matrix at the threshold.
    roc : tuple of two arrays, or None
        False and true positive rates.
    precision_recall : tuple of two arrays, or None
        Recall (rising) and precision.
    """

    rows: int
    anomalies: int
    threshold: float
    auroc: float | None
    average_precision: float | None
    precision: float | None
    recall: float | None
    f1: float | None
    false_positive_rate: float | None
    accuracy: float
    true_positives: int
    false_positives: int
    true_negatives: int
    false_negatives: int
    roc: tuple[NDArray[np.float64], NDArray[np.float64]] | None
    precision_recall: tuple[NDArray[np.float64], NDArray[np.float64]] | None

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, without the curves, as plain values that JSON can hold."""
        return {name: value for name, value in vars(self).items() if name not in {"roc", "precision_recall"}}


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _thin(x: NDArray[np.float64], y: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Keep at most about 2 * ``_CURVE_POINTS`` points of a curve, both ends among them.

    Half are spread evenly along the curve's length, so that flat and steep parts are drawn alike; half are spaced
    geometrically from its beginning, where a precision-recall curve jumps about.
    """
    if x.size <= 2 * _CURVE_POINTS:
        return x, y
    length = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    along = np.searchsorted(length, np.linspace(0.0, length[-1], _CURVE_POINTS)).clip(0, x.size - 1)
    geometric = np.geomspace(1, x.size, _CURVE_POINTS).astype(np.int64) - 1
    keep = np.unique(np.concatenate([along, geometric, [0, x.size - 1]]))
    return x[keep], y[keep]


def evaluate_scores(scores: ArrayLike, labels: ArrayLike, threshold: float) -> Evaluation:
    """Compare scores with labels, over all thresholds and at one.

    Parameters
    ----------
    scores : array-like of shape (n,)
        Higher is more anomalous.
    labels : array-like of shape (n,)
        1 or true for an anomaly, 0 or false for a normal row.
    threshold : float
        A row is flagged when its score is strictly above it, as ``decision_function < 0`` is.

    Returns
    -------
    Evaluation
        Exact figures from one sort of the scores.

    Examples
    --------
    >>> evaluate_scores([1.0, 2.0, 3.0, 9.0], [0, 0, 1, 1], threshold=5.0).auroc
    1.0
    """
    scores = check_scores(scores)
    positive = check_labels(labels, scores.size)
    if not np.isfinite(threshold):
        raise ValueError(f"threshold must be a finite number, got {threshold}")
    flagged = scores > threshold
    anomalies = int(positive.sum())
    normal = scores.size - anomalies
    tp = int((flagged & positive).sum())
    fp = int(flagged.sum()) - tp
    fn, tn = anomalies - tp, normal - fp

    auroc = average_precision = None
    roc = precision_recall = None
    if anomalies and normal:
        from sklearn.metrics import auc, roc_curve

        # One sort serves both curves: the counts that make the ROC curve make precision and recall as well.
        # Only the order counts, so an infinite score may stand as the largest number.
        fpr, tpr, _ = roc_curve(positive, np.minimum(scores, np.finfo(np.float64).max), drop_intermediate=False)
        auroc = float(auc(fpr, tpr))
        hits, alarms = tpr[1:] * anomalies, fpr[1:] * normal
        precision = hits / (hits + alarms)
        average_precision = float(np.sum(np.diff(tpr) * precision))
        roc = _thin(fpr, tpr)
        # By convention the curve starts where its first point's precision is, at recall 0.
        precision_recall = _thin(tpr, np.concatenate([precision[:1], precision]))

    return Evaluation(
        rows=int(scores.size),
        anomalies=anomalies,
        threshold=float(threshold),
        auroc=auroc,
        average_precision=average_precision,
        precision=_ratio(tp, tp + fp),
        recall=_ratio(tp, anomalies),
        f1=_ratio(2 * tp, 2 * tp + fp + fn),
        false_positive_rate=_ratio(fp, normal),
        accuracy=(tp + tn) / scores.size,
        true_positives=tp,
        false_positives=fp,
        true_negatives=tn,
        false_negatives=fn,
        roc=roc,
        precision_recall=precision_recall,
    )
