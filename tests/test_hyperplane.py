"""The hyperplane score against its definition, written out in NumPy row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast._inside import depth, last_unit
from rvae_fast._planes import NEAREST
from rvae_fast.hyperplane import PENALTY, RIDGE, Hyperplane, fit_hyperplane, hyperplane_scores
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.pathway import hidden, reconstruct

from .test_rapp import WIDTH, trained

DEEP: dict[str, Any] = {"n_layers": 10, "init": "default"}


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(200, WIDTH)).astype(np.float32)


def seen(model: Autoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Features and differences at the last unit, from the model's own forward."""
    rows = torch.from_numpy(x).to(next(model.parameters()).dtype)
    with torch.no_grad():
        here, there = (list(hidden(model, r, "branches")) for r in (rows, reconstruct(model, rows)))
        h = rows
        for module in list(model.encoder)[: depth(model)]:
            h = module(h)
    last = last_unit(model)
    return h.double().numpy(), (there[last] - here[last]).double().numpy()


def oracle(model: Autoencoder, reference: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    (features, differences), (features_x, differences_x) = seen(model, reference), seen(model, x)

    def look(h: np.ndarray, skip: int | None) -> tuple[float, float, np.ndarray]:
        far = ((features - h) ** 2).sum(axis=1)
        if skip is not None:
            far[skip] = np.inf
        nearest = np.argsort(far, kind="stable")[:k]
        middle = features[nearest].mean(axis=0)
        A = features[nearest] - middle
        w = np.linalg.solve(A @ A.T + PENALTY * (A**2).sum(axis=1).mean() * np.eye(k), A @ (h - middle))
        return float(((h - middle - w @ A) ** 2).sum()), float(np.sqrt(far[nearest[:NEAREST]]).mean()), nearest

    own, new = [look(features[i], i) for i in range(len(features))], [look(h, None) for h in features_x]
    log_d, log_r = np.log([d for d, _, _ in own]), np.log([r for _, r, _ in own])
    mean = differences.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(differences.T, bias=True))
    kept = values > 1e-10 * values.max()
    variance = values[kept] + RIDGE * values[kept].mean()

    def parts(looked: list[tuple[float, float, np.ndarray]], difference: np.ndarray) -> np.ndarray:
        nap = (((difference - mean) @ vectors[:, kept]) ** 2 / variance).sum(axis=1)
        of = [
            (np.log(d) - log_d[nearest].mean(), np.log(n), np.log(d), np.log(r) - log_r[nearest[:NEAREST]].mean())
            for (d, r, nearest), n in zip(looked, nap, strict=True)
        ]
        return np.array(of)

    usual = parts(own, differences)
    return ((parts(new, differences_x) - usual.mean(axis=0)) / usual.std(axis=0)) @ np.array([1.0, 1.0, 1.5, 0.5])


@pytest.mark.parametrize("neighbours", [7, 20])
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_definition(name: str, double: bool, neighbours: int, rows: np.ndarray) -> None:
    model = trained(name, **DEEP)
    model = model.double() if double else model
    found = hyperplane_scores(model, fit_hyperplane(model, rows[:150], neighbours=neighbours), rows[150:])
    # The planes are fp32's.
    np.testing.assert_allclose(found, oracle(model.double(), rows[:150], rows[150:], neighbours), atol=2e-3)


def test_which_place_counts() -> None:
    def of(name: str, **options: Any) -> tuple[int, int]:
        """Modules on the way there, and the width there."""
        model = MODELS[name](40, 4, **options).eval()
        h = torch.zeros(2, 40)
        for module in list(model.encoder)[: depth(model)]:
            h = module(h)
        return depth(model), h.shape[1]

    assert of("RVAE", n_layers=10) == (3, 31)
    assert of("RAE", widths=(128, 64), blocks=(2, 1)) == (4, 64)  # after a projection
    assert of("RVAE", widths=(40,), blocks=(3,)) == (1, 40)
    assert of("RVAE", n_layers=1) == (0, 40)
    assert of("VAE", widths=(30, 20, 10)) == (6, 20)
    assert of("AE", widths=(30,)) == (3, 30)
    assert of("VAE", n_layers=1) == (0, 40)


@pytest.mark.parametrize("name", MODELS)
def test_every_network_has_a_place(name: str, rows: np.ndarray) -> None:
    for n_layers in (1, 2, 3, 4):
        model = trained(name, n_layers=n_layers, init="default")
        assert np.isfinite(hyperplane_scores(model, fit_hyperplane(model, rows), rows)).all()


def test_rows_beside_the_surface_score_high() -> None:
    """Normal rows lie on a curve; the odd ones beside it, amid their neighbours by every column alone."""
    rng = np.random.default_rng(0)
    model = trained("RVAE", init="zero", widths=(WIDTH,), blocks=(1,)).double()  # its stack is the identity

    def draw(n: int, off: float) -> np.ndarray:
        t = rng.uniform(0, 2 * np.pi, size=n)
        rows = np.zeros((n, WIDTH))
        rows[:, 0], rows[:, 1] = (1 + off) * np.cos(t), (1 + off) * np.sin(t)
        return rows + 0.002 * rng.normal(size=rows.shape)

    normal, odd = draw(1000, 0.0), draw(50, -0.15)
    fitted = fit_hyperplane(model, normal)
    assert hyperplane_scores(model, fitted, odd).min() > np.quantile(hyperplane_scores(model, fitted, normal), 0.99)


def test_no_row_is_its_own_neighbour(rows: np.ndarray) -> None:
    """Rows that were kept score as they did among the others, and copies of a row change nothing."""
    model = trained("RVAE", **DEEP)
    fitted = fit_hyperplane(model, rows)
    scores = hyperplane_scores(model, fitted, rows)
    assert scores.mean() == pytest.approx(0.0, abs=1e-3)
    assert scores.std() > 0.5
    copied = fit_hyperplane(model, np.repeat(rows, 5, axis=0))
    for name, array in fitted.arrays().items():
        np.testing.assert_array_equal(copied.arrays()[name], array)


def test_the_sample_does_not_depend_on_the_chunks(rows: np.ndarray) -> None:
    model = trained("RVAE", **DEEP)
    whole = fit_hyperplane(model, rows, reference=50)
    assert len(whole.features) == 50
    for given in (iter([rows[:60], rows[60:61], rows[61:]]), torch.from_numpy(rows)):
        other = fit_hyperplane(model, given, reference=50)
        for name, array in whole.arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array)


def test_a_row_scores_the_same_alone_and_among_others() -> None:
    model = trained("RVAE", init="default", widths=(24, 16), blocks=(2, 1))
    rows = np.random.default_rng(4).normal(size=(1500, WIDTH)).astype(np.float32)
    fitted = fit_hyperplane(model, rows)
    scores = hyperplane_scores(model, fitted, rows)
    for pick in (slice(7, 8), slice(0, 300), slice(1000, 1500)):
        np.testing.assert_array_equal(hyperplane_scores(model, fitted, rows[pick]), scores[pick])
    np.testing.assert_array_equal(hyperplane_scores(model, fitted, iter([rows[:3], rows[3:]])), scores)


def test_it_is_saved_as_arrays(rows: np.ndarray) -> None:
    model = trained("VAE", **DEEP)
    fitted = fit_hyperplane(model, rows)
    again = Hyperplane.from_arrays(fitted.arrays())
    np.testing.assert_array_equal(hyperplane_scores(model, again, rows), hyperplane_scores(model, fitted, rows))
    for name in ("features", "squares", "middle", "scale", "nap.mean"):
        with pytest.raises(ValueError, match="disagree"):
            Hyperplane.from_arrays({**fitted.arrays(), name: np.zeros(1)})


def test_a_saved_score_keeps_its_weights(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained("RVAE", **DEEP)
    saved = fit_hyperplane(model, rows[:150]).arrays()
    before = hyperplane_scores(model, Hyperplane.from_arrays(saved), rows[150:])
    monkeypatch.setattr("rvae_fast.hyperplane.WEIGHTS", (1.0, 0.0, 0.0, 0.0))
    np.testing.assert_array_equal(hyperplane_scores(model, Hyperplane.from_arrays(saved), rows[150:]), before)
    assert not np.array_equal(hyperplane_scores(model, fit_hyperplane(model, rows[:150]), rows[150:]), before)


def test_an_overflow_scores_infinite(rows: np.ndarray) -> None:
    model = trained("RAE", **DEEP)
    fitted = fit_hyperplane(model, rows)
    wild = rows.copy()
    wild[3], wild[5] = 3e38, 1e15
    scores = hyperplane_scores(model, fitted, wild)
    assert np.isposinf(scores[3])
    assert scores.argsort()[-2] == 5, "far away, and no overflow"
    assert np.isfinite(np.delete(scores, 3)).all()
    with pytest.raises(ValueError, match="1 reference rows overflow"):
        fit_hyperplane(model, wild)
    wild[3] = 1e30  # its features are numbers, their square is none
    with pytest.raises(ValueError, match="1 reference rows overflow"):
        fit_hyperplane(model, wild)


def test_training_mode_is_left_as_it_was(rows: np.ndarray) -> None:
    model = trained("VAE", **DEEP).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hyperplane_scores(model, fit_hyperplane(model, rows), rows)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bad_arguments_are_named(rows: np.ndarray) -> None:
    model = trained("RVAE", **DEEP)
    with pytest.raises(ValueError, match="at least 4 distinct rows"):
        fit_hyperplane(model, np.repeat(rows[:3], 4, axis=0))
    with pytest.raises(ValueError, match="neighbours must be at least 2"):
        fit_hyperplane(model, rows, neighbours=1)
    with pytest.raises(TypeError, match="reference must be an integer"):
        fit_hyperplane(model, rows, reference=10.5)  # type: ignore[arg-type]
    for name in ("ridge", "penalty"):
        with pytest.raises(ValueError, match=f"{name} must be"):
            fit_hyperplane(model, rows, **{name: -1.0})
    with pytest.raises(ValueError, match="penalty must be above 0"):
        fit_hyperplane(model, rows, penalty=0.0)
    with pytest.raises(ValueError, match="hyperplane was fitted to places of widths"):
        hyperplane_scores(trained("RVAE", n_layers=16), fit_hyperplane(trained("AE", n_layers=4), rows), rows)
