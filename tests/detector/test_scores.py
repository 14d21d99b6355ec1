"""What a fitted detector tells of rows: scores, reconstructions, errors by column, codes."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score

from rvae_fast.detector import DETECTORS, AEDetector, RAEDetector, RVAEDetector, VAEDetector
from rvae_fast.serialization import load

from .conftest import SMALL

EVERY = list(DETECTORS.values())


def test_reconstruct_and_feature_errors_are_in_the_tables_units(table: np.ndarray) -> None:
    detector = RAEDetector(**{**SMALL, "epochs": 60}, learning_rate=1e-2).fit(table)
    seen = detector.reconstruct(table)
    assert seen.shape == table.shape
    # Better than the column's mean, in every column, whose units differ by seven orders of magnitude.
    assert (np.abs(seen - table).mean(axis=0) < np.abs(table - table.mean(axis=0)).mean(axis=0)).all()
    np.testing.assert_allclose(detector.feature_errors(table), np.abs(seen - table), rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="units must be one of 'input', 'score', got 'z'"):
        detector.feature_errors(table, units="z")


@pytest.mark.parametrize("likelihood", ["squared", "absolute", "bernoulli"])
def test_feature_errors_in_score_units_add_up_to_the_score(likelihood: str, table: np.ndarray) -> None:
    detector = RVAEDetector(likelihood=likelihood, scaler="minmax", **SMALL).fit(table)
    errors = detector.feature_errors(table, units="score")
    np.testing.assert_allclose(errors.sum(axis=1), -detector.score_samples(table), rtol=1e-4)


def test_feature_errors_point_at_the_column_that_was_changed(table: np.ndarray) -> None:
    detector = RVAEDetector(**{**SMALL, "epochs": 30}).fit(table)
    row = table[:1].copy()
    row[0, 3] += 20 * table[:, 3].std()
    assert detector.feature_errors(row, units="score")[0].argmax() == 3


@pytest.mark.parametrize("detector_class", EVERY)
def test_transform_gives_the_code(detector_class: Any, table: np.ndarray) -> None:
    detector = detector_class(latent_features=3, **SMALL).fit(table)
    code = detector.transform(table)
    assert code.shape == (300, 3)
    assert code.dtype == np.float64
    assert detector.transform(table.astype(np.float32)).dtype == np.float32
    assert detector.get_feature_names_out()[0] == f"{detector_class.__name__.lower()}0"
    x = torch.from_numpy(detector.scaler_.transform(table))
    with torch.no_grad():
        expected = detector.model_(x).z
    np.testing.assert_allclose(code, expected.numpy(), rtol=1e-4, atol=1e-5)


def test_elbo_adds_the_kl_divergence(table: np.ndarray) -> None:
    reconstruction = RVAEDetector(**SMALL).fit(table)
    elbo = RVAEDetector(anomaly_score="elbo", **SMALL).fit(table)
    x = torch.from_numpy(elbo.scaler_.transform(table))
    with torch.no_grad():
        kld = elbo.model_.loss_terms(x)[1].numpy()
    assert (kld > 0).all()
    error = -reconstruction.score_samples(table)
    np.testing.assert_allclose(-elbo.score_samples(table), error + kld, rtol=1e-5)
    elbo.set_params(kld_weight=3.0)
    np.testing.assert_allclose(-elbo.score_samples(table), error + 3 * kld, rtol=1e-5)


@pytest.mark.parametrize(("options", "weight"), [({}, 1.0), ({"kld_weight": 0.5}, 0.5)])
def test_kld_weight_reaches_the_training(options: dict[str, Any], weight: float, table: np.ndarray) -> None:
    detector = VAEDetector(**SMALL, **options).fit(table)
    assert {row["kld_weight"] for row in detector.history_.epochs} == {weight}


@pytest.mark.parametrize("anomaly_score", ["sap", "nap", "local", "hyperplane"])
@pytest.mark.parametrize("detector_class", EVERY)
def test_scores_from_inside_the_network_find_rows_that_leave_the_curve(
    detector_class: Any, anomaly_score: str, table: np.ndarray, tmp_path: Path
) -> None:
    rng = np.random.default_rng(2)
    wrong = np.stack([rng.permutation(column) for column in table[:250].T], axis=1)
    options: dict[str, Any] = {"epochs": 40, "batch_size": 64, "learning_rate": 3e-3, "random_state": 0}
    detector = detector_class(anomaly_score=anomaly_score, contamination=0.02, **options).fit(table[:250])
    X = np.r_[table[250:], wrong]
    scores = -detector.score_samples(X)
    assert roc_auc_score(np.r_[np.zeros(50), np.ones(250)], scores) > 0.8
    flagged = (detector.predict(table[:250]) == -1).sum()
    assert flagged <= 5 if anomaly_score == "nap" else flagged == 5  # by NAP each counts as if it had been held out
    np.testing.assert_array_equal(-detector.score_samples(X[7:8]), scores[7:8])
    np.testing.assert_array_equal(-pickle.loads(pickle.dumps(detector)).score_samples(X), scores)
    detector.save(tmp_path / "detector.safetensors")
    np.testing.assert_array_equal(-load(tmp_path / "detector.safetensors").score_samples(X), scores)


def test_nap_warns_of_too_few_rows(table: np.ndarray) -> None:
    """Its threshold would flag nearly all new rows: the training rows are all at the same distance."""
    with pytest.warns(
        UserWarning, match=r"found \d+ directions in 60 rows: .* another pathway.* by calibrate"
    ) as caught:
        detector = AEDetector(epochs=3, random_state=0, anomaly_score="nap").fit(table[:60])
    assert caught[0].filename == __file__
    # Copies of fewer rows see fewer directions: by their scores it is no better.
    with pytest.warns(
        UserWarning, match=r"directions in 60 rows: a copy that has seen fewer .* by calibrate"
    ) as caught:
        detector.cross_calibrate(table[:60], folds=3)
    assert [one.filename for one in caught] == [__file__]


@pytest.mark.parametrize("detector_class", [RVAEDetector, AEDetector])
def test_naps_threshold_is_one_for_new_rows(detector_class: Any) -> None:
    """A quarter as many directions as rows, or more: by their own scores many new ones would be flagged."""
    X = np.random.default_rng(3).normal(size=(2800, 24))
    detector = detector_class(epochs=1, contamination=0.1, random_state=0, anomaly_score="nap").fit(X[:800])
    assert 180 < detector.nap_.rank < 500
    assert 0.06 < (detector.predict(X[800:]) == -1).mean() < 0.17
    own = np.percentile(detector.score_samples(X[:800]), 10)
    assert (detector.score_samples(X[800:]) < own).mean() > 0.3


def test_where_nap_looks_by_default(table: np.ndarray) -> None:
    """Where it was found best: after every unit without the input; where there are no units, the paper's place."""

    def scores(kind: Any, **options: Any) -> np.ndarray:
        return kind(**SMALL, **options).fit(table).score_samples(table)

    for kind, score, pathway, include_input in (
        (RVAEDetector, "nap", "units", False), (RAEDetector, "nap", "units", False),
        (VAEDetector, "nap", "stages", True), (RVAEDetector, "sap", "stages", True),
        (AEDetector, "sap", "stages", True),
    ):  # fmt: skip
        said = scores(kind, anomaly_score=score, pathway=pathway, pathway_input=include_input)
        np.testing.assert_array_equal(scores(kind, anomaly_score=score), said)


def test_options_of_rapps_scores_reach_them(table: np.ndarray) -> None:
    def scores(**options: Any) -> np.ndarray:
        return RVAEDetector(**SMALL, **options).fit(table).score_samples(table)

    for base, *changes in (
        ({"anomaly_score": "sap"}, {"pathway": "units"}, {"pathway_input": False}),
        ({"anomaly_score": "nap"}, {"pathway": "stages"}, {"pathway_input": True}, {"nap_ridge": 0.5},
         {"nap_tolerance": 0.1}),
    ):  # fmt: skip
        plain = scores(**base)
        for change in changes:
            # To the bit: a fit is repeatable, and in a net this near the identity the input's part of NAP is next to
            # nothing, the places behind it being all but linear in it.
            assert not np.array_equal(scores(**base, **change), plain), change


@pytest.mark.parametrize("name", ["nap", "local", "hyperplane"])
def test_a_score_set_after_fit_asks_for_another_fit(name: str, table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table).set_params(anomaly_score=name)
    with pytest.raises(NotFittedError, match=f"{name}.* was set after fit.*call fit_score"):
        detector.score_samples(table)
    detector.fit(table).score_samples(table)
    assert not hasattr(detector.set_params(anomaly_score="sap").fit(table), f"{name}_")


@pytest.mark.parametrize(
    ("fitted", "changed"),
    [
        ({}, {"anomaly_score": "sap"}),
        ({}, {"anomaly_score": "elbo"}),
        ({"anomaly_score": "elbo"}, {"kld_weight": 3.0}),
        ({"anomaly_score": "sap"}, {"pathway": "linears"}),
        ({"anomaly_score": "sap"}, {"pathway_input": False}),
    ],
)
def test_a_threshold_is_not_used_for_other_scores_than_its_own(
    fitted: dict[str, Any], changed: dict[str, Any], table: np.ndarray, tmp_path: Path
) -> None:
    detector = RVAEDetector(**SMALL, **fitted).fit(table).set_params(**changed)
    other = RVAEDetector(**SMALL, **{**fitted, **changed}).fit(table)
    if "kld_weight" not in changed:  # which changes the training too
        np.testing.assert_array_equal(detector.score_samples(table), other.score_samples(table))
    name, value = next(iter(changed.items()))
    for use in (
        lambda: detector.predict(table),
        lambda: detector.decision_function(table),
        lambda: detector.threshold_,
        lambda: detector.save(tmp_path / "m"),
    ):
        with pytest.raises(NotFittedError, match=f"{name}={value!r} was set after fit, whose threshold"):
            use()
    assert (detector.fit(table).predict(table) == -1).sum() == 30
    other.save(tmp_path / "m")
    with pytest.raises(NotFittedError, match="set after fit"):
        load(tmp_path / "m").set_params(anomaly_score="reconstruction").predict(table)


def test_parameters_that_a_score_does_not_depend_on_may_change(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    before = detector.predict(table)
    detector.set_params(pathway="units", pathway_input=False, kld_weight=3.0, likelihood="bernoulli")
    np.testing.assert_array_equal(detector.predict(table), before)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pathway", "layers"),
        ("pathway_input", "yes"),
        ("nap_tolerance", -1),
        ("nap_tolerance", 1),
        ("nap_ridge", float("nan")),
    ],
)
def test_bad_options_of_rapps_scores_are_named(option: str, value: Any, table: np.ndarray) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        RVAEDetector(**SMALL, **{option: value}).fit(table)


def test_only_variational_detectors_have_an_elbo(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="anomaly_score"):
        AEDetector(**SMALL, anomaly_score="elbo").fit(table)
