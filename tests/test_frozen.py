"""Scorers kept beside their models: made once, never stale, never seen but in the time a call takes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rvae_fast
from rvae_fast import AE, RVAE, ResidualBlock, _frozen, scoring
from rvae_fast._frozen import frozen
from rvae_fast.detector import DETECTORS
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS
from rvae_fast.scorer import Scorer
from rvae_fast.scoring import network_rows, score_rows

pytestmark = pytest.mark.skipif(
    rvae_fast.available_backends()["native"] is not None, reason="no native module: nothing is frozen"
)
PRECISIONS = ["fp32", pytest.param("bf16", marks=pytest.mark.skipif(not HAS_BF16_PRODUCTS, reason="no bf16 products"))]


@pytest.fixture
def model() -> RVAE:
    return RVAE(12, latent_features=3, widths=(24, 16), blocks=(2, 1), init="default").eval()


@pytest.fixture
def rows() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(200, 12)).astype(np.float32)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that were frozen, in order."""
    models: list[Any] = []
    freeze = _frozen.freeze

    def counted(model: Any, precision: str) -> Scorer:
        models.append(model)
        return freeze(model, precision)

    monkeypatch.setattr(_frozen, "freeze", counted)
    return models


def by_model(model: Any, rows: np.ndarray) -> np.ndarray:
    with rvae_fast.backend("reference"):
        return score_rows(model, rows)


def test_made_once_for_any_number_of_calls(model: RVAE, rows: np.ndarray, made: list[Any]) -> None:
    first = score_rows(model, rows)
    for part in (rows[:1], rows[:50], torch.from_numpy(rows)):
        np.testing.assert_array_equal(score_rows(model, part), first[: len(part)])
    network_rows(model, rows, "latent")
    assert len(made) == 1
    score_rows(model, rows, precision="bf16")
    score_rows(model, rows)
    assert len(made) == 1 + HAS_BF16_PRODUCTS


def step(model: Any) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.loss(torch.randn(32, 12)).backward()
    optimizer.step()


def statistics(model: Any) -> None:
    model.train()(torch.randn(32, 12))
    model.eval()


def replaced_module(model: Any) -> None:
    model.encoder[0] = nn.Linear(12, 24)


def replaced_parameter(model: Any) -> None:
    model.decoder[0].weight = nn.Parameter(torch.randn_like(model.decoder[0].weight))


def deleted_and_made_again(model: Any) -> None:
    shape = model.decoder[0].weight.shape
    del model.decoder[0].weight
    model.decoder[0].weight = nn.Parameter(torch.randn(shape))


def data_pointer(model: Any) -> None:
    model.decoder[0].weight.data = torch.randn_like(model.decoder[0].weight)


def loaded(model: Any) -> None:
    model.load_state_dict(RVAE(12, latent_features=3, widths=(24, 16), blocks=(2, 1), init="default").state_dict())


def hooked(model: Any) -> None:
    model.decoder[0].register_forward_hook(lambda module, args, out: out + 1.0)


def another_activation(model: Any) -> None:
    model.encoder[1][0] = ResidualBlock(24, activation="tanh")


def written_past_autograd(model: Any) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(1.5)


@pytest.mark.parametrize(
    "change",
    [
        step, statistics, replaced_module, replaced_parameter, deleted_and_made_again, data_pointer, loaded, hooked,
        another_activation, written_past_autograd,
    ],
)  # fmt: skip
def test_any_change_of_the_model_is_seen(change: Callable[[Any], None], model: RVAE, rows: np.ndarray) -> None:
    before = score_rows(model, rows)
    change(model)
    after = score_rows(model, rows)
    np.testing.assert_allclose(after, by_model(model, rows), rtol=1e-4, atol=1e-5)
    assert not np.allclose(after, before, rtol=1e-3)


def option(name: str, value: Any) -> Callable[[Any], None]:
    """Set an attribute wherever it is."""

    def change(model: Any) -> None:
        for module in model.modules():
            if name in vars(module):
                setattr(module, name, value)

    return change


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (kind, *change)
        for kind in (AE, RVAE)
        for change in [("likelihood", "absolute"), ("eps", 1.0), ("activation", "tanh"), ("negative_slope", 0.7)]
    ]
    + [(RVAE, "order", "post")],
)
def test_a_changed_option_is_seen(kind: Any, name: str, value: Any, rows: np.ndarray) -> None:
    options = {} if kind is AE else {"init": "default"}
    model = kind(12, latent_features=3, widths=(24, 16), **options).eval()
    before = score_rows(model, rows)
    option(name, value)(model)
    after = score_rows(model, rows)
    np.testing.assert_allclose(after, by_model(model, rows), rtol=1e-4, atol=1e-5)
    assert not np.allclose(after, before, rtol=1e-3)


def test_a_replaced_method_is_seen_and_so_is_its_end(model: RVAE, rows: np.ndarray, made: list[Any]) -> None:
    before = score_rows(model, rows)
    last: Any = model.decoder[0]
    last.forward = lambda x: type(last).forward(last, x) + 1.0
    after = score_rows(model, rows)
    np.testing.assert_allclose(after, by_model(model, rows), rtol=1e-4)
    assert not np.allclose(after, before, rtol=1e-3)
    del last.forward
    np.testing.assert_array_equal(score_rows(model, rows), before)
    model.anomaly_score = lambda x, kld_weight=0.0: RVAE.anomaly_score(model, x, kld_weight) + 1.0  # type: ignore
    np.testing.assert_allclose(score_rows(model, rows), before + 1.0, rtol=1e-4)
    assert len(made) == 2


def test_a_hook_on_every_module_is_called(model: RVAE, rows: np.ndarray) -> None:
    score_rows(model, rows)
    seen: list[nn.Module] = []
    hook = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module))
    try:
        score_rows(model, rows)
    finally:
        hook.remove()
    assert model.decoder[0] in seen
    assert frozen(model, "fp32") is not None


def test_which_models_run_themselves(model: RVAE, rows: np.ndarray) -> None:
    class Mine(RVAE):
        def anomaly_score(self, x: Any, kld_weight: float = 0.0) -> Any:
            return super().anomaly_score(x, kld_weight) + 1.0

    mine = Mine(12, latent_features=3, widths=(24, 16), blocks=(2, 1))
    mine.load_state_dict(model.state_dict())
    np.testing.assert_allclose(score_rows(mine, rows), by_model(model, rows) + 1.0, rtol=1e-4)
    custom = copy.deepcopy(model)
    custom.encoder.append(nn.Tanh())
    double, without_statistics = copy.deepcopy(model).double(), copy.deepcopy(model)
    without_statistics.encoder[1][0].norms[0].running_mean = None
    without_statistics.encoder[1][0].norms[0].running_var = None
    with torch.inference_mode():
        inference = RVAE(12, latent_features=3, widths=(24, 16), blocks=(2, 1)).eval()
    for other in (mine, custom, double, without_statistics, inference):
        assert frozen(other, "fp32") is None
        assert score_rows(other, rows).shape == (200,)
    assert frozen(model, "fp32") is not None
    with rvae_fast.backend("reference"):
        assert frozen(model, "fp32") is None


def test_dropout_is_the_identity(rows: np.ndarray) -> None:
    model = RVAE(12, latent_features=3, widths=(24,), blocks=(2,), dropout=0.5, init="default")
    assert frozen(model, "fp32") is not None
    np.testing.assert_allclose(score_rows(model, rows), by_model(model, rows), rtol=1e-4)


def test_copies_and_pickles_know_nothing_of_it_and_it_goes_with_the_model(rows: np.ndarray) -> None:
    model = RVAE(12, latent_features=3, widths=(24, 16), blocks=(2, 1), init="default").eval()
    size, keys = len(pickle.dumps(model)), set(vars(model))
    scores = score_rows(model, rows)
    assert len(pickle.dumps(model)) == size
    assert set(vars(model)) == keys
    twin = copy.deepcopy(model)
    step(twin)
    assert not np.allclose(score_rows(twin, rows), scores)
    np.testing.assert_array_equal(score_rows(model, rows), scores)
    scorer = weakref.ref(frozen(model, "fp32"))
    assert scorer() is not None
    del model
    gc.collect()
    assert scorer() is None


def test_many_threads_score_one_model(model: RVAE, rows: np.ndarray) -> None:
    expected = score_rows(copy.deepcopy(model), rows)
    with ThreadPoolExecutor(8) as pool:
        for scores in pool.map(lambda _: score_rows(model, rows), range(64)):
            np.testing.assert_array_equal(scores, expected)


@pytest.mark.parametrize("result", [r for r in scoring.RESULTS if r != "score"])
@pytest.mark.parametrize("likelihood", ["squared", "absolute", "bernoulli"])
def test_other_results_are_the_models(likelihood: str, result: str) -> None:
    model = AE(12, latent_features=3, n_layers=4, likelihood=likelihood).train()
    rows = np.random.default_rng(1).uniform(size=(70, 12))
    got = network_rows(model, rows, result)
    with rvae_fast.backend("reference"):
        expected = network_rows(model, rows, result)
    assert got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert model.training


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("detector_class", list(DETECTORS.values()))
def test_a_detectors_scores_do_not_depend_on_how_the_table_comes(detector_class: Any, precision: str) -> None:
    rng = np.random.default_rng(3)
    table = rng.normal(size=(230, 7))
    detector = detector_class(epochs=2, widths=(33,), random_state=0, precision=precision).fit(table)
    assert frozen(detector.model_, precision) is not None
    whole = detector.score_samples(table)
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            for cuts in (list(range(1, 230)), [1, 2, 4, 7, 12, 45, 77, 140], [96], [97], [113], [191, 192]):
                parts = detector.score_chunks(np.split(table, cuts))
                np.testing.assert_array_equal(np.concatenate(list(parts)), whole)
    finally:
        torch.set_num_threads(threads)


def test_a_detector_freezes_once_and_again_after_its_weights_change(made: list[Any]) -> None:
    table = np.random.default_rng(3).normal(size=(100, 7))
    detector = DETECTORS["RVAEDetector"](epochs=2, widths=(16,), random_state=0).fit(table)
    detector.predict(table)
    detector.transform(table)
    detector.feature_errors(table)
    assert len(made) == 1
    loaded = pickle.loads(pickle.dumps(detector))
    np.testing.assert_array_equal(loaded.score_samples(table), detector.score_samples(table))
    detector.fit(table[::-1])
    assert len({id(model) for model in made}) == 3
