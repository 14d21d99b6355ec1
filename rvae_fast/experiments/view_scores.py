"""Scores of which the lowest over views of an image counts (:mod:`rvae_fast.views`), all kinds of view in one pass.

A score's name and, after an @, which views: ``views`` for all, or one of :data:`rvae_fast.views.KINDS` for those alone
(``"hyperplane@rotation"``), the row as it is being one of them always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._inside import depth, last_unit
from rvae_fast._modes import in_eval
from rvae_fast._taps import taps
from rvae_fast.experiments.pathway_scores import Scored
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.local import columns_of
from rvae_fast.models import Autoencoder
from rvae_fast.rapp import TILE, pathway_scorer, sap_scores
from rvae_fast.scoring import map_rows, score_rows
from rvae_fast.views import KINDS, ImageViews, as_views, seen

#: Scores that may be followed by an @.
OF = ("reconstruction", "sap", "hyperplane")

#: All views, after the @.
ALL = "views"

#: Validation rows that are seen in every view: all they give is the unit of an ensemble's members.
NORMAL_ROWS = 512

Array = NDArray[np.float64]


def parse(name: str) -> tuple[str, str] | None:
    """Score and views of a name with an @, or None for one without; ValueError for what is not known."""
    score, at, views = name.partition("@")
    if not at:
        return None
    if score not in OF or views not in (ALL, *KINDS):
        raise ValueError(
            f"unknown score {name!r}: before the @ is one of {', '.join(OF)}, after it one of "
            f"{', '.join((ALL, *KINDS))}"
        )
    return score, views


def view_scores(
    model: Autoencoder, names: Sequence[str], train: Any, normal: Any, validation: Any, test: Any
) -> Scored:
    """Scores of validation and test rows, by name: those with an @, and the same ones without.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Of square images of one channel.
    names : sequence of str
    train, normal : ndarray [n, in_features]
        Rows to compare with, for ``hyperplane``.
    validation, test : ndarray [n, in_features]

    Returns
    -------
    dict of (ndarray [n_validation] or, with an @, at most :data:`NORMAL_ROWS`, ndarray [n_test])
    """
    wanted = {name: parsed for name in names if (parsed := parse(name)) is not None}
    found: Scored = {}
    if not wanted:
        return found
    views = as_views("image", test.shape[1])
    assert views is not None
    scores = list(dict.fromkeys(score for score, _ in wanted.values()))
    of = _scorer(model, scores, np.concatenate([train, normal]))
    own = of(validation)
    by_view = [np.stack([of(view) for view in seen(rows, views)]) for rows in (validation[:NORMAL_ROWS], test)]
    for i, score in enumerate(scores):
        if score in names:
            found[score] = (own[:, i], by_view[1][0, :, i])
        for name, (whose, kind) in wanted.items():
            if whose == score:
                which = chosen(views, kind)
                found[name] = tuple(values[which, :, i].min(0) for values in by_view)  # type: ignore[assignment]
    return found


def stage_columns(model: Autoencoder) -> list[tuple[int, int]]:
    """Where the places of ``"stages"``, the input among them, are in the pathway ``"branches"`` with the input."""
    width = model.in_features
    # The branches come between the stages' places, which are taken of their steps' own values.
    steps = [(width + a, width + a + w) for _, a, w, before in taps(model, "branches").tolist() if not before]
    return [(0, width), *steps]


def chosen(views: ImageViews, kind: str) -> list[int]:
    """The numbers of the views of a kind, and of the row as it is."""
    return [i for i, name in enumerate(views.names) if i == 0 or kind in (ALL, name.split()[0])]


def _scorer(model: Autoencoder, scores: Sequence[str], reference: Any) -> Callable[[Any], Array]:
    """From rows to their scores ``[n, scores]``: by one pass of the frozen scorer where there is one."""
    compare = fit_hyperplane(model, reference) if "hyperplane" in scores else None
    scorer = pathway_scorer(model, "branches", {})
    if scorer is None:
        one_by_one = {
            "reconstruction": lambda rows: score_rows(model, rows),
            "sap": lambda rows: sap_scores(model, rows),
            "hyperplane": lambda rows: hyperplane_scores(model, compare, rows),  # type: ignore[arg-type]
        }
        return lambda rows: np.stack([one_by_one[score](rows) for score in scores], 1)
    stages, (start, stop), place = stage_columns(model), columns_of(model, [last_unit(model)])[0], depth(model)
    beside = None if compare is None else compare.scorer()

    def score(rows: Tensor) -> Tensor:
        there = scorer.pathway(rows, "branches", differences=True, inside=place)
        every = there.differences
        assert every is not None
        own = {"reconstruction": there.error.double()}
        if "sap" in scores:
            own["sap"] = torch.cat([every[:, a:b] for a, b in stages], 1).double().square().sum(1)
        if beside is not None:
            inside = rows if there.inside is None else there.inside
            own["hyperplane"] = beside(inside, every[:, model.in_features + start : model.in_features + stop])
        return torch.stack([own[name] for name in scores], 1)

    def of(rows: Any) -> Array:
        with in_eval(model):
            found = map_rows(model, rows, score, batch_size=TILE, row_tile=TILE)
        return np.where(np.isfinite(found), found, np.inf)

    return of
