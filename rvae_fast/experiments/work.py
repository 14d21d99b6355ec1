"""What a cell does: load, split, train, score. Runs in a process of its own or in the caller's."""

from __future__ import annotations

import functools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rvae_fast import _rng
from rvae_fast.datasets import Dataset, NoveltySplit, novelty_split
from rvae_fast.datasets import load as load_dataset
from rvae_fast.datasets.cache import store_arrays
from rvae_fast.experiments import kept
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.scores import all_scores, unit
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.scoring import score_rows
from rvae_fast.training import History, NonFiniteError, TrainingConfig, train

#: What every cell records, before the AUROCs of its scores.
METRICS = (
    "features", "epochs", "steps", "train_rows", "train_loss", "train_error", "train_kld", "eval_error",
    "median_grad_norm", "max_grad_norm", "norm_ratio", "loss_ratio", "seconds", "cpu_seconds", "precision",
)  # fmt: skip

#: Steps of the running median that a spike is measured against.
WINDOW = 200


def metric_names(scores: tuple[str, ...]) -> tuple[str, ...]:
    """Columns of a results file whose cells take these scores."""
    return (*METRICS, *(f"auroc_{name}" for name in scores))


@functools.lru_cache(maxsize=1)
def _data(name: str) -> tuple[Dataset, Any]:
    dataset = load_dataset(name)
    return dataset, dataset.scaled()


def split_of(cell: Cell) -> NoveltySplit:
    """The cell's rows: RaPP's split of its data set, by its seed."""
    dataset, X = _data(cell.data)
    index = dataset.class_index(cell.novel)
    if cell.setting == "multimodal":
        return novelty_split(X, dataset.y, index, seed=cell.seed)
    return novelty_split(X, dataset.y, normal_class=index, seed=cell.seed)


def build(cell: Cell, in_features: int, seed: int) -> Autoencoder:
    """The cell's network, its weights drawn by ``seed``."""
    options = {"n_layers": cell.n_layers, **cell.network}
    if cell.order:
        options["order"] = cell.order
    # The article's code of 20 would be a third of a small image.
    options.setdefault("latent_features", min(20, max(2, in_features // 8)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return MODELS[cell.model](in_features, **options)


class Denoising(nn.Module):
    """A model that reconstructs clean rows from noisy ones (Vincent et al. 2008), to hand to the training loop."""

    def __init__(self, model: Autoencoder, noise: float) -> None:
        super().__init__()
        self.model, self.noise, self.in_features = model, noise, model.in_features

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As the model's own, of rows with Gaussian noise added while training."""
        return self.model.loss_terms(x + self.noise * torch.randn_like(x) if self.training else x, target=x)


def run_cell(cell: Cell, folder: str | None = None, models: str | None = None) -> dict[str, Any]:
    """Train and score a cell.

    Parameters
    ----------
    cell : Cell
    folder : path, optional
        Where to keep the steps of a cell that wants them, as ``steps-<name>.npz`` (``loss``, ``grad_norm``).
    models : path, optional
        Where trained models are kept (:mod:`rvae_fast.experiments.kept`): one that is there is not trained again. Cells
        that want their steps are always trained.

    Returns
    -------
    dict
        A value for every name of :func:`metric_names`. The times count the training of a kept model too. A training
        that diverged, its loss or gradient no longer finite, is a result as well: ``norm_ratio``, ``loss_ratio`` and
        ``max_grad_norm`` are then infinite, what it had counted up to there is as it was, and what only a trained model
        has (its losses, its scores' AUROC) is None or absent.
    """
    from rvae_fast.report import evaluate_scores

    split = split_of(cell)
    rows, validation, test, labels = split.X_train, split.X_validation, split.X_test, split.y_test
    if cell.rows is not None:
        # Training rows are in random order; normal and novel test rows one after the other: both are thinned alike.
        rows, validation = rows[: cell.rows], validation[: cell.rows]
        thin = max(1, len(test) // (2 * cell.rows))
        test, labels = test[::thin], labels[::thin]
    totals: dict[str, Any] = {}
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    for part, member in cell.models:
        model, record = _trained(part, rows, member, folder, models)
        if record["loss_ratio"] == math.inf:
            return {"features": rows.shape[1], **record, **{name: spent[name] + record[name] for name in spent}}
        scoring = _Clock()
        scored = all_scores(model, cell.scores, rows, validation, test, cell.seed)
        for name, (normal, tested) in scored.items():
            by = unit(name, normal) if len(cell.models) > 1 else 1.0
            before = totals.get(name, (0.0, 0.0))
            totals[name] = (before[0] + normal / by, before[1] + tested / by)
        spent = {name: spent[name] + record[name] + value for name, value in scoring.spent().items()}
    result: dict[str, Any] = {"features": rows.shape[1], **record, **spent}
    result["eval_error"] = float(np.mean(score_rows(model, validation)))  # of an ensemble, its last member's
    for name, (_, total) in totals.items():
        result[f"auroc_{name}"] = evaluate_scores(total, labels, 0.0).auroc
    return result


class _Clock:
    """Time since it was made, by the wall and of this process."""

    def __init__(self) -> None:
        self.wall, self.cpu = time.perf_counter(), time.process_time()

    def spent(self) -> dict[str, float]:
        return {"seconds": time.perf_counter() - self.wall, "cpu_seconds": time.process_time() - self.cpu}


def _trained(
    cell: Cell, rows: Any, member: int, folder: str | None, models: str | None
) -> tuple[Autoencoder, dict[str, Any]]:
    """A member's model and what its training recorded: the kept one, or one trained now and kept."""
    if models is not None and not cell.steps:
        found = kept.find(models, cell, member)
        if found is not None:
            return found
    clock = _Clock()
    seed = cell.seed if member == 0 else _rng.derive(cell.seed, "member", member) % 2**31
    model = build(cell, rows.shape[1], seed)
    wrapped = Denoising(model, cell.noise) if cell.noise else model
    diverged = False
    try:
        history = train(wrapped, rows, TrainingConfig(**{"seed": seed, **cell.training}))
    except NonFiniteError as error:
        if error.tensor == "data":
            raise
        history, diverged = error.history, True
    record = {**_record(history, len(rows), diverged), **clock.spent()}
    if models is not None and not diverged:
        kept.keep(models, cell, model, record, member)
    if cell.steps and folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        store_arrays(steps_file(folder, cell), {"loss": history.step_loss, "grad_norm": history.grad_norm})
    return model, record


def steps_file(folder: str | Path, cell: Cell) -> Path:
    """Where the steps of a cell are kept."""
    return Path(folder) / f"steps-{'-'.join(part or 'none' for part in cell.key).replace(' ', '_')}.npz"


def _record(history: History, n_rows: int, diverged: bool) -> dict[str, Any]:
    last = {} if diverged else history.epochs[-1]
    norms = history.grad_norm
    return {
        "epochs": len(history.epochs),
        "steps": len(norms),
        "train_rows": n_rows,
        "train_loss": last.get("train_loss"),
        "train_error": last.get("train_error"),
        "train_kld": last.get("train_kld"),
        "median_grad_norm": float(np.median(norms)) if len(norms) else None,
        "max_grad_norm": math.inf if diverged else float(norms.max()),
        "norm_ratio": math.inf if diverged else spike(norms),
        "loss_ratio": math.inf if diverged else spike(history.step_loss),
        "precision": history.precision,
    }


def spike(values: np.ndarray, window: int = WINDOW) -> float | None:
    """The largest value in units of the median of the ``window`` values before it (as many as there are, 20 at least).

    The first 20 values have no past to be measured against and do not count; None of a run that has no more.
    """
    if len(values) <= 20:
        return None
    largest = 0.0
    for start in range(20, len(values), 10):
        median = float(np.median(values[max(0, start - window) : start]))
        largest = max(largest, float(values[start : start + 10].max()) / median)
    return largest
