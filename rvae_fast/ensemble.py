"""Several detectors as one, their scores averaged.

Networks of different seeds, or trained in different ways, agree about what is normal and err each in its own way.
Deep ensembles: Lakshminarayanan, Pritzel and Blundell, NeurIPS 2017; with members that differ by a hyperparameter as
well: Wenzel, Snoek, Tran and Jenatton, NeurIPS 2020.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils import get_tags
from sklearn.utils.validation import check_is_fitted

from rvae_fast import _detector_options as options
from rvae_fast._base_detector import BaseDetector
from rvae_fast._ensemble_members import check_members, said_once, unit
from rvae_fast._paths import replaceable
from rvae_fast._thresholded import Thresholded
from rvae_fast._validation import (
    check_contamination,
    check_finite,
    check_random,
    check_table,
    check_unit_range,
    unless_refused,
)
from rvae_fast.detector import RVAEDetector
from rvae_fast.preprocessing import chunks


class EnsembleDetector(Thresholded):  # type: ignore[misc]
    """Anomaly detector of several networks, trained one after the other on the same rows.

    Parameters
    ----------
    estimator : detector, optional
        What every member is a copy of; an :class:`~rvae_fast.RVAEDetector` by default. Left as it is. Parameters named
        ``estimator__...``, in a grid search for one, need one to be given.
    members : int or sequence of dict, default 2
        How many, which then differ by their seeds alone; or for each a dict of the parameters that are its own, empty
        for a plain copy.
    contamination : float, default 0.1
        Share of the training rows to flag, in (0, 0.5]. Those of ``estimator`` and of ``members`` play no part.
    random_state : int, RandomState or None, default None
        Every member has a seed drawn from it in place of the estimator's; one that ``members`` states is kept.

    Attributes
    ----------
    estimators_ : list of detector
        The fitted members, each of which can be asked and saved by itself. After a ``fit`` that was broken off, by
        Ctrl-C or by a loss that is not finite, those that were done and the one that was under way.
    units_ : ndarray [n_members] float64
        What a member's scores are divided by before they are averaged: the mean of its training rows' scores, so that
        no member outweighs the others; 1 for ``"local"`` and ``"hyperplane"``, whose scores compare as they are.
    offset_ : float
        ``decision_function(X) = score_samples(X) - offset_``; the ``contamination`` quantile of the training scores.
    threshold_ : float
        ``-offset_``: the score above which a row is an anomaly.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where ``fit`` was given a DataFrame with string column names.

    Notes
    -----
    Training and scoring take as long as the members' one after the other. With a ``checkpoint`` each member has its
    own: ``run.ckpt`` becomes ``run.ckpt.0``, ``run.ckpt.1`` and so on; ``resume=True`` needs the first, and begins
    those that are not there.

    On MNIST two members, one of half the learning rate, are better than either: ``preset("image-two-rates")``, measured
    over five seeds in ``docs/results/README.md``.

    Examples
    --------
    >>> import numpy as np
    >>> from rvae_fast import EnsembleDetector, RVAEDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 8))  # eight columns, two degrees of freedom
    >>> members = [{}, {"learning_rate": 1e-3}]
    >>> detector = EnsembleDetector(RVAEDetector(epochs=20), members=members, random_state=0).fit(X)
    >>> detector.predict(np.r_[X[:1], rng.normal(size=(1, 8))])
    array([ 1, -1])
    """

    def __init__(
        self,
        estimator: BaseDetector | None = None,
        *,
        members: int | Sequence[Mapping[str, Any]] = 2,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.estimator = estimator
        self.members = members
        self.contamination = contamination
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None) -> EnsembleDetector:
        """Learn what normal rows look like, once for every member.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            As every member's own ``fit`` takes it.
        y : ignored
            Present for scikit-learn's conventions.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            Naming the parameter or the columns at fault, what came and what was expected. An ensemble that was fitted
            before is then as it was.
        rvae_fast.training.NonFiniteError
            When the loss or a gradient of a member becomes NaN or infinite.
        """
        with unless_refused(self):
            check_contamination(self.contamination)
            members = self._unfitted()
            self._check_before_fit(members, check_table(self, X, reset=True, min_rows=2))
        self.__dict__.pop("offset_", None)  # not fitted until the end, whatever was before
        self._remove_checkpoints(members)
        self.estimators_: list[BaseDetector] = []

        def fit(member: BaseDetector) -> None:
            self.estimators_.append(member)  # before it is trained: what there is of it is not lost with an error
            member.fit(X)  # not _learn: it may be the fit of somebody's subclass

        self._learn_threshold(members, fit)
        return self

    def fit_score(self, X: Any, y: Any = None) -> EnsembleDetector:
        """Learn anew what the members' scores take of normal rows, and the threshold; the networks stay as they are.

        See :meth:`RVAEDetector.fit_score`. Each member is scored by its own parameters as they are now.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            Normal rows.
        y : ignored
            Present for scikit-learn's conventions.

        Returns
        -------
        self

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            Naming the parameter or the columns at fault, what came and what was expected. The ensemble and its members
            are then as they were before.
        """
        check_is_fitted(self)
        check_contamination(self.contamination)
        before = [member._learnt() for member in self.estimators_]
        try:
            self._learn_threshold(self.estimators_, lambda member: member.fit_score(X))
        except BaseException:  # an interrupt too
            for member, learnt in zip(self.estimators_, before, strict=True):
                member._restore(learnt)
            raise
        return self

    def _learn_threshold(self, members: Sequence[BaseDetector], fit: Callable[[BaseDetector], Any]) -> None:
        """Let every member learn from the rows, by ``fit``; then what its scores are divided by, and the threshold."""
        total: Any = 0.0
        units: list[float] = []
        for member in members:
            member._keeps_training_scores = True
            try:
                with said_once(first=not units):
                    fit(member)
                scores = member._training_scores
            finally:
                member.__dict__.pop("_keeps_training_scores", None)
                member.__dict__.pop("_training_scores", None)
            units.append(unit(member, scores))
            total = total + member._as_held_out(scores) / units[-1]
        self.units_ = np.array(units)
        self._scored_by = [options.scored_by(member) for member in members]
        self._times_learnt = [member._times_learnt for member in members]
        self.offset_ = float(np.percentile(-total / len(members), 100.0 * self.contamination))

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score rows, higher being more normal: the mean of the members' scores, each in its unit.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]

        Returns
        -------
        ndarray [n_rows] float64
            ``-inf`` for a row on which a network overflows.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            For a table of another width or other columns, or with values not finite, naming the columns.
        """
        check_is_fitted(self)
        pairs = zip(self.estimators_, self.units_, strict=True)
        return self._mean(lambda pair: pair[0].score_samples(X) / pair[1], pairs)

    def reconstruct(self, X: Any) -> NDArray[np.float64]:
        """The mean of what the networks make of each row ``[n_rows, n_features]``, in the units of ``X``."""
        check_is_fitted(self)
        return self._mean(lambda member: member.reconstruct(X), self.estimators_)

    def feature_errors(self, X: Any, *, units: str = "input") -> NDArray[np.float64]:
        """The mean of the members' errors of each value ``[n_rows, n_features]``: which columns make a row anomalous.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
        units : {"input", "score"}, default "input"
            See :meth:`RVAEDetector.feature_errors`.
        """
        check_is_fitted(self)
        return self._mean(lambda member: member.feature_errors(X, units=units), self.estimators_)

    # --- private ---

    def _mean(self, part: Callable[[Any], NDArray[np.float64]], members: Iterable[Any]) -> NDArray[np.float64]:
        total: Any = None
        for member in members:
            with said_once(first=total is None):
                one = part(member)
            total = one if total is None else np.add(total, one, out=total)
        return np.asarray(total / len(self.estimators_), dtype=np.float64)

    def _unfitted(self) -> list[BaseDetector]:
        """The members, each with its seed and its parameters."""
        base = RVAEDetector() if self.estimator is None else self.estimator
        if not isinstance(base, BaseDetector):
            raise TypeError(f"estimator must be a detector of rvae_fast such as RVAEDetector(), got {base!r}")
        changes = check_members(self.members, base)
        rng = check_random(self.random_state)
        members = []
        for i, change in enumerate(changes):
            member = clone(base)
            seed: int | None = int(rng.randint(2**31 - 1))
            if change.get("resume", base.resume) and self.random_state is None:
                seed = None  # it is in the checkpoint
            own: dict[str, Any] = {"random_state": seed}
            if base.checkpoint is not None:
                own["checkpoint"] = f"{os.fspath(base.checkpoint)}.{i}"
            if i > 0 and base.resume is True:
                own["resume"] = "auto"
            members.append(member.set_params(**{**own, **change}))
        return members

    def _check_before_fit(self, members: list[BaseDetector], table: NDArray[Any]) -> None:
        """What is wrong with the last member should not cost the training of the first, nor bad rows a checkpoint."""
        names = getattr(self, "feature_names_in_", None)
        for member in members:
            options.check_before_fit(member, table)
        # A subclass with a fit of its own may make other rows of these.
        own = [member for member in members if type(member).fit is BaseDetector.fit]
        if own:
            check_finite(chunks(table), names, allow_nan=all(member.missing != "error" for member in own))
        if any(member.likelihood == "bernoulli" and member.scaler is None for member in own):
            check_unit_range(chunks(table), names)

    @staticmethod
    def _remove_checkpoints(members: list[BaseDetector]) -> None:
        """Remove the checkpoints that a run which begins anew replaces: a later resume must not find an older run's."""
        for member in members:
            if member.checkpoint is not None and not member.resume:
                replaceable(member.checkpoint).unlink(missing_ok=True)

    def calibrate(self, X: Any, *, false_alarm_rate: float = 0.01) -> EnsembleDetector:
        """Place the threshold by normal rows that ``fit`` has not seen; see :meth:`RVAEDetector.calibrate`.

        The members must score as they did when they were fitted: ``units_`` are those of these scores.
        """
        self._check_threshold()
        return super().calibrate(X, false_alarm_rate=false_alarm_rate)

    def cross_calibrate(self, X: Any, *, false_alarm_rate: float | None = None, folds: int = 5) -> EnsembleDetector:
        """Place the threshold by rows scored by copies that have not seen them: :meth:`RVAEDetector.cross_calibrate`.

        The members must score as they did when they were fitted, as for :meth:`calibrate`.
        """
        self._check_threshold()
        return super().cross_calibrate(X, false_alarm_rate=false_alarm_rate, folds=folds)

    def _place(self, offset: float) -> None:
        self._check_threshold()
        super()._place(offset)

    def _check_threshold(self) -> None:
        check_is_fitted(self)
        for i, (member, fitted) in enumerate(zip(self.estimators_, self._scored_by, strict=True)):
            now = options.scored_by(member)
            if now != fitted:
                changed = ", ".join(f"{k}={v!r}" for k, v in now.items() if fitted.get(k, v) != v)
                raise NotFittedError(
                    f"{changed} was set on estimators_[{i}] after the ensemble's fit, whose threshold and units are "
                    "those of other scores: call fit_score of the ensemble"
                )
            if self.estimators_[i]._times_learnt != self._times_learnt[i]:
                raise NotFittedError(
                    f"estimators_[{i}] was fitted by itself after the ensemble, whose threshold and units are those of "
                    "other scores: call fit_score of the ensemble"
                )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        base = RVAEDetector() if self.estimator is None else self.estimator
        tags.input_tags.allow_nan = get_tags(base).input_tags.allow_nan
        return tags
