"""What the detectors do beyond scikit-learn's checks."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from rvae_fast._detector_options import default_architecture, default_epochs
from rvae_fast.detector import DETECTORS, AEDetector, RAEDetector, RVAEDetector, VAEDetector
from rvae_fast.serialization import load

from .conftest import SMALL

EVERY = list(DETECTORS.values())


@pytest.mark.parametrize("detector_class", EVERY)
def test_finds_rows_that_leave_the_curve(detector_class: Any, table: np.ndarray) -> None:
    rng = np.random.default_rng(2)
    normal = table[:250]
    # Each column alone is as in the table; only together are they wrong.
    wrong = np.stack([rng.permutation(column) for column in table[:250].T], axis=1)
    detector = detector_class(epochs=40, batch_size=64, learning_rate=3e-3, random_state=0).fit(normal)
    scores = -detector.score_samples(np.r_[table[250:], wrong])
    assert roc_auc_score(np.r_[np.zeros(50), np.ones(250)], scores) > 0.8


def test_breast_cancer_with_defaults_is_near_the_usual_methods() -> None:
    X, y = load_breast_cancer(return_X_y=True)
    malignant = y == 0
    train, test = X[~malignant][::2], np.r_[X[~malignant][1::2], X[malignant]]
    labels = np.r_[np.zeros(len(X[~malignant][1::2])), np.ones(malignant.sum())]
    detector = RVAEDetector(epochs=60, random_state=0).fit(train)
    assert roc_auc_score(labels, -detector.score_samples(test)) > 0.88


@pytest.mark.parametrize("detector_class", EVERY)
def test_contamination_is_the_share_flagged_and_places_nothing_but_the_threshold(
    detector_class: Any, table: np.ndarray
) -> None:
    few, many = (detector_class(contamination=c, **SMALL).fit(table) for c in (0.05, 0.4))
    assert (few.predict(table) == -1).sum() == 15
    assert (many.predict(table) == -1).sum() == 120
    np.testing.assert_array_equal(few.score_samples(table), many.score_samples(table))
    assert few.threshold_ == -few.offset_ > many.threshold_


def test_same_seed_same_scores_other_seed_other_scores(table: np.ndarray) -> None:
    def scores(seed: Any) -> np.ndarray:
        return RVAEDetector(**{**SMALL, "random_state": seed}).fit(table).score_samples(table)

    first = scores(5)
    np.testing.assert_array_equal(first, scores(5))
    assert not np.array_equal(first, scores(6))
    np.testing.assert_array_equal(scores(np.random.RandomState(7)), scores(np.random.RandomState(7)))


def test_fit_leaves_the_table_and_torchs_generator_alone(table: np.ndarray) -> None:
    before, state = table.copy(), torch.get_rng_state()
    table.setflags(write=False)
    RVAEDetector(**SMALL).fit(table).score_samples(table)
    np.testing.assert_array_equal(table, before)
    assert torch.equal(torch.get_rng_state(), state)


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


def test_pipeline_grid_search_and_pickle(table: np.ndarray) -> None:
    pipeline = make_pipeline(QuantileTransformer(n_quantiles=50), RVAEDetector(**SMALL)).fit(table)
    scores = pipeline.score_samples(table)
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(pipeline)).score_samples(table), scores)
    labels = np.where(np.arange(300) % 10 == 0, -1, 1)
    search = GridSearchCV(RVAEDetector(**SMALL), {"kld_weight": [0.1, 1.0]}, scoring="roc_auc", cv=2).fit(table, labels)
    assert search.best_params_["kld_weight"] in (0.1, 1.0)
    assert np.isfinite(search.cv_results_["mean_test_score"]).all()


def test_history_and_epochs(table: np.ndarray) -> None:
    detector = RVAEDetector(**{**SMALL, "epochs": 4}, batch_size=100).fit(table)
    assert detector.n_iter_ == 4 == len(detector.history_.epochs)
    assert len(detector.history_.grad_norm) == 12
    assert default_epochs(100, 256) == 1000
    assert default_epochs(5000, 256) == 52
    assert default_epochs(10**6, 256) == 20


def test_validation_and_early_stopping(table: np.ndarray) -> None:
    detector = RVAEDetector(
        validation_fraction=0.3, patience=2, epochs=400, widths=(16,), learning_rate=0.05, random_state=0
    ).fit(table)
    assert detector.n_iter_ < 400
    assert detector.history_.stopped_early
    assert detector.history_.epochs[-1]["val_loss"] is not None


def test_checkpoint_and_resume(tmp_path: Path, table: np.ndarray) -> None:
    options = {**SMALL, "checkpoint": str(tmp_path / "run")}
    whole = RVAEDetector(**options).fit(table)
    again = RVAEDetector(**options, resume=True).fit(table)
    np.testing.assert_array_equal(again.score_samples(table), whole.score_samples(table))
    with pytest.raises((ValueError, OSError)):
        RVAEDetector(**{**options, "checkpoint": str(tmp_path / "absent")}, resume=True).fit(table)


def test_default_network_follows_the_number_of_columns() -> None:
    def latent(n: int) -> int:
        return int(default_architecture(n)["latent_features"])

    assert [latent(n) for n in (1, 2, 9, 30, 64, 255, 784)] == [1, 1, 3, 5, 8, 16, 20]
    assert default_architecture(784)["n_layers"] == 10


def test_given_architecture_reaches_the_network(table: np.ndarray) -> None:
    detector = RAEDetector(epochs=1, widths=(12, 7), blocks=(1, 2), latent_features=4, order="post").fit(table)
    config = detector.model_.config()
    assert (config["widths"], config["blocks"], config["order"]) == ([12, 7], [1, 2], "post")
    assert detector.model_.latent_features == 4
    by_layers = AEDetector(epochs=1, n_layers=3).fit(table).model_.config()
    assert (by_layers["n_layers"], by_layers["widths"]) == (3, None)


def test_a_huge_value_scores_as_an_anomaly_and_never_as_nan(table: np.ndarray) -> None:
    detector = VAEDetector(**SMALL).fit(table)
    rows = np.repeat(table[:1], 3, axis=0)
    rows[:, 0] = [1e30, -1e300, 1e8]
    assert (detector.predict(rows) == -1).all()
    assert not np.isnan(detector.score_samples(rows)).any()


def test_verbose_shows_progress(table: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    RVAEDetector(**SMALL).fit(table)
    assert capsys.readouterr().err == ""
    RVAEDetector(verbose=1, **SMALL).fit(table)
    captured = capsys.readouterr()
    assert captured.err != ""
    assert captured.out == ""


def test_a_failed_fit_does_not_leave_a_fitted_detector(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    with pytest.raises(ValueError, match="activation"):
        detector.set_params(activation="no such").fit(table[:, :3])
    with pytest.raises(NotFittedError):
        detector.predict(table)


@pytest.mark.gpu
def test_a_detector_from_a_gpu_scores_alike_on_the_cpu(table: np.ndarray) -> None:
    detector = RVAEDetector(device="cuda", precision="fp32", **SMALL).fit(table)
    on_gpu = detector.score_samples(table)
    restored = torch.load(io.BytesIO(_dumped(detector)), weights_only=False, map_location="cpu")
    assert next(restored.model_.parameters()).device.type == "cpu"
    np.testing.assert_allclose(restored.set_params(device="cpu").score_samples(table), on_gpu, rtol=1e-3)


def _dumped(detector: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(detector, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("anomaly_score", ["sap", "nap", "local"])
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
    assert (detector.predict(table[:250]) == -1).sum() == 5
    np.testing.assert_array_equal(-detector.score_samples(X[7:8]), scores[7:8])
    np.testing.assert_array_equal(-pickle.loads(pickle.dumps(detector)).score_samples(X), scores)
    detector.save(tmp_path / "detector.safetensors")
    np.testing.assert_array_equal(-load(tmp_path / "detector.safetensors").score_samples(X), scores)


def test_options_of_rapps_scores_reach_them(table: np.ndarray) -> None:
    def scores(**options: Any) -> np.ndarray:
        return RVAEDetector(**SMALL, **options).fit(table).score_samples(table)

    for base, *changes in (
        ({"anomaly_score": "sap"}, {"pathway": "units"}, {"pathway_input": False}),
        ({"anomaly_score": "nap"}, {"pathway": "units"}, {"pathway_input": False}, {"nap_ridge": 0.5},
         {"nap_tolerance": 0.1}),
    ):  # fmt: skip
        plain = scores(**base)
        for change in changes:
            # To the bit: a fit is repeatable, and in a net this near the identity the input's part of NAP is next to
            # nothing, the places behind it being all but linear in it.
            assert not np.array_equal(scores(**base, **change), plain), change


@pytest.mark.parametrize("name", ["nap", "local"])
def test_a_score_set_after_fit_asks_for_another_fit(name: str, table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table).set_params(anomaly_score=name)
    with pytest.raises(NotFittedError, match="fit again"):
        detector.score_samples(table)
    detector.fit(table).score_samples(table)
    assert not hasattr(detector.set_params(anomaly_score="sap").fit(table), f"{name}_")


@pytest.mark.parametrize(
    ("option", "value"),
    [("pathway", "layers"), ("pathway_input", "yes"), ("nap_tolerance", -1), ("nap_ridge", float("nan"))],
)
def test_bad_options_of_rapps_scores_are_named(option: str, value: Any, table: np.ndarray) -> None:
    with pytest.raises((TypeError, ValueError), match=option):
        RVAEDetector(**SMALL, **{option: value}).fit(table)


def test_only_variational_detectors_have_an_elbo(table: np.ndarray) -> None:
    with pytest.raises(ValueError, match="anomaly_score"):
        AEDetector(**SMALL, anomaly_score="elbo").fit(table)
