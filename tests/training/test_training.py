"""The loop itself: against a plain one, its epochs, validation, accumulation, randomness."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rvae_fast import _rng
from rvae_fast.training import History, TrainingConfig, train

NAMES = ("AE", "RAE", "VAE", "RVAE")


@pytest.mark.parametrize("name", ["AE", "RAE"])
def test_equals_a_plain_loop(model, table, name: str) -> None:
    """An ordinary PyTorch loop in fp64, on the same batches, gives the same weights, losses and norms."""
    data = table(50).double()
    ours, plain = model(name).double(), model(name).double()
    history = train(
        ours,
        data,
        TrainingConfig(
            epochs=3, batch_size=16, learning_rate=1e-2, warmup_epochs=1, schedule="linear", weight_decay=0.1,
            max_grad_norm=14.0, seed=5,
        ),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, weight_decay=0.1)
    losses, norms, plain_epochs = [], [], []
    for epoch in range(3):
        order = _rng.permutation(50, 5, "order", epoch)
        for i, index in enumerate(order.split(16)):
            step = epoch * 4 + i
            share = (step + 1) / 5 if step < 4 else 1 - (step - 4) / 8
            optimizer.param_groups[0]["lr"] = 1e-2 * share
            loss = plain.loss(data[index])
            optimizer.zero_grad()
            loss.backward()
            norms.append(float(nn.utils.clip_grad_norm_(plain.parameters(), 14.0)))
            losses.append(float(loss.detach()))
            optimizer.step()
        plain_epochs.append(float(np.average(losses[-4:], weights=[16, 16, 16, 2])))
    np.testing.assert_allclose(history.step_loss, losses, rtol=1e-9)
    np.testing.assert_allclose(history.grad_norm, norms, rtol=1e-8)
    np.testing.assert_allclose([row["train_loss"] for row in history.epochs], plain_epochs, rtol=1e-9)
    assert min(norms) < 14.0 < max(norms), "clipping must have been at work, but not always"
    for (key, one), other in zip(ours.state_dict().items(), plain.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8, msg=key)


@pytest.mark.parametrize("name", NAMES)
def test_all_four_learn(model, table, name: str) -> None:
    data = table(257)
    net = model(name)
    config = TrainingConfig(epochs=30, batch_size=32, learning_rate=1e-2, kld_weight=0.1, seed=0, precision="fp32")
    history = train(net, data, config)
    losses = [row["train_loss"] for row in history.epochs]
    assert losses[-1] < 0.5 * losses[0]
    assert float(net.anomaly_score(data).mean()) < 0.5 * float(data.square().sum(1).mean())
    assert not net.training
    assert (history.epochs[-1]["train_kld"] > 0) == (name in ("VAE", "RVAE"))
    assert all(p.grad is None for p in net.parameters())


def test_history(model, table) -> None:
    config = TrainingConfig(epochs=3, batch_size=16, validation_fraction=0.25, seed=9, precision="fp32")
    history = train(model(), table(80), config)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]
    assert len(history.grad_norm) == len(history.step_loss) == 3 * 4
    assert np.all(history.grad_norm > 0)
    assert history.best_epoch == 1 + int(np.argmin([row["val_loss"] for row in history.epochs]))
    assert (history.seed, history.precision, history.device) == (9, "fp32", "cpu")
    assert not history.stopped_early
    assert not history.interrupted
    for i, row in enumerate(history.epochs):
        assert row["train_loss"] == pytest.approx(history.step_loss[4 * i : 4 * i + 4] @ [16, 16, 16, 12] / 60)
        assert row["train_loss"] == pytest.approx(row["train_error"] + row["train_kld"])
        assert row["seconds"] > 0
    again = History.from_dict(json.loads(json.dumps(history.to_dict())))
    assert again.to_dict() == history.to_dict()
    np.testing.assert_array_equal(again.grad_norm, history.grad_norm)


def test_every_row_once_an_epoch_in_a_new_order(standin) -> None:
    net = standin()
    data = torch.arange(49.0).view(-1, 1).repeat(1, 6)
    train(net, data, TrainingConfig(epochs=3, batch_size=16, seed=0, learning_rate=1e-9, precision="fp32"))
    assert [len(x) for x in net.seen] == [16, 16, 17] * 3, "one row left over joins the batch before"
    epochs = [torch.cat(net.seen[3 * i : 3 * i + 3])[:, 0] for i in range(3)]
    for order in epochs:
        assert torch.equal(order.sort().values, torch.arange(49.0))
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[1], epochs[2])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", [2, 3, 33, 65])
def test_one_row_left_over(model, table, name: str, n: int) -> None:
    """BatchNorm refuses a batch of one row, so none may reach it."""
    net = model(name)
    net.train()
    with pytest.raises(ValueError, match="1"):
        net.loss_terms(table(n)[:1])
    history = train(net, table(n), TrainingConfig(epochs=2, batch_size=2 if n == 3 else 32, seed=0, precision="fp32"))
    assert np.isfinite(history.step_loss).all()


@pytest.mark.parametrize("n", [96, 108, 97])
@pytest.mark.parametrize("sync_every", [1, 3])
def test_accumulation_equals_the_large_batch(standin, table, n: int, sync_every: int) -> None:
    """Also where the last group has fewer batches (108: 8 + 4 rows) or its last batch one row more (97)."""
    data = table(n).double()
    options: dict[str, Any] = {"epochs": 3, "seed": 1, "learning_rate": 1e-2, "max_grad_norm": 1.0, "kld_weight": 0.3}
    large, small = standin(dtype=torch.float64), standin(dtype=torch.float64)
    one = train(large, data, TrainingConfig(batch_size=32, **options))
    two = train(small, data, TrainingConfig(batch_size=8, accumulate=4, sync_every=sync_every, **options))
    assert small.calls > 3 * large.calls
    np.testing.assert_allclose(two.steps, one.steps, rtol=1e-10)
    assert [row["train_loss"] for row in two.epochs] == pytest.approx(
        [row["train_loss"] for row in one.epochs], rel=1e-10
    )
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_a_callback_can_stop_and_sees_every_epoch(model, table) -> None:
    seen = []

    def stop(net: nn.Module, history: History) -> bool:
        seen.append((len(history.epochs), len(history.grad_norm)))
        return len(history.epochs) == 2

    history = train(model(), table(32), TrainingConfig(epochs=5, batch_size=16, seed=0), callbacks=[stop])
    assert seen == [(1, 2), (2, 4)]
    assert history.stopped_early


OPTIONS: dict[str, Any] = {"epochs": 2, "batch_size": 16, "precision": "fp32", "validation_fraction": 0.1}


def test_a_seed_repeats_a_run(model, table, same) -> None:
    """Including dropout and the sampling of z, whatever the state of the global generator."""
    nets = []
    for state, seed in ((1, 4), (2, 4), (1, 5)):
        nets.append(model(dropout=0.2))
        torch.manual_seed(state)
        train(nets[-1], table(64), TrainingConfig(seed=seed, **OPTIONS))
    same(nets[0], nets[1])
    with pytest.raises(AssertionError):
        same(nets[0], nets[2])


def test_the_global_generators_are_left_alone(model, table) -> None:
    net = model(dropout=0.2)
    torch.manual_seed(7)
    np.random.seed(7)  # noqa: NPY002
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index]  # noqa: NPY002
    train(net, table(64), TrainingConfig(seed=1, **OPTIONS))
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], numpy_before)  # type: ignore[index]  # noqa: NPY002


def test_without_a_seed_torch_manual_seed_decides(model, table, same) -> None:
    runs = []
    for state in (7, 7, 8):
        net = model()
        torch.manual_seed(state)
        runs += [(net, train(net, table(64), TrainingConfig(**OPTIONS)))]
    same(runs[0][0], runs[1][0])
    assert runs[0][1].seed == runs[1][1].seed != runs[2][1].seed
    again = model()
    assert runs[2][1].seed != train(again, table(64), TrainingConfig(**OPTIONS)).seed, "every run draws its own"


def test_steps_draw_different_noise(model, table) -> None:
    """The generator is seeded at every step; two steps must not get the same numbers."""
    drawn = []

    class Noisy(nn.Module):
        in_features = 6

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(()))

        def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
            drawn.append(torch.randn(4))
            return self.weight * x.sum(1), torch.zeros(len(x))

    train(Noisy(), table(64), TrainingConfig(epochs=2, batch_size=16, accumulate=2, seed=0))
    assert len(drawn) == 8
    assert len({tuple(d.tolist()) for d in drawn}) == 8


def test_frozen_parameters_stay(model, table) -> None:
    net = model()
    for parameter in net.encoder.parameters():
        parameter.requires_grad_(False)
    frozen = [p.clone() for p in net.encoder.parameters()]
    moving = [p.detach().clone() for p in net.decoder.parameters()]
    train(net, table(64), TrainingConfig(seed=1, weight_decay=0.1, learning_rate=1e-2, **OPTIONS))
    assert all(torch.equal(a, b) for a, b in zip(frozen, net.encoder.parameters(), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(moving, net.decoder.parameters(), strict=True))


def test_log_variance_stays_safe(model, table) -> None:
    """Rows a thousand times the scale trained for, at a high rate: the loss stays finite."""
    data = table(256) * 1e3
    net = model("VAE")
    history = train(net, data, TrainingConfig(epochs=20, batch_size=32, learning_rate=0.1, seed=0, precision="fp32"))
    assert np.isfinite(history.step_loss).all()
    assert history.grad_norm.max() > 100 * TrainingConfig().max_grad_norm  # type: ignore[operator]
    logvar = net(data).logvar.detach()
    assert -20.1 < float(logvar.min()) < float(logvar.max()) < 10.1


class Means(nn.Module):
    """Somebody's own model, with the loss of the batch in place of the rows'."""

    def __init__(self, in_features: int | None) -> None:
        super().__init__()
        if in_features is not None:
            self.in_features = in_features
        self.layer = nn.Linear(6, 6)

    def loss_terms(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (self.layer(x) - x).square().sum(1).mean(), x.new_zeros(())


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"config": {"epochs": 1}}, TypeError, "^config must be a TrainingConfig, got dict"),
        ({"model": nn.Linear(6, 6)}, TypeError, "^model must be an nn.Module with loss_terms"),
        ({"model": Means(None)}, TypeError, "^model must have in_features, the width of a row; Means has none"),
        (
            {"model": Means(6)},
            ValueError,
            r"^model.loss_terms must return one error .* of shape \[\d+\]; error has \[\]",
        ),
        ({"resume": "yes"}, ValueError, "^resume must be True, False or 'auto', got 'yes'"),
        ({"resume": True}, ValueError, "^config.checkpoint must be a path when resume is set"),
        ({"config": TrainingConfig(patience=3)}, ValueError, "^patience needs validation data"),
        ({"validation": torch.zeros(0, 6)}, ValueError, "^validation must have at least one row"),
        ({"validation": torch.zeros(3, 5)}, ValueError, r"^validation must have shape \[n_rows, 6\], got \[3, 5\]"),
        ({"validation": [[0.0] * 6]}, TypeError, "^validation must be a torch.Tensor or numpy.ndarray, got list"),
        (
            {"data": torch.zeros(2, 6), "config": TrainingConfig(validation_fraction=0.5)},
            ValueError,
            "^data must have at least 2 rows .* got 2 of which 1 left to train on",
        ),
    ],
)
def test_bad_arguments(model, table, arguments: dict[str, Any], error: type[Exception], match: str) -> None:
    arguments = {"model": model(), "data": table(8), **arguments}
    with pytest.raises(error, match=match):
        train(**arguments)


def test_bad_models(model, table) -> None:
    net = model()
    with torch.no_grad():
        next(net.decoder.parameters())[0] = math.nan
    with pytest.raises(ValueError, match=r"^model must have finite weights to start from; decoder\.\S+ has NaN"):
        train(net, table(8))
    frozen = model().requires_grad_(False)
    with pytest.raises(ValueError, match=r"^model must have parameters that require a gradient"):
        train(frozen, table(8))


@pytest.mark.parametrize("kind", ["AE", "RAE", "VAE", "RVAE"])
def test_weights_laid_out_otherwise(kind: str, model, table) -> None:
    """As ``torch.from_numpy(w.T)`` of somebody's weights is, taken by ``load_state_dict(assign=True)``."""
    plain, other, data = model(kind), model(kind), table(32)
    state = {k: v.t().contiguous().t() if v.dim() == 2 else v for k, v in other.state_dict().items()}
    other.load_state_dict(state, assign=True)
    config = TrainingConfig(epochs=1, batch_size=32, learning_rate=1e-2, seed=0, precision="fp32")
    for one in (plain, other):
        train(one, data, config)
    for (name, a), (_, b) in zip(plain.named_parameters(), other.named_parameters(), strict=True):
        if name.endswith("weight"):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
