"""Why a row is flagged, in words: the columns that make it anomalous, and what the network expected there."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["reasons"]

#: Rows that are explained before it is said how far that is.
_ROWS = 64


def reasons(
    detector: Any, X: NDArray[Any], flags: NDArray[np.bool_], most: int, done: Callable[[int], None]
) -> list[str]:
    """A text for each row, empty for those that are not flagged: ``flow=12.1 (expected 3.4); heat=80 (expected 65)``.

    Parameters
    ----------
    detector : detector or ensemble
    X : ndarray [n_rows, n_features]
        Its columns, in its order.
    flags : ndarray of bool [n_rows]
    most : int
        Columns to name: those whose expected value would lower the score most, and only such.
    done : callable
        Told now and then of so many more flagged rows that are explained.
    """
    from rvae_fast.datasets.types import numbered_names

    texts = [""] * len(X)
    which = np.flatnonzero(flags)
    names = getattr(detector, "feature_names_in_", numbered_names(X.shape[1]))
    for start in range(0, len(which), _ROWS):
        some = which[start : start + _ROWS]
        rows = X[some]
        with warnings.catch_warnings():
            # A file without column names goes by position; its width is checked.
            warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
            falls, expected = detector.feature_attributions(rows), detector.reconstruct(rows)
        for at, row, fall, guess in zip(some, rows, falls, expected, strict=True):
            first = [i for i in np.argsort(-fall, kind="stable")[:most] if fall[i] > 0]
            texts[at] = "; ".join(f"{names[i]}={row[i]:.6g} (expected {guess[i]:.6g})" for i in first)
        done(len(some))
    return texts
