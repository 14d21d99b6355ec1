"""Models, detectors and ensembles as one file that loads without running code.

The file is safetensors: a JSON header and raw tensors. What is not a tensor (class, configuration, parameters) is one
JSON document in the header's metadata, under the key ``rvae_fast``, beside a SHA-256 over that document and every
tensor, because the format itself would accept a flipped bit. Nothing is pickled; only the classes listed here are made.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rvae_fast._detector_file import describe_detector, restore_detector
from rvae_fast._ensemble_file import describe_ensemble, restore_ensemble
from rvae_fast._model_file import FileFormatError, article, describe_model, restore_model, unknown
from rvae_fast._paths import replaceable
from rvae_fast._precision import resolve_device
from rvae_fast._version import __version__
from rvae_fast.models import MODELS, Autoencoder

if TYPE_CHECKING:
    from rvae_fast._base_detector import BaseDetector
    from rvae_fast.ensemble import EnsembleDetector

__all__ = ["FORMAT_VERSION", "FileFormatError", "load", "save"]

#: Raised by one when a file can no longer be read by the versions before.
FORMAT_VERSION = 1

_KEY, _DIGEST = "rvae_fast", "sha256"


def save(obj: Autoencoder | BaseDetector | EnsembleDetector, path: str | os.PathLike[str]) -> None:
    """Write a model or a fitted detector as one safetensors file.

    The file appears whole or not at all: it is written beside ``path`` under another name, flushed to disk and renamed.
    A link keeps pointing where it does, and the file there is replaced.

    Parameters
    ----------
    obj : AE, RAE, VAE, RVAE, one of the detectors or an EnsembleDetector
        A detector takes its scaler, threshold, feature names, parameters and training history along. A ``random_state``
        that is not an int or None is a generator in mid-stream and is saved as None. Parameters that take no gradient
        come back so; hooks do not come along.
    path : path
        ``.safetensors`` is the customary ending; any will do.

    Raises
    ------
    TypeError
        For any other object, or a parameter that JSON cannot hold.
    ValueError
        For a network that its constructor's arguments do not describe: modules, shapes, options of a module or methods
        were changed since. What was saved at ``path`` before is left there.
    OSError
        Where ``path`` is a directory or a device, its directory is not there, or nothing can be written.
    sklearn.exceptions.NotFittedError
        For a detector that has not been fitted, or whose threshold is not one of the score it takes now.
    """
    if isinstance(obj, Autoencoder):
        document, tensors = describe_model(obj)
    elif _is_of("_base_detector", obj):
        document, tensors = describe_detector(obj)
    elif _is_of("ensemble", obj):
        document, tensors = describe_ensemble(obj)
    else:
        raise TypeError(
            f"save takes an AE, RAE, VAE, RVAE, one of their detectors or an EnsembleDetector, got {type(obj).__name__}"
        )
    document = {"format_version": FORMAT_VERSION, "library_version": __version__, **document}
    # safetensors refuses tensors that share memory or have gaps; copies have neither.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    _write(Path(path), document, tensors)


def load(path: str | os.PathLike[str], *, device: str | torch.device | None = None) -> Any:
    """Read what :func:`save` wrote; scores are bit for bit those of the object that was saved.

    Parameters
    ----------
    path : path
    device : str or torch.device, optional
        Where to put the network (for a detector: its new ``device`` parameter; for an ensemble: its members'). By
        default a model comes to the CPU, and a detector scores where its own ``device`` says.

    Returns
    -------
    AE, RAE, VAE or RVAE in eval mode, or a fitted detector or ensemble

    Raises
    ------
    FileNotFoundError
    ValueError
        When ``device`` is no device, or not there.
    FileFormatError
        A ValueError that says what is wrong: damaged, truncated, foreign, written in a newer format, an unknown class,
        or tensors that do not fit the class.
    """
    place = torch.device("cpu") if device is None else resolve_device(device)
    path = Path(path)
    document, tensors = _read(path)
    kind, name = document.get("kind"), document.get("class")
    try:
        if kind == "model" and name in MODELS:
            model = restore_model(path, name, document, tensors)
        elif kind == "detector":
            return restore_detector(path, document, tensors, device)
        elif kind == "ensemble" and name == "EnsembleDetector":
            return restore_ensemble(path, document, tensors, device)
        else:
            raise FileFormatError(unknown(path, kind, name))
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}, which {article(kind)} {name} must have") from error
    except FileFormatError:
        raise
    except (TypeError, ValueError, IndexError, RuntimeError) as error:  # a text for a number, a list for a mapping
        raise FileFormatError(f"{path} cannot be {article(kind)} of class {name!r}: {error}") from error
    return model.to(place)


def _is_of(module: str, obj: object) -> Any:
    # Looked up by module name, so that saving a model does not import scikit-learn.
    return any(base.__module__ == f"rvae_fast.{module}" for base in type(obj).__mro__)


# --- the file ---


def _digest(document: str, tensors: dict[str, Tensor]) -> str:
    """SHA-256 over the document and, by name, each tensor's dtype, shape and bytes."""
    sha = hashlib.sha256(document.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def _write(path: Path, document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save as to_bytes

    text = json.dumps(document)
    content = to_bytes(tensors, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
    path = replaceable(path)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(beside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file: rvae_fast.load reads what rvae_fast.save wrote")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError, ValueError) as error:
        raise FileFormatError(f"{path} is damaged, truncated or no safetensors file at all: {error}") from error
    if _KEY not in metadata:
        raise FileFormatError(
            f"{path} is a safetensors file that rvae_fast.save did not write (no {_KEY!r} in its metadata)"
        )
    try:
        document = json.loads(metadata[_KEY])
        version = document["format_version"]
    except (ValueError, KeyError, TypeError) as error:
        raise FileFormatError(
            f"{path} is damaged: its {_KEY!r} metadata are no document of ours ({error!r})"
        ) from error
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise FileFormatError(
            f"{path} was written by rvae-fast {document.get('library_version')} in format {version}; rvae-fast "
            f"{__version__} reads formats up to {FORMAT_VERSION}: upgrade to read it"
        )
    if metadata.get(_DIGEST) != _digest(metadata[_KEY], tensors):
        raise FileFormatError(f"{path} is damaged: its content does not match the SHA-256 it was written with")
    return document, tensors
