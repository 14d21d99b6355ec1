"""The most and least anomalous rows of a stream, kept in bounded memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

__all__ = ["ExtremeRows", "extreme_positions"]


def extreme_positions(scores: NDArray[np.float64], k: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the ``k`` highest scores (highest first) and the ``k`` lowest (lowest first).

    Equal scores keep their order, so the result does not depend on the partition's pivots. Costs one pass, not a sort.
    """
    k = min(k, scores.size)
    if k == 0:
        empty = np.empty(0, dtype=np.int64)
        return empty, empty
    cut_high = np.partition(scores, scores.size - k)[scores.size - k]
    cut_low = np.partition(scores, k - 1)[k - 1]
    high = np.concatenate([np.flatnonzero(scores > cut_high), np.flatnonzero(scores == cut_high)])[:k]
    low = np.concatenate([np.flatnonzero(scores < cut_low), np.flatnonzero(scores == cut_low)])[:k]
    return high[np.argsort(-scores[high], kind="stable")], low[np.argsort(scores[low], kind="stable")]


class ExtremeRows:
    """Keep the rows with the ``k`` highest and the ``k`` lowest scores while a large table goes by in chunks.

    Parameters
    ----------
    k : int
        How many rows to keep at either end.

    Attributes
    ----------
    rows : ndarray of int
        Positions of the kept rows in the whole stream.
    X : ndarray of shape (len(rows), features)
        Their values.
    ids : list
        Their ids (their positions where none were given).
    """

    def __init__(self, k: int = 20) -> None:
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        self.k = k
        self.rows: NDArray[np.int64] = np.empty(0, dtype=np.int64)
        self.X: NDArray[Any] = np.empty((0, 0))
        self.ids: list[Any] = []
        self._scores: NDArray[np.float64] = np.empty(0)
        self._seen = 0

    def update(self, scores: ArrayLike, X: NDArray[Any], ids: Any = None) -> None:
        """Take the next chunk: ``scores`` of shape (n,), ``X`` of shape (n, features), ``ids`` of length n or None."""
        scores = np.asarray(scores, dtype=np.float64)
        high, low = extreme_positions(scores, self.k)
        chosen = np.unique(np.concatenate([high, low]))
        new_ids = (chosen + self._seen).tolist() if ids is None else [ids[i] for i in chosen]
        picked = np.asarray(X[chosen])
        all_scores = np.concatenate([self._scores, scores[chosen]])
        all_rows = np.concatenate([self.rows, chosen + self._seen])
        all_x = np.concatenate([self.X, picked]) if self.rows.size else picked
        all_ids = self.ids + new_ids
        high, low = extreme_positions(all_scores, self.k)
        keep = np.unique(np.concatenate([high, low]))
        self._scores, self.rows, self.X = all_scores[keep], all_rows[keep], all_x[keep]
        self.ids = [all_ids[i] for i in keep]
        self._seen += scores.size
