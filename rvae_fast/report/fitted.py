"""What a fitted detector, one network or an ensemble of them, lends to its report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["curves", "history_of", "members", "parameters"]


def members(detector: Any) -> list[Any]:
    """The networks' detectors: those of an ensemble, or the one itself."""
    return list(getattr(detector, "estimators_", [detector]))


def parameters(detector: Any) -> dict[str, Any]:
    """The parameters in one table; of an ensemble its own beside those of its first member."""
    if not hasattr(detector, "get_params"):
        return {}
    own = dict(detector.get_params(deep=False))
    if not hasattr(detector, "estimators_") or "estimator" not in own:
        return own
    del own["estimator"]
    first = members(detector)[0]
    return {"estimator": type(first).__name__, **first.get_params(deep=False), **own}


def history_of(detector: Any) -> tuple[Any, str]:
    """The history of the training to draw, and what to add to its captions: whose it is, where there are several."""
    every = members(detector)
    note = f" Of the first of {len(every)} networks." if len(every) > 1 else ""
    return getattr(every[0], "history_", None), note


def curves(history: Any) -> tuple[list[Mapping[str, Any]], NDArray[np.float64], int | None]:
    """Epochs, gradient norms by step and the best epoch of a history, which may be an object or a mapping."""
    if history is None:
        return [], np.empty(0), None

    def get(name: str) -> Any:
        return history.get(name) if isinstance(history, dict) else getattr(history, name, None)

    norms = get("grad_norm")
    best = get("best_epoch")
    return list(get("epochs") or []), np.asarray([] if norms is None else norms, dtype=np.float64).ravel(), best
