"""scikit-learn's own checks, none switched off."""

from __future__ import annotations

from typing import Any

import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from rvae_fast.detector import DETECTORS, RVAEDetector
from rvae_fast.ensemble import EnsembleDetector

# The default network for the main class, small ones for its siblings: what is checked is the estimator around it.
ESTIMATORS = [
    detector(epochs=2, widths=None if detector is RVAEDetector else (16,))  # type: ignore[call-arg]
    for detector in DETECTORS.values()
]
ESTIMATORS.append(RVAEDetector(epochs=2, widths=(16,), missing="mean", scaler="minmax", anomaly_score="elbo"))
ESTIMATORS.append(RVAEDetector(epochs=2, widths=(16, 8), anomaly_score="hyperplane"))
ESTIMATORS.append(EnsembleDetector(RVAEDetector(epochs=2, widths=(16,)), members=2))


@pytest.mark.filterwarnings("ignore:constant column")
@parametrize_with_checks(ESTIMATORS)  # type: ignore[untyped-decorator]
def test_scikit_learn_check(estimator: Any, check: Any) -> None:
    check(estimator)
