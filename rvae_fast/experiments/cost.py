"""What taking scores costs, in rows of training: for the estimate that is shown before a grid is run.

The figures are those of ten layers on images (MNIST, one core of an EPYC Zen 4, 2026-11-27), where a row takes 0.2 ms
an epoch to train, and rough: other networks take other shares.
"""

from __future__ import annotations

from collections.abc import Sequence

from rvae_fast.experiments import view_scores
from rvae_fast.experiments.pathway_scores import NAP_ROWS, parse
from rvae_fast.views import ImageViews

#: A scored row.
ROW = {"reconstruction": 0.7, "elbo": 0.7, "local": 2.0, "hyperplane": 1.6, "pixel": 1.0, "samples": 16.0, "rank": 0.0}
SAP = 0.3
NAP, NAP_OF_MANY, OF_ONE_PLACE = 1.0, 1.5, 0.1

#: A row that a score learns from.
LEARNT = {"local": 1.0, "hyperplane": 2.0}

#: The eigenvectors of a whole pathway: few columns hand the stages on, many the units and the branches.
EIGENVECTORS = {"stages": 7_000.0, "units": 50_000.0, "branches": 50_000.0}

#: Views of an image, as many times the row.
VIEWS = len(ImageViews((28, 28)))


def rows_of_training(names: Sequence[str], train: int, validation: int, test: int) -> float:
    """The time that scores take, as a number of rows that are trained for an epoch.

    Parameters
    ----------
    names : sequence of str
        Scores, as in :mod:`rvae_fast.experiments.scores`.
    train, validation, test : int
        Rows.
    """
    total, whitened, fitted, seen = 0.0, set(), set(), set()
    for name in names:
        viewed = view_scores.parse(name)
        if viewed is not None:
            seen.add(viewed[0])  # all kinds of view are of one pass
            continue
        score = parse(name)
        if score is None:
            total += ROW[name] * test
            fitted.add(name)
            continue
        if score.place is not None:
            total += OF_ONE_PLACE * test
        elif score.kind == "sap":
            total += SAP * test
        else:
            total += (NAP if score.pathway == "stages" else NAP_OF_MANY) * test
            whitened.add((score.pathway, score.include_input))  # with and without a ridge they are the same
    for name in seen:
        total += ROW.get(name, SAP) * VIEWS * test
    total += sum(LEARNT.get(name, 0.0) * (train + validation * (name == "hyperplane")) for name in fitted | seen)
    return total + sum(min(train, NAP_ROWS) + EIGENVECTORS.get(pathway, 0.0) for pathway, _ in whitened)
