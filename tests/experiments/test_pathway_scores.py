"""SAP and NAP of many places in one pass, against the library's own scores and against the differences themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast import RVAE, VAE
from rvae_fast.experiments import places
from rvae_fast.experiments.experiment import Settings
from rvae_fast.experiments.pathway_scores import RIDGE, parse, pathway_scores
from rvae_fast.experiments.work import build
from rvae_fast.pathway import PATHWAYS, differences, reconstruct
from rvae_fast.rapp import fit_nap, nap_scores, sap_scores

rng = np.random.default_rng(0)
TRAIN, VALIDATION, TEST = (rng.uniform(size=(n, 16)).astype(np.float32) for n in (300, 40, 20))


def model_of(kind: Any = RVAE, **options: Any) -> Any:
    torch.manual_seed(0)
    return kind(16, latent_features=4, init="default", **options).eval()


@pytest.mark.parametrize(
    ("kind", "options"),
    [(RVAE, {"n_layers": 7}), (RVAE, {"widths": (20, 9), "blocks": (2, 1), "order": "post"}), (VAE, {"n_layers": 3})],
)
def test_many_places_in_one_pass_are_the_scores_of_each(kind: Any, options: dict[str, Any]) -> None:
    model = model_of(kind, **options)
    names = [f"{score}/{where}" for where in PATHWAYS for score in ("sap", "sap-", "nap", "nap-", "ridge", "ridge-")]
    found = pathway_scores(model, names, TRAIN, VALIDATION, TEST)
    assert list(found) == names
    for name, both in found.items():
        score, _, where = name.partition("/")
        options = {"pathway": where, "include_input": not score.endswith("-")}
        for mine, rows in zip(both, (VALIDATION, TEST), strict=True):
            if score.startswith("sap"):
                other = sap_scores(model, rows, **options)
            else:
                nap = fit_nap(model, TRAIN, ridge=RIDGE if score.startswith("ridge") else 0.0, **options)
                other = nap_scores(model, nap, rows, **options)
            # NAP without a ridge raises what rounding there is in the directions of least variance.
            np.testing.assert_allclose(mine, other, rtol=1e-5 if score.startswith("nap") else 1e-6, err_msg=name)


def test_the_place_that_is_left_out_is_the_first() -> None:
    assert parse("sap") == parse("sap/stages")
    assert parse("local") is None
    assert parse("nap-/units").include_input is False  # type: ignore[union-attr]


@pytest.mark.parametrize("pathway", ["branches", "linears"])
def test_a_single_place_is_the_difference_there(pathway: str) -> None:
    model = model_of(n_layers=7)
    with torch.no_grad():
        x, normal = torch.from_numpy(TEST), torch.from_numpy(TRAIN)
        there = [d.double().numpy() for d in differences(model, x, reconstruct(model, x), pathway, False)]
        normally = [d.double().numpy() for d in differences(model, normal, reconstruct(model, normal), pathway, False)]
    names = [f"{kind}/{pathway}:{i + 1}" for kind in ("sap", "ridge") for i in range(len(there))]
    found = pathway_scores(model, names, TRAIN, VALIDATION, TEST)
    for i, (d, of_normal) in enumerate(zip(there, normally, strict=True)):
        np.testing.assert_allclose(found[f"sap/{pathway}:{i + 1}"][1], np.square(d).sum(1), rtol=1e-4)
        covariance = np.cov(of_normal.T, bias=True)
        covariance += RIDGE * np.trace(covariance) / len(covariance) * np.eye(len(covariance))
        centred = d - of_normal.mean(0)
        expected = (centred @ np.linalg.inv(covariance) * centred).sum(1)
        np.testing.assert_allclose(found[f"ridge/{pathway}:{i + 1}"][1], expected, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sap/layers", "unknown score 'sap/layers': its place must be one of stages, units"),
        ("sap/units:0", "unknown score 'sap/units:0'"),
        ("sap/units:", "unknown score 'sap/units:'"),
        ("nap-/units:1", "'nap-/units:1' leaves out the input, which does not count"),
        ("nap/units:9", "'nap/units:9' is of place 9: there are"),
    ],
)
def test_a_place_that_is_not_there_is_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pathway_scores(model_of(n_layers=7), [name], TRAIN, VALIDATION, TEST)


def test_the_places_of_the_experiment_are_those_of_its_network() -> None:
    model = build(places.grid(Settings(data=("mnist",), seeds=1))[0], 784, 0).eval()
    x, other = torch.rand(2, 784), torch.rand(2, 784)
    with torch.no_grad():
        there = {where: list(differences(model, x, other, where, False)) for where in ("branches", "linears")}
    assert places.SINGLE_PLACES["branches"] == tuple(range(1, len(there["branches"]) + 1))
    inside = set(range(1, len(there["linears"]) + 1))
    for i, d in enumerate(there["linears"], start=1):
        if any(d.shape == branch.shape and torch.allclose(d, branch, atol=1e-4) for branch in there["branches"]):
            inside.remove(i)
    assert inside == set(places.SINGLE_PLACES["linears"])
