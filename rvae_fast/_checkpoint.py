"""The state of a training run in one file: safetensors with a JSON header, replaced atomically, no pickle."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rvae_fast._paths import replaceable

FORMAT, VERSION = "rvae_fast.checkpoint", 1
_KEY, _CHECKSUM = "rvae_fast", "crc32"


class CheckpointError(ValueError):
    """A checkpoint that is damaged, foreign, or of another run than the one that would resume from it."""


def save(path: str | os.PathLike[str], tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Write ``tensors`` and ``header`` (JSON values) to ``path``.

    Written beside it, flushed to the disk and renamed over it: whenever the process or the machine stops, ``path``
    holds the old state or the new one, whole.

    Raises
    ------
    OSError
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    target = replaceable(path)
    partial = target.with_name(target.name + ".partial")
    seen: set[int] = set()
    flat = {}
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        # safetensors refuses tensors that share memory (tied weights): each is written for itself.
        flat[name] = value.clone() if value.data_ptr() in seen else value
        seen.add(value.data_ptr())
    text = json.dumps({"format": FORMAT, "version": VERSION, **header})
    try:
        try:
            save_file(flat, partial, metadata={_KEY: text, _CHECKSUM: _checksum(text, flat)})
        except SafetensorError as error:  # which is no OSError, whatever the file system has said
            raise OSError(f"checkpoint {os.fspath(path)!r} cannot be written: {error}") from error
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if os.name == "posix":  # the rename itself is in the directory
        directory = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def _checksum(header: str, tensors: dict[str, Tensor]) -> str:
    """CRC-32 of the header and, by name, of every tensor's bytes: safetensors would accept a flipped bit."""
    crc = zlib.crc32(header.encode())
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, crc)
    return f"{crc:08x}"


def load(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the header that :func:`save` wrote.

    Raises
    ------
    FileNotFoundError
    CheckpointError
        When the file is damaged, foreign or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(
            f"no checkpoint at {os.fspath(path)!r}; to begin one there, train with resume=False or 'auto'"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata[_KEY])
            if header["format"] != FORMAT:
                raise KeyError("format")
            if header["version"] > VERSION:
                raise CheckpointError(
                    f"checkpoint {os.fspath(path)!r} has format version {header['version']}; "
                    f"this library reads up to {VERSION}: install a newer one"
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"{os.fspath(path)!r} is not a checkpoint of a training run, or is damaged: {type(error).__name__}: {error}"
        ) from error
    # Checkpoints of earlier versions have none.
    if _CHECKSUM in metadata and metadata[_CHECKSUM] != _checksum(metadata[_KEY], tensors):
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r} is damaged: its content does not match the checksum it was written with"
        )
    return tensors, header


def require_same(path: str | os.PathLike[str], saved: dict[str, Any], here: dict[str, Any]) -> None:
    """Refuse a checkpoint whose ``identity`` is not this run's.

    Parameters
    ----------
    saved, here : dict
        ``{"config": {...}, "model": {...}, "data": "...", ...}``: compared key by key, two levels deep.

    Raises
    ------
    CheckpointError
        Listing what differs.
    """
    differences = []
    for key in sorted(saved.keys() | here.keys()):
        one, other = saved.get(key), here.get(key)
        if isinstance(one, dict) and isinstance(other, dict):
            differences += [
                f"{key}.{inner}: {one.get(inner)!r} there, {other.get(inner)!r} here"
                for inner in sorted(one.keys() | other.keys())
                if one.get(inner) != other.get(inner)
            ]
        elif one != other:
            differences.append(f"{key}: {one!r} there, {other!r} here")
    if differences:
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r} is of another run and cannot be resumed by this one:\n  "
            + "\n  ".join(differences)
        )


def require_shapes(path: str | os.PathLike[str], tensors: dict[str, Tensor], here: dict[str, Tensor]) -> None:
    """Refuse a checkpoint whose tensors cannot be copied into this run's.

    Raises
    ------
    KeyError
        Of the first that is missing.
    CheckpointError
        Listing those that have another shape.
    """
    if missing := here.keys() - tensors.keys():
        raise KeyError(sorted(missing)[0])
    shapes = {name: (list(tensors[name].shape), list(value.shape)) for name, value in here.items()}
    differences = [f"{name}: {there} there, {own} here" for name, (there, own) in shapes.items() if there != own]
    if differences:
        raise CheckpointError(
            f"checkpoint {os.fspath(path)!r} has tensors of other shapes than this run and cannot be resumed by it:\n  "
            + "\n  ".join(differences)
        )


def subset(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with ``prefix``, without it."""
    return {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}


def describe_model(model: torch.nn.Module) -> dict[str, Any]:
    """What a model must share with another for its state to fit: class, configuration, tensors."""
    config = getattr(model, "config", None)
    return {
        "class": type(model).__name__,
        "config": config() if callable(config) else None,
        "tensors": {name: f"{value.dtype} {list(value.shape)}" for name, value in model.state_dict().items()},
    }
