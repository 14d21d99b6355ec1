"""Checks by content: a data set is accepted for its values, not for the name or checksum of the file that carried it.

The same values reach users through different packages and compressions, so the checks are on the arrays and do not
depend on the order of rows, save for the official split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .types import DatasetContentError


@dataclass(frozen=True)
class Expected:
    """What the arrays of a data set must be.

    Attributes
    ----------
    shape : (rows, features)
    label_counts : tuple of int
        Rows with label 0, 1, ...
    total : float
        Sum of all values; exact for integers.
    moment : float
        Sum over columns of column index times column sum: it tells a transposed image or permuted columns from the
        true ones.

    What is None is not checked.
    """

    shape: tuple[int, int]
    label_counts: tuple[int, ...] | None = None
    total: float | None = None
    moment: float | None = None

    def problems(self, X: np.ndarray, y: np.ndarray, what: str = "") -> list[str]:
        """Return what is wrong with the arrays, one sentence each; empty when nothing is."""
        part = f"{what} " if what else ""
        if X.shape != self.shape:
            return [f"{part}shape is {X.shape}, expected {self.shape}"]
        if y.shape != (len(X),):
            return [f"{part}labels have shape {y.shape}, expected ({len(X)},)"]
        found = []
        if not np.issubdtype(y.dtype, np.integer) or (y.size and y.min() < 0):
            return [f"{part}labels are not integers from 0"]
        if self.label_counts is not None:
            counts = tuple(np.bincount(y.astype(np.int64), minlength=len(self.label_counts)).tolist())
            if counts != self.label_counts:
                found.append(f"{part}label counts are {counts}, expected {self.label_counts}")
        if self.total is None or self.moment is None:
            return found
        columns = X.sum(axis=0, dtype=np.int64 if np.issubdtype(X.dtype, np.integer) else np.float64)
        total, moment = float(columns.sum()), float((columns * np.arange(X.shape[1])).sum())
        # 1e-9: sums of float64 differ by their order; of integers they are exact
        if not np.isclose(total, self.total, rtol=1e-9, atol=0.0):
            size = self.shape[0] * self.shape[1]
            found.append(f"{part}mean value is {total / size:.6g}, expected {self.total / size:.6g}")
        elif not np.isclose(moment, self.moment, rtol=1e-9, atol=0.0):
            found.append(f"{part}columns are not in the expected order (a transposed image, or permuted columns)")
        return found


def check_parts(X: np.ndarray, y: np.ndarray, parts: tuple[Expected, ...], name: str) -> None:
    """Check consecutive parts of a data set (its official train and test parts, or the one part that it has).

    Raises
    ------
    DatasetContentError
        Naming everything that differs.
    """
    rows = sum(part.shape[0] for part in parts)
    problems = []
    if X.ndim != 2 or len(X) != rows:
        problems.append(f"shape is {X.shape}, expected {(rows, parts[0].shape[1])}")
    else:
        start = 0
        for index, part in enumerate(parts):
            stop = start + part.shape[0]
            what = "" if len(parts) == 1 else ("train", "test")[index]
            problems += part.problems(X[start:stop], y[start:stop], what)
            start = stop
    if problems:
        raise DatasetContentError(f"these are not the values of {name!r}: {'; '.join(problems)}")
