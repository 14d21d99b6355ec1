"""The data set that is always there: the 8 x 8 digits that scikit-learn carries."""

from __future__ import annotations

import numpy as np

from .types import Dataset, pixel_names

DIGITS = "digits"
DIGITS_DESCRIPTION = (
    "UCI optical digits, test part: handwritten digits 0 to 9, 8 x 8 pixels of 17 grey levels; 1,797 images"
)
DIGITS_LICENCE = "CC BY 4.0 (UCI repository)"


def load_embedded_digits() -> Dataset:
    """Return scikit-learn's digits as a `Dataset`."""
    from sklearn.datasets import load_digits

    bundle = load_digits()
    return Dataset(
        X=bundle.data.astype(np.uint8),
        y=bundle.target.astype(np.int64),
        feature_names=pixel_names((8, 8)),
        image_shape=(8, 8),
        class_names=tuple("0123456789"),
        name=DIGITS,
        description=DIGITS_DESCRIPTION,
        source="embedded in scikit-learn",
        licence=DIGITS_LICENCE,
        value_range=(0.0, 16.0),
    )
