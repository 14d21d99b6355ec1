"""Ctrl-C."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rvae_fast.training import History, TrainingConfig, train

OPTIONS: dict[str, Any] = {"epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "precision": "fp32", "seed": 2}


def interrupt_at(net: nn.Module, *calls: int) -> None:
    """Send this process SIGINT at the start of these forward passes (from 1)."""
    terms, count = net.loss_terms, 0

    def loss_terms(x: Tensor) -> Any:
        nonlocal count
        count += net.training
        for _ in range(calls.count(count) if net.training else 0):
            os.kill(os.getpid(), signal.SIGINT)
        return terms(x)  # type: ignore[operator]

    net.loss_terms = loss_terms  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize("sync_every", [1, 4])
def test_the_step_is_finished_first(model, table, same, tmp_path: Path, sync_every: int) -> None:
    net, unbroken, resumed = model(), model(), model(seed=1)
    interrupt_at(net, 7)
    config = TrainingConfig(**OPTIONS, sync_every=sync_every, checkpoint=str(tmp_path / "run"), checkpoint_every=100)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as caught:
        train(net, table(40), config)
    assert signal.getsignal(signal.SIGINT) is handler
    history: History = caught.value.history  # type: ignore[attr-defined]
    assert len(history.grad_norm) == 7
    assert len(history.epochs) == 1
    assert history.interrupted
    assert not net.training

    expected = train(unbroken, table(40), TrainingConfig(**OPTIONS))
    np.testing.assert_array_equal(history.steps, expected.steps[:7])
    final = train(resumed, table(40), config, resume=True)
    same(unbroken, resumed)
    np.testing.assert_array_equal(final.steps, expected.steps)
    assert not final.interrupted


def test_the_weights_are_those_of_the_last_whole_step(model, table, same) -> None:
    """A second Ctrl-C does not wait: the half-made step, which has moved the BatchNorms, is undone."""
    once, twice = model(), model()
    interrupt_at(once, 6)
    with pytest.raises(KeyboardInterrupt):
        train(once, table(40), TrainingConfig(**OPTIONS))

    terms = twice.loss_terms

    def after_the_forward_pass(x: Tensor) -> Any:
        result = terms(x)
        if twice.training and int(twice.encoder[0][0].norms[0].num_batches_tracked) == 7:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return result

    twice.loss_terms = after_the_forward_pass  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt) as caught:
        train(twice, table(40), TrainingConfig(**OPTIONS))
    assert len(caught.value.history.grad_norm) == 6  # type: ignore[attr-defined]
    same(once, twice)


def test_a_handler_of_the_program_stays_in_charge(model, table) -> None:
    received: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        net = model()
        interrupt_at(net, 2)
        history = train(net, table(40), TrainingConfig(**OPTIONS))
    finally:
        signal.signal(signal.SIGINT, previous)
    assert received == [signal.SIGINT]
    assert len(history.epochs) == 3


def test_in_another_thread(model, table) -> None:
    """Signal handlers belong to the main thread; training elsewhere must not touch them."""
    results: list[History] = []
    data, net = table(40), model()
    worker = threading.Thread(target=lambda: results.append(train(net, data, TrainingConfig(**OPTIONS))))
    worker.start()
    worker.join()
    assert len(results[0].epochs) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_from_a_callback(model, table, same, tmp_path: Path) -> None:
    def stop(net: nn.Module, history: History) -> None:
        if len(history.epochs) == 2:
            raise KeyboardInterrupt

    config = TrainingConfig(**OPTIONS, checkpoint=str(tmp_path / "run"), checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(model(), table(40), config, callbacks=[stop])
    resumed, unbroken = model(seed=1), model()
    history = train(resumed, table(40), config, resume=True)
    train(unbroken, table(40), TrainingConfig(**OPTIONS))
    same(unbroken, resumed)
    assert [row["epoch"] for row in history.epochs] == [1, 2, 3]


def test_gradients_are_dropped(model, table) -> None:
    net = model()
    interrupt_at(net, 2)
    with pytest.raises(KeyboardInterrupt):
        train(net, table(40), TrainingConfig(**OPTIONS))
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.isfinite(p).all() for p in net.parameters())
