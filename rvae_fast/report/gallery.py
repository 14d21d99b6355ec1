"""Choose the rows worth a look and bring each together with its reconstruction."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.report.fitted import members, parameters
from rvae_fast.report.reconstructions import (
    check_image_shape,
    contact_sheet,
    image_strip,
    leading_features,
    squared_errors,
)
from rvae_fast.report.rows import extreme_positions
from rvae_fast.report.theme import number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import ArrayLike, NDArray

    from rvae_fast.report.reconstructions import FeatureError

__all__ = ["Gallery", "Sample", "build_gallery", "reconstruct"]

_IMAGES, _TABLES, _AVERAGED = 8, 6, 20
#: Each row whose features are ranked by what they add to the score is scored once more for each of them.
_ATTRIBUTED_FEATURES = 256


@dataclass(frozen=True)
class Sample:
    """One row of the gallery: its id, score and true class, with its picture or its worst features."""

    id: str
    score: str
    truth: str | None
    flagged: bool
    strip: bytes | None
    features: list[FeatureError]


@dataclass(frozen=True)
class Gallery:
    """The worst and the best rows; ``sheets`` are PNGs of image rows, ``drivers`` the features of the worst rows.

    ``shares_of`` says what ranks features: what the "score" falls by with the value as expected, or the reconstruction
    "error" by the detector's likelihood, or the "squared error" after scaling.
    """

    worst: list[Sample]
    best: list[Sample]
    sheets: dict[str, bytes]
    drivers: list[FeatureError]
    averaged: int
    shares_of: str


def reconstruct(detector: Any, X: NDArray[Any]) -> NDArray[np.float64]:
    """Return the fitted detector's reconstruction of ``X`` in input units, shape (n, features)."""
    with warnings.catch_warnings():
        # The columns are the fitted ones, in their order; only their names are not with the array.
        warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
        return np.asarray(detector.reconstruct(X), dtype=np.float64)


def _weights(
    detector: Any, values: NDArray[np.float64], expected: NDArray[np.float64], scale: NDArray[np.float64]
) -> tuple[NDArray[np.float64], str]:
    """What ranks the features of rows, and what that is: what each adds to the score, as near as it can be had."""
    known = parameters(detector)
    score = known.get("anomaly_score", "reconstruction")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
        if score != "reconstruction" and values.shape[1] <= _ATTRIBUTED_FEATURES and len(values):
            return np.maximum(detector.feature_attributions(values), 0.0), "score"
        if known.get("likelihood", "squared") != "squared" and len(values):
            # Less than nothing is the cross-entropy of no value.
            return np.maximum(detector.feature_errors(values, units="score"), 0.0), "error"
    return squared_errors(values, expected, scale), "squared error"


def _scale(detector: Any, feature_scale: ArrayLike | None, features: int) -> NDArray[np.float64]:
    """Return the size of one model unit in input units: as given, or from the detector's scaler."""
    if feature_scale is None:
        feature_scale = getattr(getattr(members(detector)[0], "scaler_", None), "scale", None)
    scale = np.ones(features) if feature_scale is None else np.asarray(feature_scale, dtype=np.float64)
    if scale.shape != (features,):
        raise ValueError(f"feature_scale must have shape ({features},), got {scale.shape}")
    return np.where(np.isfinite(scale) & (scale > 0), scale, 1.0)


def build_gallery(
    *,
    scores: NDArray[np.float64],
    threshold: float,
    labels: NDArray[np.bool_] | None,
    X: Any,
    reconstruction: Any,
    rows: NDArray[np.int64],
    names: Sequence[str],
    row_id: Callable[[int], str],
    image_shape: Sequence[int] | None,
    detector: Any,
    feature_scale: ArrayLike | None,
) -> Gallery:
    """Build the gallery from the rows at hand.

    Parameters
    ----------
    scores, labels
        Of all rows of the report.
    X, reconstruction
        The rows at hand and what the model made of them (None: ask ``detector``), in input units.
    rows : ndarray of int
        Positions in ``scores`` of the rows at hand.
    names
        Feature names.
    row_id
        Gives the id of the row at a position in ``scores``.
    """
    features = X.shape[1]
    shape = None if image_shape is None else check_image_shape(image_shape, features)
    shown = _IMAGES if shape else _TABLES
    high, low = extreme_positions(scores[rows], _AVERAGED)
    chosen = np.concatenate([high, low])
    # A memory map is indexed in rising order once: only these rows are read.
    order = np.argsort(chosen, kind="stable")
    values = np.empty((chosen.size, features), dtype=np.float64)
    values[order] = np.asarray(X[chosen[order]], dtype=np.float64)
    if reconstruction is None:
        expected = reconstruct(detector, values)
    else:
        expected = np.empty_like(values)
        expected[order] = np.asarray(reconstruction[chosen[order]], dtype=np.float64)
    scale = _scale(detector, feature_scale, features)

    limits, error_high = (0.0, 1.0), 1.0
    if shape:
        # A missing value (NaN) is drawn as the darkest one.
        values = np.where(np.isnan(values), np.nanmin(values) if np.isfinite(values).any() else 0.0, values)
        limits = (float(values.min()), float(values.max()))
        error_high = float(np.abs(values - expected).max())

    worst_values, worst_expected = values[: high.size], expected[: high.size]
    best_values, best_expected = values[high.size :], expected[high.size :]

    weights, shares_of = (np.empty(0), "") if shape else _weights(detector, values, expected, scale)

    def sample(i: int, k: int) -> Sample:
        position, value, guess = rows[i], values[k], expected[k]
        return Sample(
            id=row_id(int(position)),
            score=number(scores[position]),
            truth=None if labels is None else ("anomaly" if labels[position] else "normal"),
            flagged=bool(scores[position] > threshold),
            strip=image_strip(value, guess, shape, limits, error_high) if shape else None,
            features=[] if shape else leading_features(value, guess, weights[k], names),
        )

    # Few rows: the ends must not overlap, or one row would be among both the worst and the best.
    n_worst = min(shown, (rows.size + 1) // 2)
    n_best = min(shown if shape else 2, rows.size - n_worst)
    sheets = {}
    if shape:
        for name, count, v, e in (
            ("reconstructions-worst", n_worst, worst_values, worst_expected),
            ("reconstructions-best", n_best, best_values, best_expected),
        ):
            if count:
                sheets[name] = contact_sheet(v[:count], e[:count], shape, limits, error_high)
    drivers = []
    if not shape and high.size > 1:
        gap = np.sqrt(np.mean(np.nan_to_num(np.square(worst_values - worst_expected)), axis=0))
        drivers = leading_features(gap, np.zeros_like(gap), weights[: high.size].mean(axis=0), names, k=8)
    return Gallery(
        worst=[sample(int(i), k) for k, i in enumerate(high[:n_worst])],
        best=[sample(int(i), high.size + k) for k, i in enumerate(low[:n_best])],
        sheets=sheets,
        drivers=drivers,
        averaged=int(high.size),
        shares_of=shares_of,
    )
