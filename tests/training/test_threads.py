"""Trainings in several threads, which share torch's global generators: each draws its own numbers all the same."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from rvae_fast import _rng
from rvae_fast.training import TrainingConfig, train

OPTIONS: dict[str, Any] = {"epochs": 40, "batch_size": 16, "seed": 3}


def together(*work: Any) -> None:
    """Run each in a thread of its own; raises what one raises."""
    with ThreadPoolExecutor(len(work)) as pool:
        for done in [pool.submit(one) for one in work]:
            done.result()


@pytest.mark.parametrize("kind", ["VAE", "RVAE", "dropout"])
def test_results_are_those_of_one_after_the_other(kind: str, model, table, same) -> None:
    """Steps seed the generator and draw from it; another thread's in between gave other numbers every time."""
    data = table(64)
    chosen: dict[str, Any] = {"name": "RAE", "dropout": 0.5} if kind == "dropout" else {"name": kind}
    alone, nets = model(**chosen), [model(**chosen) for _ in range(4)]
    train(alone, data, TrainingConfig(**OPTIONS))
    together(*(lambda net=net: train(net, data, TrainingConfig(**OPTIONS)) for net in nets))
    for net in nets:
        same(alone, net)


def test_the_generator_is_given_back_by_the_last(model, table) -> None:
    """Where runs overlap, the second to begin has found the generator as the first has seeded it."""
    torch.manual_seed(5)
    before, data = torch.get_rng_state(), table(40)
    first_is_in, second_is_in, first_is_out = (threading.Event() for _ in range(3))

    def first() -> None:
        with _rng.fork(torch.device("cpu")):
            torch.manual_seed(1)
            first_is_in.set()
            second_is_in.wait(5)
        first_is_out.set()

    def second() -> None:
        first_is_in.wait(5)
        with _rng.fork(torch.device("cpu")):
            second_is_in.set()
            first_is_out.wait(5)
            train(model(), data, TrainingConfig(epochs=1, seed=0))

    together(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no os.fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_child_of_fork_has_its_turn() -> None:
    """Another thread's turn never ends there."""
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with _rng.turn():
            holding.set()
            done.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    holding.wait(5)
    child = os.fork()
    if child == 0:
        os._exit(0 if _rng.turn().acquire(timeout=5) else 1)  # type: ignore[attr-defined]
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert status == 0


def test_new_modules_leave_the_generators_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """``torch.manual_seed`` seeds the generators of all GPUs as well."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    with _rng.seeded(3):
        one = torch.nn.Linear(3, 2)
    with _rng.seeded(3):
        other = torch.nn.Linear(3, 2)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
