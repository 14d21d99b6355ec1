"""RaPP's split by its published counts, and what every split promises: each row once, anomalies where they belong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rvae_fast.datasets import NoveltySplit, anomaly_split, novelty_split

MNIST_COUNTS = [6903, 7877, 6990, 7141, 6824, 6313, 6876, 7293, 6825, 6958]


def mnist_like() -> tuple[np.ndarray, np.ndarray]:
    """Labels as many as MNIST's, and rows that are their own numbers."""
    y = np.random.default_rng(1).permutation(np.repeat(np.arange(10), MNIST_COUNTS))
    return np.arange(70_000)[:, None], y


def check_indices(X: np.ndarray, split: NoveltySplit) -> None:
    """Rows belong to their indices, and no row is used twice."""
    np.testing.assert_array_equal(split.X_train, X[split.train_indices])
    np.testing.assert_array_equal(split.X_validation, X[split.validation_indices])
    np.testing.assert_array_equal(split.X_test, X[split.test_indices])
    used = np.concatenate([split.train_indices, split.validation_indices, split.test_indices])
    assert len(np.unique(used)) == len(used)


def test_multimodal_counts_are_rapps() -> None:
    X, y = mnist_like()
    split = novelty_split(X, y, 0, seed=0)
    check_indices(X, split)
    assert (len(split.X_train), len(split.X_validation), len(split.X_test)) == (37_858, 12_619, 12_620 + 6_903)
    assert round(100 * split.novel_fraction, 1) == 35.4
    np.testing.assert_array_equal(split.y_test, y[split.test_indices] == 0)
    assert not np.any(y[split.train_indices] == 0)
    assert not np.any(y[split.validation_indices] == 0)
    assert not split.y_train.any()
    # train and validation are mixtures of the nine normal digits, not a run of them
    assert np.bincount(y[split.train_indices], minlength=10)[1:].min() > 3_500


def test_unimodal_test_set_is_half_novel() -> None:
    X, y = mnist_like()
    split = novelty_split(X, y, normal_class=3, seed=0)
    check_indices(X, split)
    assert set(y[split.train_indices]) == {3}
    assert len(split.X_train) + len(split.X_validation) == round(0.6 * 7141) + round(0.2 * 7141)
    assert split.y_test.sum() == (split.y_test == 0).sum() == 7141 - len(split.X_train) - len(split.X_validation)
    assert set(y[split.test_indices[split.y_test == 1]]) == set(range(10)) - {3}
    every = novelty_split(X, y, [c for c in range(10) if c != 3], seed=0)
    assert every.y_test.sum() == 70_000 - 7141


def test_several_novel_and_several_normal_classes() -> None:
    X, y = mnist_like()
    split = novelty_split(X, y, (1, 7), normal_class=(0, 2), seed=0, novel_share=0.25)
    check_indices(X, split)
    assert set(y[split.train_indices]) == {0, 2}
    assert set(y[split.test_indices]) == {0, 1, 2, 7}
    assert abs(split.novel_fraction - 0.25) < 1e-3


def test_a_seed_names_the_same_rows_everywhere() -> None:
    X, y = np.arange(20)[:, None], np.arange(20) % 4
    split = novelty_split(X, y, 0, seed=7)
    # The generator (PCG64) and its permutation are NumPy's, and part of what a recorded run relies on.
    rng = np.random.default_rng(7).permutation(np.flatnonzero(y != 0))
    np.testing.assert_array_equal(split.train_indices, rng[:9])
    np.testing.assert_array_equal(split.validation_indices, rng[9:12])
    np.testing.assert_array_equal(split.test_indices, [*rng[12:], 0, 4, 8, 12, 16])
    again = novelty_split(X, y, 0, seed=np.random.default_rng(7))
    np.testing.assert_array_equal(split.test_indices, again.test_indices)
    assert not np.array_equal(split.train_indices, novelty_split(X, y, 0, seed=8).train_indices)


def test_text_labels_and_images() -> None:
    X = np.zeros((30, 4, 4), dtype=np.uint8)
    split = novelty_split(X, np.array(["bag", "coat", "boot"] * 10), "bag", seed=0)
    assert split.X_train.shape == (12, 4, 4)
    assert split.X_train.dtype == np.uint8
    assert split.y_test.sum() == 10


@settings(max_examples=40, deadline=None)
@given(
    normal=st.integers(10, 200),
    anomalies=st.integers(30, 60),
    contamination=st.sampled_from([0.0, 0.01, 0.05, 0.1]),
    seed=st.integers(0, 2**32),
)
def test_anomaly_split_uses_every_row_once(normal: int, anomalies: int, contamination: float, seed: int) -> None:
    X = np.arange(normal + anomalies, dtype=float)[:, None]
    y = np.random.default_rng(seed).permutation(np.repeat([0, 1], [normal, anomalies]))
    split = anomaly_split(X, y, seed=seed, contamination=contamination)
    check_indices(X, split)
    assert len(split.X_train) + len(split.X_validation) + len(split.X_test) == normal + anomalies
    np.testing.assert_array_equal(split.y_test, y[split.test_indices])
    np.testing.assert_array_equal(split.y_train, y[split.train_indices])
    for rows in (split.train_indices, split.validation_indices):
        assert abs(y[rows].sum() - contamination / (1 - contamination) * (y[rows] == 0).sum()) <= 0.5
    assert split.y_test.any()


def test_anomaly_split_mixes_the_anomalies_in() -> None:
    X, y = np.zeros((2000, 1)), np.repeat([0, 1], [1000, 1000])
    split = anomaly_split(X, y, seed=0, contamination=0.2)
    assert split.y_train.mean() == pytest.approx(0.2)
    first, second = np.array_split(split.y_train, 2)
    assert first.any()
    assert second.any()
    assert anomaly_split(X, y, seed=0).y_train.sum() == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "novel_class: give the novel class"),
        ({"novel_class": 5}, r"novel_class: no row has class 5; y has 0, 1"),
        ({"novel_class": []}, "novel_class: expected a class or several"),
        ({"normal_class": "0"}, "normal_class: no row has class '0'"),
        ({"novel_class": [0, 1]}, "no normal rows are left"),
        ({"normal_class": [0, 1]}, "no novel rows are left"),
        ({"novel_class": 0, "normal_class": [0, 1]}, "overlap"),
        ({"novel_class": 0, "fractions": (0.5, 0.2)}, "three shares"),
        ({"novel_class": 0, "fractions": (0.5, 0.2, 0.2)}, "sum to 1"),
        ({"novel_class": 0, "fractions": (-0.2, 0.6, 0.6)}, "three shares"),
        ({"novel_class": 0, "fractions": (float("nan"), 0.5, 0.5)}, "fractions: expected three shares"),
        ({"novel_class": 0, "seed": -1}, "^seed: expected an integer of at least 0"),
        ({"novel_class": 0, "fractions": (0.0, 0.5, 0.5)}, "leave the train or the test set without"),
        ({"novel_class": 0, "novel_share": 1.5}, r"novel_share: expected a share in \(0, 1\)"),
        ({"novel_class": 0, "novel_share": 0.95}, "takes 38 novel rows, there are 10"),
        ({"novel_class": 0, "seed": None}, "seed: expected"),
    ],
)
def test_novelty_split_refuses(arguments: dict[str, object], message: str) -> None:
    X, y = np.zeros((20, 2)), np.arange(20) % 2
    with pytest.raises(ValueError, match=message):
        novelty_split(X, y, **{"seed": 0, **arguments})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("y", "arguments", "message"),
    [
        (np.arange(20) % 3, {}, "y: expected 0 .* found also 2"),
        (np.zeros(20), {}, "found 0 anomalies in 20 rows"),
        (np.ones(20), {}, "found 20 anomalies in 20 rows"),
        (np.zeros(19), {}, r"y: expected one label a row, shape \(20,\), got shape \(19,\)"),
        (np.arange(20) % 2, {"contamination": 0.5}, r"contamination: expected a share in \[0, 0.5\)"),
        (np.arange(20) < 2, {"contamination": 0.2}, "but there are 2 and at least one"),
    ],
)
def test_anomaly_split_refuses(y: np.ndarray, arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        anomaly_split(np.zeros((20, 2)), y, seed=0, **arguments)
    with pytest.raises(ValueError, match="X: expected rows of features"):
        anomaly_split(np.zeros(20), y, seed=0)
