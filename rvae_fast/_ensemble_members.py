"""The members of an ensemble: which they are, and what makes their scores comparable."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvae_fast._base_detector import BaseDetector

#: Scores that a normal row has about 0 of: those of several networks need no common unit.
IN_THEIR_OWN_UNITS = ("local", "hyperplane")


def check_members(members: Any, base: BaseDetector) -> list[dict[str, Any]]:
    """The parameters that are each member's own, or an error that names ``members``."""
    if isinstance(members, (int, np.integer)) and not isinstance(members, bool):
        if members < 1:
            raise ValueError(f"members must be at least 1, got {members}")
        return [{} for _ in range(int(members))]
    if isinstance(members, (str, Mapping)) or not isinstance(members, Sequence):
        raise TypeError(f"members must be a number or a list of dicts of parameters, got {members!r}")
    if not members:
        raise ValueError("members must have at least one dict of parameters, got none")
    known = base.get_params(deep=False)
    for i, change in enumerate(members):
        if not isinstance(change, Mapping):
            raise TypeError(f"members[{i}] must be a dict of parameters, got {change!r}")
        unknown = [name for name in change if name not in known]
        if unknown:
            raise ValueError(
                f"members[{i}] has {', '.join(map(repr, unknown))}, which is no parameter of {type(base).__name__}"
            )
    return [dict(change) for change in members]


@contextlib.contextmanager
def said_once(*, first: bool) -> Iterator[None]:
    """Silence the warnings about the table that every member would repeat."""
    with warnings.catch_warnings():
        if not first:
            for message in ("constant column", "X does not have valid feature names"):
                warnings.filterwarnings("ignore", message=message, category=UserWarning)
        yield


def unit(member: BaseDetector, scores: NDArray[np.float64]) -> float:
    """What a member's scores are divided by, given those of normal rows."""
    if member.anomaly_score in IN_THEIR_OWN_UNITS:
        return 1.0
    mean = float(np.mean(scores))
    return mean if mean > 0 else 1.0  # a table that is reconstructed without an error
