"""The scores whose AUROC a cell records, by name: fitted on training and validation rows, taken of test rows.

``reconstruction``, ``elbo``
    The article's score, and that plus the KL divergence.
``sap``, ``nap``, ``ridge``, or one of them with a place, such as ``nap/units``
    RaPP's and NAP with a ridge, see :mod:`rvae_fast.experiments.pathway_scores`.
``local``
    The error beside those of rows with a similar code, and NAP in the deeper units, see :mod:`rvae_fast.local`.
``hyperplane``
    The distance from the plane through the nearest training and validation rows, and NAP, see
    :mod:`rvae_fast.hyperplane`. The more rows there are to compare with, the better it is, and both are normal.
``pixel``
    Per-pixel likelihood: squared errors divided by each pixel's mean squared error on the validation rows.
``samples``
    Reconstruction error averaged over samples of z instead of that of its mean.
``rank``
    Rank sum of the scores named before it: each score is replaced by the share of validation rows below it.
``reconstruction@views`` and the like
    The lowest over views of an image, see :mod:`rvae_fast.experiments.view_scores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._ensemble_members import IN_THEIR_OWN_UNITS as ALIKE
from rvae_fast._modes import in_eval
from rvae_fast.experiments import view_scores
from rvae_fast.experiments.pathway_scores import NAP_ROWS, Scored, parse, pathway_scores
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.local import columns_of, fit_local, local_scores, places
from rvae_fast.models import Autoencoder
from rvae_fast.pathway import reconstruct
from rvae_fast.rapp import TILE, fit_nap, pathway_scorer
from rvae_fast.scoring import map_rows, score_rows

#: Samples of z for ``samples``.
SAMPLES = 16

#: Validation rows that are scored: they set the unit of an ensemble's members, the ranks and the pixels' errors.
NORMAL_ROWS = 4096

#: Scores that a normal row has about 0 of, or ranks: those of several models need no common unit.
IN_THEIR_OWN_UNITS = (*ALIKE, "rank")


def check_score(name: str) -> None:
    """Raise a ValueError that names an unknown score."""
    if view_scores.parse(name) is not None:
        return
    if parse(name) is None and name not in ("reconstruction", "elbo", *IN_THEIR_OWN_UNITS, "pixel", "samples"):
        raise ValueError(f"unknown score {name!r}")


def unit(name: str, normal: NDArray[np.float64]) -> float:
    """What the scores of one model of several are divided by: the mean of normal rows, or 1 for what has a unit."""
    return 1.0 if name.partition("@")[0] in IN_THEIR_OWN_UNITS else float(np.mean(normal))


def all_scores(model: Autoencoder, names: Sequence[str], train: Any, validation: Any, test: Any, seed: int) -> Scored:
    """Scores of validation and test rows, by name.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
    names : sequence of str
    train, validation, test : ndarray [n, in_features]
        Training and validation rows in random order; see :data:`NAP_ROWS` and :data:`NORMAL_ROWS`.
    seed : int
        Of the samples of z.

    Returns
    -------
    dict of (ndarray [n_validation], ndarray [n_test])
    """
    for name in names:
        check_score(name)
    normal, validation = validation, validation[:NORMAL_ROWS]
    found = view_scores.view_scores(model, names, train, normal, validation, test)
    found.update(_together(model, [name for name in names if name not in found], train, validation, test))
    along = [name for name in names if name not in found and parse(name) is not None]
    found.update(pathway_scores(model, along, train, validation, test))
    for name in names:
        if name in found:
            continue
        if name == "local":
            local = fit_local(model, train)
            found[name] = (local_scores(model, local, validation), local_scores(model, local, test))
        elif name == "hyperplane":
            hyperplane = fit_hyperplane(model, np.concatenate([train, normal]))
            found[name] = (hyperplane_scores(model, hyperplane, validation), hyperplane_scores(model, hyperplane, test))
        elif name == "pixel":
            found[name] = _pixel(model, validation, test)
        elif name == "samples":
            found[name] = (_sampled(model, validation, seed), _sampled(model, test, seed))
        elif name != "rank":
            weight = 1.0 if name == "elbo" else 0.0
            found[name] = tuple(score_rows(model, x, kld_weight=weight) for x in (validation, test))  # type: ignore[assignment]
    if "rank" in names:
        before = names[: names.index("rank")]
        if not before:
            raise ValueError("rank is the rank sum of the scores named before it, and there are none")
        found["rank"] = _rank([found[name] for name in before])
    return found


#: Scores that one pass of the frozen scorer has all it takes for.
TOGETHER = ("reconstruction", "sap", "nap", "local")


def _together(model: Autoencoder, names: Sequence[str], train: Any, validation: Any, test: Any) -> Scored:
    """Those of :data:`TOGETHER` that are asked for, if they are several and the model has a native scorer."""
    wanted = [name for name in TOGETHER if name in names]
    scorer = pathway_scorer(model, "branches", {})
    if scorer is None or len(wanted) < 2:
        return {}
    nap = fit_nap(model, train[:NAP_ROWS]) if "nap" in wanted else None
    local = fit_local(model, train) if "local" in wanted else None
    project = None if nap is None else nap.scorer(torch.device("cpu"))
    compare = None if local is None else local.scorer()
    stages = view_scores.stage_columns(model)
    local_columns = [(model.in_features + a, model.in_features + b) for a, b in columns_of(model, places(model))]

    def score(rows: Tensor) -> Tensor:
        seen = scorer.pathway(rows, "branches", latent=True, differences=True)
        every, code = seen.differences, seen.latent
        assert every is not None
        assert code is not None
        own = {"reconstruction": seen.error.double()}
        along = torch.cat([every[:, a:b] for a, b in stages], 1)
        own["sap"] = along.double().square().sum(1)
        if project is not None:
            own["nap"] = project(along)
        if compare is not None:
            own["local"] = compare(seen.error, code, [every[:, a:b] for a, b in local_columns])
        return torch.stack([own[name] for name in wanted], 1)

    both = []
    with in_eval(model):
        for x in (validation, test):
            scores = map_rows(model, x, score, batch_size=TILE, row_tile=TILE)
            both.append(np.where(np.isnan(scores), np.inf, scores))
    return {name: (both[0][:, i], both[1][:, i]) for i, name in enumerate(wanted)}


def _pixel(model: Autoencoder, validation: Any, test: Any) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    def squared(x: Any) -> NDArray[np.float64]:
        with in_eval(model):
            return map_rows(model, x, lambda rows: (reconstruct(model, rows) - rows).square())

    errors = squared(validation)
    mean = errors.mean(axis=0)
    # A pixel that is always black has next to no error: without a floor one stray dot there would decide everything.
    mean = mean + 1e-2 * mean.mean()
    return (errors / mean).sum(axis=1), (squared(test) / mean).sum(axis=1)


def _sampled(model: Autoencoder, x: Any, seed: int) -> NDArray[np.float64]:
    if not model.is_variational:
        return score_rows(model, x)
    generator = torch.Generator().manual_seed(seed)

    def score(rows: Tensor) -> Tensor:
        mu, logvar = model.encode(rows)
        total = torch.zeros(len(rows), device=rows.device)
        for _ in range(SAMPLES):
            noise = torch.randn(mu.shape, generator=generator).to(mu.device)
            z = mu + torch.exp(0.5 * logvar) * noise
            total += (model.decode(z) - rows).square().sum(1)
        return total / SAMPLES

    with in_eval(model):
        return map_rows(model, x, score)


def _rank(scored: list[tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Any:
    """Sum over the scores of the share of validation rows below, each smoothed so that it grows beyond the largest."""
    totals: list[Any] = [0.0, 0.0]
    for validation, test in scored:
        ordered = np.sort(validation)
        for i, values in enumerate((validation, test)):
            share = np.searchsorted(ordered, values) / (len(ordered) + 1)
            # Most novel rows lie above all normal ones, where shares tie: there the distance orders them.
            beyond = np.maximum(values / max(float(ordered[-1]), np.finfo(float).tiny), 1.0)
            totals[i] = totals[i] + share + np.log(beyond)
    return totals[0], totals[1]
