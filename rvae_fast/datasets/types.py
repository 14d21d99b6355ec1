"""What the data room hands out: `Dataset`, and the two errors it raises.

Kept apart from the code that fetches, so that every other module of the package can import it without a cycle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


class DatasetUnavailableError(RuntimeError):
    """The data set is neither in the cache nor obtainable.

    The message says which commands to run and where to put the file.
    """


class DatasetContentError(ValueError):
    """The data were read, but are not the data set they claim to be (wrong shape, counts or sums)."""


@dataclass(frozen=True)
class Dataset:
    """A data set in memory, rows in the order of its source.

    Attributes
    ----------
    X : ndarray, shape [n_rows, n_features]
        uint8 for images (row-major, upright, flattened), float64 for tables. Not scaled; see `scaled`.
    y : ndarray of int64, shape [n_rows]
        For images the class label, an index into `class_names`. For tables 1 marks an anomaly and 0 a normal row.
    feature_names : tuple of str, length n_features
    image_shape : (height, width) or None
        None where the rows are not images.
    class_names : tuple of str
        Name of each value of `y`.
    name, description : str
    source : str
        The package, library or file these values came from.
    licence : str
        As far as its distributor states one.
    value_range : (low, high) or None
        The range that the values can take (0 to 255 for most images), None for tables, whose columns differ.
    n_train : int or None
        Where the data have an official split: the first `n_train` rows are the training part.
    """

    X: np.ndarray
    y: np.ndarray
    feature_names: tuple[str, ...]
    image_shape: tuple[int, int] | None
    class_names: tuple[str, ...]
    name: str
    description: str
    source: str
    licence: str
    value_range: tuple[float, float] | None = None
    n_train: int | None = None

    @property
    def is_image(self) -> bool:
        """Whether a row is an image."""
        return self.image_shape is not None

    @property
    def is_anomaly_table(self) -> bool:
        """Whether `y` already marks anomalies (1) rather than classes."""
        return not self.is_image

    @property
    def n_anomalies(self) -> int | None:
        """Rows marked as anomalies; None for images, where a split decides what is novel."""
        return None if self.is_image else int(self.y.sum())

    def scaled(self, dtype: np.dtype | type = np.float32) -> np.ndarray:
        """Return the values mapped from `value_range` to [0, 1] (pixels / 255), shape [n_rows, n_features].

        Raises
        ------
        ValueError
            For a table: its columns have no common range; fit a scaler on the training rows instead.
        """
        if self.value_range is None:
            raise ValueError(
                f"{self.name!r} is a table without a common value range; fit a scaler on its training rows"
            )
        low, high = self.value_range
        scaled = self.X.astype(dtype)
        scaled -= low
        scaled /= high - low
        return scaled

    def class_index(self, name_or_index: str | int) -> int:
        """Return the label of a class given by name or by index; ValueError if there is none."""
        if isinstance(name_or_index, str) and name_or_index in self.class_names:
            return self.class_names.index(name_or_index)
        try:
            index = int(name_or_index)
        except ValueError:
            index = -1
        if not 0 <= index < len(self.class_names):
            raise ValueError(
                f"{self.name!r} has no class {name_or_index!r}; its classes are {', '.join(self.class_names)}"
            )
        return index


def pixel_names(shape: tuple[int, int]) -> tuple[str, ...]:
    """Names `pixel_<row>_<column>`, row-major, as scikit-learn's digits has them."""
    return tuple(f"pixel_{row}_{column}" for row in range(shape[0]) for column in range(shape[1]))


def numbered_names(count: int, prefix: str = "x") -> tuple[str, ...]:
    """Names `x0`, `x1`, ... for columns that have none."""
    return tuple(f"{prefix}{index}" for index in range(count))


def nearest_name(wanted: str, names: Sequence[str]) -> str:
    """Return " (did you mean 'x'?)" for a near miss, else ""."""
    import difflib

    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.6)
    if not close:
        close = [name for name in names if name.lower() == wanted.lower()][:1]
    return f" (did you mean {close[0]!r}?)" if close else ""
