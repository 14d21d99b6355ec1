"""What the experiments have in common: settings, a grid, and what they make of its rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.runner import estimate
from rvae_fast.experiments.tables import Row
from rvae_fast.experiments.work import metric_names, run_cell

#: The library's own choices for images (see ``rvae_fast.preset``), less the number of epochs and the learning rate,
#: which is that of the recorded results. Said in full, because a recipe is what results are compared by: it must not
#: change with a default.
TRAINING: dict[str, Any] = {
    "batch_size": 256, "learning_rate": 2e-3, "schedule": "cosine", "warmup_epochs": 1.0, "max_grad_norm": 10.0,
    "optimizer": "adamw", "kld_weight": 1.0, "precision": "auto",
}  # fmt: skip

#: The data that every installation has, for quick runs where the real ones are not cached.
EMBEDDED = "digits"

#: What ``--variant`` may be: changes to every cell, each with what it stands for.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "kl-half": ("KL weight one half", {"training": {"kld_weight": 0.5}}),
    "kl-warm-up": ("KL weight risen over half of the epochs", {"kld_warmup_share": 0.5}),
    "noise": ("Gaussian noise of standard deviation 0.2 on the input while training", {"noise": 0.2}),
    "absolute": ("absolute in place of squared error", {"network": {"likelihood": "absolute"}}),
    "bernoulli": ("binary cross-entropy in place of squared error", {"network": {"likelihood": "bernoulli"}}),
    "large-batch": ("effective batches of 4000 rows, 16 of 250", {"training": {"batch_size": 250, "accumulate": 16}}),
    "half-rate": ("half the learning rate", {"rate_share": 0.5}),
    "double-rate": ("twice the learning rate", {"rate_share": 2.0}),
    "ensemble": ("three models of different seeds, scores averaged", {"members": 3}),
    # An ensemble over hyperparameters, as in Wenzel et al., NeurIPS 2020: its members differ more than by their seeds.
    "two-rates": ("two models, one at half the learning rate, scores averaged", {"parts": ("", "half-rate")}),
}


@dataclass(frozen=True)
class Settings:
    """What a user may say about a run.

    Attributes
    ----------
    data : tuple of str
        Names of data sets.
    seeds : int
        How many; they are 0, 1, 2, ...
    quick : bool
        A short run on a part of the rows, which shows the machinery and proves nothing.
    epochs : int, optional
        In place of the experiment's own.
    variant : str
        One of :data:`VARIANTS`, or empty.
    max_rows : int, optional
        Training rows at most, in place of the experiment's own number (or of a quick run's).
    """

    data: tuple[str, ...]
    seeds: int
    quick: bool = False
    epochs: int | None = None
    variant: str = ""
    max_rows: int | None = None

    def training(self, epochs: int, quick_epochs: int, **changes: Any) -> dict[str, Any]:
        """Arguments of the training: :data:`TRAINING` with changes."""
        own = quick_epochs if self.quick else epochs
        return {**TRAINING, "epochs": self.epochs or own, **changes}

    def rows(self, quick_rows: int, own: int | None = None) -> int | None:
        """Training rows at most; None for all."""
        return self.max_rows or (quick_rows if self.quick else own)

    def vary(self, cells: Sequence[Cell]) -> list[Cell]:
        """The cells with the variant's changes.

        Raises
        ------
        ValueError
            When the variant takes a share of a learning rate that is ``"auto"``: a number is only known in training.
        """
        if not self.variant:
            return list(cells)
        changes = dict(VARIANTS[self.variant][1])
        if "parts" in changes:
            singles = [dataclasses.replace(self, variant=name).vary(cells) for name in changes["parts"]]
            return [
                dataclasses.replace(cell, variant=self.variant, parts=tuple(parts))
                for cell, *parts in zip(cells, *singles, strict=True)
            ]
        share, rate_share = changes.pop("kld_warmup_share", None), changes.pop("rate_share", None)
        varied = []
        for cell in cells:
            training = {**cell.training, **changes.get("training", {})}
            if share is not None:
                training["kld_warmup_epochs"] = share * training["epochs"]
            if rate_share is not None:
                rate = training["learning_rate"]
                if isinstance(rate, str):
                    raise ValueError(
                        f"variant {self.variant} takes a share of the learning rate, and that of {cell.series} of "
                        f"{cell.n_layers} layers here is {rate!r}: it suits the experiments with a rate of their own"
                    )
                training["learning_rate"] = rate_share * rate
            given = {**changes, "training": training, "network": {**cell.network, **changes.get("network", {})}}
            varied.append(dataclasses.replace(cell, variant=self.variant, **given))
        return varied


@dataclass(frozen=True)
class Experiment:
    """An experiment of the article.

    Attributes
    ----------
    name, title, description : str
    data : tuple of str
        The data sets it runs on unless told otherwise.
    seeds : int
    scores : tuple of str
        Whose AUROC every cell records.
    grid : callable
        ``grid(settings)``: the cells.
    findings : callable
        ``findings(rows, settings, folder)``: claims, pictures and tables; ``folder`` is where steps are kept.
    work : callable
        What a cell does, see :func:`rvae_fast.experiments.work.run_cell`.
    estimate : callable
        ``estimate(cells, jobs, models)``: seconds that cells will take, where some models may be kept already.
    metrics : callable
        ``metrics(scores)``: the columns of its results file.
    keeps_models : bool
        Whether trained models can be kept and scored again.
    """

    name: str
    title: str
    description: str
    data: tuple[str, ...]
    seeds: int
    scores: tuple[str, ...]
    grid: Callable[[Settings], list[Cell]]
    findings: Callable[[list[Row], Settings, Path], Findings]
    work: Callable[..., dict[str, Any]] = run_cell
    estimate: Callable[..., float] = estimate
    metrics: Callable[[tuple[str, ...]], tuple[str, ...]] = metric_names
    keeps_models: bool = True
