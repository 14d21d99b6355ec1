"""Scores of training rows as if each had been new: by copies of a detector that are trained without it.

A detector's own scores of the rows it has learnt are lower than those of new ones, with few rows by far.
Cross-conformal prediction (Vovk, Annals of Mathematics and Artificial Intelligence, 2015; for anomalies Hennhoefer and
Preisach 2024) takes those of networks that have not seen them.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone

from rvae_fast._conformal import conformal_offset
from rvae_fast._validation import check_random


def check_folds(folds: Any, n_rows: int) -> int:
    """Return ``folds`` as an int, or raise an error that names it."""
    if not isinstance(folds, (int, np.integer)) or isinstance(folds, (bool, np.bool_)):
        raise TypeError(f"folds must be a whole number, got {folds!r}")
    if not 2 <= folds <= n_rows:
        raise ValueError(f"folds must be at least 2 and at most the number of rows, {n_rows:,}, got {folds}")
    if n_rows - -(-n_rows // int(folds)) < 2:
        raise ValueError(f"X must have more rows: {n_rows} in {folds} folds leave a copy fewer than 2 to learn from")
    return int(folds)


def check_cross_calibration(folds: Any, rate: float, n_rows: int) -> int:
    """Return ``folds`` as an int, or raise what is wrong with it or with the number of rows, before any training."""
    conformal_offset(np.zeros(n_rows), rate)  # whether there are enough rows for the rate
    return check_folds(folds, n_rows)


def held_out_scores(detector: Any, table: NDArray[Any], folds: int) -> NDArray[np.float64]:
    """``score_samples`` of every row by a copy of a fitted detector that was trained on the rows of the other folds.

    Parameters
    ----------
    detector : detector or ensemble
        Left as it is.
    table : ndarray [n_rows, n_features]
    folds : int

    Returns
    -------
    ndarray [n_rows] float64
    """
    from sklearn.model_selection import KFold  # loads much that a fit does not need

    seed = int(check_random(detector.random_state).randint(2**31 - 1))
    scores = np.empty(len(table))
    for learnt, held in KFold(folds, shuffle=True, random_state=seed).split(table):
        copy = _fresh(detector)
        with warnings.catch_warnings():
            # What the fit of the detector itself has said, or is said of a threshold that nobody uses.
            for message in ("constant column", "anomaly_score='nap' found"):
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
            copy.fit(table[learnt])
        if hasattr(detector, "units_"):  # those of fewer rows, known better by heart, are smaller
            copy.units_ = detector.units_
        scores[held] = copy.score_samples(table[held])
    return scores


def _fresh(detector: Any) -> Any:
    """An unfitted copy that neither writes nor reads checkpoints, which are those of the detector's own training."""
    copy = clone(detector)
    parameters = copy.get_params()
    without = {"checkpoint": None, "resume": False}
    copy.set_params(**{
        name: without[name.rpartition("__")[2]] for name in parameters if name.rpartition("__")[2] in without
    })  # fmt: skip
    if isinstance(members := parameters.get("members"), (list, tuple)):
        copy.set_params(members=[{k: v for k, v in own.items() if k not in without} for own in members])
    return copy
