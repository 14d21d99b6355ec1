"""The scikit-learn face: anomaly detectors made of a scaler, an autoencoder and a threshold.

Four classes, one per network. scikit-learn reads a class's parameters from the signature of its ``__init__``, so each
states its own in full; the behaviour is in :mod:`rvae_fast._base_detector`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rvae_fast._base_detector import BaseDetector
from rvae_fast.models import AE, RAE, RVAE, VAE
from rvae_fast.views import ImageViews


class RVAEDetector(BaseDetector):
    """Anomaly detector by a residual variational autoencoder, the article's model.

    The network learns to reconstruct the rows it is given through a narrow code; a row that it reconstructs badly is
    unlike them. With the defaults, a table of some thousand rows takes seconds.

    Parameters
    ----------
    scaler : {"standard", "minmax", None}, default "standard"
        How columns are brought to one scale before the network sees them, found in fp64 and saved with the model: zero
        mean and unit variance, the range [0, 1], or left alone. A constant column is only centred.
    missing : {"error", "mean", "median"}, default "error"
        What a NaN is: an error that names the columns, or a gap to fill with the training column's mean or median.
        An infinite value is always an error.
    latent_features : int, optional
        Width of the code. By default chosen from the number of columns, see Notes.
    n_layers : int, optional
        Linear layers of the encoder, as the article counts, widths falling from the number of columns to the code's.
    widths : sequence of int, optional
        Instead of ``n_layers``: the width of each stage.
    blocks : int or sequence of int, optional
        Residual units of each stage; needs ``widths``.
    order : {"pre", "post"}, default "pre"
        Kind of residual unit, see :class:`rvae_fast.ResidualBlock`.
    dropout : float, default 0.0
        On the branch of every residual unit while training.
    init : {"zero", "default"}, default "zero"
        Start of the residual units, see :class:`rvae_fast.RVAE`.
    activation, negative_slope
        See :class:`rvae_fast.ResidualBlock`.
    likelihood : {"squared", "absolute", "bernoulli"}, default "squared"
        Reconstruction error: squared, absolute, or binary cross-entropy (for values in [0, 1]: ``scaler="minmax"`` or
        None; values beyond the training range then count as its edge).
    kld_weight : float, default 1.0
        Weight of the KL divergence in the training loss (the beta of a beta-VAE). Worth a trial: on tables of
        standardised columns 0.2 found clearly more anomalies in some and clearly fewer in others.
    kld_warmup_epochs : float, default 0.0
        Epochs over which that weight rises from 0.
    anomaly_score : {"reconstruction", "elbo", "sap", "nap", "local", "hyperplane"}, default "reconstruction"
        What a row is scored by: its reconstruction error, as in the article; that plus the weighted KL divergence; or
        RaPP's scores, which compare what the row and its reconstruction become inside the encoder
        (:mod:`rvae_fast.rapp`): the squared differences added up, or their squared Mahalanobis distance; or the local
        score (:mod:`rvae_fast.local`): the error beside those of training rows with a similar code, and NAP inside the
        deeper units; or the hyperplane score (:mod:`rvae_fast.hyperplane`): the distance inside the encoder from the
        plane through the nearest training rows, beside theirs, and NAP. Both keep training rows, the latter up to
        60,000 of them. ``"elbo"`` is for the variational detectors.
    pathway : {"auto", "stages", "units", "branches", "linears", "activations"}, default "auto"
        Where SAP and NAP compare, see :data:`rvae_fast.pathway.PATHWAYS`. ``"auto"`` is the paper's ``"stages"``, but
        for NAP of a residual network ``"units"`` where these have at most 2,000 columns.
    pathway_input : bool or "auto", default "auto"
        Whether SAP and NAP count the difference of the row itself too, as in the paper; ``"auto"`` leaves it out of NAP
        of a residual network, which is the better for it.
    views : {"image"} or "HxW", "CxHxW", mapping, :class:`rvae_fast.views.ImageViews`, optional
        For rows that are flattened images: a row is scored as it is and shifted, turned, zoomed and slanted a little,
        and the lowest score counts (:mod:`rvae_fast.views`). ``"image"`` is a square one of one channel. Needs
        ``scaler=None``; scoring, and the end of ``fit``, take eleven times as long. The network, its codes,
        reconstructions and ``feature_errors`` are the same.
    nap_tolerance, nap_ridge : float, default 1e-10 and 0.0
        Which directions of little variance NAP leaves out, and by how much the others are damped; see
        :func:`rvae_fast.rapp.fit_nap`.
    epochs : int, optional
        By default as many as make about 1000 optimiser steps, but 20 at least and 1000 at most.
    batch_size : int, default 256
    optimizer, learning_rate, weight_decay, warmup_epochs, schedule, max_grad_norm, accumulate
        See :class:`rvae_fast.training.TrainingConfig`.
    validation_fraction : float, default 0.0
        Share of the rows held out to watch the validation loss; the weights of its best epoch are kept.
    patience : int, optional
        Stop after so many epochs without a lower validation loss (by ``min_delta``); needs a ``validation_fraction``.
    min_delta : float, default 0.0
    contamination : float, default 0.1
        Share of the training rows to flag, in (0, 0.5]: it places the threshold and nothing else. By ``"nap"``, and by
        ``"hyperplane"`` of other views, each counts as if it had been held out; scored again it is a little nearer. Of
        fewer than about a thousand rows, which the network knows nearly by heart, the threshold flags most new ones:
        :meth:`cross_calibrate` places one that holds for them.
    random_state : int, RandomState or None, default None
        Seed of initialisation, row order, validation split and sampling. An int makes ``fit`` repeatable.
    device : str, default "auto"
        ``"auto"`` is a CUDA device where there is one.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the training; ``"auto"`` is bf16 where the hardware has it. Scores are computed in fp32 unless it is "bf16".
    checkpoint : path, optional
        File that the state of the training is kept in while it runs.
    resume : bool or "auto", default False
        True continues from ``checkpoint``, with the same data and parameters, and fails where there is none; ``"auto"``
        begins where there is none.
    verbose : int, default 0
        Above 0: a progress bar on standard error.

    Attributes
    ----------
    model_ : RVAE
        The trained network, in eval mode.
    scaler_ : rvae_fast.preprocessing.Scaler
    history_ : rvae_fast.training.History
        Losses by epoch, losses and gradient norms by step.
    n_iter_ : int
        Epochs run.
    offset_ : float
        ``decision_function(X) = score_samples(X) - offset_``; the ``contamination`` quantile of the training scores.
    threshold_ : float
        ``-offset_``: the score above which a row is an anomaly.
    nap_ : rvae_fast.rapp.NAP
        With ``anomaly_score="nap"``: what was learnt from the training rows' differences.
    local_ : rvae_fast.local.Local
        With ``anomaly_score="local"``: what was kept of the training rows.
    hyperplane_ : rvae_fast.hyperplane.Hyperplane
        With ``anomaly_score="hyperplane"``: the same.
    n_features_in_ : int
    feature_names_in_ : ndarray of str
        Where ``fit`` was given a DataFrame with string column names.

    Notes
    -----
    The default network depends on the number of columns *d*. Up to 255: widths 128 and 64 with two and one residual
    units, and a code of about the square root of *d*. From 256 on (images): ``n_layers=10`` and a code of 20, the
    article's. With a code as wide as the table nothing would have to be learnt; a table of one column cannot have a
    narrower one, and is better served by a univariate method.

    Examples
    --------
    >>> import numpy as np
    >>> from rvae_fast import RVAEDetector
    >>> rng = np.random.default_rng(0)
    >>> X = rng.normal(size=(500, 2)) @ rng.normal(size=(2, 8))  # eight columns, two degrees of freedom
    >>> detector = RVAEDetector(epochs=20, random_state=0).fit(X)
    >>> detector.predict(np.r_[X[:1], rng.normal(size=(1, 8))])
    array([ 1, -1])
    """

    _model_class = RVAE

    def __init__(
        self,
        *,
        scaler: str | None = "standard",
        missing: str = "error",
        latent_features: int | None = None,
        n_layers: int | None = None,
        widths: Sequence[int] | None = None,
        blocks: int | Sequence[int] | None = None,
        order: str = "pre",
        dropout: float = 0.0,
        init: str = "zero",
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        likelihood: str = "squared",
        kld_weight: float = 1.0,
        kld_warmup_epochs: float = 0.0,
        anomaly_score: str = "reconstruction",
        pathway: str = "auto",
        pathway_input: bool | str = "auto",
        views: str | Mapping[str, Any] | ImageViews | None = None,
        nap_tolerance: float = 1e-10,
        nap_ridge: float = 0.0,
        epochs: int | None = None,
        batch_size: int = 256,
        optimizer: str = "adamw",
        learning_rate: float | str = "auto",
        weight_decay: float = 0.0,
        warmup_epochs: float | str = "auto",
        schedule: str = "cosine",
        max_grad_norm: float | None = 10.0,
        accumulate: int = 1,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        min_delta: float = 0.0,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        precision: str = "auto",
        checkpoint: str | None = None,
        resume: bool | str = False,
        verbose: int = 0,
    ) -> None:
        self._keep(locals())


class VAEDetector(BaseDetector):
    """Anomaly detector by a plain variational autoencoder; parameters as :class:`RVAEDetector`'s, less the units'."""

    _model_class = VAE

    def __init__(
        self,
        *,
        scaler: str | None = "standard",
        missing: str = "error",
        latent_features: int | None = None,
        n_layers: int | None = None,
        widths: Sequence[int] | None = None,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        likelihood: str = "squared",
        kld_weight: float = 1.0,
        kld_warmup_epochs: float = 0.0,
        anomaly_score: str = "reconstruction",
        pathway: str = "auto",
        pathway_input: bool | str = "auto",
        views: str | Mapping[str, Any] | ImageViews | None = None,
        nap_tolerance: float = 1e-10,
        nap_ridge: float = 0.0,
        epochs: int | None = None,
        batch_size: int = 256,
        optimizer: str = "adamw",
        learning_rate: float | str = "auto",
        weight_decay: float = 0.0,
        warmup_epochs: float | str = "auto",
        schedule: str = "cosine",
        max_grad_norm: float | None = 10.0,
        accumulate: int = 1,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        min_delta: float = 0.0,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        precision: str = "auto",
        checkpoint: str | None = None,
        resume: bool | str = False,
        verbose: int = 0,
    ) -> None:
        self._keep(locals())


class RAEDetector(BaseDetector):
    """Anomaly detector by a residual autoencoder; parameters as :class:`RVAEDetector`'s, less the KL divergence's."""

    _model_class = RAE

    def __init__(
        self,
        *,
        scaler: str | None = "standard",
        missing: str = "error",
        latent_features: int | None = None,
        n_layers: int | None = None,
        widths: Sequence[int] | None = None,
        blocks: int | Sequence[int] | None = None,
        order: str = "pre",
        dropout: float = 0.0,
        init: str = "zero",
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        likelihood: str = "squared",
        anomaly_score: str = "reconstruction",
        pathway: str = "auto",
        pathway_input: bool | str = "auto",
        views: str | Mapping[str, Any] | ImageViews | None = None,
        nap_tolerance: float = 1e-10,
        nap_ridge: float = 0.0,
        epochs: int | None = None,
        batch_size: int = 256,
        optimizer: str = "adamw",
        learning_rate: float | str = "auto",
        weight_decay: float = 0.0,
        warmup_epochs: float | str = "auto",
        schedule: str = "cosine",
        max_grad_norm: float | None = 10.0,
        accumulate: int = 1,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        min_delta: float = 0.0,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        precision: str = "auto",
        checkpoint: str | None = None,
        resume: bool | str = False,
        verbose: int = 0,
    ) -> None:
        self._keep(locals())


class AEDetector(BaseDetector):
    """Anomaly detector by a plain autoencoder; parameters as :class:`RVAEDetector`'s, less the units' and the KL's."""

    _model_class = AE

    def __init__(
        self,
        *,
        scaler: str | None = "standard",
        missing: str = "error",
        latent_features: int | None = None,
        n_layers: int | None = None,
        widths: Sequence[int] | None = None,
        activation: str = "leaky_relu",
        negative_slope: float = 0.01,
        likelihood: str = "squared",
        anomaly_score: str = "reconstruction",
        pathway: str = "auto",
        pathway_input: bool | str = "auto",
        views: str | Mapping[str, Any] | ImageViews | None = None,
        nap_tolerance: float = 1e-10,
        nap_ridge: float = 0.0,
        epochs: int | None = None,
        batch_size: int = 256,
        optimizer: str = "adamw",
        learning_rate: float | str = "auto",
        weight_decay: float = 0.0,
        warmup_epochs: float | str = "auto",
        schedule: str = "cosine",
        max_grad_norm: float | None = 10.0,
        accumulate: int = 1,
        validation_fraction: float = 0.0,
        patience: int | None = None,
        min_delta: float = 0.0,
        contamination: float = 0.1,
        random_state: int | np.random.RandomState | None = None,
        device: str = "auto",
        precision: str = "auto",
        checkpoint: str | None = None,
        resume: bool | str = False,
        verbose: int = 0,
    ) -> None:
        self._keep(locals())


DETECTORS: dict[str, type[BaseDetector]] = {
    detector.__name__: detector for detector in (RVAEDetector, VAEDetector, RAEDetector, AEDetector)
}
