"""Rows beside their reconstructions: as images, or as the features that the model got most wrong."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["FeatureError", "check_image_shape", "contact_sheet", "image_strip", "leading_features", "squared_errors"]

_SIDE = 84


@dataclass(frozen=True)
class FeatureError:
    """One feature of one row: what was there, what the model expected, and its share in the row's being anomalous."""

    name: str
    value: float
    expected: float
    share: float


def check_image_shape(image_shape: Sequence[int], features: int) -> tuple[int, int, int]:
    """Return ``image_shape`` as (height, width, channels), checked against the number of features."""
    shape = tuple(int(side) for side in image_shape)
    if len(shape) == 2:
        shape = (*shape, 1)
    if len(shape) != 3 or shape[2] not in (1, 3) or min(shape) < 1:
        raise ValueError(f"image_shape must be (height, width) or (height, width, 1 or 3), got {tuple(image_shape)}")
    if shape[0] * shape[1] * shape[2] != features:
        raise ValueError(
            f"image_shape {tuple(image_shape)} holds {np.prod(shape)} values, the rows have {features} features"
        )
    return shape[0], shape[1], shape[2]


def squared_errors(rows: NDArray[Any], expected: NDArray[Any], scale: NDArray[np.float64]) -> NDArray[np.float64]:
    """Squared error of every value in units of ``scale``, 0 where one is missing.

    ``scale`` is one unit of the model's own input space, in input units: without it a feature that is measured in
    thousands would outrank all others.
    """
    # A missing value has no error of its own: the model was shown a filled one.
    return np.nan_to_num(np.square((rows.astype(np.float64) - expected) / scale), nan=0.0)


def leading_features(
    row: NDArray[Any], expected: NDArray[Any], weight: NDArray[np.float64], names: Sequence[str], k: int = 5
) -> list[FeatureError]:
    """The ``k`` features of greatest ``weight``, with their shares of the sum of the weights.

    Parameters
    ----------
    row, expected : ndarray of shape (features,)
        The input and its reconstruction, in input units.
    weight : ndarray of shape (features,)
        What makes the row anomalous: not negative; may be infinite.
    """
    if np.isinf(weight).any():
        weight = np.isinf(weight).astype(np.float64)
    total = float(weight.sum())
    return [
        FeatureError(str(names[i]), float(row[i]), float(expected[i]), float(weight[i]) / total if total > 0 else 0.0)
        for i in np.argsort(-weight, kind="stable")[:k]
    ]


def _grey(values: NDArray[np.float64], low: float, high: float) -> NDArray[np.uint8]:
    unit = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return (unit.clip(0.0, 1.0) * 255).round().astype(np.uint8)


def _panels(
    row: NDArray[Any],
    expected: NDArray[Any],
    shape: tuple[int, int, int],
    limits: tuple[float, float],
    error_high: float,
) -> list[NDArray[np.uint8]]:
    """Return input, reconstruction and absolute difference as RGB images, enlarged by whole pixels."""
    from matplotlib import colormaps

    factor = max(1, -(-_SIDE // max(shape[0], shape[1])))
    a, b = (np.asarray(v, dtype=np.float64).reshape(shape) for v in (row, expected))
    difference = np.abs(a - b).mean(axis=2)
    heat = np.asarray(colormaps["inferno"](_grey(difference, 0.0, error_high)))[..., :3]
    images = [np.broadcast_to(_grey(v, *limits), (*shape[:2], 3)) for v in (a, b)] + [
        (heat * 255).round().astype(np.uint8)
    ]
    return [image.repeat(factor, axis=0).repeat(factor, axis=1) for image in images]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def image_strip(
    row: NDArray[Any],
    expected: NDArray[Any],
    shape: tuple[int, int, int],
    limits: tuple[float, float],
    error_high: float,
) -> bytes:
    """Return one PNG with input, reconstruction and absolute difference side by side.

    Parameters
    ----------
    limits : tuple of float
        Values drawn black and white, the same for all strips so that they compare.
    error_high : float
        Difference drawn brightest.
    """
    panels = _panels(row, expected, shape, limits, error_high)
    gap = np.full((panels[0].shape[0], 4, 3), 128, dtype=np.uint8)
    return _png(np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1))


def contact_sheet(
    rows: NDArray[Any],
    expected: NDArray[Any],
    shape: tuple[int, int, int],
    limits: tuple[float, float],
    error_high: float,
) -> bytes:
    """Return one PNG for slides and papers: a column a row, with input over reconstruction over difference."""
    columns = []
    for row, guess in zip(rows, expected, strict=True):
        panels = _panels(row, guess, shape, limits, error_high)
        gap = np.full((4, panels[0].shape[1], 3), 255, dtype=np.uint8)
        stack = np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=0)
        columns += [stack, np.full((stack.shape[0], 4, 3), 255, dtype=np.uint8)]
    return _png(np.concatenate(columns[:-1], axis=1))
