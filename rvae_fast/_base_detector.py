"""What the four detectors share: a scaler, a network, a threshold, and scikit-learn's manners."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import ClassNamePrefixFeaturesOutMixin, TransformerMixin
from sklearn.utils.validation import check_is_fitted

from rvae_fast import _detector_options as options
from rvae_fast import _rng
from rvae_fast._paths import replaceable
from rvae_fast._precision import resolve_device
from rvae_fast._scored import LEARNT, Scored
from rvae_fast._threads import alone_in_a_child
from rvae_fast._training_config import TrainingConfig, check_resume
from rvae_fast._validation import (
    check_choice,
    check_finite,
    check_random,
    check_table,
    check_unit_range,
    name_columns,
    unless_refused,
)
from rvae_fast.models import Autoencoder
from rvae_fast.preprocessing import Scaler, chunks, fit_scaler, scaled_table
from rvae_fast.scoring import network_rows
from rvae_fast.training import History, NonFiniteError, train


class BaseDetector(ClassNamePrefixFeaturesOutMixin, TransformerMixin, Scored):  # type: ignore[misc]
    """Common base of the detectors; make an :class:`~rvae_fast.RVAEDetector` or one of its siblings."""

    _model_class: ClassVar[type[Autoencoder]]

    # Parameters every detector has; the classes set them in their own __init__, as scikit-learn wants it.
    scaler: str | None
    missing: str
    latent_features: int | None
    n_layers: int | None
    widths: Any
    likelihood: str
    random_state: Any
    device: str
    precision: str
    resume: bool | str
    verbose: int

    def fit(self, X: Any, y: Any = None) -> BaseDetector:
        """Learn what normal rows look like.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            Any real dtype, at least 2 rows; it may hold a few anomalies. Left as it is. Of a memory-mapped array
            (``numpy.memmap``) no copy is made in memory: the scaled rows go to a temporary file, 4 bytes a value.
        y : ignored
            Present for scikit-learn's conventions.

        Returns
        -------
        self

        Raises
        ------
        TypeError, ValueError
            Naming the parameter or the columns at fault, what came and what was expected. A detector that was fitted
            before is then as it was.
        rvae_fast.training.NonFiniteError
            When the loss or a gradient becomes NaN or infinite. ``model_`` is then the network of the step before.
        KeyboardInterrupt
            By Ctrl-C, which waits for the end of a step. ``model_`` is the network as that step left it, and
            :meth:`fit_score` of the same rows makes a fitted detector of it.
        """
        scores = self._learn(X)
        if self._keeps_training_scores:
            self._training_scores = scores
        return self

    def _learn(self, X: Any) -> NDArray[np.float64]:
        """What ``fit`` does; returns the training rows' anomaly scores."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(alone_in_a_child(training=True))
            stack.enter_context(torch.inference_mode(False))  # parameters made in there could not be trained
            with unless_refused(self):
                table, config, model, scaler = self._prepare(X)
                for name in ("offset_", *LEARNT):  # not fitted until the end, whatever was before
                    self.__dict__.pop(name, None)
                self.scaler_, self.model_ = scaler, model.eval()
                self.history_, self.n_iter_ = History(), 0  # an earlier fit's is of another network
                rows = stack.enter_context(scaled_table(table, self._scaled_parts(table)))  # a disk may be full
            try:
                self.history_ = train(model, rows, config, resume=self.resume)
            except (KeyboardInterrupt, NonFiniteError) as error:  # what is trained is not lost: see fit_score
                if isinstance(history := getattr(error, "history", None), History):
                    self.history_, self.n_iter_ = history, len(history.epochs)
                raise
            self.n_iter_ = len(self.history_.epochs)
            return self._learn_score(
                rows, "training rows", "; a lower learning_rate, or scaler='standard', prevents that"
            )

    def _prepare(self, X: Any) -> tuple[NDArray[Any], TrainingConfig, Autoencoder, Scaler]:
        """All that comes before the training, and may be refused: the checked rows, and what they are given to."""
        options.check(self)
        # One draw from a RandomState or from NumPy's global one; the same int gives the same detector.
        seed = int(check_random(self.random_state).randint(2**31 - 1))
        table = check_table(self, X, reset=True, min_rows=2)
        options.check_views(self, table.shape[1], self.scaler)
        options.check_enough_rows(self, table)
        config = options.training_config(self, seed, table.shape[0])
        names = getattr(self, "feature_names_in_", None)
        check_finite(chunks(table), names, allow_nan=self.missing != "error")
        # torch's global generator belongs to the user: initialisation draws from a forked one.
        with _rng.seeded(seed):
            model = self._model_class(table.shape[1], **options.model_options(self, table.shape[1]))
        if self.likelihood == "bernoulli" and self.scaler is None:
            check_unit_range(chunks(table), names)
        scaler = fit_scaler(table, self.scaler, self.missing, names)
        if scaler.constant.any():
            warnings.warn(
                f"constant {name_columns(scaler.constant, names)}: nothing to learn there; any other value will count "
                "as an error in its own units",
                UserWarning,
                stacklevel=4,
            )
        check_resume(self.resume, config)
        if config.checkpoint is not None:
            replaceable(config.checkpoint)
        return table, config, model, scaler

    def score_samples(self, X: Any) -> NDArray[np.float64]:
        """Score rows, higher being more normal: minus the reconstruction error (or what ``anomaly_score`` says).

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
            Read in chunks, so a memory-mapped array may be larger than memory.

        Returns
        -------
        ndarray [n_rows] float64
            In scaled units; ``-inf`` for a row on which the network overflows.

        Raises
        ------
        sklearn.exceptions.NotFittedError
        TypeError, ValueError
            For a table of another width or other columns, or with values not finite, naming the columns.
        """
        table = self._check(X)
        with alone_in_a_child():
            return -np.concatenate(list(self._scores(self._scaled_parts(table))))

    def transform(self, X: Any) -> NDArray[Any]:
        """The code of each row ``[n_rows, latent_features]`` (for a VAE its mean), fp32 for fp32 input, else fp64."""
        table = self._check(X)
        return self._network(table, "latent").astype(
            np.float32 if table.dtype == np.float32 else np.float64, copy=False
        )

    def reconstruct(self, X: Any) -> NDArray[np.float64]:
        """What the network makes of each row ``[n_rows, n_features]``, in the units of ``X``."""
        table = self._check(X)
        return self.scaler_.inverse_transform(self._network(table, "reconstruction"))

    def feature_errors(self, X: Any, *, units: str = "input") -> NDArray[np.float64]:
        """Error of each value: which columns make a row anomalous.

        Parameters
        ----------
        X : array-like, DataFrame or Tensor [n_rows, n_features]
        units : {"input", "score"}, default "input"
            ``"input"``: the distance ``|x - reconstruction|`` in the column's own units. ``"score"``: what the column
            adds to the reconstruction error of its row; comparable between columns.

        Returns
        -------
        ndarray [n_rows, n_features] float64
            Infinite where the network overflows. A value beyond a million standard deviations (or ranges) counts as
            one at a million.
        """
        check_choice("units", units, ("input", "score"))
        table = self._check(X)
        if units == "score":
            errors = self._network(table, "feature_error")
            errors[np.isnan(errors)] = np.inf
            return errors
        errors = np.empty(table.shape)
        start = 0
        for scaled in self._scaled_parts(table):
            seen = network_rows(self.model_, scaled, "reconstruction", **self._network_options())
            with np.errstate(invalid="ignore"):
                np.subtract(seen, scaled, out=seen)
            np.multiply(np.abs(seen), self.scaler_.scale, out=errors[start : start + len(seen)])
            start += len(seen)
        errors[np.isnan(errors)] = np.inf
        return errors

    # --- private ---

    def _keep(self, parameters: dict[str, Any]) -> None:
        """Set the parameters of ``__init__``, given its ``locals()``, as attributes, unchecked: scikit-learn's rule."""
        for name, value in parameters.items():
            if name != "self":
                setattr(self, name, value)

    def _network_options(self) -> dict[str, Any]:
        return {"device": resolve_device(self.device, self.model_), "precision": self.precision}

    def _check(self, X: Any) -> NDArray[Any]:
        check_is_fitted(self)
        return check_table(self, X, reset=False)

    def _place(self, offset: float) -> None:
        self._scored_by = options.scored_by(self)
        super()._place(offset)

    def _check_threshold(self) -> None:
        check_is_fitted(self)
        options.check_scored_by(self, self._scored_by)

    def _scaled_parts(self, table: NDArray[Any]) -> Iterator[NDArray[np.float32]]:
        """Filled and scaled chunks of a checked table; values that are no numbers are reported over the whole of it."""
        names = getattr(self, "feature_names_in_", None)
        # By what fit found and made, not by parameters that may have been set since: there may be nothing to fill with.
        allow_nan = self.scaler_.fill is not None and self.missing != "error"
        for part in chunks(table):
            if part.dtype.kind == "f" and not np.isfinite(part).all():
                check_finite(chunks(table), names, allow_nan)
            scaled = self.scaler_.transform(part)
            # The cross-entropy of a target outside [0, 1] is not bounded below: beyond the range seen is its edge.
            yield scaled.clip(0.0, 1.0) if self.model_.likelihood == "bernoulli" else scaled

    def _network(self, table: NDArray[Any], result: str) -> NDArray[np.float64]:
        options = self._network_options()
        return np.concatenate([network_rows(self.model_, p, result, **options) for p in self._scaled_parts(table)])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = self.missing != "error"
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    @property
    def _n_features_out(self) -> int:
        return int(self.model_.latent_features)

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = dict(super().__getstate__())
        model = state.get("model_")
        if model is not None and next(model.parameters()).device.type != "cpu":
            # So that a pickle made on a GPU opens where there is none; scoring moves it again.
            state["model_"] = copy.deepcopy(model).cpu()
        return state
