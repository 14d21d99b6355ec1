"""An ensemble as the document and tensors of a file: its members' side by side, each under its number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rvae_fast._detector_file import FileFormatError, describe_detector, plain, restore_detector

if TYPE_CHECKING:
    from rvae_fast.ensemble import EnsembleDetector


def describe_ensemble(ensemble: EnsembleDetector) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Document and tensors of a fitted ensemble."""
    from sklearn.utils.validation import check_is_fitted

    from rvae_fast.detector import DETECTORS
    from rvae_fast.ensemble import EnsembleDetector

    if type(ensemble) is not EnsembleDetector:
        raise TypeError(
            f"save takes an EnsembleDetector itself, got the subclass {type(ensemble).__name__}: load could not make "
            "it again"
        )
    check_is_fitted(ensemble)
    ensemble._check_threshold()  # the file would not say that it belongs to other scores
    described = [describe_detector(member) for member in ensemble.estimators_]
    tensors = {f"{i}.{name}": t for i, (_, own) in enumerate(described) for name, t in own.items()}
    base, members = ensemble.estimator, ensemble.members
    estimator = None
    if base is not None:
        if type(base) not in DETECTORS.values():
            raise TypeError(f"save takes an ensemble of rvae_fast's own detectors, its estimator is {base!r}")
        parameters = {name: plain(name, value) for name, value in base.get_params(deep=False).items()}
        estimator = {"class": type(base).__name__, "parameters": parameters}
    return {
        "kind": "ensemble",
        "class": "EnsembleDetector",
        "estimator": estimator,
        "members": _plain_members(members),
        "contamination": plain("contamination", ensemble.contamination),
        "random_state": plain("random_state", ensemble.random_state),
        "units": [float(unit) for unit in ensemble.units_],
        "offset": float(ensemble.offset_),
        "detectors": [document for document, _ in described],
    }, tensors


def restore_ensemble(path: Path, document: dict[str, Any], tensors: dict[str, Tensor], device: Any) -> EnsembleDetector:
    """The fitted ensemble that a file describes."""
    import numpy as np

    from rvae_fast._detector_options import scored_by
    from rvae_fast.ensemble import EnsembleDetector

    described, units = document["detectors"], document["units"]
    if not described or len(units) != len(described):
        raise FileFormatError(f"{path} holds {len(described)} members and {len(units)} units of scores")
    members = []
    for i, one in enumerate(described):
        prefix = f"{i}."
        own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        try:
            members.append(restore_detector(path, one, own, device))
        except KeyError as error:
            raise FileFormatError(f"{path} lacks {error}, which member {i} of an ensemble must have") from error
    widths = {member.n_features_in_ for member in members}
    if len(widths) != 1:
        raise FileFormatError(f"{path} holds members of different tables: {sorted(widths)} columns")
    changes = document["members"]
    if device is not None and isinstance(changes, list):
        changes = [{**own, "device": str(device)} if "device" in own else own for own in changes]
    ensemble = EnsembleDetector(
        _unfitted(path, document["estimator"], device),
        members=changes,
        contamination=document["contamination"],
        random_state=document["random_state"],
    )
    ensemble.estimators_ = members
    ensemble._scored_by = [scored_by(member) for member in members]
    ensemble._times_learnt = [member._times_learnt for member in members]
    ensemble.units_ = np.array(units, dtype=np.float64)
    ensemble.offset_ = float(document["offset"])
    ensemble.n_features_in_ = members[0].n_features_in_
    if hasattr(members[0], "feature_names_in_"):
        ensemble.feature_names_in_ = members[0].feature_names_in_
    return ensemble


def _plain_members(members: Any) -> Any:
    if isinstance(members, Mapping):
        return {name: plain(name, value) for name, value in members.items()}
    if isinstance(members, Sequence) and not isinstance(members, str):
        return [_plain_members(own) for own in members]
    return plain("members", members)  # a number, or what only the next fit will refuse


def _unfitted(path: Path, described: dict[str, Any] | None, device: Any) -> Any:
    """What the members are copies of; where it is the default, and a device is asked for, that one with the device."""
    from rvae_fast.detector import DETECTORS

    if described is None:
        return None if device is None else DETECTORS["RVAEDetector"](device=str(device))
    try:
        estimator = DETECTORS[described["class"]](**described["parameters"])
    except (KeyError, TypeError) as error:
        raise FileFormatError(f"{path} holds an ensemble of {described['class']}, which failed: {error}") from error
    return estimator if device is None else estimator.set_params(device=str(device))
