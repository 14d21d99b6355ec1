"""Statistics of columns, in chunks and in fp64."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.preprocessing import MinMaxScaler, StandardScaler

from rvae_fast import preprocessing
from rvae_fast._validation import check_finite, name_columns
from rvae_fast.preprocessing import LIMIT, Scaler, chunk_rows, chunks, fit_scaler, is_mapped, scaled_table


@pytest.fixture
def table() -> np.ndarray:
    rng = np.random.default_rng(3)
    return rng.normal(size=(2000, 4)) * [1, 1e-6, 1e6, 1] + [0, 1, 1e9, -5]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of 32 rows."""
    monkeypatch.setattr(preprocessing, "CHUNK_BYTES", 1)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(("kind", "oracle"), [("standard", StandardScaler), ("minmax", MinMaxScaler)])
def test_chunked_statistics_equal_scikit_learns_in_one_go(kind: str, oracle: Any, table: np.ndarray) -> None:
    assert len(list(chunks(table))) == 63
    scaler = fit_scaler(table, kind)
    expected = oracle().fit_transform(table)
    np.testing.assert_allclose(scaler.transform(table), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(scaler.inverse_transform(expected), table, rtol=1e-12, atol=1e-12)


def test_merged_variance_of_a_large_offset_is_exact(small_chunks: None) -> None:
    # The naive sum of squares loses all digits of a variance of 1 around 1e9 (1e18 needs 60 bits, a double has 53).
    column = 1e9 + np.random.default_rng(0).normal(size=(3000, 1))
    scaler = fit_scaler(column)
    np.testing.assert_allclose(scaler.scale, [np.std(column - 1e9)], rtol=1e-6)


def test_no_scaler_changes_nothing(table: np.ndarray) -> None:
    np.testing.assert_array_equal(fit_scaler(table, None).transform(table), table.astype(np.float32))


@pytest.mark.parametrize("kind", ["standard", "minmax"])
@pytest.mark.parametrize("value", [0.0, 0.1, 1e-300, 1e9 + 0.1, -7, 1e300])
def test_constant_columns_are_only_centred(kind: str, value: float) -> None:
    x = np.full((1001, 2), value)
    x[:, 1] = np.arange(1001)
    scaler = fit_scaler(x, kind)
    assert scaler.constant.tolist() == [True, False]
    assert scaler.scale[0] == 1.0
    # Of rounding noise in the mean, nothing is made.
    np.testing.assert_allclose(scaler.transform(x)[:, 0], 0.0, atol=1e-15 * abs(value))


@pytest.mark.parametrize("kind", ["standard", "minmax"])
def test_a_tiny_but_real_spread_is_no_constant(kind: str) -> None:
    x = 1.0 + 1e-9 * np.random.default_rng(0).normal(size=(500, 1))
    scaler = fit_scaler(x, kind)
    assert not scaler.constant.any()
    assert np.ptp(scaler.transform(x)) > 0.9


def test_far_values_are_cut_and_never_infinite(table: np.ndarray) -> None:
    with np.errstate(all="raise"):
        scaled = fit_scaler(table).transform(np.array([[1e300, -1e300, 1e308, 0.0]]))
    assert scaled[0, :3].tolist() == [LIMIT, -LIMIT, LIMIT]


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("missing", ["mean", "median"])
def test_missing_values_do_not_enter_the_statistics(missing: str, table: np.ndarray) -> None:
    gaps = table.copy()
    gaps[np.random.default_rng(0).random(gaps.shape) < 0.2] = np.nan
    gaps[:40, 1] = np.nan  # a whole chunk of a column
    scaler = fit_scaler(gaps, "standard", missing)
    np.testing.assert_allclose(scaler.center, np.nanmean(gaps, axis=0))
    np.testing.assert_allclose(scaler.scale, np.nanstd(gaps, axis=0), rtol=1e-7)
    filled = {"mean": np.nanmean, "median": np.nanmedian}[missing](gaps, axis=0)
    np.testing.assert_allclose(scaler.fill, filled)
    np.testing.assert_array_equal(
        scaler.transform(gaps), scaler.transform(np.where(np.isnan(gaps), np.asarray(scaler.fill), gaps))
    )


@pytest.mark.parametrize(("name", "options"), [("scaler", {"kind": "robust"}), ("missing", {"missing": "zero"})])
def test_unknown_choices_are_named(name: str, options: dict[str, Any], table: np.ndarray) -> None:
    with pytest.raises(ValueError, match=f"{name} must be one of"):
        fit_scaler(table, **options)


def test_transform_does_not_touch_its_input(table: np.ndarray) -> None:
    before = table.copy()
    fit_scaler(table).transform(table)
    np.testing.assert_array_equal(table, before)


def test_scaled_table_of_a_memory_map_is_on_disk(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "t.npy", table)
    mapped = np.load(tmp_path / "t.npy", mmap_mode="r")
    scaler = fit_scaler(mapped)
    for source, on_disk in ((np.asarray(mapped)[:, 1:][:, :2], True), (table[:, 1:3], False)):
        part = Scaler("standard", scaler.center[1:3], scaler.scale[1:3], scaler.constant[1:3])
        with scaled_table(source, (part.transform(chunk) for chunk in chunks(source, 100))) as rows:
            assert is_mapped(rows) is on_disk
            np.testing.assert_array_equal(rows, part.transform(table[:, 1:3]))


def test_a_table_in_memory_needs_no_temporary_folder(table: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with scaled_table(table, [table.astype(np.float32)]) as rows:
        assert rows.shape == table.shape


def test_chunks_are_bounded_in_bytes() -> None:
    assert chunk_rows(4) * 4 * 8 == preprocessing.CHUNK_BYTES
    assert chunk_rows(10**9) == 32


def test_finite_check_counts_over_all_chunks() -> None:
    x = np.zeros((100, 3), dtype=np.float32)
    x[[5, 95], 1], x[50, 2] = np.nan, -np.inf
    with pytest.raises(ValueError, match=r"2 NaN and 1 infinite values .* columns 1 \(2 NaN\), 2 \(1 inf\)"):
        check_finite(chunks(x, 10))
    with pytest.raises(ValueError, match=r"contains 1 infinite values .* column 2 \(1 inf\)"):
        check_finite(chunks(x, 10), allow_nan=True)
    check_finite(chunks(x[:40, [0, 1]], 10), allow_nan=True)
    # Finite values whose sum is not.
    check_finite([np.full((10, 1), 1.7e308)])


def test_long_lists_of_columns_are_cut() -> None:
    assert name_columns(np.ones(14, bool)) == "columns 0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 4 more"
    assert name_columns(np.array([False, True]), ["a", "b"]) == "column 'b'"
