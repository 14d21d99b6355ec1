"""SAP and NAP against the definitions of the paper, written out in NumPy with a full SVD."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rvae_fast._whitening import held_out
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.pathway import PATHWAYS, differences, hidden, reconstruct
from rvae_fast.rapp import NAP, Moments, fit_nap, nap_scores, sap_scores

RESIDUAL, WIDTH, CODE = ("RAE", "RVAE"), 12, 3


def trained(name: str, **options: Any) -> Autoencoder:
    """A small model with weights and running statistics that are nobody's defaults."""
    torch.manual_seed(5)
    given: dict[str, Any] = {"n_layers": 7, **options}
    model = MODELS[name](WIDTH, CODE, **given)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d):
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.4)
    return model.eval()


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(3).normal(size=(200, WIDTH)).astype(np.float32)


# --- an oracle in fp64, from the parameters alone ---


def _linear(layer: Any, x: np.ndarray) -> np.ndarray:
    return x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()


def _norm(bn: Any, x: np.ndarray) -> np.ndarray:
    mean, var = bn.running_mean.double().numpy(), bn.running_var.double().numpy()
    return (x - mean) / np.sqrt(var + bn.eps) * bn.weight.detach().double().numpy() + bn.bias.detach().double().numpy()


def _act(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, 0.01 * x)


def oracle_hidden(model: Autoencoder, x: np.ndarray, pathway: str) -> list[np.ndarray]:
    found: dict[str, list[np.ndarray]] = {name: [] for name in PATHWAYS}

    def see(value: np.ndarray, *names: str) -> None:
        for name in names:
            found[name].append(value)

    modules: list[Any] = list(model.encoder)
    h = x
    if not model.is_residual:
        for i, module in enumerate(modules):
            if isinstance(module, nn.Linear):
                h = _linear(module, h)
                see(h, "linears")
            elif isinstance(module, nn.BatchNorm1d):
                h = _norm(module, h)
            else:
                h = _act(h)
                see(h, "stages", "units", "branches", "activations")
            if i + 1 == len(modules):
                see(h, "stages", "units", "branches", "activations")
    for i, module in enumerate(modules if model.is_residual else []):
        if isinstance(module, nn.Linear):
            if i > 0:
                see(h, "activations")
            h = _linear(module, h)
            see(h, "stages", "units", "branches", "linears")
            if i + 1 == len(modules):
                see(h, "activations")
            continue
        for j, unit in enumerate(module):
            f = h
            for k, (bn, linear) in enumerate(zip(unit.norms, unit.linears, strict=True)):
                if unit.order == "pre":
                    f = _act(_norm(bn, f))
                    see(f, "activations")
                    f = _linear(linear, f)
                    see(f, "linears")
                else:
                    if (i, j, k) != (0, 0, 0):  # the row itself
                        see(f, "activations")
                    f = _linear(linear, f)
                    see(f, "linears")
                    f = _norm(bn, f)
                    if k + 1 < len(unit.linears):
                        f = _act(f)
            see(f, "branches")
            h = h + f if unit.order == "pre" else _act(h + f)
            see(h, "units")
        see(h, "stages")  # replaced below: a stage's output is its transition's
        found["stages"].pop()
    places = found[pathway]
    return [*places[:-1], places[-1][:, :CODE]]


def oracle_differences(model: Autoencoder, x: np.ndarray, pathway: str, include_input: bool) -> np.ndarray:
    wide = x.astype(np.float64)
    with torch.no_grad():
        x_hat = reconstruct(model, torch.from_numpy(wide)).numpy()
    here, there = oracle_hidden(model, wide, pathway), oracle_hidden(model, x_hat, pathway)
    parts = [b - a for a, b in zip(here, there, strict=True)]
    return np.concatenate(([x_hat - wide] if include_input else []) + parts, axis=1)


def oracle_nap(train: np.ndarray, test: np.ndarray) -> np.ndarray:
    """The paper's: project centred differences on the right singular vectors, divide by the singular values."""
    mean = train.mean(axis=0)
    _, s, vt = np.linalg.svd(train - mean, full_matrices=False)
    s, vt = s[s > 1e-5 * s[0]], vt[s > 1e-5 * s[0]]
    return len(train) * (((test - mean) @ vt.T / s) ** 2).sum(axis=1)


CASES = [(name, order) for name in MODELS for order in (("pre", "post") if name in RESIDUAL else ("pre",))]


@pytest.mark.parametrize("include_input", [True, False])
@pytest.mark.parametrize("pathway", PATHWAYS)
@pytest.mark.parametrize(("name", "order"), CASES)
def test_scores_are_the_definitions(name: str, order: str, pathway: str, include_input: bool, rows: np.ndarray) -> None:
    model = trained(name, order=order, init="default").double()  # so that both see the same rank
    where: dict[str, Any] = {"pathway": pathway, "include_input": include_input}
    train, test = rows[:150], rows[150:]
    d = oracle_differences(model, rows, **where)
    sap = (d[150:] ** 2).sum(axis=1)
    np.testing.assert_allclose(sap_scores(model, test, **where), sap, rtol=1e-9)
    nap = fit_nap(model, train, **where)
    np.testing.assert_allclose(nap_scores(model, nap, test, **where), oracle_nap(d[:150], d[150:]), rtol=1e-5)
    assert nap_scores(model, nap, train, **where).mean() == pytest.approx(nap.rank, rel=1e-6)
    np.testing.assert_allclose(sap_scores(model.float(), test, **where), sap, rtol=2e-5)


def test_places_of_the_articles_ten_layers() -> None:
    model = MODELS["RVAE"](40, 4, n_layers=10).eval()  # stages of 40, 31, 22, 13; units in the first three
    widths = {pathway: [place.shape[1] for place in hidden(model, torch.zeros(2, 40), pathway)] for pathway in PATHWAYS}
    assert widths["stages"] == [31, 22, 13, 4]
    assert widths["units"] == widths["branches"] == [40, 31, 31, 22, 22, 13, 4]
    assert widths["linears"] == [40, 40, 31, 31, 31, 22, 22, 22, 13, 4]
    assert widths["activations"] == [40, 40, 40, 31, 31, 31, 22, 22, 22, 13, 4]


def test_a_row_and_its_reconstruction_pass_the_encoder_as_one_batch(
    rows: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, seen = trained("RVAE"), []
    forward = type(model.encoder[0]).forward
    monkeypatch.setattr(type(model.encoder[0]), "forward", lambda self, x: seen.append(len(x)) or forward(self, x))
    x = torch.from_numpy(rows)
    with torch.no_grad():
        list(differences(model, x, x, "stages"))
    assert seen[0] == 2 * len(rows)


@pytest.mark.parametrize("pathway", ["stages", "activations"])
def test_a_row_scores_the_same_alone_and_among_others(pathway: str) -> None:
    # Widths as in test_scoring: of others (9, say) the library's matrix product sums a row by where it lies in memory.
    model = trained("RVAE", init="default", widths=(24, 16), blocks=(2, 1))
    rows = np.random.default_rng(4).normal(size=(1500, WIDTH)).astype(np.float32)
    nap = fit_nap(model, rows, pathway=pathway)
    for score in (
        lambda x: sap_scores(model, x, pathway=pathway),
        lambda x: nap_scores(model, nap, x, pathway=pathway),
    ):
        whole = score(rows)
        np.testing.assert_array_equal(score(rows[700:701]), whole[700:701])
        np.testing.assert_array_equal(np.concatenate([score(part) for part in np.array_split(rows, 37)]), whole)
        np.testing.assert_array_equal(score([rows[:501], torch.from_numpy(rows[501:])]), whole)


def test_nap_of_rows_that_stream_is_nap_of_the_table(rows: np.ndarray) -> None:
    model = trained("RVAE", init="default").double()
    whole, streamed = fit_nap(model, rows), fit_nap(model, iter([rows[:70], rows[70:71], rows[71:]]))
    np.testing.assert_allclose(nap_scores(model, streamed, rows), nap_scores(model, whole, rows), rtol=1e-9)


def test_moments_of_a_distant_mean_keep_their_digits() -> None:
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(4000, 3))
    moments = Moments()
    for part in np.array_split(exact + 1e6, 9):
        moments.update(part)
    np.testing.assert_allclose(moments.scatter / 4000, np.cov(exact.T, bias=True), atol=1e-9)
    np.testing.assert_allclose(moments.mean, exact.mean(axis=0) + 1e6, rtol=1e-14)


def score(nap: NAP, d: torch.Tensor) -> float:
    return float(nap.scorer(d.device)(d))


def test_tolerance_cuts_the_rank_and_ridge_damps_the_small_directions() -> None:
    rng = np.random.default_rng(1)
    moments = Moments()
    moments.update(rng.normal(size=(500, 4)) * [10.0, 1.0, 1e-3, 0.0])
    assert [moments.whiten(t).rank for t in (1e-10, 1e-5, 0.5)] == [3, 2, 1]
    d = torch.tensor([[0.0, 0.0, 1e-2, 0.0]], dtype=torch.float64)
    plain, damped = moments.whiten(1e-10, 0.0), moments.whiten(1e-10, 1.0)
    at = d + torch.from_numpy(moments.mean)
    assert score(plain, at) == pytest.approx(100.0, rel=0.3)  # ten standard deviations
    assert score(damped, at) < 1e-4


def test_a_direction_never_seen_to_vary_does_not_count() -> None:
    moments = Moments()
    moments.update(np.random.default_rng(1).normal(size=(50, 2)) @ np.array([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    nap = moments.whiten()
    assert nap.rank == 2
    base = torch.tensor([[0.3, 0.2, 0.3]], dtype=torch.float64)
    off = base + torch.tensor([[1.0, 0.0, -1.0]], dtype=torch.float64)
    assert score(nap, off) == pytest.approx(score(nap, base))


def test_an_overflow_scores_infinite(rows: np.ndarray) -> None:
    model = trained("AE")
    nap = fit_nap(model, rows)
    rows = rows.copy()
    rows[3] = 3e38
    for scores in (sap_scores(model, rows), nap_scores(model, nap, rows)):
        assert np.isposinf(scores[3])
        assert np.isfinite(np.delete(scores, 3)).all()
    with pytest.raises(ValueError, match="1 rows overflow the network"):
        fit_nap(model, rows)


def test_training_mode_is_left_as_it_was(rows: np.ndarray) -> None:
    model = trained("VAE").train()
    model.encoder[1].eval()
    before = [module.training for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    nap_scores(model, fit_nap(model, rows), rows)
    sap_scores(model, rows)
    assert [module.training for module in model.modules()] == before
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_bad_arguments_are_named(rows: np.ndarray) -> None:
    model = trained("AE")
    nap = NAP(np.zeros(5), np.eye(5))
    with pytest.raises(ValueError, match="pathway must be one of"):
        sap_scores(model, rows, pathway="layers")
    with pytest.raises(ValueError, match="nap was fitted to 5 differences"):
        nap_scores(model, nap, rows)
    with pytest.raises(ValueError, match="ridge must be"):
        fit_nap(model, rows, ridge=-1.0)
    with pytest.raises(TypeError, match="tolerance must be"):
        fit_nap(model, rows, tolerance=True)
    with pytest.raises(ValueError, match="at least 2 rows"):
        fit_nap(model, rows[:1])
    still = Moments()
    still.update(np.ones((5, 2)))
    with pytest.raises(ValueError, match="do not vary"):
        still.whiten()


@pytest.mark.parametrize(("n", "width"), [(40, 3), (40, 30), (200, 90)])
def test_a_row_as_if_it_had_been_held_out(n: int, width: int) -> None:
    rows = np.random.default_rng(n).normal(size=(n, width)) @ np.random.default_rng(width).normal(size=(width, width))

    def nap_of(these: np.ndarray) -> Any:
        moments = Moments()
        moments.update(these.copy())
        return moments.whiten()

    def scores(nap: Any, these: np.ndarray) -> np.ndarray:
        return nap.scorer(torch.device("cpu"))(torch.from_numpy(these)).numpy()

    wanted = [scores(nap_of(np.delete(rows, i, 0)), rows[i : i + 1])[0] for i in range(n)]
    np.testing.assert_allclose(held_out(scores(nap_of(rows), rows)), wanted, rtol=1e-6)


def test_a_direction_of_a_rows_own() -> None:
    """Without the row there would be no such direction: as far as can be, and finite."""
    found = held_out(np.full(10, 9.0))  # ten rows in nine directions
    assert np.isfinite(found).all()
    assert (found > 1e6).all()
