"""NaN and infinity: reported with their place, and harmless."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rvae_fast import _checkpoint
from rvae_fast._nonfinite import BufferGuard
from rvae_fast.training import NonFiniteError, TrainingConfig, train

SYNC = pytest.mark.parametrize("sync_every", [1, 2, 50])


def config(**options: Any) -> TrainingConfig:
    return TrainingConfig(
        **{"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "seed": 5, **options}
    )


class Stop(BaseException):
    """Ends a run where a test wants it to."""


def stopped_after(net: nn.Module, steps: int, *arguments: Any, **options: Any) -> None:
    """Train for exactly ``steps`` optimiser steps."""
    calls, terms = 0, net.loss_terms

    def counted(x: Tensor) -> Any:
        nonlocal calls
        calls += net.training
        if calls > steps:
            raise Stop
        return terms(x)

    net.loss_terms = counted  # type: ignore[method-assign,assignment]
    with pytest.raises(Stop):
        train(net, *arguments, **options)
    del net.loss_terms


@SYNC
@pytest.mark.parametrize(
    ("name", "value"), [("AE", float("nan")), ("RAE", float("inf")), ("VAE", float("inf")), ("RVAE", float("nan"))]
)
def test_bad_input_value(model, table, same, tmp_path: Path, sync_every: int, name: str, value: float) -> None:
    """Row and column are named; weights, BatchNorms and checkpoint are those of the step before."""
    clean = table(60)
    data = clean.clone()
    data[37, 4] = value
    net, twin = model(name), model(name)
    path = tmp_path / "run"
    every = 1 if sync_every == 1 else 1000  # a checkpoint reads the device too, and the others are to read late
    setting = config(sync_every=sync_every, checkpoint=path, checkpoint_every=every, checkpoint_unit="steps")
    with pytest.raises(NonFiniteError, match="row 37, column 4 of the input") as caught:
        train(net, data, setting)
    error = caught.value
    assert error.tensor == "data"
    assert error.epoch == 1
    good = error.step - 1
    assert good >= 2
    assert f"epoch 1, step {error.step}:" in str(error)
    assert len(error.history.grad_norm) == good
    assert error.history.interrupted

    stopped_after(twin, good, clean, config())
    same(net, twin)
    tensors, header = _checkpoint.load(path)
    same(_checkpoint.subset(tensors, "model."), (twin if every == 1 else model(name)).state_dict())
    assert header["position"]["group"] == (good if every == 1 else 0)


@SYNC
def test_gradient(standin, table, same, sync_every: int) -> None:
    """Finite loss, infinite gradient: the parameter is named."""

    class Explode(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
            return grad * float("inf")

    net, twin = standin(), standin()

    def explode(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # calls 6 is the sixth step; when the step is run again to see what was wrong, later ones
        return Explode.apply(output) if net.calls >= 6 else output

    net.encoder.register_forward_hook(explode)
    with pytest.raises(NonFiniteError) as caught:
        train(net, table(32), config(sync_every=sync_every))
    assert (caught.value.tensor, caught.value.epoch, caught.value.step) == ("encoder.weight.grad", 2, 6)
    stopped_after(twin, 5, table(32), config())
    same(net, twin)


@SYNC
def test_loss_term_and_module(standin, table, sync_every: int) -> None:
    net = standin()

    def overflow(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output * 1e30 if net.calls >= 3 else output

    net.decoder.register_forward_hook(overflow)
    with pytest.raises(NonFiniteError, match=r"row \d+ of the input has error inf") as caught:
        train(net, table(32), config(sync_every=sync_every))
    assert (caught.value.tensor, caught.value.step) == ("error", 3)

    def poison(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return output.sqrt() if net.calls >= 3 else output

    net = standin()
    net.encoder.register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="first module with a non-finite output is 'encoder'"):
        train(net, table(32), config(sync_every=sync_every))


@SYNC
def test_kld(standin, table, sync_every: int) -> None:
    net = standin()
    terms = net.loss_terms

    def infinite(x: Tensor) -> tuple[Tensor, Tensor]:
        error, kld = terms(x)
        return error, kld * (float("inf") if net.calls >= 4 else 1.0)

    net.loss_terms = infinite
    with pytest.raises(NonFiniteError) as caught:
        train(net, table(32), config(sync_every=sync_every))
    assert (caught.value.tensor, caught.value.step) == ("kld", 4)


def test_norm_overflow(standin, table) -> None:
    """Every gradient finite in fp32, their norm not."""
    net = standin()
    net.encoder.weight.register_hook(lambda grad: torch.full_like(grad, 3e38))
    with pytest.raises(NonFiniteError, match="their norm overflows") as caught:
        train(net, table(32), config())
    assert caught.value.tensor == "gradient norm"


@SYNC
def test_weights_driven_to_infinity(standin, table, sync_every: int) -> None:
    with pytest.raises(NonFiniteError) as caught:
        train(standin(), table(32), config(learning_rate=1e38, warmup_epochs=0, sync_every=sync_every))
    assert caught.value.step == 2
    assert caught.value.tensor in ("error", "kld", "encoder.weight")


def test_in_an_accumulated_step(model, table, same) -> None:
    """The bad row is in a later batch of the step: the batches before have already moved the BatchNorms."""
    clean = table(64)
    data = clean.clone()
    data[11, 2] = float("nan")
    net, twin = model(), model()
    setting = {"accumulate": 4, "batch_size": 4}
    with pytest.raises(NonFiniteError, match="row 11, column 2") as caught:
        train(net, data, config(**setting))
    stopped_after(twin, 4 * (caught.value.step - 1), clean, config(**setting))
    same(net, twin)


def test_validation_data(model, table) -> None:
    held_out = table(20)
    held_out[13, 1] = float("inf")
    net = model()
    with pytest.raises(NonFiniteError, match="row 13, column 1 of validation is inf") as caught:
        train(net, table(32), config(), validation=held_out)
    assert (caught.value.tensor, caught.value.epoch, caught.value.step) == ("validation loss", 1, 4)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())


def test_the_error_survives_pickling() -> None:
    error = NonFiniteError("message", epoch=2, step=7, tensor="kld")
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.epoch, again.step, again.tensor) == ("message", 2, 7, "kld")


def test_buffer_guard() -> None:
    net = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(2).double())
    net.register_buffer("odd", torch.arange(12.0).view(3, 4).t())  # not contiguous
    guard = BufferGuard(net)
    saved = {k: v.clone() for k, v in net.state_dict().items()}

    def spoil() -> None:
        for buffer in net.buffers():
            buffer.fill_(float("nan") if buffer.is_floating_point() else -1)

    spoil()
    guard.save(torch.ones(()))  # blocked: the copy must not be taken, nor mixed with NaN
    guard.restore()
    assert all(torch.equal(v, saved[k]) for k, v in net.state_dict().items())
    spoil()
    guard.save(torch.zeros(()))
    guard.restore()
    assert np.isnan(net[0].running_mean.numpy()).all()
