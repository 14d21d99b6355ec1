"""From a detector's parameters to the arguments of its network and of its training."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from rvae_fast._architecture import check_number
from rvae_fast._paths import replaceable
from rvae_fast._precision import resolve_device
from rvae_fast._training_config import TrainingConfig, check_resume
from rvae_fast._validation import check_choice, check_contamination, check_random
from rvae_fast._whitening import check_share
from rvae_fast.pathway import PATHWAYS
from rvae_fast.preprocessing import MISSING, SCALERS
from rvae_fast.views import ImageViews, as_views

ANOMALY_SCORES = ("reconstruction", "elbo", "sap", "nap", "local", "hyperplane")

#: Optimiser steps after which a table of some thousand rows is learnt well enough.
STEPS = 1000

#: Parameters that the network takes under the same name, where the detector has them.
_MODEL = ("activation", "negative_slope", "likelihood", "order", "dropout", "init")

#: Those that the training takes.
_TRAINING = (
    "epochs", "batch_size", "optimizer", "learning_rate", "weight_decay", "warmup_epochs", "schedule", "max_grad_norm",
    "accumulate", "validation_fraction", "patience", "min_delta", "kld_weight", "kld_warmup_epochs", "precision",
    "device", "checkpoint",
)  # fmt: skip


def default_architecture(n_features: int) -> dict[str, Any]:
    """Network for a table of so many columns: ``latent_features`` and either ``n_layers`` or ``widths`` and ``blocks``.

    Up to 255 columns the rows are lifted to 128 features, narrowed to 64, and reduced to a code of about the square
    root of the number of columns: with the width of a narrow table itself, the residual units would have nothing to
    compute with. From 256 columns on (images), the article's ten layers, from the input's width to a code of 20.
    """
    if n_features >= 256:
        return {"latent_features": 20, "n_layers": 10}
    return {"latent_features": max(1, round(math.sqrt(n_features))), "widths": [128, 64], "blocks": [2, 1]}


def default_epochs(n_rows: int, batch_size: int, accumulate: int = 1) -> int:
    """Epochs for a table of so many rows: about :data:`STEPS` optimiser steps' worth, within 20 and 1000."""
    return min(1000, max(20, math.ceil(STEPS * batch_size * accumulate / n_rows)))


def check(detector: Any) -> None:
    """Check the parameters that neither the network nor the training checks, naming the one at fault."""
    check_contamination(detector.contamination)
    check_choice("scaler", detector.scaler, SCALERS)
    check_choice("missing", detector.missing, MISSING)
    check_score(detector)
    check_random(detector.random_state)
    for name in ("nap_tolerance", "nap_ridge"):
        check_share(name, getattr(detector, name))
    if detector.nap_tolerance >= 1:  # found when the score is learnt, too, but that is after the training
        raise ValueError(f"nap_tolerance must be below 1 to keep a direction, got {detector.nap_tolerance!r}")
    if not isinstance(detector.verbose, (bool, int, np.integer)):
        raise TypeError(f"verbose must be an integer or a bool, got {detector.verbose!r}")
    if detector.likelihood == "bernoulli" and detector.scaler == "standard":
        raise ValueError(
            "likelihood='bernoulli' needs values in [0, 1], which scaler='standard' does not give: use "
            "scaler='minmax', or scaler=None for data that are there already"
        )


def check_score(detector: Any) -> None:
    """Check the parameters that say what rows are scored by, which may be set on a fitted detector too."""
    variational = detector._model_class.is_variational
    check_choice("anomaly_score", detector.anomaly_score, [s for s in ANOMALY_SCORES if variational or s != "elbo"])
    check_choice("pathway", detector.pathway, ("auto", *PATHWAYS))
    given = detector.pathway_input
    if not isinstance(given, (bool, np.bool_)) and not (isinstance(given, str) and given == "auto"):
        raise TypeError(f"pathway_input must be True, False or 'auto', got {given!r}")
    if detector.anomaly_score == "elbo":
        weight = detector.kld_weight
        check_number("kld_weight", weight, "of at least 0")
        if not 0 <= weight < math.inf:
            raise ValueError(f"kld_weight must be at least 0 and finite, got {weight!r}")


def check_before_fit(detector: Any, table: Any) -> None:
    """Raise what the parameters would make ``fit`` raise, before anything is trained.

    Parameters
    ----------
    detector : detector
    table : ndarray [n_rows, n_features]
    """
    check(detector)
    check_views(detector, table.shape[1], detector.scaler)
    check_enough_rows(detector, table)
    config = training_config(detector, 0, table.shape[0])
    check_resume(detector.resume, config)
    with torch.device("meta"):  # no memory, no random numbers
        detector._model_class(table.shape[1], **model_options(detector, table.shape[1]))
    resolve_device(detector.device)
    if config.checkpoint is not None:
        replaceable(config.checkpoint)


def check_views(detector: Any, n_features: int, scaler: str | None) -> ImageViews | None:
    """The views that ``detector.views`` stands for, or an error that says what is wrong with it.

    Parameters
    ----------
    detector : detector
    n_features : int
    scaler : str or None
        What its rows are, or will be, scaled by.
    """
    views = as_views(detector.views, n_features)
    if views is not None and scaler is not None:
        raise ValueError(
            f"views needs scaler=None, got scaler={scaler!r}: scaled one by one, the pixels of an image that is moved "
            "are those of another. Bring all of them to [0, 1] together before"
        )
    return views


#: Rows that a score compares with each other, at least, and whether equal ones count as one.
_FEWEST_ROWS = {"local": (3, "rows"), "hyperplane": (4, "distinct rows")}

#: Rows that are looked at together for distinct ones; nearly always the first of them are enough.
_FEW = 1000


def check_enough_rows(detector: Any, table: NDArray[Any]) -> None:
    """Raise a ValueError for fewer rows than the anomaly score compares: before a training, which would be for nothing.

    Parameters
    ----------
    detector : detector
    table : ndarray [n_rows, n_features]
    """
    fewest, what = _FEWEST_ROWS.get(detector.anomaly_score, (0, ""))
    n_rows = len(table)
    if fewest and what == "distinct rows":
        n_rows = _distinct_rows(table, fewest)
    if n_rows < fewest:
        raise ValueError(
            f"anomaly_score={detector.anomaly_score!r} compares rows with each other: X must have at least {fewest} "
            f"{what}, got {n_rows}"
        )


def _distinct_rows(table: NDArray[Any], enough: int) -> int:
    """How many rows differ, counted no further than to ``enough``; NaN, which will be filled, is like NaN."""
    found: list[NDArray[Any]] = []
    for start in range(0, len(table), _FEW):
        rows = np.asarray(table[start : start + _FEW])
        if rows.dtype.kind == "f":
            rows = np.where(np.isnan(rows), np.inf, rows)
        for one in found:
            rows = rows[(rows != one).any(axis=1)]
        while len(rows) and len(found) < enough:
            found.append(rows[0])
            rows = rows[(rows != rows[0]).any(axis=1)]
        if len(found) == enough:
            break
    return len(found)


def scored_by(detector: Any) -> dict[str, Any]:
    """The parameters that say what a row is scored by: a threshold holds for the scores of these values alone."""
    check_score(detector)
    names = {"elbo": ("kld_weight",), "sap": ("pathway", "pathway_input"), "nap": ("pathway", "pathway_input")}
    score = detector.anomaly_score
    views = detector.views.describe() if isinstance(detector.views, ImageViews) else copy.deepcopy(detector.views)
    return {name: getattr(detector, name) for name in ("anomaly_score", *names.get(score, ()))} | {"views": views}


def check_scored_by(detector: Any, fitted: dict[str, Any]) -> None:
    """Raise a NotFittedError unless ``detector`` still scores by what it did when its threshold was placed."""
    now = scored_by(detector)
    if now != fitted:
        changed = ", ".join(f"{name}={value!r}" for name, value in now.items() if fitted.get(name, value) != value)
        was = ", ".join(f"{name}={value!r}" for name, value in fitted.items())
        raise NotFittedError(
            f"{changed} was set after fit, whose threshold is one of {was}: learn one for this score by "
            "fit_score, place one by calibrate, or compare score_samples with one of your own"
        )


def warn_of_few_rows(rank: int, n_rows: int, *, copies: bool = False) -> None:
    """Warn where NAP has seen too few rows for a threshold among their scores to mean anything for others.

    With about a direction a row, all of them are at the same distance, and nearly every new row beyond it. Nor do the
    ``copies`` of a cross-calibration tell more, which have seen fewer rows and so fewer directions: of 200 rows the
    threshold flagged 45 % of the new ones where a tenth was asked for, of 450 none.
    """
    if n_rows < 1.5 * rank:
        tells = "a copy that has seen fewer of them scores otherwise, and the" if copies else (
            "nearly every new row lies outside them, and the"
        )  # fmt: skip
        warnings.warn(
            f"anomaly_score='nap' found {rank} directions in {n_rows} rows: {tells} threshold tells little. Give it "
            "three times as many rows, take another pathway or anomaly_score, or place the threshold by calibrate, "
            "with rows that were held out",
            UserWarning,
            stacklevel=3 if copies else 5,
        )


def training_config(detector: Any, seed: int, n_rows: int) -> TrainingConfig:
    """The training's configuration; its own checks name what is wrong."""
    # A resumed run without a random_state has its seed in the checkpoint.
    given_seed = None if detector.resume and detector.random_state is None else seed
    given = {name: getattr(detector, name) for name in _TRAINING if hasattr(detector, name)}
    epochs = given.pop("epochs")
    config = TrainingConfig(**given, seed=given_seed, progress=bool(detector.verbose))
    if epochs is None:
        held = 1.0 - config.validation_fraction
        epochs = default_epochs(max(1, round(n_rows * held)), config.batch_size, config.accumulate)
    return dataclasses.replace(config, epochs=epochs)


def model_options(detector: Any, n_features: int) -> dict[str, Any]:
    """The network's arguments: those given, and for those left None the ones that suit the number of columns."""
    chosen = default_architecture(n_features)
    options = {name: getattr(detector, name) for name in _MODEL if hasattr(detector, name)}
    latent = detector.latent_features
    options["latent_features"] = chosen["latent_features"] if latent is None else latent
    blocks = getattr(detector, "blocks", None)
    if detector.widths is not None:
        if detector.n_layers is not None:
            raise ValueError(
                f"n_layers and widths both say how deep the network is: leave one of them None, got "
                f"n_layers={detector.n_layers!r} and widths={detector.widths!r}"
            )
        options["widths"] = detector.widths
    elif detector.n_layers is None and "widths" in chosen:
        options["widths"] = chosen["widths"]
        blocks = chosen["blocks"] if blocks is None else blocks
    else:
        options["n_layers"] = chosen["n_layers"] if detector.n_layers is None else detector.n_layers
    if hasattr(detector, "blocks"):
        options["blocks"] = blocks
    return options
