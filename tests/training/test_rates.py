"""Learning rate and warm-up where none is given."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rvae_fast import AE, RAE, RVAE, RVAEDetector
from rvae_fast._rates import default_learning_rate, default_warmup_epochs, resolved
from rvae_fast.datasets import load
from rvae_fast.detector import AEDetector, RAEDetector, VAEDetector
from rvae_fast.nn import ResidualStack
from rvae_fast.training import TrainingConfig, train


@pytest.mark.parametrize(("n_layers", "rate"), [(2, 2e-3), (10, 6.78e-4), (20, 3.66e-4), (80, 8.71e-5), (200, 3.5e-5)])
def test_falls_with_the_depth_of_pre_activation_networks(n_layers: int, rate: float) -> None:
    with torch.device("meta"):
        assert default_learning_rate(RAE(784, 20, n_layers=n_layers)) == pytest.approx(rate, rel=5e-3)
        for other in (AE(784, 20, n_layers=n_layers), RAE(784, 20, n_layers=n_layers, order="post")):
            assert default_learning_rate(other) == 2e-3


def test_counts_the_layers_of_any_module() -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 512), ResidualStack(512, 25), nn.Linear(512, 4))
    assert default_learning_rate(net) == pytest.approx(7 / (4 + 51 * 512))


@pytest.mark.parametrize(
    ("epochs", "steps", "warmup"),
    [(12, 163, 163), (100, 20, 20), (250, 4, 20), (1000, 1, 20), (20, 4, 16), (3, 2, 2), (1, 1, 1)],
)
def test_warms_up_for_an_epoch_or_twenty_steps(epochs: int, steps: int, warmup: int) -> None:
    assert round(default_warmup_epochs(epochs, steps) * steps) == warmup


def test_numbers_are_kept_as_they_are() -> None:
    config = TrainingConfig(learning_rate=0.3, warmup_epochs=0)
    assert resolved(config, RVAE(16, 4, n_layers=80), 4) == config


def test_a_run_takes_what_auto_stands_for() -> None:
    config = TrainingConfig(epochs=50, batch_size=16, seed=0, schedule="constant", precision="fp32")
    model = RVAE(8, 2, widths=[128], blocks=40)
    history = train(model, torch.rand(32, 8), config, callbacks=[lambda model, history: len(history.epochs) == 12])
    rates = [row["learning_rate"] for row in history.epochs]
    assert rates[-1] == default_learning_rate(model) < 4e-4
    assert [rate < rates[-1] for rate in rates].index(False) == 10  # 20 steps, two an epoch


def test_a_final_rate_above_that_of_a_deep_network_is_refused() -> None:
    model = RVAE(8, 2, widths=[128], blocks=40)
    with pytest.raises(
        ValueError, match=r"^final_learning_rate must be at most learning_rate \(0\.000\d+\), got 0\.001"
    ):
        train(model, torch.rand(32, 8), TrainingConfig(final_learning_rate=1e-3))


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Two would wait for each other where the machine is busy, and this is a comparison of losses, not of times."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("detector", [AEDetector, RAEDetector, VAEDetector, RVAEDetector])
def test_detectors_leave_it_to_the_training(detector: type) -> None:
    parameters = detector().get_params()
    assert (parameters["learning_rate"], parameters["warmup_epochs"]) == ("auto", "auto")


@pytest.mark.usefixtures("_one_thread")
def test_a_deep_wide_network_learns_by_the_default_where_a_shallow_one_s_rate_throws_it_about() -> None:
    X = torch.from_numpy(load("digits").scaled()).float()[:512]
    losses, jumps = {}, {}
    for rate in ("auto", 2e-3):
        torch.manual_seed(0)
        config = TrainingConfig(epochs=3, batch_size=64, learning_rate=rate, precision="fp32", seed=0)
        history = train(RAE(64, 10, widths=[384], blocks=20), X, config)
        losses[rate] = history.epochs[-1]["train_loss"]
        jumps[rate] = history.step_loss.max() / history.step_loss[0]
    assert losses["auto"] < 0.8 * losses[2e-3]
    assert jumps["auto"] < 2 < jumps[2e-3]
