"""Held-out rows: the split, the loss on them, early stopping, the best epoch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rvae_fast.training import TrainingConfig, train


def test_validation_rows_are_held_out(standin) -> None:
    net = standin()
    data = torch.arange(50.0).view(-1, 1).repeat(1, 6)
    seen: dict[bool, set[float]] = {True: set(), False: set()}

    def note(x: Tensor) -> Tensor:
        seen[net.training].update(x[:, 0].tolist())
        return x

    net.before = note
    train(net, data, TrainingConfig(epochs=2, batch_size=8, seed=0, validation_fraction=0.2, learning_rate=1e-9))
    assert len(seen[False]) == 10
    assert seen[True] == set(range(50)) - seen[False]
    assert seen[False] != set(range(10)), "drawn at random, not the first"


def test_validation_loss(model, table) -> None:
    """Eval mode, full KL weight, all of the validation rows, whatever their number."""
    net, held_out = model(), table(41)
    config = TrainingConfig(
        epochs=1, batch_size=16, seed=0, kld_weight=0.7, kld_warmup_epochs=3, validation_fraction=0.5, precision="fp32"
    )
    history = train(net, table(32), config, validation=held_out)
    assert history.epochs[0]["val_loss"] == pytest.approx(float(net.eval().loss(held_out, kld_weight=0.7).detach()))
    assert history.epochs[0]["kld_weight"] < 0.7
    assert len(history.step_loss) == 2, "validation_fraction is not taken from the data when validation is given"


class Scripted(nn.Module):
    """Its validation losses are given; its weight counts epochs."""

    def __init__(self, losses: list[float]) -> None:
        super().__init__()
        self.in_features, self.losses = 2, iter(losses)
        self.weight = nn.Parameter(torch.zeros(()))

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.training:
            return self.weight.expand(len(x)), torch.zeros(len(x))
        return torch.full((len(x),), next(self.losses)), torch.zeros(len(x))


@pytest.mark.parametrize(
    ("losses", "options", "best", "ran", "early"),
    [
        ([5, 4, 3, 2, 1], {}, 5, 5, False),
        ([5, 4, 3, 4, 5], {}, 3, 5, False),
        ([5, 4, 3, 4, 5], {"restore_best": False}, 3, 5, False),
        ([5, 4, 6, 6, 1], {"patience": 2}, 2, 4, True),
        ([5, 4, 6, 3, 4], {"patience": 2}, 4, 5, False),
        ([5, 4.9, 4.8, 4.7, 4.6], {"patience": 3, "min_delta": 0.5}, 1, 4, True),
        ([5, 5, 5, 5, 5], {"patience": 1}, 1, 2, True),
    ],
)
def test_early_stopping(losses: list[float], options: dict[str, Any], best: int, ran: int, early: bool) -> None:
    net = Scripted(losses)
    weights: list[float] = []
    history = train(
        net,
        torch.zeros(4, 2),
        TrainingConfig(epochs=5, seed=0, learning_rate=1.0, warmup_epochs=0, schedule="constant", **options),
        validation=torch.zeros(3, 2),
        callbacks=[lambda m, _: weights.append(float(m.weight.detach()))],
    )
    assert [row["val_loss"] for row in history.epochs] == pytest.approx(losses[:ran])
    assert (history.best_epoch, history.stopped_early) == (best, early)
    assert len(set(weights)) == ran
    kept = best if options.get("restore_best", True) else ran
    assert float(net.weight.detach()) == weights[kept - 1]


def test_without_validation_the_last_weights_stay(model, table, same) -> None:
    net, snapshots = model(), []
    config = TrainingConfig(epochs=2, batch_size=16, seed=0, precision="fp32")
    history = train(
        net,
        table(32),
        config,
        callbacks=[lambda m, _: snapshots.append({k: v.clone() for k, v in m.state_dict().items()})],
    )
    same(net, snapshots[-1])
    assert history.best_epoch is None
    assert history.epochs[0]["val_loss"] is None
