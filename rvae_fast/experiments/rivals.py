"""What a table's rows are otherwise scored by: scikit-learn's detectors, on standardised columns.

Each is a function ``(train, test, seed)`` of float64 arrays ``[n, n_features]`` whose columns have zero mean and unit
variance over the training rows; it returns a score ``[n_test]``, higher being more anomalous.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _isolation_forest(train: Array, test: Array, seed: int) -> Array:
    from sklearn.ensemble import IsolationForest

    return np.asarray(-IsolationForest(random_state=seed).fit(train).score_samples(test))


def _pca(train: Array, test: Array, seed: int) -> Array:
    from sklearn.decomposition import PCA

    kept = PCA(n_components=0.9, svd_solver="full").fit(train)
    return np.asarray(np.square(test - kept.inverse_transform(kept.transform(test))).sum(axis=1))


def _nearest(train: Array, test: Array, seed: int) -> Array:
    from sklearn.neighbors import NearestNeighbors

    distances, _ = NearestNeighbors(n_neighbors=5).fit(train).kneighbors(test)
    return np.asarray(distances[:, -1])


def _local_outlier_factor(train: Array, test: Array, seed: int) -> Array:
    from sklearn.neighbors import LocalOutlierFactor

    return np.asarray(-LocalOutlierFactor(novelty=True).fit(train).score_samples(test))


def _one_class_svm(train: Array, test: Array, seed: int) -> Array:
    from sklearn.svm import OneClassSVM

    return np.asarray(-OneClassSVM(nu=0.1).fit(train).score_samples(test))


#: By name: a forest of 100 trees, PCA that keeps 90 % of the variance, the distance from the fifth nearest training row
#: (Ramaswamy, Rastogi and Shim, SIGMOD 2000), the local outlier factor of 20 neighbours, and a one-class SVM.
RIVALS: dict[str, Callable[[Array, Array, int], Array]] = {
    "isolation forest": _isolation_forest,
    "PCA": _pca,
    "nearest neighbours": _nearest,
    "LOF": _local_outlier_factor,
    "one-class SVM": _one_class_svm,
}


def rival_scores(name: str, train: Array, test: Array, seed: int) -> Array:
    """Scores of the test rows ``[n_test]`` by one of :data:`RIVALS`, higher being more anomalous."""
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train)
    return RIVALS[name](scaler.transform(train), scaler.transform(test), seed)
