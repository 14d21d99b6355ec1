"""The figures against scikit-learn's, and the helpers that make ten million rows drawable."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics

from rvae_fast.report import ExtremeRows, evaluate_scores
from rvae_fast.report.plots import histogram_edges
from rvae_fast.report.rows import extreme_positions
from rvae_fast.report.theme import number


def test_figures_equal_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = (rng.uniform(size=5000) < 0.2).astype(int)
    scores = np.round(rng.normal(size=5000) + labels, 2)  # rounded, so that many are tied
    found = evaluate_scores(scores, labels, 0.8)
    flagged = scores > 0.8
    assert found.auroc == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    assert found.average_precision == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)
    assert found.precision == pytest.approx(metrics.precision_score(labels, flagged))
    assert found.recall == pytest.approx(metrics.recall_score(labels, flagged))
    assert found.f1 == pytest.approx(metrics.f1_score(labels, flagged))
    assert found.accuracy == pytest.approx(metrics.accuracy_score(labels, flagged))
    confusion = [[found.true_negatives, found.false_positives], [found.false_negatives, found.true_positives]]
    assert confusion == metrics.confusion_matrix(labels, flagged).tolist()
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["rows"] == 5000


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=40), st.integers(-1, 6))
def test_any_scores_and_labels(rows: list[tuple[int, bool]], threshold: int) -> None:
    scores = np.array([float(score) for score, _ in rows])
    labels = np.array([label for _, label in rows])
    found = evaluate_scores(scores, labels, threshold)
    if 0 < labels.sum() < len(labels):
        assert found.auroc == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
        assert found.average_precision == pytest.approx(metrics.average_precision_score(labels, scores), abs=1e-12)
    else:
        assert found.auroc is None
        assert found.roc is None
    assert (found.precision is None) == (not (scores > threshold).any())
    assert (found.recall is None) == (not labels.any())
    assert found.true_positives + found.false_positives + found.true_negatives + found.false_negatives == len(rows)
    json.dumps(found.to_dict(), allow_nan=False)


def test_the_threshold_is_not_above_itself() -> None:
    assert evaluate_scores([1.0, 2.0, 3.0], [0, 0, 1], 2.0).false_positives == 0


def test_an_infinite_score_is_the_highest() -> None:
    assert evaluate_scores([1.0, np.inf, 3.0, np.inf], [0, 1, 0, 1], 2.0).auroc == 1.0
    with pytest.raises(ValueError, match="1 NaN or minus infinity"):
        evaluate_scores([1.0, -np.inf], [0, 1], 2.0)


def test_a_million_rows_are_exact_and_their_curves_short() -> None:
    rng = np.random.default_rng(0)
    labels = np.arange(1_000_000) % 50 == 0
    scores = rng.normal(size=labels.size) + 2 * labels
    found = evaluate_scores(scores, labels, 2.0)
    # P(N(2, 1) > N(0, 1)) = Phi(sqrt 2) = 0.92135
    assert found.auroc == pytest.approx(0.92135, abs=0.002)
    assert found.roc is not None
    assert found.precision_recall is not None
    fpr, tpr = found.roc
    assert 500 < fpr.size <= 4000
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    # what is drawn encloses the area that is reported
    assert np.trapezoid(tpr, fpr) == pytest.approx(found.auroc, abs=1e-3)
    recall, precision = found.precision_recall
    assert np.trapezoid(precision, recall) == pytest.approx(found.average_precision, abs=2e-3)


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(1, 12))
@settings(max_examples=80, deadline=None)
def test_extreme_positions_are_a_stable_sorts(values: list[int], k: int) -> None:
    scores = np.array(values, dtype=np.float64)
    high, low = extreme_positions(scores, k)
    assert high.tolist() == np.argsort(-scores, kind="stable")[:k].tolist()
    assert low.tolist() == np.argsort(scores, kind="stable")[:k].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
def test_extreme_rows_do_not_depend_on_the_chunks(chunk: int) -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 20, size=100).astype(float)
    X = rng.normal(size=(100, 3))
    ids = [f"id{i}" for i in range(100)]
    kept = ExtremeRows(k=5)
    for start in range(0, 100, chunk):
        part = slice(start, start + chunk)
        kept.update(scores[part], X[part], ids[part])
    high, low = extreme_positions(scores, 5)
    expected = np.unique(np.concatenate([high, low]))
    assert kept.rows.tolist() == expected.tolist()
    assert np.array_equal(kept.X, X[expected])
    assert kept.ids == [ids[i] for i in expected]


def test_histogram_takes_all_scores_and_the_threshold() -> None:
    rng = np.random.default_rng(0)
    for scores, threshold, logarithmic in (
        (rng.normal(size=1000), 9.0, False),
        (rng.lognormal(sigma=2, size=1000), 3.0, True),
        (np.full(10, 3.0), 3.0, False),
        (np.array([0.0, 1e6]), -5.0, False),
    ):
        edges, found = histogram_edges(scores, threshold)
        assert found == logarithmic
        assert np.histogram(scores, edges)[0].sum() == scores.size
        assert edges[0] <= threshold <= edges[-1]
        assert (np.diff(edges) > 0).all()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"), (float("nan"), "–"), (float("inf"), "∞"), (0, "0"), (1234567, "1,234,567"), (1234.56, "1,235"),
        (0.0123456, "0.01235"), (-2.5, "−2.500"), (1.5e-7, "1.500e−07"), (48.0, "48"), (48.004, "48.00"),
    ],
)  # fmt: skip
def test_numbers_for_reading(value: float | None, text: str) -> None:
    assert number(value) == text
