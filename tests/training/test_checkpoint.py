"""Killed anywhere and resumed, a run ends with the bits of an unbroken one."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rvae_fast import _checkpoint
from rvae_fast.training import CheckpointError, NonFiniteError, TrainingConfig, train

BASE: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "learning_rate": 1e-2, "max_grad_norm": 5.0, "kld_weight": 0.5,
    "kld_warmup_epochs": 1.5, "precision": "fp32", "seed": 11,
}  # fmt: skip


class Killed(BaseException):
    """Stands for SIGKILL inside one process: nothing of ours may handle it."""


def die_at(net: nn.Module, call: int) -> None:
    """Make the ``call``-th training forward pass (from 1) raise :class:`Killed`."""
    terms, calls = net.loss_terms, 0

    def loss_terms(x: Tensor) -> Any:
        nonlocal calls
        calls += net.training
        if calls == call:
            raise Killed
        return terms(x)  # type: ignore[operator]

    net.loss_terms = loss_terms  # type: ignore[method-assign,assignment]


def assert_same_history(one: Any, other: Any) -> None:
    np.testing.assert_array_equal(one.steps, other.steps)
    for a, b in zip(one.epochs, other.epochs, strict=True):
        assert {k: v for k, v in a.items() if k != "seconds"} == {k: v for k, v in b.items() if k != "seconds"}
    assert (one.best_epoch, one.stopped_early, one.seed) == (other.best_epoch, other.stopped_early, other.seed)
    assert not other.interrupted


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RVAE", {"checkpoint_unit": "steps", "checkpoint_every": 1, "epochs": 2, "validation_fraction": 0.2}),
        ("RVAE", {"checkpoint_unit": "steps", "checkpoint_every": 4, "sync_every": 3, "validation_fraction": 0.2}),
        ("VAE", {"checkpoint_unit": "steps", "checkpoint_every": 2, "accumulate": 2, "epochs": 2, "optimizer": "adam"}),
        (
            "RAE",
            {"epochs": 4, "checkpoint_unit": "epochs", "patience": 2, "min_delta": 1e3, "validation_fraction": 0.2},
        ),
        ("AE", {"precision": "bf16", "checkpoint_unit": "steps", "checkpoint_every": 3}),
    ],
)
@pytest.mark.filterwarnings("ignore:bf16 is emulated")
def test_killed_at_every_step(model, table, same, tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    """Every forward pass of the run in turn is the last; then once more, while resuming."""
    extra = {"dropout": 0.1} if name in ("RAE", "RVAE") else {}
    data = table(41)
    unbroken = model(name, **extra)
    passes = 0
    terms = unbroken.loss_terms

    def count(x: Tensor) -> Any:
        nonlocal passes
        passes += unbroken.training
        return terms(x)

    unbroken.loss_terms = count  # type: ignore[method-assign]
    free = {k: v for k, v in options.items() if "checkpoint" not in k}
    expected = train(unbroken, data, TrainingConfig(**{**BASE, **free}))
    assert passes >= 8
    for call in range(1, passes + 1):
        config = TrainingConfig(**{**BASE, **options, "checkpoint": str(tmp_path / f"{call}")})
        first = model(name, **extra)
        die_at(first, call)
        with pytest.raises(Killed):
            train(first, data, config)
        second = model(name, seed=99, **extra)  # other weights: all must come from the file
        die_at(second, 2)
        with contextlib.suppress(Killed):  # or no second pass was left
            train(second, data, config, resume=True)
        third = model(name, seed=98, **extra)
        torch.manual_seed(call)
        history = train(third, data, config, resume=True)
        same(unbroken, third)
        assert_same_history(expected, history)


CHILD = """
import json, os, signal, sys
import torch
from rvae_fast.models import RVAE
from rvae_fast.training import TrainingConfig, train

arguments = json.loads(sys.argv[1])
torch.set_num_threads(arguments["threads"])
torch.manual_seed(arguments["seed"])
model = RVAE(6, latent_features=2, n_layers=4, dropout=0.1)
left = arguments["left"]

def last():
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

if arguments["where"] == "step":
    terms = model.loss_terms
    def loss_terms(x):
        last()
        return terms(x)
    model.loss_terms = loss_terms
else:  # while a checkpoint is being written: the new file is there, the rename is not done
    replace = os.replace
    def cut(source, target):
        last()
        replace(source, target)
    os.replace = cut
train(model, torch.load(arguments["data"], weights_only=True), TrainingConfig(**arguments["config"]), resume="auto")
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_by_sigkill(model, table, same, tmp_path: Path) -> None:
    """Real processes: killed in a step, then in the middle of writing a checkpoint, then left to finish."""
    data = table(60)
    torch.save(data, tmp_path / "data")
    options = {**BASE, "checkpoint": str(tmp_path / "run"), "checkpoint_every": 3, "checkpoint_unit": "steps"}
    generator = np.random.default_rng(int(os.environ.get("RVAE_FAST_KILL_SEED", "0")))
    unbroken = model(dropout=0.1)
    expected = train(unbroken, data, TrainingConfig(**BASE))
    assert len(expected.grad_norm) == 24
    positions = []
    for number, (where, left) in enumerate((("step", generator.integers(5, 12)), ("write", generator.integers(2, 4)))):
        arguments = {
            "where": where, "left": int(left), "threads": torch.get_num_threads(), "data": str(tmp_path / "data"),
            "config": options, "seed": number,
        }  # fmt: skip
        done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(arguments)], capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        position = _checkpoint.load(tmp_path / "run")[1]["position"]
        positions.append(position["epoch"] * 8 + position["group"])
    assert 0 < positions[0] < positions[1] < 24
    assert (tmp_path / "run.partial").exists(), "the second was killed before the rename"
    last = model(seed=2, dropout=0.1)
    history = train(last, data, TrainingConfig(**options), resume=True)
    # The children began from weights of seed 0, as the unbroken run did.
    same(unbroken, last)
    assert_same_history(expected, history)
    assert not (tmp_path / "run.partial").exists()


def test_a_resumed_run_that_fails_at_once_keeps_the_state_it_read(model, table, same, tmp_path: Path) -> None:
    """Also the BatchNorms, which its first forward pass has already moved."""
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    first, second = model(), model(seed=1)
    die_at(first, 8)
    with pytest.raises(Killed):
        train(first, table(40), config)
    second.decoder[-1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    second.decoder[-1].register_forward_hook(lambda *_: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        train(second, table(40), config, resume=True)
    assert int(second.encoder[0][0].norms[0].num_batches_tracked) == 5
    same(_checkpoint.subset(_checkpoint.load(tmp_path / "run")[0], "model."), second.state_dict())


def test_a_half_made_update_is_not_saved(model, table, same, tmp_path: Path, monkeypatch: Any) -> None:
    """Broken off between counting and updating, by a handler that does not wait: the file keeps the step before."""
    from rvae_fast._optimizer import Optimizer

    step, calls = Optimizer.step, 0

    def broken(self: Optimizer, *arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 7:
            self._steps += 1
            raise KeyboardInterrupt
        step(self, *arguments)

    monkeypatch.setattr(Optimizer, "step", broken)
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"), checkpoint_every=4, checkpoint_unit="steps")
    with pytest.raises(KeyboardInterrupt):
        train(model(), table(40), config)
    _, header = _checkpoint.load(tmp_path / "run")
    assert (header["position"]["epoch"], header["position"]["group"]) == (0, 4)
    monkeypatch.undo()
    resumed, unbroken = model(seed=1), model()
    train(resumed, table(40), config, resume=True)
    train(unbroken, table(40), TrainingConfig(**BASE))
    same(unbroken, resumed)


def test_without_a_seed_the_checkpoint_has_it(model, table, same, tmp_path: Path) -> None:
    config = TrainingConfig(**{**BASE, "seed": None, "checkpoint": str(tmp_path / "run")})
    unbroken = model()
    torch.manual_seed(3)
    train(unbroken, table(40), config)
    broken = model()
    die_at(broken, 7)
    torch.manual_seed(3)
    with pytest.raises(Killed):
        train(broken, table(40), config)
    resumed = model(seed=5)
    torch.manual_seed(4)
    train(resumed, table(40), config, resume=True)
    same(unbroken, resumed)


def test_a_seed_that_was_given_need_not_be_given_again(model, table, same, tmp_path: Path) -> None:
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    unbroken, broken, resumed = model(), model(), model(seed=5)
    train(unbroken, table(40), config)
    die_at(broken, 7)
    with pytest.raises(Killed):
        train(broken, table(40), config)
    history = train(resumed, table(40), dataclasses.replace(config, seed=None), resume=True)
    same(unbroken, resumed)
    assert history.seed == BASE["seed"]
    train(model(), table(40), config, resume=True)  # and whoever gives it may still go on


def test_a_finished_run_resumes_to_itself(model, table, same, tmp_path: Path) -> None:
    config = TrainingConfig(**BASE, validation_fraction=0.3, checkpoint=str(tmp_path / "new" / "run"))
    first, second = model(), model(seed=1)
    history = train(first, table(40), config)
    die_at(second, 1)
    again = train(second, table(40), config, resume=True)
    same(first, second)
    assert_same_history(history, again)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run"]


def test_resume_modes(model, table, same, tmp_path: Path) -> None:
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    with pytest.raises(FileNotFoundError, match=r"no checkpoint at .*run"):
        train(model(), table(40), config, resume=True)
    auto, anew = model(), model()
    train(auto, table(40), config, resume="auto")
    longer = TrainingConfig(**{**BASE, "epochs": 1}, checkpoint=config.checkpoint)
    assert len(train(anew, table(40), longer, resume=False).epochs) == 1, "False begins anew whatever is there"
    same(_checkpoint.subset(_checkpoint.load(tmp_path / "run")[0], "model."), anew.state_dict())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"learning_rate": 0.5}, r"config\.learning_rate: 0\.01 there, 0\.5 here"),
        ({"epochs": 9, "seed": 12}, r"config\.epochs: 3 there, 9 here\n  config\.seed: 11 there, 12 here"),
        ({"data": "row"}, "data: '40x6 torch.float32 "),
        ({"data": "longer"}, r"data: '40x6 .*' there, '41x6"),
        ({"validation": True}, r"validation: None there, '7x6 "),
        ({"model": "VAE"}, "model.class: 'RVAE' there, 'VAE' here"),
        ({"model": "wide"}, r"model\.config: .*'latent_features': 2"),
        ({"precision": "bf16"}, "precision: 'fp32' there, 'bf16' here"),
    ],
)
@pytest.mark.filterwarnings("ignore:bf16 is emulated")
def test_another_run_is_refused(model, table, same, tmp_path: Path, change: dict[str, Any], match: str) -> None:
    path = tmp_path / "run"
    broken = model()
    die_at(broken, 9)
    with pytest.raises(Killed):
        train(broken, table(40), TrainingConfig(**BASE, checkpoint=str(path)))
    before = path.read_bytes()
    change = dict(change)
    data, held_out = table(40), None
    match change.pop("data", None):
        case "row":
            data[39, 5] += 1e-3
        case "longer":
            data = table(41)
    if change.pop("validation", False):
        held_out = table(7)
    from rvae_fast.models import RVAE

    kind = change.pop("model", "RVAE")
    other = RVAE(6, latent_features=3, n_layers=4) if kind == "wide" else model(kind)
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=match) as caught:
        train(other, data, TrainingConfig(**{**BASE, **change}, checkpoint=str(path)), resume=True, validation=held_out)
    assert str(path) in str(caught.value)
    same(weights, other.state_dict())
    assert path.read_bytes() == before


def test_incidental_options_may_change(model, table, same, tmp_path: Path) -> None:
    unbroken, broken, resumed = model(), model(), model(seed=1)
    train(unbroken, table(40), TrainingConfig(**BASE))
    die_at(broken, 9)
    with pytest.raises(Killed):
        train(broken, table(40), TrainingConfig(**BASE, checkpoint=str(tmp_path / "run")))
    os.rename(tmp_path / "run", tmp_path / "moved")
    config = TrainingConfig(
        **BASE,
        checkpoint=str(tmp_path / "moved"),
        checkpoint_every=7,
        checkpoint_unit="steps",
        sync_every=4,
        progress=True,
    )
    train(resumed, table(40), config, resume=True)
    same(unbroken, resumed)


def test_a_non_finite_step_leaves_a_checkpoint_to_resume_from(model, table, same, tmp_path: Path) -> None:
    """The input is mended, the run goes on, and ends as if nothing had been."""
    clean = table(600)
    data = clean.clone()
    data[3, 3] = float("nan")  # not among the rows that the fingerprint looks at
    config = TrainingConfig(**{**BASE, "batch_size": 64}, checkpoint=str(tmp_path / "run"), checkpoint_unit="steps")
    with pytest.raises(NonFiniteError, match="row 3, column 3"):
        train(model(), data, config)
    resumed, unbroken = model(seed=4), model()
    train(resumed, clean, config, resume=True)
    train(unbroken, clean, TrainingConfig(**{**BASE, "batch_size": 64}))
    same(unbroken, resumed)
