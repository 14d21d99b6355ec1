"""Tables of every kind, in memory or not, with names or holes: the scores are those of their values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from rvae_fast.detector import DETECTORS, RVAEDetector

from .conftest import SMALL

EVERY = list(DETECTORS.values())


@pytest.mark.filterwarnings("ignore:constant column")
@pytest.mark.parametrize("kind", ["float32", "int", "fortran", "strided", "list", "tensor", "bfloat16 tensor", "bool"])
def test_input_kinds_give_the_same_scores_as_their_float64_values(kind: str, table: np.ndarray) -> None:
    numbers: Any = np.round(table[:, :4] * 10)
    given: Any = {
        "float32": lambda: numbers.astype(np.float32),
        "int": lambda: numbers.astype(np.int16),
        "fortran": lambda: np.asfortranarray(numbers),
        "strided": lambda: np.repeat(numbers, 2, axis=0)[::2],
        "list": lambda: numbers.tolist(),
        "tensor": lambda: torch.from_numpy(numbers),
        "bfloat16 tensor": lambda: torch.from_numpy(numbers).bfloat16(),
        "bool": lambda: numbers > 0,
    }[kind]()
    if kind == "bool":
        numbers = (numbers > 0).astype(float)
    elif kind == "bfloat16 tensor":
        numbers = given.double().numpy()
    with np.errstate(all="raise"):
        a, b = (RVAEDetector(**SMALL).fit(x) for x in (given, numbers))
    np.testing.assert_array_equal(a.score_samples(given), b.score_samples(numbers))


@pytest.mark.parametrize("offset", [0.0, 1e9])
def test_scaling_is_done_in_double_precision(offset: float, table: np.ndarray) -> None:
    # A time stamp in seconds: in fp32 its resolution is 64 s, so that a shift by 1e9 would wipe the column out.
    plain = RVAEDetector(**SMALL).fit(table[:, :3])
    shifted = RVAEDetector(**SMALL).fit(table[:, :3] + offset)
    np.testing.assert_allclose(
        shifted.score_samples(table[:, :3] + offset), plain.score_samples(table[:, :3]), rtol=1e-4
    )


def test_a_row_scores_the_same_alone_and_among_others(table: np.ndarray) -> None:
    detector = RVAEDetector(epochs=2, random_state=0).fit(table)
    together = detector.score_samples(table)
    alone = np.concatenate([detector.score_samples(row[None]) for row in table[:40]])
    np.testing.assert_array_equal(alone, together[:40])
    np.testing.assert_array_equal(np.concatenate(list(detector.score_chunks(np.array_split(table, 7)))), together)


def test_score_chunks_is_lazy_and_checks_each_chunk(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)

    def parts() -> Any:
        yield table[:10]
        yield table[:10, :5]

    scores = detector.score_chunks(parts())
    assert next(scores).shape == (10,)
    with pytest.raises(ValueError, match="X has 5 features, but RVAEDetector is expecting 6"):
        next(scores)
    with pytest.raises(NotFittedError):
        next(RVAEDetector().score_chunks([table]))


def test_memory_mapped_table_trains_and_scores_as_the_same_table_in_memory(tmp_path: Path, table: np.ndarray) -> None:
    np.save(tmp_path / "table.npy", table.astype(np.float32))
    mapped = np.load(tmp_path / "table.npy", mmap_mode="r")
    a, b = RVAEDetector(**SMALL).fit(mapped), RVAEDetector(**SMALL).fit(np.array(mapped))
    np.testing.assert_array_equal(a.score_samples(mapped), b.score_samples(np.array(mapped)))


def test_dataframe_names_are_kept_and_checked(table: np.ndarray) -> None:
    pd = pytest.importorskip("pandas")
    frame = pd.DataFrame(table, columns=list("abcdef"))
    detector = RVAEDetector(**SMALL).fit(frame)
    assert list(detector.feature_names_in_) == list("abcdef")
    with pytest.raises(ValueError, match="feature names"):
        detector.score_samples(frame[list("abcdfe")])
    out = clone(detector).set_output(transform="pandas").fit_transform(frame)
    assert list(out.columns) == ["rvaedetector0", "rvaedetector1"]
    assert len(out) == 300


@pytest.mark.parametrize("fill", ["mean", "median"])
def test_missing_values_are_filled_from_the_training_table(fill: str, table: np.ndarray) -> None:
    gaps = table.copy()
    gaps[::7, 2] = np.nan
    detector = RVAEDetector(missing=fill, **SMALL).fit(gaps)
    expected = {"mean": np.nanmean, "median": np.nanmedian}[fill](gaps, axis=0)
    np.testing.assert_allclose(detector.scaler_.fill, expected)
    row, filled = table[:1].copy(), table[:1].copy()
    row[0, 4], filled[0, 4] = np.nan, expected[4]
    np.testing.assert_array_equal(detector.score_samples(row), detector.score_samples(filled))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
def test_what_is_masked_is_missing(dtype: type, table: np.ndarray) -> None:
    """NumPy's conversions forget the mask, and the sentinels under it would be values."""
    values = np.round(table * 100).astype(dtype)
    mask = np.zeros(values.shape, dtype=bool)
    mask[::7, 2] = True
    holed = np.where(mask, np.nan, values.astype(dtype if dtype == np.float32 else np.float64))
    values[mask] = -9999
    masked = np.ma.masked_array(values, mask)
    with pytest.raises(ValueError, match=r"43 NaN .* in column 2 \(43 NaN\)"):
        RVAEDetector(**SMALL).fit(masked)
    a, b = (RVAEDetector(**SMALL, missing="median").fit(x) for x in (masked, holed))
    np.testing.assert_array_equal(a.score_samples(masked), b.score_samples(holed))
    whole = np.ma.masked_array(values)
    np.testing.assert_array_equal(a.score_samples(whole), a.score_samples(values))
