"""A cell's work on the embedded digits: repeatable, and told apart by its options."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast.datasets.cache import load_arrays
from rvae_fast.experiments import by_name, scores
from rvae_fast.experiments.experiment import VARIANTS, Settings
from rvae_fast.experiments.runner import run
from rvae_fast.experiments.scores import all_scores
from rvae_fast.experiments.store import Results
from rvae_fast.experiments.work import build, metric_names, run_cell, spike, steps_file
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.models import RVAE, VAE
from rvae_fast.nn import Transition

from .conftest import cell


def result(**changes: Any) -> dict[str, Any]:
    return {k: v for k, v in run_cell(cell(**changes)).items() if not k.endswith("seconds")}


def test_a_cell_is_repeatable_and_has_every_metric() -> None:
    before = torch.get_rng_state()
    found = result(model="RVAE", order="pre", scores=("reconstruction", "sap", "nap"))
    assert torch.equal(torch.get_rng_state(), before)
    expected = set(metric_names(("reconstruction", "sap", "nap"))) - {"seconds", "cpu_seconds"}
    assert found.keys() == expected
    assert found["train_rows"] == 200
    assert found == result(model="RVAE", order="pre", scores=("reconstruction", "sap", "nap"))


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"novel": "1"}, {"setting": "unimodal", "rows": 100}, {"noise": 0.2}, {"members": 2}]
)
def test_every_part_of_a_cell_counts(change: dict[str, Any]) -> None:
    assert result(**change)["auroc_reconstruction"] != result()["auroc_reconstruction"]


def test_steps_are_kept(folder: Path) -> None:
    own = cell(steps=True)
    found = run_cell(own, str(folder))
    arrays = load_arrays(steps_file(folder, own))
    assert len(arrays["grad_norm"]) == len(arrays["loss"]) == found["steps"]
    assert arrays["grad_norm"].max() == pytest.approx(found["max_grad_norm"])


def test_variants_change_every_cell() -> None:
    cells = [cell(model="RVAE", order="pre")]
    for name in VARIANTS:
        (varied,) = Settings(data=("digits",), seeds=1, variant=name).vary(cells)
        assert varied.variant == name
        assert varied.recipe != cells[0].recipe
        assert varied.network.items() >= cells[0].network.items()
    (varied,) = Settings(data=("digits",), seeds=1, variant="kl-warm-up").vary([cell(training={"epochs": 8})])
    assert varied.training["kld_warmup_epochs"] == 4.0
    half = Settings(data=("digits",), seeds=1, variant="half-rate")
    assert half.vary([cell(training={"learning_rate": 2e-3})])[0].training["learning_rate"] == 1e-3
    with pytest.raises(ValueError, match=r"half-rate takes a share of the learning rate, .* is 'auto'"):
        half.vary([cell(training={"learning_rate": "auto"})])


def test_a_setting_limits_the_rows() -> None:
    for quick in (False, True):
        assert Settings(data=("digits",), seeds=1, quick=quick, max_rows=300).rows(1000) == 300
    assert Settings(data=("digits",), seeds=1, quick=True).rows(1000) == 1000
    assert Settings(data=("digits",), seeds=1).rows(1000) is None


def test_a_training_that_diverges_is_a_result(tmp_path: Path) -> None:
    wild = {"epochs": 3, "batch_size": 64, "learning_rate": 1e30, "max_grad_norm": None, "precision": "fp32"}
    own = cell(training=wild, steps=True, scores=("reconstruction",))
    found = run_cell(own, str(tmp_path), str(tmp_path / "models"))
    assert (found["norm_ratio"], found["loss_ratio"], found["max_grad_norm"]) == (math.inf, math.inf, math.inf)
    assert found["train_loss"] is None
    assert "auroc_reconstruction" not in found
    assert found["epochs"] < 3
    assert len(load_arrays(steps_file(tmp_path, own))["loss"]) == found["steps"]
    assert not (tmp_path / "models").exists()  # nothing was trained
    table, said = Results(tmp_path / "results.csv", metric_names(own.scores)), []
    run([own], table, say=said.append)
    assert f"diverged at step {found['steps'] + 1}" in said[-1]
    assert table.of([own])[0]["loss_ratio"] == "inf"
    assert table.of([own])[0]["auroc_reconstruction"] == ""


@pytest.mark.parametrize(
    ("values", "expected"),
    [(np.ones(100), 1.0), (np.r_[np.ones(50), 30.0, np.ones(50)], 30.0), (np.ones(20), None),
     (np.r_[np.full(5, 99.0), np.ones(60)], 1.0)],
)  # fmt: skip
def test_spike_is_measured_in_running_medians(values: np.ndarray, expected: float | None) -> None:
    assert spike(values) == expected


def test_scores_by_name() -> None:
    torch.manual_seed(0)
    model = RVAE(16, latent_features=4, n_layers=7, init="default").eval()
    rng = np.random.default_rng(0)
    train, validation, test = (rng.uniform(size=(n, 16)).astype(np.float32) for n in (80, 40, 20))
    test[:10] += 3.0
    names = ("reconstruction", "elbo", "pixel", "samples", "sap/units", "nap-", "local", "hyperplane", "rank")
    scored = all_scores(model, names, train, validation, test, 0)
    assert set(scored) == set(names)
    for name, (normal, tested) in scored.items():
        assert normal.shape == (40,)
        assert tested.shape == (20,)
        assert np.isfinite(tested).all()
        assert tested[:10].mean() > tested[10:].mean(), name
    assert (scored["elbo"][1] > scored["reconstruction"][1]).all()  # the KL divergence is positive
    both = fit_hyperplane(model, np.concatenate([train, validation]))
    np.testing.assert_array_equal(scored["hyperplane"][1], hyperplane_scores(model, both, test))
    again = all_scores(model, names, train, validation, test, 0)
    np.testing.assert_array_equal(again["samples"][1], scored["samples"][1])
    with pytest.raises(ValueError, match="unknown score 'sap/layers'"):
        all_scores(model, ("sap/layers",), train, validation, test, 0)
    with pytest.raises(ValueError, match="there are none"):
        all_scores(model, ("rank", "sap"), train, validation, test, 0)


def test_only_errors_are_brought_to_a_unit_before_an_ensemble_adds_them() -> None:
    """The mean of standard scores over normal rows is next to nothing: a unit of it would be one by chance."""
    normal = np.array([-1.0, 0.5, 0.5001])
    assert [scores.unit(name, normal) for name in ("local", "hyperplane", "rank")] == [1.0] * 3
    assert scores.unit("sap", normal + 3) == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize(
    ("kind", "options"),
    [(RVAE, {"n_layers": 7}), (RVAE, {"widths": (20, 9), "blocks": (2, 1), "order": "post"}), (VAE, {"n_layers": 3})],
)
def test_scores_of_one_pass_are_those_of_each_alone(kind: Any, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = kind(16, latent_features=4, init="default", **options).eval()
    rng = np.random.default_rng(0)
    train, validation, test = (rng.uniform(size=(n, 16)).astype(np.float32) for n in (300, 40, 20))
    together = all_scores(model, scores.TOGETHER, train, validation, test, 0)
    for name in scores.TOGETHER:
        for a, b in zip(together[name], all_scores(model, (name,), train, validation, test, 0)[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=name)


def test_rows_are_the_user_s_or_the_quick_run_s_or_the_experiment_s() -> None:
    settings = Settings(data=("digits",), seeds=1)
    assert settings.rows(100) is None
    assert settings.rows(100, 6000) == 6000
    assert dataclasses.replace(settings, quick=True).rows(100, 6000) == 100
    assert dataclasses.replace(settings, quick=True, max_rows=7).rows(100, 6000) == 7


def test_the_number_of_transitions_does_not_change_with_depth_in_degradation() -> None:
    cells = [c for c in by_name("degradation").grid(Settings(data=("emnist",), seeds=1)) if c.model == "RAE"]
    assert {c.n_layers for c in cells} == {2, 4, 6, 8, 10, 12, 14, 16, 32, 64, 100}
    transitions = {sum(isinstance(m, Transition) for m in build(c, 784, 0).modules()) for c in cells}
    assert transitions == {4}
