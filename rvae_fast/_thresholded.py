"""What every detector does with its scores: place a threshold and compare with it, go chunk by chunk, be saved."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, OutlierMixin
from sklearn.utils.validation import check_is_fitted

from rvae_fast._attributions import attributions
from rvae_fast._conformal import conformal_offset
from rvae_fast._cross_calibration import check_cross_calibration, held_out_scores
from rvae_fast._detector_options import warn_of_few_rows
from rvae_fast._validation import check_share_of_rows, check_table

Self = TypeVar("Self", bound="Thresholded")


class Thresholded(OutlierMixin, BaseEstimator, ABC):  # type: ignore[misc]
    """A detector with ``score_samples`` and, once fitted, ``offset_``."""

    offset_: float
    contamination: float

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

    def feature_attributions(self, X: Any) -> NDArray[np.float64]:
        """Which columns make a row anomalous, by whatever score is taken.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            The rows to explain, such as those that were flagged: each is scored ``n_features + 1`` times.

        Returns
        -------
        ndarray [n_rows, n_features] float64
            By how much the anomaly score (``-score_samples``) of a row falls if this value alone is what the network
            expects there, its reconstruction; negative where the row would be more anomalous. The values of a row do
            not add up to its score. Infinite where the score is, and would no longer be.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            As :meth:`score_samples`.

        Notes
        -----
        Occlusion (Zeiler and Fergus, ECCV 2014). ``feature_errors`` costs one pass in all, and knows of the
        reconstruction error alone.

        Examples
        --------
        >>> import numpy as np
        >>> from rvae_fast import RVAEDetector
        >>> rng = np.random.default_rng(0)
        >>> X = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 8))
        >>> detector = RVAEDetector(epochs=20, random_state=0).fit(X)
        >>> row = X[:1] + 9.0 * np.eye(8)[:1]  # the first column is off
        >>> int(detector.feature_attributions(row).argmax())
        0
        """
        check_is_fitted(self)
        scores = self.score_samples(X)  # what is wrong with the rows is told here, and not of those made of them
        return attributions(self, check_table(self, X, reset=False), scores)

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

    def cross_calibrate(self: Self, X: Any, *, false_alarm_rate: float | None = None, folds: int = 5) -> Self:
        """Place the threshold by the rows it was trained on, each scored by a copy that has not seen it.

        For tables too small to hold rows back for :meth:`calibrate`: a network knows a few hundred rows nearly by
        heart, and a threshold among their scores flags most of the new ones. The copies are trained on the other
        ``folds - 1`` parts of the rows, with the same parameters; then they are forgotten.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            The training rows.
        false_alarm_rate : float, optional
            Share of new rows like these to be flagged, in (0, 0.5]; ``contamination`` unless given.
        folds : int, default 5
            Trainings, each as long as ``fit``. The more there are, the nearer the copies come to the detector.

        Returns
        -------
        self
            With another ``offset_``, one of the score that is taken now; the network stays as it is.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            For a rate or a number of folds that is none, too few rows for them, and what ``fit`` raises. The detector
            is then as it was before.

        Notes
        -----
        Cross-conformal prediction (Vovk 2015). Unlike :meth:`calibrate` it promises nothing: the copies have fewer
        rows to learn from, so that it rather flags too few. Anomalies among the rows count as normal ones. By ``"nap"``
        it may flag far too many where there are fewer than one and a half rows to a direction, which a warning says.

        Examples
        --------
        >>> import numpy as np
        >>> from rvae_fast import RVAEDetector
        >>> X = np.random.default_rng(0).normal(size=(150, 8))
        >>> detector = RVAEDetector(epochs=5, random_state=0).fit(X)
        >>> before = detector.threshold_
        >>> bool(detector.cross_calibrate(X, folds=3).threshold_ > before)
        True
        """
        rate = self.contamination if false_alarm_rate is None else false_alarm_rate
        share = check_share_of_rows("false_alarm_rate", rate, "the share of rows to be flagged")
        check_is_fitted(self)
        table = check_table(self, X, reset=False, min_rows=2)
        folds = check_cross_calibration(folds, share, len(table))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
            self.score_samples(table[:1])  # and whether it can score as it is
        self._place(conformal_offset(held_out_scores(self, table, folds), share))
        for one in getattr(self, "estimators_", [self]):
            if one.anomaly_score == "nap":
                warn_of_few_rows(one.nap_.rank, len(table), copies=True)
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
