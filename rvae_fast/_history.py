"""What a training run did: a row an epoch, a number a step."""

from __future__ import annotations

from typing import Any

import numpy as np

#: Columns of the per-step record.
STEP_COLUMNS = ("loss", "error", "kld", "grad_norm")


class History:
    """Record of a training run, as :func:`rvae_fast.training.train` returns it.

    Attributes
    ----------
    epochs : list of dict
        One row a finished epoch: ``epoch`` (from 1), ``train_loss``, ``train_error``, ``train_kld`` (means over the
        rows trained on, as the steps saw them), ``val_loss`` (None without validation data), ``learning_rate`` and
        ``kld_weight`` (of the epoch's last step), ``seconds``.
    best_epoch : int or None
        The epoch of lowest validation loss; None without validation data.
    stopped_early : bool
    interrupted : bool
        True when a KeyboardInterrupt or a non-finite value ended the run.
    seed, precision, device
        What ``seed=None``, ``precision="auto"`` and ``device="auto"`` came to.
    """

    def __init__(self, *, seed: int | None = None, precision: str | None = None, device: str | None = None) -> None:
        self.epochs: list[dict[str, Any]] = []
        self.best_epoch: int | None = None
        self.stopped_early = False
        self.interrupted = False
        self.seed, self.precision, self.device = seed, precision, device
        self._steps = np.empty((256, len(STEP_COLUMNS)))
        self._n_steps = 0

    @property
    def steps(self) -> np.ndarray:
        """``[n_steps, 4]`` float64, a row an optimiser step: loss, error, kld (means over its rows), gradient norm."""
        return self._steps[: self._n_steps]

    @property
    def step_loss(self) -> np.ndarray:
        """``[n_steps]`` float64: the loss of every optimiser step."""
        return self.steps[:, 0]

    @property
    def grad_norm(self) -> np.ndarray:
        """``[n_steps]`` float64: global L2 norm of the gradient before clipping, of every optimiser step."""
        return self.steps[:, 3]

    def append_steps(self, rows: np.ndarray | list[list[float]]) -> None:
        """Add ``[n, 4]`` step records."""
        rows = np.asarray(rows, dtype=np.float64).reshape(-1, len(STEP_COLUMNS))
        needed = self._n_steps + len(rows)
        if needed > len(self._steps):
            # Doubling keeps a million appends linear; a list of lists would cost a checkpoint a conversion each time.
            grown = np.empty((max(needed, 2 * len(self._steps)), len(STEP_COLUMNS)))
            grown[: self._n_steps] = self.steps
            self._steps = grown
        self._steps[self._n_steps : needed] = rows
        self._n_steps = needed

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**self.summary(), "steps": self.steps.tolist()}

    def summary(self) -> dict[str, Any]:
        """:meth:`to_dict` without the per-step record."""
        return {
            "epochs": [dict(row) for row in self.epochs],
            "best_epoch": self.best_epoch,
            "stopped_early": self.stopped_early,
            "interrupted": self.interrupted,
            "seed": self.seed,
            "precision": self.precision,
            "device": self.device,
        }

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> History:
        """What :meth:`to_dict` gave; ``steps`` may be an array."""
        history = cls(seed=record["seed"], precision=record["precision"], device=record["device"])
        history.epochs = [dict(row) for row in record["epochs"]]
        history.best_epoch = record["best_epoch"]
        history.stopped_early = bool(record["stopped_early"])
        history.interrupted = bool(record["interrupted"])
        history.append_steps(np.asarray(record["steps"], dtype=np.float64).reshape(-1, len(STEP_COLUMNS)))
        return history

    def __repr__(self) -> str:
        last = f", last train_loss {self.epochs[-1]['train_loss']:.6g}" if self.epochs else ""
        return f"History({len(self.epochs)} epochs, {self._n_steps} steps{last})"
