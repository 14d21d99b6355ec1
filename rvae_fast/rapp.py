"""SAP and NAP: anomaly scores from the way a row and its reconstruction take through the encoder.

Both are RaPP's (Kim et al., ICLR 2020). With ``d`` the differences of :mod:`rvae_fast.pathway` side by side::

    SAP(x) = |d|^2                                 simple aggregation
    NAP(x) = n |S^-1 V^T (d - mean)|^2             normalised aggregation, U S V^T the SVD of the n training rows' d

NAP is the Mahalanobis distance of ``d``, so its singular vectors come from a covariance, which rows stream through: the
matrix of differences ``[n, D]`` never exists. The paper leaves out the factor ``n``, which orders rows in the same way;
with it a training row averages the rank, whatever the size of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._frozen import frozen
from rvae_fast._modes import in_eval
from rvae_fast._whitening import NAP, TOLERANCE, Moments, check_share
from rvae_fast.models import Autoencoder
from rvae_fast.pathway import differences, reconstruct
from rvae_fast.scorer import Scorer
from rvae_fast.scoring import _parts, map_rows

#: Rows that go through the network at once, always so many: matrix products of another number of rows may sum in
#: another order, and a row's score must not depend on how its table comes in. A last batch is padded.
TILE = 256

#: Rows whose differences are gathered before they enter the covariance: fewer would make its additions the main cost.
#: As many go through kernels to which a row is the same however many come with it: there is work for many threads.
GATHERED = 16 * TILE


def sap_scores(
    model: Autoencoder,
    x: Any,
    *,
    pathway: str = "stages",
    include_input: bool = True,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """SAP scores of a table's rows, higher being more anomalous.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Scored as in eval mode; its own mode is left as it was.
    x : ndarray, memory map or Tensor [n, in_features], or an iterable of such chunks
        In the model's units.
    pathway : {"stages", "units", "branches", "linears", "activations"}, default "stages"
        Where row and reconstruction are compared, see :data:`rvae_fast.pathway.PATHWAYS`.
    include_input : bool, default True
        Whether the input itself counts, as in the paper.
    device, precision
        See :func:`rvae_fast.scoring.score_rows`.

    Returns
    -------
    ndarray [n] float64
        Infinite for a row on which the network overflows.

    Raises
    ------
    TypeError, ValueError
        Naming the argument.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE
    >>> from rvae_fast.rapp import sap_scores
    >>> sap_scores(RVAE(16, latent_features=4, n_layers=4), torch.rand(3, 16)).shape
    (3,)
    """
    options = {"device": device, "precision": precision}
    parts = list(sap_parts(model, x, pathway, include_input, **options))
    return np.concatenate(parts) if parts else np.empty(0)


def sap_parts(
    model: Autoencoder, x: Any, pathway: str = "stages", include_input: bool = True, **options: Any
) -> Iterator[NDArray[np.float64]]:
    """:func:`sap_scores` as a generator: one array of scores per chunk of ``x``."""

    scorer = pathway_scorer(model, pathway, options)
    x_hat = _reconstructor(model, options)

    def score(rows: Tensor) -> Tensor:
        if scorer is not None:
            return scorer.pathway(rows, pathway, include_input=include_input).sap
        total = torch.zeros(rows.shape[0], dtype=_wide(rows), device=rows.device)
        for d in differences(model, rows, x_hat(rows), pathway, include_input):
            total += d.float().square().sum(1) if d.dtype != torch.float64 else d.square().sum(1)
        return total

    return scored_parts(model, x, score, options)


def fit_nap(
    model: Autoencoder,
    x: Any,
    *,
    pathway: str = "stages",
    include_input: bool = True,
    tolerance: float = TOLERANCE,
    ridge: float = 0.0,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NAP:
    """Find NAP's whitening on normal rows, normally those the model was trained on.

    Parameters
    ----------
    model, x, pathway, include_input, device, precision
        As for :func:`sap_scores`; at least 2 rows.
    tolerance : float, default 1e-10
        Directions of less variance than this share of the largest are left out.
    ridge : float, default 0.0
        Added to every variance, in units of the mean variance kept: directions of little variance then count less.
        Zero is the paper's.

    Returns
    -------
    NAP

    Notes
    -----
    Memory: the scatter matrix ``[D, D]`` in fp64 and up to 4096 rows of differences ``[4096, D]``, ``D`` being the sum
    of the places' widths.
    """
    check_share("tolerance", tolerance)
    check_share("ridge", ridge)
    options: dict[str, Any] = {"device": device, "precision": precision}
    return moments_of(model, x, observer(model, pathway, include_input, options), options).whiten(tolerance, ridge)


def nap_scores(
    model: Autoencoder,
    nap: NAP,
    x: Any,
    *,
    pathway: str = "stages",
    include_input: bool = True,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """NAP scores of a table's rows, higher being more anomalous: the squared Mahalanobis distance of the differences.

    Parameters
    ----------
    nap : NAP
        From :func:`fit_nap`, with the same ``pathway`` and ``include_input``.
    model, x, pathway, include_input, device, precision
        As for :func:`sap_scores`.

    Returns
    -------
    ndarray [n] float64
        A training row averages ``nap.rank`` (less with a ridge). Infinite for a row on which the network overflows.

    Raises
    ------
    ValueError
        When ``nap`` was fitted to another pathway.
    """
    options = {"device": device, "precision": precision}
    parts = list(nap_parts(model, nap, x, pathway, include_input, **options))
    return np.concatenate(parts) if parts else np.empty(0)


def nap_parts(
    model: Autoencoder, nap: NAP, x: Any, pathway: str = "stages", include_input: bool = True, **options: Any
) -> Iterator[NDArray[np.float64]]:
    """:func:`nap_scores` as a generator: one array of scores per chunk of ``x``."""

    observe = observer(model, pathway, include_input, options)
    project: Callable[[Tensor], Tensor] | None = None

    def score(rows: Tensor) -> Tensor:
        nonlocal project
        d = observe(rows)
        if d.shape[1] != len(nap.mean):
            raise ValueError(
                f"nap was fitted to {len(nap.mean)} differences; pathway {pathway!r} of this model has {d.shape[1]}"
            )
        project = nap.scorer(d.device) if project is None else project
        return project(d)

    return scored_parts(model, x, score, options)


# --- private ---


def moments_of(model: Autoencoder, x: Any, observe: Callable[[Tensor], Tensor], options: dict[str, Any]) -> Moments:
    """Mean and scatter of what ``observe`` makes of a table's rows.

    Raises
    ------
    ValueError
        Where rows overflow the network: of infinite differences there is no covariance.
    """
    moments, overflown = Moments(), 0
    with in_eval(model):
        for part in _parts(x):
            # Not a whole chunk at once: its differences would be several times the chunk itself.
            for start in range(0, part.shape[0], GATHERED):
                rows = part[start : start + GATHERED]
                seen = map_rows(model, rows, observe, batch_size=TILE, row_tile=TILE, **options)
                overflown += int(np.count_nonzero(~np.isfinite(seen).all(axis=1)))
                moments.update(seen)
    if overflown:
        raise ValueError(f"{overflown} rows overflow the network: NAP finds no covariance of their differences")
    return moments


def _wide(rows: Tensor) -> torch.dtype:
    return torch.float32 if rows.device.type == "mps" else torch.float64


def pathway_scorer(model: Autoencoder, pathway: str, options: dict[str, Any]) -> Scorer | None:
    """The model's frozen scorer as it is now, if there is one that goes the pathway in one native call."""
    scorer = _native_scorer(model, options)
    return scorer if scorer is not None and pathway in scorer.pathways else None


def _native_scorer(model: Autoencoder, options: dict[str, Any]) -> Scorer | None:
    device = options.get("device")
    at = next(model.parameters()).device if device is None else torch.device(device)
    return frozen(model, options.get("precision", "auto")) if at.type == "cpu" else None


def _reconstructor(model: Autoencoder, options: dict[str, Any]) -> Callable[[Tensor], Tensor]:
    """:func:`reconstruct` of the model as it is now, through its frozen scorer where there is one."""
    scorer = _native_scorer(model, options)
    if scorer is None:
        return lambda rows: reconstruct(model, rows)
    return lambda rows: cast(Tensor, scorer.detailed(rows, reconstruction=True).reconstruction)


def observer(
    model: Autoencoder, pathway: str, include_input: bool, options: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Rows to their differences, place beside place."""
    scorer = pathway_scorer(model, pathway, options)
    if scorer is not None:
        return lambda rows: cast(
            Tensor, scorer.pathway(rows, pathway, include_input=include_input, differences=True).differences
        )
    x_hat = _reconstructor(model, options)

    def observe(rows: Tensor) -> Tensor:
        found = differences(model, rows, x_hat(rows), pathway, include_input)
        d = torch.cat([part.to(rows.dtype) for part in found], 1)
        return d.cpu() if d.device.type == "mps" else d  # no fp64 there

    return observe


def scored_parts(
    model: Autoencoder, x: Any, score: Callable[[Tensor], Tensor], options: dict[str, Any], *, row_tile: int = TILE
) -> Iterator[NDArray[np.float64]]:
    """``score`` of a table's rows, tile by tile, each filled up to ``row_tile`` rows: one array per chunk of ``x``."""
    batch_size = GATHERED if row_tile == 1 else TILE
    for part in _parts(x):
        with in_eval(model):
            scores = map_rows(model, part, score, batch_size=batch_size, row_tile=row_tile, **options)
        # An overflow anywhere on the way: the network has never seen anything like this row.
        scores[~np.isfinite(scores)] = np.inf
        yield scores
