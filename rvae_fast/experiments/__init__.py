"""The article's experiments, each a grid of trainings, a results file and a page: ``rvae-fast reproduce``.

:func:`reproduce` runs one; the modules ``degradation``, ``explosion``, ``novelty``, ``deep``, ``rapp``, ``places``,
``views``, ``quality`` and ``tabular`` say what each is made of. Pages need the ``report`` extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rvae_fast.experiments.experiment import Experiment
    from rvae_fast.experiments.reproduction import reproduce

__all__ = ["NAMES", "by_name", "reproduce"]

#: The experiments: the article's in its order, where in a residual encoder to look, in which views of an image, other
#: errors and ways to train, and the detectors on tables.
NAMES = ("degradation", "explosion", "novelty", "deep", "rapp", "places", "views", "quality", "tabular")


def by_name(name: str) -> Experiment:
    """An experiment by name; ValueError for an unknown one."""
    if name not in NAMES:
        raise ValueError(f"name must be one of {', '.join(NAMES)}, got {name!r}")
    found: Experiment = importlib.import_module(f"rvae_fast.experiments.{name}").EXPERIMENT
    return found


def __getattr__(name: str) -> Any:
    if name == "reproduce":
        from rvae_fast.experiments.reproduction import reproduce

        return reproduce
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
