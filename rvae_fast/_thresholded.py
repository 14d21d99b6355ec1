"""What every detector does with its scores: compare them with a threshold, take them chunk by chunk, be saved."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted


class Thresholded(OutlierMixin, BaseEstimator):  # type: ignore[misc]
    """A detector with ``score_samples`` and, once fitted, ``offset_``."""

    offset_: float

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score rows, higher being more normal ``[n_rows]``."""
        raise NotImplementedError

    def _check_threshold(self) -> None:
        """Raise a NotFittedError unless there is a threshold, and it is one of the scores that are taken now."""
        raise NotImplementedError

    def score_chunks(self, parts: Iterable[Any]) -> Iterator[NDArray[np.float64]]:
        """Score an iterable of tables chunk by chunk, for data that never are in memory together.

        Parameters
        ----------
        parts : iterable of array-like, DataFrame or Tensor [n, n_features]

        Yields
        ------
        ndarray [n] float64
            :meth:`score_samples` of each chunk, in order.
        """
        check_is_fitted(self)
        for part in parts:
            yield self.score_samples(part)

    def decision_function(self, X: Any) -> NDArray[np.float64]:
        """``score_samples(X) - offset_`` ``[n_rows]``: below 0 is an anomaly."""
        self._check_threshold()
        return self.score_samples(X) - self.offset_

    def predict(self, X: Any) -> NDArray[np.int64]:
        """+1 for a normal row, -1 for an anomaly ``[n_rows]``."""
        return np.where(self.decision_function(X) < 0, -1, 1)

    @property
    def threshold_(self) -> float:
        """Anomaly score (``-score_samples``) above which a row is an anomaly: ``-offset_``."""
        self._check_threshold()
        return -self.offset_

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector as one file; see :func:`rvae_fast.save`."""
        from rvae_fast.serialization import save

        save(self, path)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "offset_")
