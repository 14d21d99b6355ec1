"""The local score against its definition, written out in NumPy row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast.local import FLOOR, RIDGE, Local, fit_local, local_scores, places
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.pathway import hidden, reconstruct

from .test_rapp import CODE, WIDTH, trained

DEEP: dict[str, Any] = {"n_layers": 10, "init": "default"}


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(200, WIDTH)).astype(np.float32)


def parts(model: Autoencoder, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Errors, codes and differences at the places that count, from the model's own forward."""
    rows = torch.from_numpy(x).to(next(model.parameters()).dtype)
    with torch.no_grad():
        x_hat = reconstruct(model, rows)
        here, there = (list(hidden(model, r, "branches")) for r in (rows, x_hat))
        error = model.anomaly_score(rows)
    differences = [(there[i] - here[i]).double().numpy() for i in places(model)]
    return error.double().numpy(), here[-1].double().numpy(), differences


def oracle(model: Autoencoder, reference: np.ndarray, x: np.ndarray, k: int) -> np.ndarray:
    errors, codes, differences = parts(model, reference)
    errors_x, codes_x, differences_x = parts(model, x)

    def beside(code: np.ndarray, skip: int | None) -> float:
        distance = ((codes - code) ** 2).sum(axis=1)
        if skip is not None:
            distance[skip] = np.inf
        return float(np.log(errors)[np.argsort(distance, kind="stable")[:k]].mean())

    own = np.array([np.log(errors[i]) - beside(codes[i], i) for i in range(len(errors))])
    new = np.array([np.log(e) - beside(c, None) for e, c in zip(errors_x, codes_x, strict=True)])
    total = (new - own.mean()) / own.std()
    for d, d_x in zip(differences, differences_x, strict=True):
        mean = d.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(d.T, bias=True))
        kept = values > 1e-10 * values.max()
        variance = values[kept] + RIDGE * values[kept].mean()
        own, new = (np.log((((v - mean) @ vectors[:, kept]) ** 2 / variance).sum(axis=1)) for v in (d, d_x))
        total += (new - own.mean()) / own.std()
    return total


@pytest.mark.parametrize("likelihood", ["squared", "bernoulli"])
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_the_definition(name: str, likelihood: str, rows: np.ndarray) -> None:
    model = trained(name, likelihood=likelihood, **DEEP).double()
    x = rows.clip(0.0, 1.0) if likelihood == "bernoulli" else rows
    local = fit_local(model, x[:150], neighbours=7)
    np.testing.assert_allclose(local_scores(model, local, x[150:]), oracle(model, x[:150], x[150:], 7), rtol=1e-6)


def test_scores_in_fp32_are_close_to_it(rows: np.ndarray) -> None:
    model = trained("RVAE", **DEEP)
    found = local_scores(model, fit_local(model, rows[:150]), rows[150:])
    np.testing.assert_allclose(found, oracle(model.double(), rows[:150], rows[150:], 30), atol=1e-3)


def test_which_places_count() -> None:
    def of(name: str, **options: Any) -> list[tuple[int, int]]:
        """Places that count, with their widths."""
        model = MODELS[name](40, 4, **options).eval()
        widths = [place.shape[1] for place in hidden(model, torch.zeros(2, 40), "branches")]
        return [(i, widths[i]) for i in places(model)]

    assert of("RVAE", n_layers=10) == [(2, 31), (4, 22)]
    assert of("RAE", widths=(128, 64), blocks=(2, 1)) == [(4, 64)]  # after a projection
    assert of("RVAE", widths=(40,), blocks=(3,)) == [(2, 40)]
    assert of("VAE", widths=(30, 20, 10)) == [(1, 20), (2, 10)]
    assert of("AE", widths=(30,)) == [(0, 30)]
    assert of("VAE", n_layers=1) == [(0, 4)]


def test_the_sample_does_not_depend_on_the_chunks(rows: np.ndarray) -> None:
    model = trained("RVAE", **DEEP)
    whole = fit_local(model, rows, reference=50)
    assert whole.codes.shape == (50, CODE)
    for given in (iter([rows[:60], rows[60:61], rows[61:]]), torch.from_numpy(rows)):
        other = fit_local(model, given, reference=50)
        for name, array in whole.arrays().items():
            np.testing.assert_array_equal(other.arrays()[name], array)


def test_an_easy_row_that_is_hard_for_its_place_scores_high() -> None:
    """Rows of one kind are noisy, of the other clean: a little noise is an anomaly there, and less error than here."""
    rng = np.random.default_rng(0)
    model = trained("AE", n_layers=1, widths=None).double()
    weight = torch.linalg.qr(torch.randn(WIDTH, CODE, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))[
        0
    ]
    with torch.no_grad():  # a projection on three directions
        model.encoder[0].weight.copy_(weight.T)
        model.encoder[0].bias.zero_()
        model.decoder[0].weight.copy_(weight)
        model.decoder[0].bias.zero_()

    def draw(n: int, at: float, noise: float) -> np.ndarray:
        codes = rng.normal(size=(n, CODE)) + np.array([at, 0.0, 0.0])
        return codes @ weight.numpy().T + noise * rng.normal(size=(n, WIDTH))

    normal, odd = np.r_[draw(300, -10.0, 1.0), draw(300, 10.0, 0.01)], draw(50, 10.0, 0.1)
    local = fit_local(model, normal)
    scores, usual = local_scores(model, local, odd), local_scores(model, local, normal)
    assert scores.min() > np.quantile(usual, 0.99)
    errors = [((v - v @ weight.numpy() @ weight.numpy().T) ** 2).sum(axis=1) for v in (normal[:300], odd)]
    assert errors[1].max() < errors[0].min()


def test_a_row_scores_the_same_alone_and_among_others() -> None:
    model = trained("RVAE", init="default", widths=(24, 16), blocks=(2, 1))
    rows = np.random.default_rng(4).normal(size=(1500, WIDTH)).astype(np.float32)
    local = fit_local(model, rows)
    scores = local_scores(model, local, rows)
    for pick in (slice(7, 8), slice(0, 300), slice(1000, 1500)):
        np.testing.assert_array_equal(local_scores(model, local, rows[pick]), scores[pick])
    np.testing.assert_array_equal(local_scores(model, local, iter([rows[:3], rows[3:]])), scores)


def test_it_is_saved_as_arrays(rows: np.ndarray) -> None:
    model = trained("VAE", **DEEP)
    local = fit_local(model, rows)
    again = Local.from_arrays(local.arrays())
    np.testing.assert_array_equal(local_scores(model, again, rows), local_scores(model, local, rows))
    for name in ("codes", "scale", "nap1.mean"):
        with pytest.raises(ValueError, match="disagree"):
            Local.from_arrays({**local.arrays(), name: np.zeros(1)})


def test_an_overflow_scores_infinite(rows: np.ndarray) -> None:
    model = trained("RAE", **DEEP)
    local = fit_local(model, rows)
    wild = rows.copy()
    wild[3] = 3e38
    scores = local_scores(model, local, wild)
    assert np.isposinf(scores[3])
    assert np.isfinite(np.delete(scores, 3)).all()
    with pytest.raises(ValueError, match="1 reference rows overflow"):
        fit_local(model, wild)


def test_a_perfect_reconstruction_has_a_floor(rows: np.ndarray) -> None:
    model = trained("AE", **DEEP)
    local = fit_local(model, rows)
    assert local.floors[0] == pytest.approx(FLOOR * parts(model, rows)[0].mean(), rel=1e-4)


def test_training_mode_is_left_as_it_was(rows: np.ndarray) -> None:
    model = trained("VAE", **DEEP).train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    local_scores(model, fit_local(model, rows), rows)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bad_arguments_are_named(rows: np.ndarray) -> None:
    model = trained("RVAE", **DEEP)
    with pytest.raises(ValueError, match="at least 3 rows"):
        fit_local(model, rows[:2])
    with pytest.raises(ValueError, match="neighbours must be at least 1"):
        fit_local(model, rows, neighbours=0)
    with pytest.raises(TypeError, match="reference must be an integer"):
        fit_local(model, rows, reference=10.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ridge must be"):
        fit_local(model, rows, ridge=-1.0)
    with pytest.raises(ValueError, match=r"do not (vary|differ)"):
        fit_local(trained("RVAE", **DEEP), np.ones((10, WIDTH), dtype=np.float32))
    with pytest.raises(ValueError, match="local was fitted to a code"):
        local_scores(trained("RVAE", n_layers=16), fit_local(trained("AE", n_layers=4), rows), rows)
