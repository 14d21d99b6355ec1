from __future__ import annotations

import numpy as np
import pytest

from rvae_fast._schedule import Schedule
from rvae_fast.training import TrainingConfig, train


def rates(steps_per_epoch: int, **options: object) -> np.ndarray:
    config = TrainingConfig(learning_rate=0.5, **options)  # type: ignore[arg-type]
    schedule = Schedule(config, steps_per_epoch)
    return np.array([schedule.learning_rate(step) for step in range(config.epochs * steps_per_epoch)])


def test_warmup_rises_by_equal_steps_to_the_full_rate() -> None:
    np.testing.assert_allclose(
        rates(4, epochs=3, warmup_epochs=1, schedule="constant")[:6], [0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    )
    np.testing.assert_allclose(rates(4, epochs=3, warmup_epochs=0.5, schedule="constant")[:3], [0.5 / 3, 1 / 3, 0.5])


def test_linear() -> None:
    got = rates(4, epochs=2, warmup_epochs=0, schedule="linear", final_learning_rate=0.1)
    np.testing.assert_allclose(got, np.linspace(0.5, 0.1, 9)[:-1])


def test_cosine() -> None:
    got = rates(4, epochs=2, warmup_epochs=1, schedule="cosine")
    np.testing.assert_allclose(got[4:], 0.25 * (1 + np.cos(np.pi * np.arange(4) / 4)))
    assert got.min() > 0, "no step is wasted at a rate of zero"


def test_warmup_longer_than_the_run() -> None:
    got = rates(2, epochs=2, warmup_epochs=10)
    assert np.all(np.diff(got) > 0)
    assert got[-1] < 0.5


@pytest.mark.parametrize("epochs", [0.0, 0.5, 2.0])
def test_kld_weight(epochs: float) -> None:
    schedule = Schedule(TrainingConfig(epochs=4, kld_weight=3.0, kld_warmup_epochs=epochs), 4)
    got = [schedule.kld_weight(step) for step in range(16)]
    warm = round(epochs * 4)
    np.testing.assert_allclose(got, [3.0 * min(1.0, (step + 1) / (warm + 1)) for step in range(16)])
    assert got[warm] == 3.0
    assert warm == 0 or got[warm - 1] < 3.0


def test_the_loop_uses_both(standin, table) -> None:
    """Rows of the history, and the loss that the steps minimised."""
    config = TrainingConfig(
        epochs=2, batch_size=8, learning_rate=1e-2, warmup_epochs=1, kld_weight=2.0, kld_warmup_epochs=1, seed=0,
        precision="fp32",
    )  # fmt: skip
    history = train(standin(), table(32), config)
    schedule = Schedule(config, 4)
    assert [row["learning_rate"] for row in history.epochs] == [schedule.learning_rate(3), schedule.learning_rate(7)]
    assert [row["kld_weight"] for row in history.epochs] == [schedule.kld_weight(3), 2.0]
    weights = np.array([schedule.kld_weight(step) for step in range(8)])
    loss, error, kld, _ = history.steps.T
    np.testing.assert_allclose(loss, error + weights * kld, rtol=1e-6)
