"""What each column adds to a row's score, for every score alike: how much lower it is with the column as expected.

Occlusion (Zeiler and Fergus, ECCV 2014) by what the network expects there, in place of a grey patch.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A block of changed rows in fp64 takes about as many bytes.
BLOCK_BYTES = 1 << 25


def attributions(detector: Any, table: NDArray[Any], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """By how much each row's anomaly score falls when one value of it is the reconstructed one.

    Parameters
    ----------
    detector : detector or ensemble
        Fitted.
    table : ndarray [n_rows, n_features]
    scores : ndarray [n_rows] float64
        Its ``score_samples``.

    Returns
    -------
    ndarray [n_rows, n_features] float64
    """
    n, d = table.shape
    found = np.empty((n, d))
    block = max(1, BLOCK_BYTES // (8 * d * d))
    width = max(1, min(d, BLOCK_BYTES // (8 * d * block)))  # all columns at once, unless one row's are too many
    with warnings.catch_warnings():
        # The rows are made here, of those whose names the caller has checked.
        warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
        for start in range(0, n, block):
            rows = table[start : start + block].astype(np.float64)
            expected, before = _expected(detector, rows), scores[start : start + block, None]
            for first in range(0, d, width):
                column = np.arange(first, min(first + width, d))
                changed = np.repeat(rows[:, None, :], len(column), axis=1)
                changed[:, column - first, column] = expected[:, column]
                after = detector.score_samples(changed.reshape(-1, d)).reshape(-1, len(column))
                with np.errstate(invalid="ignore"):
                    falls = after - before
                # Infinite before and after: the network overflows with the expected value there as well.
                found[start : start + block, first : first + width] = np.where(np.isnan(falls), 0.0, falls)
    return found


def _expected(detector: Any, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The reconstruction; for a row on which the network overflows, what a column is in the mean."""
    expected = np.asarray(detector.reconstruct(rows))
    scaler = getattr(detector, "estimators_", [detector])[0].scaler_
    return np.where(np.isfinite(expected), expected, scaler.center)
