"""What a cell of tables does: split, fit a detector (or one of scikit-learn's), score; the detectors as users get them.

A score's name is an ``anomaly_score`` of the detectors, or SAP or NAP with its place as in
:mod:`rvae_fast.experiments.pathway_scores` (``"nap-/units"``: after every unit, without the input).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvae_fast.detector import DETECTORS
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.pathway_scores import parse
from rvae_fast.experiments.rivals import RIVALS, rival_scores
from rvae_fast.experiments.work import METRICS

#: The only score of a rival.
OWN = "own"

#: Before a score's name: the share of new normal rows beyond the threshold that the detector placed by its default
#: ``contamination`` of a tenth.
FLAGGED = "flagged_"

#: Training rows and normal test rows, at most.
TRAINING_ROWS, TEST_ROWS = 5000, 10_000

#: Variants: what the members of two networks differ by.
MEMBERS: dict[str, Any] = {"two seeds": 2, "two rates": [{}, {"learning_rate": 1e-3}]}

#: The variant whose threshold is by rows that a copy has not seen (``cross_calibrate``).
FOLDS = "five folds"

#: Seconds that a cell takes of one core (EPYC Zen 4, 2026-11-27), for the estimate.
FIT, SCORE, RIVAL = 2.5, 0.3, 0.5


def metric_names(scores: Sequence[str]) -> tuple[str, ...]:
    """Columns of a results file of tables."""
    return (*METRICS, *(f"auroc_{name}" for name in scores), *(FLAGGED + name for name in scores if name != OWN))


def estimate(cells: Sequence[Cell], jobs: int, models: object = None) -> float:
    """Seconds that the cells will take, roughly; no models of theirs are kept."""
    fits = {**dict.fromkeys(MEMBERS, 2), FOLDS: 6}
    each = [RIVAL if c.model in RIVALS else fits.get(c.variant, 1) * (FIT + SCORE * len(c.scores)) for c in cells]
    return sum(each) / max(1, min(jobs, len(cells)))


def split_of(cell: Cell) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Training rows, test rows and the latter's labels (1 is an anomaly).

    Half of the normal rows are to learn from, the other half and all anomalies to test with.
    """
    from rvae_fast.datasets import load, novelty_split

    dataset = load(cell.data)
    split = novelty_split(
        np.asarray(dataset.X, dtype=np.float64), dataset.y, dataset.class_index(cell.novel), seed=cell.seed,
        fractions=(0.5, 0.0, 0.5),
    )  # fmt: skip
    normal, novel = (split.X_test[split.y_test == label] for label in (0, 1))
    normal = normal[:TEST_ROWS]
    labels = np.repeat(np.array([0, 1], dtype=np.int64), [len(normal), len(novel)])
    return split.X_train[: cell.rows or TRAINING_ROWS], np.concatenate([normal, novel]), labels


def run_table_cell(cell: Cell, folder: str | None = None, models: str | None = None) -> dict[str, Any]:
    """Fit and score a cell of tables.

    Parameters
    ----------
    cell : Cell
        Its ``model`` is one of :data:`rvae_fast.experiments.rivals.RIVALS`, or that of a detector, whose parameters
        ``network`` are.
    folder, models : str, optional
        Not used: nothing is kept.

    Returns
    -------
    dict
        A value for names of :func:`metric_names`; of rivals, which have no epochs and losses, only for some.
    """
    wall, cpu = time.perf_counter(), time.process_time()
    train, test, labels = split_of(cell)
    result: dict[str, Any] = {"features": train.shape[1], "train_rows": len(train)}
    if cell.model in RIVALS:
        result[f"auroc_{OWN}"] = _auroc(labels, rival_scores(cell.model, train, test, cell.seed))
    else:
        result |= _of_detector(cell, train, test, labels)
    return {**result, "seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}


def _of_detector(cell: Cell, train: Any, test: Any, labels: NDArray[np.int64]) -> dict[str, Any]:
    single: Any = DETECTORS[f"{cell.model}Detector"](device="cpu", **cell.network)
    if cell.variant in MEMBERS:
        detector: Any = EnsembleDetector(single, members=MEMBERS[cell.variant], random_state=cell.seed)
    else:
        detector = single.set_params(random_state=cell.seed)
    found: dict[str, Any] = {}
    with warnings.catch_warnings():
        # A constant column, or fewer rows than directions of NAP: facts of these tables, which the results show.
        warnings.simplefilter("ignore", UserWarning)
        detector.fit(train)
        nets = detector.estimators_ if cell.variant in MEMBERS else [detector]
        for name in cell.scores:
            for net in nets:
                net.set_params(**options_of(name))
            detector.fit_score(train)
            if cell.variant == FOLDS:
                detector.cross_calibrate(train)
            scores = detector.score_samples(test)
            found[f"auroc_{name}"] = _auroc(labels, -scores)
            found[FLAGGED + name] = float((scores[labels == 0] < detector.offset_).mean())
    last = nets[-1].history_.epochs[-1]
    return {
        **found, "epochs": nets[-1].n_iter_, "steps": len(nets[-1].history_.step_loss),
        "train_loss": last["train_loss"], "train_error": last["train_error"], "train_kld": last["train_kld"],
        "precision": nets[-1].history_.precision,
    }  # fmt: skip


def options_of(name: str) -> dict[str, Any]:
    """The detectors' parameters that a score's name stands for."""
    score = parse(name)
    if score is None:
        return {"anomaly_score": name}
    return {"anomaly_score": score.kind, "pathway": score.pathway, "pathway_input": score.include_input}


def _auroc(labels: NDArray[np.int64], scores: NDArray[np.float64]) -> float | None:
    from rvae_fast.report import evaluate_scores

    return evaluate_scores(scores, labels, 0.0).auroc
