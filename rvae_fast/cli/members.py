"""``fit`` of several models: their checkpoints, and what is said of them together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["checkpoint_files", "summary"]


def checkpoint_files(checkpoint: Path | None, members: int | Sequence[Any] | None) -> list[Path]:
    """The files that a training writes its state to: ``checkpoint``, or that of each of an ensemble's members."""
    if checkpoint is None:
        return []
    if members is None:
        return [checkpoint]
    count = members if isinstance(members, int) else len(members)
    return [checkpoint.with_name(f"{checkpoint.name}.{i}") for i in range(count)]


def summary(fitted: Sequence[Any]) -> dict[str, Any]:
    """Epochs run in all, the best one, and the mean of the last losses.

    The best epoch is None for several models, each having its own, and the validation loss where there is none.
    """
    last = [detector.history_.epochs[-1] for detector in fitted]
    validated = [row["val_loss"] for row in last if row["val_loss"] is not None]
    return {
        "epochs": sum(detector.n_iter_ for detector in fitted),
        "best_epoch": fitted[0].history_.best_epoch if len(fitted) == 1 else None,
        "train_loss": float(np.mean([row["train_loss"] for row in last])),
        "val_loss": float(np.mean(validated)) if validated else None,
    }
