"""Tables and detectors that fit in a fraction of a second."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

#: A network that trains in a blink: what is under test here is the detector around it.
SMALL: dict[str, Any] = {"epochs": 3, "widths": (16,), "random_state": 0}


@pytest.fixture
def table() -> np.ndarray:
    """Six columns of different units on a curve of two degrees of freedom, float64 [300, 6]."""
    rng = np.random.default_rng(1)
    angle, height = rng.uniform(0, np.pi, 300), rng.normal(size=300)
    columns = [np.cos(angle), np.sin(angle), height, height**2, angle * height, angle]
    noisy = np.stack(columns, axis=1) + 0.02 * rng.normal(size=(300, 6))
    return noisy * [1, 1, 10, 1e-3, 1, 1e4] + [0, 0, 0, 5, 0, 1e6]
