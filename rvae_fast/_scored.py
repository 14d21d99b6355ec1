"""What a network's rows are scored by: what that takes of normal rows, and how it is learnt anew."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from rvae_fast import _detector_options as options
from rvae_fast._progress import watched
from rvae_fast._threads import alone_in_a_child
from rvae_fast._thresholded import Self, Thresholded
from rvae_fast._validation import check_table
from rvae_fast._whitening import held_out
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_parts
from rvae_fast.local import fit_local, local_parts
from rvae_fast.models import Autoencoder
from rvae_fast.pathway import default_pathway
from rvae_fast.preprocessing import Scaler, chunk_rows, chunks, scaled_table
from rvae_fast.rapp import fit_nap, nap_parts, sap_parts
from rvae_fast.scoring import score_parts
from rvae_fast.views import lowest

#: What the scores that take something of normal rows keep of them.
LEARNT = ("nap_", "local_", "hyperplane_")


class Scored(Thresholded):
    """A detector with a network, ``model_``, and an ``anomaly_score``."""

    model_: Autoencoder
    scaler_: Scaler

    #: Set by an ensemble on its members: ``fit`` leaves the training rows' anomaly scores as ``_training_scores``.
    _keeps_training_scores = False

    #: How often what the score takes of rows was learnt: an ensemble looks whether it was since.
    _times_learnt = 0

    anomaly_score: str
    pathway: str
    pathway_input: bool | str
    nap_tolerance: float
    nap_ridge: float
    contamination: float
    views: Any

    def fit_score(self: Self, X: Any, y: Any = None) -> Self:
        """Learn anew what the anomaly score takes of normal rows, and the threshold; the network stays as it is.

        For another score of a network that is trained; for one whose training was interrupted; and for more rows to
        compare with than it was trained on, which ``"hyperplane"`` and ``"local"`` are the better for: rows that were
        held out are normal ones too.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            Normal rows, all of them, at least 2: what was learnt of others before is forgotten. ``contamination`` says
            how many of them are beyond the threshold.
        y : ignored
            Present for scikit-learn's conventions.

        Returns
        -------
        self
            Scoring by ``anomaly_score`` and its options as they are now.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            Naming the parameter or the columns at fault, what came and what was expected. The detector is then as it
            was before.

        Examples
        --------
        >>> import numpy as np
        >>> from rvae_fast import RVAEDetector
        >>> X = np.random.default_rng(0).normal(size=(500, 8))
        >>> detector = RVAEDetector(epochs=2, random_state=0).fit(X)
        >>> detector.set_params(anomaly_score="hyperplane").fit_score(X).score_samples(X[:2]).shape
        (2,)
        """
        scores = self._relearn(X)
        if self._keeps_training_scores:
            self._training_scores = scores
        return self

    @abstractmethod
    def _network_options(self) -> dict[str, Any]:
        """``device`` and ``precision`` of the network, for what scores rows."""

    @abstractmethod
    def _scaled_parts(self, table: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
        """Chunks of a checked table as the network takes them."""

    def _pathway_options(self) -> dict[str, Any]:
        pathway, include_input = default_pathway(self.model_, self.anomaly_score)
        return {
            "pathway": pathway if self.pathway == "auto" else self.pathway,
            "include_input": include_input if self.pathway_input == "auto" else bool(self.pathway_input),
            **self._network_options(),
        }

    def _relearn(self, X: Any) -> NDArray[np.float64]:
        """What ``fit_score`` does; returns the rows' anomaly scores."""
        if not hasattr(self, "model_"):
            raise NotFittedError(f"this {type(self).__name__} has no network yet: call fit before fit_score")
        options.check(self)
        table = check_table(self, X, reset=False, min_rows=2)
        options.check_views(self, table.shape[1], self.scaler_.kind)
        options.check_enough_rows(self, table)
        before = self._learnt()
        try:
            with alone_in_a_child(), scaled_table(table, self._scaled_parts(table)) as rows:
                return self._learn_score(rows, "rows", "")
        except BaseException:  # an interrupt too
            self._restore(before)
            raise

    def _learnt(self) -> dict[str, Any]:
        """What ``fit_score`` replaces."""
        return {
            name: self.__dict__[name]
            for name in (*LEARNT, "offset_", "_scored_by", "_times_learnt")
            if name in self.__dict__
        }

    def _restore(self, learnt: dict[str, Any]) -> None:
        for name in self._learnt():
            del self.__dict__[name]
        self.__dict__.update(learnt)

    def _learn_score(self, rows: Any, what: str, advice: str) -> NDArray[np.float64]:
        """What the score takes of normal rows, scaled, and the threshold; returns their anomaly scores."""
        model = self.model_
        if self.anomaly_score == "nap":
            self.nap_ = fit_nap(
                model, rows, tolerance=self.nap_tolerance, ridge=self.nap_ridge, **self._pathway_options()
            )
            options.warn_of_few_rows(self.nap_.rank, len(rows))
        if self.anomaly_score == "local":
            self.local_ = fit_local(model, rows, **self._network_options())
        if self.anomaly_score == "hyperplane":
            self.hyperplane_ = fit_hyperplane(model, rows, **self._network_options())
        size = chunk_rows(rows.shape[1])
        parts = watched(chunks(rows, size), -(-len(rows) // size), f"scoring {what}", bool(getattr(self, "verbose", 0)))
        scores = np.concatenate(list(self._scores(parts, own=True)))
        if not np.isfinite(scores).all():
            raise ValueError(
                f"{np.count_nonzero(~np.isfinite(scores))} {what} have no finite score: the network overflows on them"
                f"{advice}"
            )
        self._scored_by = options.scored_by(self)
        self._times_learnt += 1
        self.offset_ = float(np.percentile(-self._as_held_out(scores), 100.0 * self.contamination))
        return scores

    def _as_held_out(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of the rows that the score was learnt from, for a threshold: NAP's as if each had not been there."""
        return held_out(scores) if self.anomaly_score == "nap" else scores

    def _scores(self, rows: Any, *, own: bool = False) -> Iterator[NDArray[np.float64]]:
        """Anomaly scores of scaled rows (an array, or an iterable of chunks), one array a chunk.

        With ``own`` they are those that the score was learnt from: what these become in other views is compared with
        the other rows only.
        """
        options.check_score(self)
        views = options.check_views(self, self.model_.in_features, self.scaler_.kind)
        if views is None:
            return self._scores_as_they_are(rows)
        parts = chunks(rows) if isinstance(rows, np.ndarray) else rows
        return lowest(lambda seen: self._scores_as_they_are(seen, own=own), parts, views)

    def _scores_as_they_are(self, rows: Any, *, own: bool = False) -> Iterator[NDArray[np.float64]]:
        if self.anomaly_score == "sap":
            return sap_parts(self.model_, rows, **self._pathway_options())
        if self.anomaly_score == "nap":
            if not hasattr(self, "nap_"):
                raise _not_learnt("nap")
            return nap_parts(self.model_, self.nap_, rows, **self._pathway_options())
        if self.anomaly_score == "local":
            if not hasattr(self, "local_"):
                raise _not_learnt("local")
            return local_parts(self.model_, self.local_, rows, **self._network_options())
        if self.anomaly_score == "hyperplane":
            if not hasattr(self, "hyperplane_"):
                raise _not_learnt("hyperplane")
            return hyperplane_parts(self.model_, self.hyperplane_, rows, own=own, **self._network_options())
        weight = getattr(self, "kld_weight", 0.0) if self.anomaly_score == "elbo" else 0.0
        return score_parts(self.model_, rows, kld_weight=weight, **self._network_options())


def _not_learnt(score: str) -> NotFittedError:
    return NotFittedError(
        f"anomaly_score={score!r} was set after fit, which took nothing for it of the rows: call fit_score with normal "
        "ones"
    )
