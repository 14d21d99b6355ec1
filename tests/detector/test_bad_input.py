"""Bad input: each an error that names what is at fault, what came and what was expected."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from rvae_fast.detector import AEDetector, RVAEDetector

from .conftest import SMALL


def fit(X: Any, **options: Any) -> RVAEDetector:
    return RVAEDetector(**{**SMALL, **options}).fit(X)


def test_nan_and_inf_are_counted_by_column(table: np.ndarray) -> None:
    table[[1, 5, 9], 2] = np.nan
    table[7, 2] = np.inf
    table[8, 4] = -np.inf
    message = "Input X contains 3 NaN and 2 infinite values .* in columns 2 (3 NaN, 1 inf), 4 (1 inf); missing='mean'"
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        fit(table)


def test_nan_is_named_by_the_dataframes_column_and_found_while_scoring(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table, columns=["a", "b", "c", "d", "e", "f"])
    detector = fit(frame)
    frame.loc[3, "e"] = np.nan
    with pytest.raises(ValueError, match=r"1 NaN and 0 infinite values .* in column 'e' \(1 NaN\)"):
        detector.score_samples(frame)
    with pytest.raises(ValueError, match=r"in column 'e' \(1 NaN\)"):
        fit(frame)


def test_infinity_is_an_error_even_where_nan_is_filled(table: np.ndarray) -> None:
    table[0, 0] = np.nan
    detector = fit(table, missing="median")
    table[1, 1] = np.inf
    with pytest.raises(ValueError, match=r"contains 1 infinite values .* in column 1 \(1 inf\)"):
        detector.score_samples(table)
    with pytest.raises(ValueError, match="1 infinite values"):
        fit(table, missing="mean")


def test_filling_set_after_fit_has_nothing_to_fill_with(table: np.ndarray) -> None:
    detector = fit(table).set_params(missing="mean")
    table[3, 4] = np.nan
    for method in ("score_samples", "predict", "transform", "feature_errors"):
        with pytest.raises(ValueError, match=r"1 NaN and 0 infinite values .* in column 4 \(1 NaN\)"):
            getattr(detector, method)(table)
    assert np.isfinite(detector.fit(table).score_samples(table)).all()


def test_column_without_a_single_value_cannot_be_filled(table: np.ndarray) -> None:
    table[:, 3] = np.nan
    with pytest.raises(ValueError, match="missing='mean' cannot fill columns without a single value: column 3"):
        fit(table, missing="mean")


def test_wrong_width_at_score_time(table: np.ndarray) -> None:
    detector = fit(table)
    for method in ("score_samples", "decision_function", "predict", "transform", "reconstruct", "feature_errors"):
        with pytest.raises(ValueError, match="X has 4 features, but RVAEDetector is expecting 6 features as input"):
            getattr(detector, method)(table[:, :4])


def test_constant_columns_warn_by_name_and_do_not_blow_up(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table, columns=["a", "b", "c", "d", "e", "f"]).assign(b=0.1, e=1e12)
    with pytest.warns(UserWarning, match="constant columns 'b', 'e': nothing to learn there"):
        detector = fit(frame)
    scores = detector.score_samples(frame)
    assert np.isfinite(scores).all()
    moved = frame.assign(b=frame["b"] + 5.0)
    assert (detector.score_samples(moved) < scores - 5.0).all()


def test_all_columns_constant() -> None:
    with pytest.warns(UserWarning, match="constant columns 0, 1"):
        detector = fit(np.ones((20, 2)))
    assert detector.predict(np.array([[1.0, 4.0]])) == [-1]


def test_one_row() -> None:
    with pytest.raises(ValueError, match=r"1 sample.* while a minimum of 2 is required"):
        fit(np.ones((1, 3)))


def test_two_rows_are_enough() -> None:
    assert fit(np.array([[1.0, 2.0], [2.0, 1.0]])).score_samples(np.eye(2)).shape == (2,)


def test_no_rows_and_no_columns(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="0 sample"):
        fit(np.empty((0, 3)))
    with pytest.raises(ValueError, match="0 feature"):
        fit(np.empty((5, 0)))
    with pytest.raises(ValueError, match="0 sample"):
        fit(table).score_samples(table[:0])


def test_non_numeric_columns_are_named(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table[:50], columns=["a", "b", "c", "d", "e", "f"])
    frame["when"] = pd.Timestamp("2020-01-01")
    frame["city"] = "Seoul"
    frame["grade"] = pd.Categorical(["low", "high"] * 25)
    with pytest.raises(ValueError, match=r"X has 3 non-numeric columns: 'when' \(.*\), 'city' \(.*\), 'grade' \(.*\)"):
        fit(frame)


def test_columns_of_numbers_as_objects_nullable_and_boolean_are_numeric(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table[:60], columns=["a", "b", "c", "d", "e", "f"])
    frame["a"] = frame["a"].astype(object)
    frame["b"] = frame["b"].round().astype("Int64")
    frame["c"] = frame["c"] > 0
    assert np.isfinite(fit(frame).score_samples(frame)).all()


def test_text_and_objects_in_arrays_are_named() -> None:
    cells = np.array([[1.0, "red"], [2.0, "blue"]] * 5, dtype=object)
    with pytest.raises(ValueError, match=r"1 non-numeric column: 1 \(dtype object\): could not convert string"):
        fit(cells)
    cells[:, 1] = [{"a": 1}] * 10
    with pytest.raises(TypeError, match=r"1 non-numeric column: 1 .*argument must be a string or a real number"):
        fit(cells)


def test_complex_and_sparse_are_refused(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="Complex data not supported"):
        fit(table + 1j)
    with pytest.raises(TypeError, match="Sparse data was passed"):
        fit(sparse.csr_matrix(table))


@pytest.mark.parametrize("labels", [np.array([1, -1] * 20), [0, 1, 0, 1]])
def test_labels_instead_of_features(labels: Any) -> None:
    with pytest.raises(ValueError, match=r"Expected 2D array, got 1D array.*Labels are not features"):
        fit(labels)


def test_labels_as_a_series(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    with pytest.raises(ValueError, match="Labels are not features"):
        fit(pd.Series([1, 0, 1]))


def test_labels_beside_features_are_ignored(table: np.ndarray) -> None:
    labels = np.where(np.arange(300) % 2, 1, -1)
    with_labels = RVAEDetector(**SMALL).fit(table, labels)
    np.testing.assert_array_equal(with_labels.score_samples(table), fit(table).score_samples(table))


@pytest.mark.parametrize("value", [0, 0.0, -0.1, 0.51, 1, np.nan, np.inf])
def test_contamination_out_of_range(value: Any, table: np.ndarray) -> None:
    with pytest.raises(ValueError, match=rf"contamination must be in \(0, 0.5\], got {re.escape(repr(value))}"):
        fit(table, contamination=value)


@pytest.mark.parametrize("value", ["auto", None, True, [0.1]])
def test_contamination_of_the_wrong_type(value: Any, table: np.ndarray) -> None:
    with pytest.raises(TypeError, match=r"contamination must be a number in \(0, 0.5\], got "):
        fit(table, contamination=value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("scaler", "robust"), ("missing", "drop"), ("anomaly_score", "kl"), ("epochs", 0), ("epochs", 2.5),
        ("batch_size", 1), ("learning_rate", -1.0), ("latent_features", 0), ("n_layers", 0), ("widths", ()),
        ("blocks", (1, 2, 3)), ("activation", "step"), ("likelihood", "poisson"), ("precision", "fp8"),
        ("device", "abacus"), ("max_grad_norm", 0.0), ("validation_fraction", 1.0), ("patience", 3),
        ("verbose", "yes"), ("order", "mid"), ("resume", "maybe"), ("kld_weight", -1.0),
    ],
)  # fmt: skip
def test_parameter_out_of_range_is_named(option: str, value: Any, table: np.ndarray) -> None:
    options = {"widths": (16, 8)} if option == "blocks" else {"widths": None} if option == "n_layers" else {}
    with pytest.raises((TypeError, ValueError), match=option):
        fit(table, **{**options, option: value})


def test_bernoulli_needs_the_unit_interval(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"likelihood='bernoulli' needs values in .0, 1., which scaler='standard'"):
        fit(table, likelihood="bernoulli")
    with pytest.raises(ValueError, match=r"outside are columns 0, 2, 3, 4, 5"):
        fit(np.clip(table, [-9, 0, *[-1e9] * 4], [9, 1, *[1e9] * 4]), likelihood="bernoulli", scaler=None)
    detector = fit(table, likelihood="bernoulli", scaler="minmax")
    # The cross-entropy of a target beyond 1 has no lower bound: such a row must not become the most normal of all.
    assert detector.score_samples(table + 10 * np.ptp(table, axis=0)).max() <= 0


def test_a_table_too_wide_for_double_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="overflows double precision: column 1"):
        fit(np.array([[0.0, 1.7e308], [1.0, -1.7e308]] * 4))


def test_parameters_of_other_networks_do_not_exist() -> None:
    with pytest.raises(TypeError, match="kld_weight"):
        AEDetector(kld_weight=1.0)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="blocks"):
        AEDetector(blocks=1)  # type: ignore[call-arg]
