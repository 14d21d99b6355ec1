"""What every detector does with its scores: place a threshold and compare with it, go chunk by chunk, be saved."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from rvae_fast._validation import check_share_of_rows

Self = TypeVar("Self", bound="Thresholded")


class Thresholded(OutlierMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """A detector with ``score_samples`` and, once fitted, ``offset_``."""

    offset_: float

    @abstractmethod
    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score rows, higher being more normal ``[n_rows]``."""

    @abstractmethod
    def _check_threshold(self) -> None:
        """Raise a NotFittedError unless there is a threshold, and it is one of the scores that are taken now."""

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

    def calibrate(self: Self, X: Any, *, false_alarm_rate: float = 0.01) -> Self:
        """Place the threshold by normal rows that ``fit`` has not seen, for a rate of false alarms.

        The threshold that ``fit`` places is one of the training rows' scores, which are lower than those of new rows,
        the network having learnt them; and ``contamination`` says how many of them are flagged, anomalies or not.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            Normal rows, ``1 / false_alarm_rate - 1`` or more.
        false_alarm_rate : float, default 0.01
            Of further rows that are distributed as these are, at most this share is flagged in the mean over all
            such ``X``, however the scores are distributed: split conformal prediction (Vovk, Gammerman and Shafer
            2005; for anomalies Laxhammar and Falkman, SSCI 2010). By the ``X`` at hand it may be more, the less so the
            more rows there are. In (0, 0.5].

        Returns
        -------
        self
            With another ``offset_``, one of the score that is taken now: ``anomaly_score`` may have been set since
            ``fit``, if it is one that needs nothing of the training rows.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            For a rate that is none, too few rows for it, and what ``score_samples`` raises.
        """
        share = check_share_of_rows("false_alarm_rate", false_alarm_rate, "the share of normal rows to be flagged")
        check_is_fitted(self)
        self._place(conformal_offset(self.score_samples(X), share))
        return self

    @property
    def threshold_(self) -> float:
        """Anomaly score (``-score_samples``) above which a row is an anomaly: ``-offset_``. It may be set."""
        self._check_threshold()
        return -self.offset_

    @threshold_.setter
    def threshold_(self, value: float) -> None:
        check_is_fitted(self)
        number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
        if not number or not np.isfinite(value):
            raise ValueError(f"threshold_ must be a finite number, got {value!r}")
        self._place(-float(value))

    def _place(self, offset: float) -> None:
        """Take ``offset`` for the scores as they are taken now."""
        self.offset_ = offset

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the fitted detector as one file; see :func:`rvae_fast.save`."""
        from rvae_fast.serialization import save

        save(self, path)

    def __sklearn_is_fitted__(self) -> bool:
        return hasattr(self, "offset_")


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
