"""Rows of a results file as an experiment writes them, without any training."""

from __future__ import annotations

from typing import Any

import pytest

from rvae_fast.experiments.cells import KEY, Cell

#: A network and a training that take a fraction of a second on the embedded digits.
TINY: dict[str, Any] = {
    "network": {"n_layers": 4, "latent_features": 4},
    "training": {"epochs": 1, "batch_size": 128, "learning_rate": 1e-3, "precision": "fp32"},
    "rows": 200,
}


def cell(**changes: Any) -> Cell:
    """A small cell of the embedded digits."""
    given: dict[str, Any] = {"data": "digits", "novel": "0", "model": "AE", "n_layers": 4, "seed": 0, **TINY}
    return Cell(**{**given, **changes})


def row(**values: Any) -> dict[str, str]:
    """A row of a results file: the key's columns, and the metrics given."""
    base: dict[str, Any] = dict.fromkeys(KEY, "") | {"setting": "multimodal", "data": "mnist", "seed": 0}
    base |= {"epochs": 1, "train_rows": 10, "precision": "fp32", "features": 784, "recipe": "{}", "cpu_seconds": 1.0}
    return {name: str(value) for name, value in (base | values).items()}


@pytest.fixture
def folder(tmp_path: Any) -> Any:
    return tmp_path / "out"
