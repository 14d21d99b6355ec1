"""`Table`, what the readers return, and what they share: choosing columns by name, and labels as 0 and 1."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from .types import nearest_name

# Texts that mean "no value": pandas' and R's habits, and the question mark of the UCI files.
MISSING = ("", "NA", "N/A", "n/a", "#N/A", "nan", "NaN", "-nan", "NAN", "null", "NULL", "None", "?")


class TableError(ValueError):
    """A table cannot be read as asked; the message names the file, what was found and what was expected."""


@dataclass(frozen=True)
class Table:
    """Rows of numbers, with their ids and labels where the file has them.

    Attributes
    ----------
    X : ndarray, shape [n_rows, n_features]
        float64 (float32 where every column is stored so) from text and Parquet, missing values NaN; the file's own
        type from arrays, a read-only memory map for .npy.
    columns : tuple of str
        Names of the features, in the order of the columns of `X`.
    ids : ndarray or None, shape [n_rows]
        Values of the id column; texts, exactly as written, for CSV.
    labels : ndarray or None, shape [n_rows]
        Values of the label column: integers or floats where all of them are numbers, else texts. See `anomaly_labels`.
    start : int
        Number of the first row in the file, counted from 0; above 0 in the chunks of `iter_table`.
    """

    X: np.ndarray
    columns: tuple[str, ...]
    ids: np.ndarray | None = None
    labels: np.ndarray | None = None
    start: int = 0

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.X)

    def row_ids(self) -> np.ndarray:
        """Return the ids, or the row numbers in the file (from 0) where there is no id column."""
        return np.arange(self.start, self.start + len(self.X)) if self.ids is None else self.ids


@dataclass(frozen=True)
class Naming:
    """What a file says of its columns.

    Attributes
    ----------
    names : tuple of str
        Of all its columns, in its order.
    named : bool
        Whether the file has these names; else they are x0, x1, ...
    index : tuple of str
        Columns that number or name the rows and measure nothing: pandas' index. No features unless asked for.
    empty : tuple of str
        Columns at the end with neither name nor value. No features unless asked for.
    counted : bool
        Whether the names are a line 0, 1, ... or 1, 2, 3, ... that might be a row of numbers.
    """

    names: tuple[str, ...]
    named: bool = True
    index: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()
    counted: bool = False

    @property
    def left_out(self) -> tuple[str, ...]:
        """Return the columns that are features only if they are asked for."""
        return self.index + self.empty


@dataclass(frozen=True)
class Selection:
    """Which columns of a file are features, label and id."""

    columns: tuple[str, ...] | None = None
    drop: tuple[str, ...] = ()
    label: str | None = None
    id: str | None = None

    @classmethod
    def of(cls, columns: Sequence[str] | None, drop: Sequence[str], label: str | None, id: str | None) -> Selection:
        """Check the types of a caller's arguments."""
        for argument, value in (("columns", columns), ("drop", drop)):
            if isinstance(value, str):
                raise TypeError(f"{argument}: expected a sequence of column names, got the text {value!r}")
        if columns is not None and len(columns) == 0:
            raise ValueError("columns: expected at least one column name, got an empty sequence")
        return cls(None if columns is None else tuple(columns), tuple(drop), label, id)

    @property
    def named(self) -> frozenset[str | None]:
        """Return the columns that the caller names, for whatever purpose."""
        return frozenset((*(self.columns or ()), *self.drop, self.label, self.id))

    def features(self, names: Sequence[str], path: Path, left_out: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the feature columns among a file's column names; TableError for a name that is not there.

        Those in ``left_out`` are features only if ``columns`` names them.
        """
        if len(set(names)) < len(names):
            repeated = sorted(name for name, count in Counter(names).items() if count > 1)
            raise TableError(
                f"{path}: columns that occur twice: {', '.join(map(repr, repeated))}; give each its own name"
            )
        known = set(names)
        for argument, wanted in (("columns", self.columns or ()), ("drop", self.drop)):
            for name in wanted:
                if name not in known:
                    self._refuse(name, names, argument, path)
        for argument, one in (("label", self.label), ("id", self.id)):
            if one is not None:
                if one not in known:
                    self._refuse(one, names, argument, path)
                if one in (self.columns or ()):
                    raise TableError(
                        f"{path}: {one!r} is both in columns and the {argument}; a feature must not be either"
                    )
        apart = {*self.drop, self.label, self.id}
        offered = [name for name in names if name not in left_out] if self.columns is None else self.columns
        chosen = tuple(name for name in offered if name not in apart)
        if not chosen:
            raise TableError(f"{path}: no feature columns are left of {', '.join(map(repr, names))}")
        if len(set(chosen)) < len(chosen):
            raise TableError(f"{path}: columns names a column twice: {', '.join(map(repr, chosen))}")
        return chosen

    @staticmethod
    def _refuse(name: str, names: Sequence[str], argument: str, path: Path) -> NoReturn:
        shown = ", ".join(map(repr, names[:20])) + (f", ... ({len(names)} in all)" if len(names) > 20 else "")
        hint = nearest_name(str(name), names)
        raise TableError(f"{path}: {argument} {name!r} is not a column{hint}; the file has {shown}")


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a file, as many as its reader found convenient."""

    X: np.ndarray
    ids: np.ndarray | None = None
    labels: np.ndarray | None = None


@dataclass(frozen=True)
class Opened:
    """A file opened for reading: its feature columns, and its rows batch by batch."""

    columns: tuple[str, ...]
    batches: Iterator[Batch]
    whole: Callable[[], Batch] | None = None  # all rows at once, where they are in memory or mapped already


def parse_labels(values: np.ndarray) -> np.ndarray:
    """Return texts as int64 or float64 where every one of them is such a number, else as they are."""
    for dtype in (np.int64, np.float64):
        try:
            return values.astype(dtype)
        except (ValueError, OverflowError):
            continue
    return values


def anomaly_labels(labels: np.ndarray | Sequence[Any], anomaly: Any = None) -> np.ndarray:
    """Turn a label column into 0 (normal) and 1 (anomaly).

    Parameters
    ----------
    labels : array-like, shape [n_rows]
    anomaly : label or sequence of labels, optional
        The values that mean anomaly; all others are normal. Default: understood are booleans (True), 0 and 1 (1),
        scikit-learn's +1 and -1 (-1), and pairs such as "normal" and "anomaly".

    Returns
    -------
    ndarray of int64, shape [n_rows]

    Raises
    ------
    ValueError
        No row, an `anomaly` that does not occur, or labels whose meaning is not plain: then `anomaly` must be given.
    """
    values = np.asarray(labels)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"labels: expected one label a row and at least one row, got shape {values.shape}")
    found = np.unique(values.astype(str) if values.dtype == object else values).tolist()
    if anomaly is not None:
        wanted = list(anomaly) if isinstance(anomaly, (list, tuple, set, np.ndarray)) else [anomaly]
        marked = np.zeros(values.shape, dtype=bool)
        for value in wanted:
            same = _equal(values, value)
            if not same.any():
                raise ValueError(f"anomaly: {value!r} is not among the labels; they are {found[:20]}")
            marked |= same
        return marked.astype(np.int64)
    if values.dtype == bool or set(found) <= {0, 1}:
        return values.astype(np.int64)
    if set(found) <= {-1, 1}:
        return (values == -1).astype(np.int64)
    texts = np.char.lower(values.astype(str))
    meanings = {**dict.fromkeys(_ANOMALY_WORDS, 1), **dict.fromkeys(_NORMAL_WORDS, 0)}
    if all(str(value).lower() in meanings for value in found):
        return np.array([meanings[text] for text in texts], dtype=np.int64)
    raise ValueError(f"labels: cannot tell which of {found[:20]} mean anomaly; say so with anomaly=...")


def _equal(values: np.ndarray, wanted: Any) -> np.ndarray:
    """Return which labels are the wanted one; a number typed as a text is the same number, 2 the same as 2.0."""
    same = values.astype(str) == str(wanted)
    if values.dtype.kind in "iuf" and not same.any():  # else exact: as floats large whole numbers are the same
        with contextlib.suppress(ValueError, TypeError):
            same = values == float(wanted)
    return same


_ANOMALY_WORDS = ("anomaly", "anomalous", "outlier", "abnormal", "novel", "attack", "fraud", "true", "yes")
_NORMAL_WORDS = ("normal", "inlier", "nominal", "benign", "false", "no")
