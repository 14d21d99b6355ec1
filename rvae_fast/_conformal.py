"""A threshold from the scores of normal rows that a detector has not learnt from: split conformal prediction."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray


def conformal_offset(scores: NDArray[np.float64], rate: float) -> float:
    """The ``score_samples`` below which at most ``rate`` of further normal rows lie.

    Parameters
    ----------
    scores : ndarray [n_rows] float64
        Of normal rows, higher being more normal.
    rate : float
        In (0, 1).

    Returns
    -------
    float
        The k-th smallest score, k the whole part of ``rate * (n_rows + 1)``: a further row is as likely to be at any
        of the n + 1 places among them, and below the k-th in k.

    Raises
    ------
    ValueError
        For fewer rows than one false alarm needs, or where the score is not finite.
    """
    k = math.floor(rate * (len(scores) + 1) * (1 + 1e-12))  # 0.01 * 700 is 6.999...
    if k < 1:
        needed = np.ceil((1 / rate) * (1 - 1e-12)) - 1  # by numpy, which knows an infinite number of rows
        many = f"{needed:,.0f}" if needed < 1e15 else f"{needed:.3g}"
        raise ValueError(f"false_alarm_rate={rate:g} needs at least {many} rows, X has {len(scores):,}")
    offset = float(np.partition(scores, k - 1)[k - 1])
    if np.isnan(scores).any():
        raise ValueError(f"{np.count_nonzero(np.isnan(scores)):,} of {len(scores):,} rows have NaN for a score")
    if not np.isfinite(offset):
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(scores)):,} of {len(scores):,} rows have no finite score, more than "
            f"false_alarm_rate={rate:g} of them: there is no threshold to place"
        )
    return offset
