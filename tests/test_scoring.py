"""Scoring in chunks and padded batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast import scoring
from rvae_fast.local import fit_local, local_scores
from rvae_fast.models import AE, RVAE
from rvae_fast.scoring import map_rows, score_rows


@pytest.fixture
def model() -> RVAE:
    """A trained-looking network of 12 columns: weights at random, statistics of BatchNorm no longer 0 and 1."""
    model = RVAE(12, latent_features=3, widths=(24, 16), blocks=(2, 1), init="default")
    for _ in range(5):
        model(torch.randn(64, 12) * 2 + 1)
    return model


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(1000, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_networks_and_tables(model: RVAE, rows: np.ndarray, dtype: torch.dtype) -> None:
    """NumPy has no bf16: an array becomes what the network takes, and a table is sampled as fp32."""
    rows = rows[:200].astype(np.float32)
    expected = fit_local(model, torch.from_numpy(rows).to(dtype).float())
    np.testing.assert_array_equal(fit_local(model, torch.from_numpy(rows).to(dtype)).codes, expected.codes)
    model = model.to(dtype)
    of_tensor = score_rows(model, torch.from_numpy(rows))
    for table in (rows, rows.astype(np.float64), [rows[:150], rows[150:]]):
        np.testing.assert_array_equal(score_rows(model, table), of_tensor)
    assert np.isfinite(local_scores(model, fit_local(model, rows), rows)).all()


@pytest.mark.parametrize("kld_weight", [0.0, 1.0])
def test_scores_are_the_models(model: RVAE, rows: np.ndarray, kld_weight: float) -> None:
    scores = score_rows(model, rows, kld_weight=kld_weight)
    expected = model.double().anomaly_score(torch.from_numpy(rows), kld_weight=kld_weight).numpy()
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-4)
    assert not np.allclose(scores, score_rows(model, rows, kld_weight=1.0 - kld_weight), rtol=1e-3)


@pytest.mark.parametrize("batch_size", [1, 7, 32, 100, 4096])
def test_a_score_does_not_depend_on_the_batch(model: RVAE, rows: np.ndarray, batch_size: int) -> None:
    np.testing.assert_array_equal(score_rows(model, rows, batch_size=batch_size), score_rows(model, rows))


def test_kinds_of_input_agree(model: RVAE, rows: np.ndarray, tmp_path: Path) -> None:
    rows = rows.astype(np.float32)
    np.save(tmp_path / "rows.npy", rows)
    expected = score_rows(model, rows)
    kinds: list[Any] = [
        torch.from_numpy(rows),
        np.load(tmp_path / "rows.npy", mmap_mode="r"),
        np.asfortranarray(rows),
        np.repeat(rows, 2, axis=1)[:, ::2],
        (part for part in np.array_split(rows, 9)),
        [torch.from_numpy(part) for part in np.array_split(rows, 3)],
    ]
    for kind in kinds:
        np.testing.assert_array_equal(score_rows(model, kind), expected)


def test_chunks_are_asked_for_one_at_a_time(model: RVAE, rows: np.ndarray) -> None:
    taken = []

    def parts() -> Iterator[np.ndarray]:
        for number, part in enumerate(np.array_split(rows, 4)):
            taken.append(number)
            yield part

    scores = scoring.score_parts(model, parts())
    assert taken == []
    assert next(scores).shape == (250,)
    assert taken == [0]


def test_no_rows(model: RVAE) -> None:
    assert score_rows(model, np.empty((0, 12))).shape == (0,)
    assert score_rows(model, []).shape == (0,)


@pytest.mark.parametrize("training", [True, False])
def test_mode_and_gradients_of_the_model_are_left_alone(model: RVAE, rows: np.ndarray, training: bool) -> None:
    model.train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    score_rows(model, rows)
    assert model.training is training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.loss(torch.randn(8, 12)).backward()  # parameters have not become inference tensors


def test_a_padded_row_is_the_last_one_and_dropped(model: RVAE, rows: np.ndarray) -> None:
    seen = []

    def remember(batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch.clone())
        return batch

    out = map_rows(model, rows[:70], remember, batch_size=40)
    np.testing.assert_array_equal(out, rows[:70].astype(np.float32))
    assert [len(batch) for batch in seen] == [64, 32]
    assert torch.equal(seen[0][40:], seen[0][39].expand(24, 12))


def test_overflow_scores_infinite_not_nan(model: RVAE, rows: np.ndarray) -> None:
    rows[3] = 1e38
    scores = score_rows(model, rows)
    assert scores[3] == np.inf
    assert np.isfinite(np.delete(scores, 3)).all()


def test_bf16_is_close_and_not_the_same(model: RVAE, rows: np.ndarray) -> None:
    exact, rough = score_rows(model, rows), score_rows(model, rows, precision="bf16")
    assert not np.array_equal(exact, rough)
    np.testing.assert_allclose(rough, exact, rtol=0.1)


def test_a_model_in_double_precision_scores_in_it(rows: np.ndarray) -> None:
    model = AE(12, latent_features=3, n_layers=3).double()
    expected = model.anomaly_score(torch.from_numpy(rows)).numpy()
    np.testing.assert_allclose(score_rows(model, rows), expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("x", "options", "message"),
    [
        (np.zeros((4, 5)), {}, r"x must have shape \[n, 12\], got \[4, 5\]"),
        (np.zeros(12), {}, r"x must have shape \[n, 12\], got \[12\]"),
        (torch.zeros(12), {}, r"x must have shape \[n, 12\], got \[12\]"),
        ([np.zeros((2, 12)), np.zeros((2, 3))], {}, r"x must have shape \[n, 12\], got \[2, 3\]"),
        ([[1.0] * 12], {}, "chunk 0 of x must be an ndarray or a Tensor, got list"),
        ("rows.npy", {}, "x must be an ndarray, a Tensor or an iterable of them, got str"),
        (np.zeros((4, 12), dtype=complex), {}, "x must be a table of real numbers, got dtype complex128"),
        (torch.zeros(4, 12, dtype=torch.complex64), {}, "x must be a table of real numbers, got dtype torch.complex64"),
        (np.full((4, 12), "1.5"), {}, "x must be a table of real numbers, got dtype <U3"),
        (np.zeros((4, 12)), {"batch_size": 0}, "batch_size must be an integer of at least 1, got 0"),
        (np.zeros((4, 12)), {"precision": "int8"}, "precision must be one of 'auto', 'fp32', 'bf16', got 'int8'"),
    ],
)
def test_bad_arguments_are_named(model: RVAE, x: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        score_rows(model, x, **options)
