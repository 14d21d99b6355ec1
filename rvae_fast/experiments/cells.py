"""A cell: one training of the grid, named by what varies and told everything else by its recipe."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

#: Columns that name a cell in a results file; together they are unique in a grid.
KEY = ("data", "setting", "novel", "model", "order", "n_layers", "variant", "seed")


@dataclass(frozen=True)
class Cell:
    """One training and its scores.

    Attributes
    ----------
    data : str
        Name of a data set of :mod:`rvae_fast.datasets`.
    setting : {"multimodal", "unimodal", "table"}
        RaPP's: one class is novel and all others normal, or one class is normal and all others novel. Or a table,
        half of whose normal rows are trained on.
    novel : str
        The class that is on its own.
    model : {"AE", "RAE", "VAE", "RVAE"}
        Or one of :data:`rvae_fast.experiments.rivals.RIVALS`, of tables.
    order : {"pre", "post", ""}
        Kind of residual unit; empty for plain models.
    n_layers : int
        Of the encoder, as the article counts; 0 for the detectors' own network, and for what is none.
    seed : int
        Of split, initialisation, order of rows and sampling.
    variant : str
        Whatever else is different, by name; empty for the plain case.
    network, training : dict
        Further arguments of the model and of :class:`rvae_fast.training.TrainingConfig`.
    scores : tuple of str
        Which scores to take the AUROC of, see :mod:`rvae_fast.experiments.scores`.
    rows : int, optional
        At most so many training rows, as many validation rows, and about twice as many test rows.
    noise : float, default 0.0
        Standard deviation of the noise on the rows that the model sees while training (denoising).
    members : int, default 1
        Models trained from different seeds, whose scores are averaged.
    parts : tuple of Cell
        Cells of one model each whose scores are averaged, in place of the cell's own models.
    steps : bool, default False
        Whether loss and gradient norm of every step are kept.
    """

    data: str
    novel: str
    model: str
    n_layers: int
    seed: int
    order: str = ""
    setting: str = "multimodal"
    variant: str = ""
    network: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    scores: tuple[str, ...] = ("reconstruction",)
    rows: int | None = None
    noise: float = 0.0
    members: int = 1
    parts: tuple[Cell, ...] = ()
    steps: bool = False

    @property
    def models(self) -> list[tuple[Cell, int]]:
        """What is trained: for each model the cell that says by what, and its number there."""
        return [(part, 0) for part in self.parts] or [(self, member) for member in range(self.members)]

    @property
    def key(self) -> tuple[str, ...]:
        """The cell's name, as the strings of a results file."""
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def label(self) -> str:
        """The cell's name for reading."""
        novel = f"{self.novel} {'normal' if self.setting == 'unimodal' else 'novel'}"
        depth = [f"{self.n_layers} layers"] if self.n_layers else []
        return ", ".join([self.data, novel, self.series, *depth, f"seed {self.seed}"])

    @property
    def series(self) -> str:
        """Model, order and variant: what one line of a plot shows."""
        return " ".join(part for part in (self.model, self.order, self.variant) if part)

    @property
    def recipe(self) -> str:
        """Everything about the cell that its name does not say, as JSON: equal recipes give equal results."""
        said = {**self._trained_by, "scores": self.scores, "members": self.members}
        if self.parts:
            said["parts"] = [part._trained_by for part in self.parts]
        return json.dumps(said, sort_keys=True)

    @property
    def training_recipe(self) -> str:
        """What of the recipe a trained model depends on, as JSON: not the scores that are taken of it."""
        return json.dumps(self._trained_by, sort_keys=True)

    @property
    def _trained_by(self) -> dict[str, Any]:
        return {"network": self.network, "training": self.training, "rows": self.rows, "noise": self.noise}
