"""Models and detectors as one file that loads without running code.

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

import numpy as np
import torch
from torch import Tensor

from rvae_fast._paths import replaceable
from rvae_fast._precision import resolve_device
from rvae_fast._version import __version__
from rvae_fast.models import MODELS, Autoencoder

if TYPE_CHECKING:
    from rvae_fast._base_detector import BaseDetector

#: Raised by one when a file can no longer be read by the versions before.
FORMAT_VERSION = 1

#: Scores that keep training rows, as ``<score>_`` of a detector and ``<score>.<array>`` in a file.
KEPT_ROWS = ("local", "hyperplane")

_KEY, _DIGEST = "rvae_fast", "sha256"


class FileFormatError(ValueError):
    """A file that :func:`load` cannot read: damaged, foreign, or written by a newer version."""


def save(obj: Autoencoder | BaseDetector, path: str | os.PathLike[str]) -> None:
    """Write a model or a fitted detector as one safetensors file.

    The file appears whole or not at all: it is written beside ``path`` under another name, flushed to disk and renamed.
    A link keeps pointing where it does, and the file there is replaced.

    Parameters
    ----------
    obj : AE, RAE, VAE, RVAE, or one of the detectors
        A detector takes its scaler, threshold, feature names, parameters and training history along. A ``random_state``
        that is not an int or None is a generator in mid-stream and is saved as None.
    path : path
        ``.safetensors`` is the customary ending; any will do.

    Raises
    ------
    TypeError
        For any other object, or a parameter that JSON cannot hold.
    OSError
        Where ``path`` is a directory or a device, its directory is not there, or nothing can be written.
    sklearn.exceptions.NotFittedError
        For a detector that has not been fitted.
    """
    if isinstance(obj, Autoencoder):
        document, tensors = _describe_model(obj)
    elif _is_detector(obj):
        document, tensors = _describe_detector(obj)
    else:
        raise TypeError(f"save takes an AE, RAE, VAE, RVAE or one of their detectors, got {type(obj).__name__}")
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
        Where to put the network (for a detector: its new ``device`` parameter). By default a model comes to the CPU,
        and a detector scores where its own ``device`` says.

    Returns
    -------
    AE, RAE, VAE or RVAE in eval mode, or a fitted detector

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
            return _restore_model(path, name, document["config"], tensors).to(place)
        if kind == "detector":
            from rvae_fast.detector import DETECTORS

            if name in DETECTORS:
                return _restore_detector(path, DETECTORS[name], document, tensors, device)
    except KeyError as error:
        raise FileFormatError(f"{path} lacks {error}, which a {kind} {name} must have") from error
    raise FileFormatError(f"{path} holds a {kind} of class {name!r}, which rvae-fast {__version__} does not know")


# --- models ---


def _describe_model(model: Autoencoder) -> tuple[dict[str, Any], dict[str, Tensor]]:
    name = type(model).__name__
    if MODELS.get(name) is not type(model):
        raise TypeError(
            f"save takes an AE, RAE, VAE or RVAE itself, got the subclass {name}: load could not make it again"
        )
    tensors = {f"model.{key}": tensor for key, tensor in model.state_dict().items()}
    return {"kind": "model", "class": name, "config": model.config()}, tensors


def _restore_model(path: Path, name: str, config: dict[str, Any], tensors: dict[str, Tensor]) -> Autoencoder:
    state = {key.removeprefix("model."): t for key, t in tensors.items() if key.startswith("model.")}
    try:
        # On the meta device: no memory is taken, and no random number drawn, before the shapes are known to agree.
        with torch.device("meta"):
            model = MODELS[name](**config)
    except (TypeError, ValueError) as error:
        raise FileFormatError(f"{path} holds a configuration that {name} does not take: {error}") from error
    expected = {key: tuple(t.shape) for key, t in model.state_dict().items()}
    found = {key: tuple(t.shape) for key, t in state.items()}
    if expected != found:
        raise FileFormatError(f"{path} does not fit a {name} of its configuration: {_difference(expected, found)}")
    model.load_state_dict(state, assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model.eval()


def _difference(expected: dict[str, Any], found: dict[str, Any]) -> str:
    notes = [f"{key} is missing" for key in expected if key not in found]
    notes += [f"{key} is not known" for key in found if key not in expected]
    notes += [f"{key} has shape {list(found[key])}, not {list(shape)}" for key, shape in expected.items()
              if found.get(key, shape) != shape]  # fmt: skip
    return "; ".join(notes[:3]) + (f"; and {len(notes) - 3} more" if len(notes) > 3 else "")


# --- detectors ---


def _is_detector(obj: object) -> bool:
    # Looked up by module name, so that saving a model does not import scikit-learn.
    return any(base.__module__ == "rvae_fast._base_detector" for base in type(obj).__mro__)


def _describe_detector(detector: BaseDetector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from sklearn.utils.validation import check_is_fitted

    from rvae_fast.detector import DETECTORS

    check_is_fitted(detector)
    detector._check_threshold()  # the file would not say that it belongs to another score
    name = type(detector).__name__
    if DETECTORS.get(name) is not type(detector):
        raise TypeError(
            f"save takes a detector of rvae_fast itself, got the subclass {name}: load could not make it again"
        )
    document, tensors = _describe_model(detector.model_)
    parameters = {key: _plain(key, value) for key, value in detector.get_params(deep=False).items()}
    names = getattr(detector, "feature_names_in_", None)
    scaler = detector.scaler_
    tensors |= {
        "scaler.center": torch.from_numpy(scaler.center),
        "scaler.scale": torch.from_numpy(scaler.scale),
        "scaler.constant": torch.from_numpy(scaler.constant),
        "history.steps": torch.from_numpy(np.array(detector.history_.steps)),
    }
    if scaler.fill is not None:
        tensors["scaler.fill"] = torch.from_numpy(scaler.fill)
    if hasattr(detector, "nap_"):
        tensors["nap.mean"] = torch.from_numpy(detector.nap_.mean)
        tensors["nap.whitening"] = torch.from_numpy(detector.nap_.whitening)
    for score in KEPT_ROWS:
        if hasattr(detector, f"{score}_"):
            arrays = getattr(detector, f"{score}_").arrays()
            tensors |= {f"{score}.{key}": torch.from_numpy(value) for key, value in arrays.items()}
    return {
        "kind": "detector",
        "class": name,
        "model_class": document["class"],
        "config": document["config"],
        "parameters": parameters,
        "scaler": scaler.kind,
        "offset": detector.offset_,
        "feature_names": None if names is None else [str(n) for n in names],
        "history": detector.history_.summary(),
    }, tensors


def _restore_detector(
    path: Path, cls: type[BaseDetector], document: dict[str, Any], tensors: dict[str, Tensor], device: Any
) -> BaseDetector:
    from rvae_fast._detector_options import scored_by
    from rvae_fast._history import History
    from rvae_fast.preprocessing import Scaler

    try:
        detector = cls(**document["parameters"])
    except TypeError as error:
        raise FileFormatError(f"{path} holds parameters that {cls.__name__} does not take: {error}") from error
    if document["model_class"] != cls._model_class.__name__:
        raise FileFormatError(f"{path} holds a {document['model_class']} in a {cls.__name__}")
    detector.model_ = _restore_model(path, document["model_class"], document["config"], tensors)
    width = detector.model_.in_features
    parts: dict[str, Any] = {key: tensors[f"scaler.{key}"].numpy() for key in ("center", "scale", "constant")}
    parts["fill"] = tensors["scaler.fill"].numpy() if "scaler.fill" in tensors else None
    names = document["feature_names"]
    lengths = {f"scaler.{key}": part.shape for key, part in parts.items() if part is not None}
    lengths |= {} if names is None else {"feature_names": (len(names),)}
    wrong = [f"{key} has shape {list(shape)}" for key, shape in lengths.items() if shape != (width,)]
    if wrong:
        raise FileFormatError(f"{path} does not fit a network of {width} columns: {'; '.join(wrong)}")
    detector.scaler_ = Scaler(document["scaler"], **parts)
    if detector.anomaly_score == "nap" or "nap.mean" in tensors:
        detector.nap_ = _restore_nap(path, tensors)
    for score in KEPT_ROWS:
        if detector.anomaly_score == score or any(key.startswith(f"{score}.") for key in tensors):
            setattr(detector, f"{score}_", _restore_kept_rows(path, score, tensors))
    detector.history_ = History.from_dict({**document["history"], "steps": tensors["history.steps"].numpy()})
    detector.n_iter_ = len(detector.history_.epochs)
    detector.offset_ = float(document["offset"])
    detector._scored_by = scored_by(detector)
    detector.n_features_in_ = width
    if names is not None:
        detector.feature_names_in_ = np.asarray(names, dtype=object)
    if device is not None:
        detector.set_params(device=str(device))
    return detector


def _restore_nap(path: Path, tensors: dict[str, Tensor]) -> Any:
    from rvae_fast.rapp import NAP

    mean, whitening = tensors["nap.mean"].numpy(), tensors["nap.whitening"].numpy()
    if mean.ndim != 1 or whitening.ndim != 2 or len(whitening) != len(mean):
        raise FileFormatError(f"{path}: nap.mean {list(mean.shape)} and nap.whitening {list(whitening.shape)} disagree")
    return NAP(mean, whitening)


def _restore_kept_rows(path: Path, score: str, tensors: dict[str, Tensor]) -> Any:
    from rvae_fast.hyperplane import Hyperplane
    from rvae_fast.local import Local

    kind: Any = {"local": Local, "hyperplane": Hyperplane}[score]
    prefix = f"{score}."
    arrays = {key.removeprefix(prefix): t.numpy() for key, t in tensors.items() if key.startswith(prefix)}
    try:
        return kind.from_arrays(arrays)
    except KeyError as error:
        raise FileFormatError(f"{path} has no {prefix}{error.args[0]}, which its anomaly score needs") from error
    except ValueError as error:
        raise FileFormatError(f"{path}: {error}") from error


def _plain(name: str, value: Any) -> Any:
    """A parameter as a JSON value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (np.random.RandomState, np.random.Generator)):
        return None
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(name, v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"parameter {name} cannot be saved: {value!r} has no JSON form")


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
