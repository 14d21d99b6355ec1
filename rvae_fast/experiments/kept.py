"""Trained models of cells on disk: what has been trained once is scored again, by this or another experiment, without
a second training.

A model is two files, ``<cell>.safetensors`` and beside it ``<cell>.json`` with what it was trained by and what the
training recorded; the second is written last, so that a model without it counts as absent.
"""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from rvae_fast.datasets.cache import atomic_path
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.store import ResultsError
from rvae_fast.models import Autoencoder
from rvae_fast.serialization import load, save


def model_file(folder: str | os.PathLike[str], cell: Cell, member: int = 0) -> Path:
    """Where the model of a cell (of an ensemble, one of its members) is kept."""
    # The first member of an ensemble is the single model of its seed, under whatever name the ensemble goes.
    single = dataclasses.replace(cell, variant="") if cell.members > 1 else cell
    parts = [part or "none" for part in single.key]
    return Path(folder) / f"{'-'.join(parts).replace(' ', '_')}-{member}.safetensors"


def keep(
    folder: str | os.PathLike[str], cell: Cell, model: Autoencoder, record: dict[str, Any], member: int = 0
) -> None:
    """Write a trained model and what its training recorded (values that JSON can hold)."""
    path = model_file(folder, cell, member)
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path)
    with atomic_path(path.with_suffix(".json")) as temporary:
        document = {"trained_by": cell.training_recipe, "record": record}
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def find(folder: str | os.PathLike[str], cell: Cell, member: int = 0) -> tuple[Autoencoder, dict[str, Any]] | None:
    """The cell's model and its record, or None where there is none.

    Raises
    ------
    ResultsError
        When the model there was trained by another recipe.
    rvae_fast.serialization.FileFormatError
        When the model's file is damaged.
    """
    path = model_file(folder, cell, member)
    about = path.with_suffix(".json")
    if not (path.exists() and about.exists()):
        return None
    document = json.loads(about.read_text(encoding="utf-8"))
    if document["trained_by"] != cell.training_recipe:
        raise ResultsError(
            f"{path} was trained by {document['trained_by']}, and not by {cell.training_recipe}: "
            "give another directory for the models"
        )
    return load(path), document["record"]
