"""SAP and NAP of many places at once: what an experiment compares is found by one pass a pathway.

A score's name is a kind, and a place after a slash (``"nap-/units"``); without one it is that of the first pathway,
RaPP's.

``sap``, ``nap``
    RaPP's, see :mod:`rvae_fast.rapp`.
``ridge``
    NAP with a ridge of one mean variance: directions in which normal rows hardly vary do not decide.
``sap-``, ``nap-``, ``ridge-``
    The same without the input's difference.

A place is one of :data:`rvae_fast.pathway.PATHWAYS`, or a single one of its places, counted from 1 in the order of
:func:`rvae_fast.pathway.hidden` (``"nap/branches:3"``); in that the input never counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._modes import in_eval
from rvae_fast._whitening import Moments
from rvae_fast.models import Autoencoder
from rvae_fast.pathway import PATHWAYS, hidden
from rvae_fast.rapp import TILE, moments_of, observer
from rvae_fast.scoring import map_rows

KINDS = ("sap", "sap-", "nap", "nap-", "ridge", "ridge-")

#: Training rows that NAP's covariance is taken of, the first of their random order: all of an image data set's would
#: take as long as two epochs of training.
NAP_ROWS = 10_000

#: Of ``ridge``, in mean variances of the directions kept.
RIDGE = 1.0

Scored = dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]]
Score = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PathwayScore:
    """A score's name, taken apart.

    Attributes
    ----------
    kind : {"sap", "nap", "ridge"}
    pathway : str
    place : int or None
        From 1; None for all of the pathway's.
    include_input : bool
    """

    kind: str
    pathway: str
    place: int | None
    include_input: bool


def parse(name: str) -> PathwayScore | None:
    """The parts of a score's name, or None for a name of another kind; ValueError for a place that cannot be."""
    kind, slash, where = name.partition("/")
    if kind not in KINDS:
        return None
    pathway, colon, number = where.partition(":")
    if (slash and pathway not in PATHWAYS) or (colon and not (number.isdecimal() and int(number) > 0)):
        raise ValueError(
            f"unknown score {name!r}: its place must be one of {', '.join(PATHWAYS)}, or one of these with :N"
        )
    if colon and kind.endswith("-"):
        raise ValueError(f"the score {name!r} leaves out the input, which does not count in a single place")
    include_input = not kind.endswith("-") and not colon
    return PathwayScore(kind.rstrip("-"), pathway or "stages", int(number) if colon else None, include_input)


def pathway_scores(model: Autoencoder, names: Sequence[str], train: Any, validation: Any, test: Any) -> Scored:
    """Scores of validation and test rows, by name, each pathway gone once.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
    names : sequence of str
        Each of the form above.
    train, validation, test : ndarray [n, in_features]
        Training and validation rows in random order; NAP is fitted to the first :data:`NAP_ROWS` training rows.

    Returns
    -------
    dict of (ndarray [n_validation], ndarray [n_test]) float64
        Infinite for a row on which the network overflows.

    Raises
    ------
    ValueError
        For a place that the model does not have.
    """
    found: Scored = {}
    by_pathway: dict[str, dict[str, PathwayScore]] = {}
    for name in names:
        parts = parse(name)
        assert parts is not None, name
        by_pathway.setdefault(parts.pathway, {})[name] = parts
    for pathway, wanted in by_pathway.items():
        observe = observer(model, pathway, True, {})
        ends = _ends(model, pathway, train[:1])
        columns = {name: _columns(name, parts, ends) for name, parts in wanted.items()}
        moments = None
        if any(parts.kind != "sap" for parts in wanted.values()):
            moments = moments_of(model, train[:NAP_ROWS], observe, {})
        scores = _score_by_columns(wanted, columns, moments)

        def score(rows: Tensor, observe: Score = observe, scores: Score = scores) -> Tensor:
            return scores(observe(rows).double())

        with in_eval(model):
            both = [map_rows(model, x, score, batch_size=TILE, row_tile=TILE) for x in (validation, test)]
        both = [np.where(np.isnan(values), np.inf, values) for values in both]
        found.update({name: (both[0][:, i], both[1][:, i]) for i, name in enumerate(wanted)})
    return found


def _ends(model: Autoencoder, pathway: str, row: Any) -> list[int]:
    """Where in a pathway's differences side by side the input's end, and those of each place."""
    with in_eval(model), torch.no_grad():
        first = torch.as_tensor(np.asarray(row), dtype=torch.float32).to(next(model.parameters()).device)
        widths = [place.shape[1] for place in hidden(model, first, pathway)]
    return list(itertools.accumulate([model.in_features, *widths]))


def _columns(name: str, parts: PathwayScore, ends: list[int]) -> tuple[int, int]:
    """From which to which column of a pathway's differences the score is taken."""
    if parts.place is None:
        return (0 if parts.include_input else ends[0]), ends[-1]
    if parts.place >= len(ends):
        raise ValueError(f"the score {name!r} is of place {parts.place}: there are {len(ends) - 1} in this model")
    return ends[parts.place - 1], ends[parts.place]


def _score_by_columns(
    wanted: dict[str, PathwayScore], columns: dict[str, tuple[int, int]], moments: Moments | None
) -> Score:
    """Scores ``[n, len(wanted)]`` of differences ``[n, D]``: NAP and its ridge share a projection."""
    projections: dict[tuple[int, int], tuple[Score, Tensor]] = {}
    for name, parts in wanted.items():
        where = columns[name]
        if parts.kind == "sap" or where in projections:
            continue
        assert moments is not None
        nap = _part(moments, *where).whiten()
        mean, whitening = torch.from_numpy(nap.mean), torch.from_numpy(nap.whitening)
        # A whitened direction's length is one over its standard deviation, the directions themselves being of length 1.
        variance = 1.0 / whitening.square().sum(0)
        shrunk = variance / (variance + RIDGE * variance.mean())

        def project(d: Tensor, mean: Tensor = mean, whitening: Tensor = whitening) -> Tensor:
            return ((d - mean) @ whitening).square()

        projections[where] = project, shrunk

    def score(d: Tensor) -> Tensor:
        d = d.cpu()
        squares = {where: project(d[:, slice(*where)]) for where, (project, _) in projections.items()}
        results = []
        for name, parts in wanted.items():
            where = columns[name]
            if parts.kind == "sap":
                results.append(d[:, slice(*where)].square().sum(1))
            elif parts.kind == "nap":
                results.append(squares[where].sum(1))
            else:
                results.append(squares[where] @ projections[where][1])
        return torch.stack(results, 1)

    return score


def _part(moments: Moments, first: int, end: int) -> Moments:
    """The moments of some of the columns."""
    part = Moments()
    part.count, part.mean = moments.count, moments.mean[first:end].copy()
    part.scatter = moments.scatter[first:end, first:end].copy()
    return part
