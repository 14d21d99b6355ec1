"""The checkpoint as a file: damaged, foreign, half written."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from rvae_fast import _checkpoint
from rvae_fast.training import CheckpointError, TrainingConfig, train

BASE: dict[str, Any] = {"epochs": 2, "batch_size": 8, "precision": "fp32", "seed": 11}


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "bit":
        path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    elif how == "noise":
        path.write_bytes(np.random.default_rng(0).bytes(2000))
    elif how == "foreign":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, path, metadata={"format": "pt"})
    elif how == "other":
        from safetensors.torch import save_file

        save_file({"weight": torch.zeros(3)}, path, metadata={"rvae_fast": json.dumps({"format": "rvae_fast.model"})})
    elif how == "pickle":
        torch.save({"weight": torch.zeros(3)}, path)
    else:
        tensors, header = _checkpoint.load(path)
        if how == "newer":
            header["version"] = _checkpoint.VERSION + 1
        elif how == "header":
            del header["position"]
        elif how == "tensors":
            del tensors["optimizer.steps"]
        _checkpoint.save(path, tensors, {k: v for k, v in header.items() if k != "format"})


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "bit", "noise", "foreign", "other", "pickle", "newer", "header", "tensors"]
)
def test_a_damaged_file_is_refused(model, table, same, tmp_path: Path, how: str) -> None:
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    train(model(), table(40), config)
    damage(tmp_path / "run", how)
    other = model(seed=1)
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match="version 2; .* install a newer" if how == "newer" else "damaged"):
        train(other, table(40), config, resume=True)
    same(weights, other.state_dict())


def test_a_checkpoint_without_a_checksum_is_of_an_earlier_version(model, table, same, tmp_path: Path) -> None:
    path = tmp_path / "run"
    unbroken, resumed = model(), model()
    train(unbroken, table(40), TrainingConfig(**BASE, checkpoint=str(path)))
    tensors, header = _checkpoint.load(path)
    safetensors.torch.save_file(tensors, path, metadata={"rvae_fast": json.dumps(header)})
    train(resumed, table(40), TrainingConfig(**BASE, checkpoint=str(path)), resume=True)
    same(unbroken, resumed)


def test_a_failed_write_leaves_the_old_file(model, table, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "run"
    config = TrainingConfig(**BASE, checkpoint=str(path))
    train(model(), table(40), config)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(model(), table(40), config)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("unit", ["epochs", "steps"])
def test_a_disk_that_becomes_full_costs_no_training(
    model, table, same, unit: str, tmp_path: Path, monkeypatch: Any
) -> None:
    path, written = tmp_path / "run", []
    config = TrainingConfig(**BASE, checkpoint=str(path), checkpoint_unit=unit)
    net, unbroken, save_file = model(), model(), safetensors.torch.save_file

    def full(*arguments: Any, **named: Any) -> None:
        written.append(len(written))
        if len(written) > 1:
            raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")
        save_file(*arguments, **named)

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.warns(RuntimeWarning, match=r"run' cannot be written: .*No space left.*; the training goes on"):
        history = train(net, table(40), config)
    assert len(written) > 2
    monkeypatch.undo()
    train(unbroken, table(40), TrainingConfig(**BASE))
    same(unbroken, net)
    assert len(history.epochs) == config.epochs
    train(other := model(seed=1), table(40), config, resume=True)  # from the checkpoint of before
    same(unbroken, other)


def test_no_room_for_the_first_checkpoint_is_an_error(model, table, tmp_path: Path, monkeypatch: Any) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"checkpoint '.*run' cannot be written"):
        train(model(), table(40), TrainingConfig(**BASE, checkpoint=str(tmp_path / "run")))


@pytest.mark.skipif(os.name != "posix", reason="links and pipes as POSIX has them")
def test_a_checkpoint_follows_a_link_and_replaces_nothing_but_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("target")
    _checkpoint.save(tmp_path / "link", {"a": torch.arange(2.0)}, {})
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").is_file()
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "."):
        with pytest.raises(OSError, match="expected the name of a file to write"):
            _checkpoint.save(tmp_path / name, {"a": torch.arange(2.0)}, {})
    assert (tmp_path / "pipe").is_fifo()


def test_tied_weights_can_be_saved(tmp_path: Path) -> None:
    shared = torch.arange(6.0).view(2, 3)
    _checkpoint.save(tmp_path / "file", {"a": shared, "b": shared, "c": shared.t()}, {})
    tensors, _ = _checkpoint.load(tmp_path / "file")
    assert torch.equal(tensors["b"], shared)
    assert torch.equal(tensors["c"], shared.t())


def frozen(net: Any, *names: str) -> Any:
    for name, parameter in net.named_parameters():
        parameter.requires_grad_(name not in names)
    return net


#: Of one shape.
ONE, OTHER = (f"encoder.0.0.norms.0.{name}" for name in ("weight", "bias"))


@pytest.mark.parametrize("names", [(OTHER,), (ONE, OTHER), ()])
def test_other_frozen_parameters_are_another_run(model, table, same, tmp_path: Path, names: tuple[str, ...]) -> None:
    """Adam's moments go by position: with others frozen they would be another parameter's."""
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    train(frozen(model(), ONE), table(40), config)
    other = frozen(model(seed=1), *names)
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"parameters\.encoder\.0\.0\.norms\.0\.\w+: '\w+' there, '\w+' here"):
        train(other, table(40), config, resume=True)
    same(weights, other.state_dict())
    resumed, unbroken = frozen(model(seed=1), ONE), frozen(model(), ONE)
    train(resumed, table(40), config, resume=True)
    train(unbroken, table(40), TrainingConfig(**BASE))
    same(unbroken, resumed)


def test_checkpoints_that_do_not_name_the_parameters_resume(model, table, same, tmp_path: Path) -> None:
    """Versions before did not; where their state is of another number of parameters, it shows in the shapes."""
    path = tmp_path / "run"
    config = TrainingConfig(**BASE, checkpoint=str(path))
    trained = model()
    train(trained, table(40), config)
    tensors, header = _checkpoint.load(path)
    del header["identity"]["parameters"]
    _checkpoint.save(path, tensors, {k: v for k, v in header.items() if k not in ("format", "version")})
    resumed = model(seed=1)
    train(resumed, table(40), config, resume=True)
    same(trained, resumed)
    other = frozen(model(seed=1), ONE)
    weights = {k: v.clone() for k, v in other.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"tensors of other shapes than this run .*\n .*optimizer\.\w+"):
        train(other, table(40), config, resume=True)
    same(weights, other.state_dict())


def test_another_likelihood_is_another_run(model, table, tmp_path: Path) -> None:
    config = TrainingConfig(**BASE, checkpoint=str(tmp_path / "run"))
    train(model(), table(40), config)
    other = model()
    other.likelihood = "absolute"
    with pytest.raises(CheckpointError, match=r"model\.config: .*'likelihood': 'absolute'.* here"):
        train(other, table(40), config, resume=True)
