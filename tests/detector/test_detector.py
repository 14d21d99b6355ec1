"""What the detectors do beyond scikit-learn's checks."""

from __future__ import annotations

import io
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.exceptions import NotFittedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import QuantileTransformer

from rvae_fast._detector_options import default_architecture, default_epochs
from rvae_fast._stepper import Stepper
from rvae_fast.detector import DETECTORS, AEDetector, RAEDetector, RVAEDetector, VAEDetector
from rvae_fast.training import NonFiniteError

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


@pytest.mark.parametrize("resume", [True, "auto"])
def test_an_interrupted_fit_without_a_random_state_can_be_resumed(
    resume: bool | str, tmp_path: Path, table: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The default is no random_state: the seed that was drawn is the checkpoint's, and the resumed run's."""
    options = {**SMALL, "random_state": None, "checkpoint": str(tmp_path / "run")}
    read = Stepper.read

    def interrupt(stepper: Stepper) -> None:
        read(stepper)
        if len(stepper.history.steps) == 2:
            raise KeyboardInterrupt

    np.random.seed(5)  # noqa: NPY002  (what random_state=None draws from)
    monkeypatch.setattr(Stepper, "read", interrupt)
    with pytest.raises(KeyboardInterrupt):
        RVAEDetector(**options).fit(table)
    monkeypatch.setattr(Stepper, "read", read)
    resumed = RVAEDetector(**options, resume=resume).fit(table)
    np.random.seed(5)  # noqa: NPY002
    whole = RVAEDetector(**{**options, "checkpoint": None}).fit(table)
    np.testing.assert_array_equal(resumed.score_samples(table), whole.score_samples(table))


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


@pytest.mark.filterwarnings("error")
def test_an_overflow_is_infinite_and_no_warning(table: np.ndarray) -> None:
    detector = VAEDetector(**SMALL, scaler=None).fit(table[:, [0, 1, 4]])
    rows = np.full((2, 3), 1e300)
    assert (detector.score_samples(rows) == -np.inf).all()
    assert (detector.predict(rows) == -1).all()
    for units in ("input", "score"):
        assert (detector.feature_errors(rows, units=units) == np.inf).all()


def test_verbose_shows_progress(table: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    RVAEDetector(**SMALL).fit(table)
    assert capsys.readouterr().err == ""
    RVAEDetector(verbose=1, **SMALL).fit(table)
    captured = capsys.readouterr()
    assert captured.err != ""
    assert captured.out == ""


def test_verbose_shows_how_far_the_threshold_is(
    table: np.ndarray, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    monkeypatch.setattr("rvae_fast.preprocessing.CHUNK_BYTES", 8 * 32 * table.shape[1])
    monkeypatch.setattr("rvae_fast._progress.LINE_INTERVAL", 0.0)
    before = detector.offset_
    detector.fit_score(table)
    assert capsys.readouterr().err == ""
    parts = -(-len(table) // 32)
    detector.set_params(verbose=1).fit_score(table)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"scoring rows  {done}/{parts} parts" for done in range(1, parts)]
    assert detector.offset_ == before


def test_a_training_that_fails_does_not_leave_a_fitted_detector(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL).fit(table)
    wild = {"learning_rate": 1e30, "max_grad_norm": None, "warmup_epochs": 0, "optimizer": "adam", "epochs": 20}
    with pytest.raises(NonFiniteError):
        detector.set_params(**wild).fit(table)
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


def test_the_same_seed_in_several_threads(table: np.ndarray) -> None:
    """Making the network draws from the generator that all threads share."""
    alone = RVAEDetector(**SMALL).fit(table)
    fitted = [RVAEDetector(**SMALL) for _ in range(4)]
    threads = [threading.Thread(target=detector.fit, args=(table,)) for detector in fitted]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for detector in fitted:
        np.testing.assert_array_equal(detector.score_samples(table), alone.score_samples(table))


def test_a_training_that_diverges_leaves_its_last_good_network(table: np.ndarray) -> None:
    detector = RVAEDetector(**SMALL | {"epochs": 30}, learning_rate=1e6, max_grad_norm=None, scaler=None)
    with pytest.raises(NonFiniteError) as caught:
        detector.fit(table)
    assert len(detector.history_.steps) == caught.value.step - 1
    assert detector.n_iter_ == len(detector.history_.epochs)
    assert all(bool(p.isfinite().all()) for p in detector.model_.parameters())


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_fit_where_there_are_no_gradients(block: Any, dropout: float, table: np.ndarray) -> None:
    """As in somebody's block of evaluation. With dropout the gradients are autograd's."""
    outside = RVAEDetector(**SMALL, dropout=dropout).fit(table)
    with block():
        inside = RVAEDetector(**SMALL, dropout=dropout).fit(table)
        assert not torch.is_grad_enabled()
    np.testing.assert_array_equal(inside.score_samples(table), outside.score_samples(table))
    assert not any(p.is_inference() for p in inside.model_.parameters())
