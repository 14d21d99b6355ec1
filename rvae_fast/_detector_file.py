"""A fitted detector as the document and tensors of a file: its network's, and what was learnt around it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from rvae_fast._model_file import FileFormatError, describe_model, restore_model, unknown
from rvae_fast.views import ImageViews

if TYPE_CHECKING:
    from rvae_fast._base_detector import BaseDetector

#: Scores that keep training rows, as ``<score>_`` of a detector and ``<score>.<array>`` in a file.
KEPT_ROWS = ("local", "hyperplane")


def describe_detector(detector: BaseDetector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of a fitted detector."""
    from sklearn.utils.validation import check_is_fitted

    from rvae_fast.detector import DETECTORS

    check_is_fitted(detector)
    detector._check_threshold()  # the file would not say that it belongs to another score
    name = type(detector).__name__
    if DETECTORS.get(name) is not type(detector):
        raise TypeError(
            f"save takes a detector of rvae_fast itself, got the subclass {name}: load could not make it again"
        )
    document, tensors = describe_model(detector.model_)
    parameters = {key: plain(key, value) for key, value in detector.get_params(deep=False).items()}
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
        "frozen": document["frozen"],
        "parameters": parameters,
        "scaler": scaler.kind,
        "offset": float(detector.offset_),
        "feature_names": None if names is None else [str(n) for n in names],
        "history": detector.history_.summary(),
    }, tensors


def restore_detector(path: Path, document: dict[str, Any], tensors: dict[str, Tensor], device: Any) -> BaseDetector:
    """The fitted detector that a file describes."""
    from rvae_fast._detector_options import scored_by
    from rvae_fast._history import History
    from rvae_fast.detector import DETECTORS
    from rvae_fast.preprocessing import Scaler

    name = document.get("class")
    if name not in DETECTORS:
        raise FileFormatError(unknown(path, "detector", name))
    cls = DETECTORS[name]
    try:
        detector = cls(**document["parameters"])
    except TypeError as error:
        raise FileFormatError(f"{path} holds parameters that {cls.__name__} does not take: {error}") from error
    if document["model_class"] != cls._model_class.__name__:
        raise FileFormatError(f"{path} holds a {document['model_class']} in a {cls.__name__}")
    detector.model_ = restore_model(path, document["model_class"], document, tensors)
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


def plain(name: str, value: Any) -> Any:
    """A parameter as a JSON value."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (np.random.RandomState, np.random.Generator)):
        return None
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    if isinstance(value, ImageViews):
        value = value.describe()
    if isinstance(value, Mapping):
        return {str(key): plain(f"{name}[{key!r}]", v) for key, v in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [plain(name, v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"parameter {name} cannot be saved: {value!r} has no JSON form")
