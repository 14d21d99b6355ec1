"""Columns of a table brought to one scale, and their gaps filled: statistics in fp64, in chunks, from one pass.

A table larger than memory is read once, chunk by chunk; what is found is kept as plain fp64 arrays, which is what a
saved detector holds.
"""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rvae_fast._validation import check_choice, name_columns

SCALERS = ("standard", "minmax", None)
MISSING = ("error", "mean", "median")

#: Rows of a chunk are chosen so that a chunk in fp64 takes about this many bytes.
CHUNK_BYTES = 1 << 25

#: Scaled values are cut here: no row of a training table of fewer than 1e12 rows can be so many standard deviations
#: away, and the square of anything larger could overflow fp32 inside a deep network. Such a row is anomalous anyway.
LIMIT = 1e6


def chunk_rows(n_features: int) -> int:
    """Rows of a chunk of about :data:`CHUNK_BYTES` in fp64, at least 32."""
    return max(32, CHUNK_BYTES // (8 * max(n_features, 1)))


def chunks(x: Any, rows: int | None = None) -> Iterator[NDArray[Any]]:
    """Slices of at most ``rows`` rows of a 2-D array or memory map, in order; views, not copies."""
    rows = chunk_rows(x.shape[1]) if rows is None else rows
    for start in range(0, x.shape[0], rows):
        yield np.asarray(x[start : start + rows])


@dataclass(frozen=True)
class Scaler:
    """``(x - center) / scale`` per column, after gaps have been filled with ``fill``.

    Attributes
    ----------
    kind : {"standard", "minmax", None}
        Where center and scale come from: mean and standard deviation, minimum and range, or 0 and 1.
    center, scale : ndarray [n_features] float64
        ``scale`` is 1 for a constant column, so that a deviation from it counts in the column's own units.
    constant : ndarray [n_features] bool
        Columns with no spread beyond rounding in the training table.
    fill : ndarray [n_features] float64 or None
        What a NaN becomes; None where NaN is an error.
    """

    kind: str | None
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    constant: NDArray[np.bool_]
    fill: NDArray[np.float64] | None = None

    def transform(self, x: NDArray[Any], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
        """Fill and scale rows ``[n, n_features]`` in fp64 and round to fp32; ``x`` is left as it is."""
        scaled = np.array(x, dtype=np.float64)
        if self.fill is not None:
            np.copyto(scaled, self.fill, where=np.isnan(scaled))
        # Beyond fp32, where nothing is cut, is infinite: such a row scores as one on which the network overflows.
        with np.errstate(over="ignore"):
            scaled -= self.center
            scaled /= self.scale
            if self.kind is not None:
                np.clip(scaled, -LIMIT, LIMIT, out=scaled)
            if out is None:
                return scaled.astype(np.float32)
            out[...] = scaled
        return out

    def inverse_transform(self, scaled: NDArray[Any]) -> NDArray[np.float64]:
        """Rows ``[n, n_features]`` back in the table's units."""
        return np.asarray(scaled, dtype=np.float64) * self.scale + self.center


def fit_scaler(x: Any, kind: str | None = "standard", missing: str = "error", names: Any = None) -> Scaler:
    """Find a table's :class:`Scaler` in one pass over its chunks (``missing="median"``: one pass more, by columns).

    Parameters
    ----------
    x : array [n, n_features]
        Any real dtype, NaN where ``missing`` is not ``"error"``, no infinities; may be a memory map.
    kind : {"standard", "minmax", None}
    missing : {"error", "mean", "median"}
        What a NaN will be filled with.
    names : sequence of str, optional
        Of the columns, for messages.

    Raises
    ------
    ValueError
        Naming ``kind`` or ``missing``, a column that holds nothing but NaN, or one whose spread overflows fp64.
    """
    check_choice("scaler", kind, SCALERS)
    check_choice("missing", missing, MISSING)
    # Chunks small enough for the cache: each is read several times.
    mean, var, low, high = _moments(chunks(x, max(32, chunk_rows(x.shape[1]) // 16)))
    empty = np.isnan(mean)
    if empty.any():
        raise ValueError(
            f"missing={missing!r} cannot fill columns without a single value: {name_columns(empty, names)}"
        )
    with np.errstate(over="ignore"):
        std, extent = np.sqrt(var), high - low
    # Rounding alone gives a column of 0.1s a standard deviation of about 1e-17; its division would make noise of it.
    rounding = 10 * np.finfo(np.float64).eps * np.maximum(np.abs(low), np.abs(high))
    constant = (extent <= rounding) | (std <= rounding)
    too_wide = ~constant & ~(np.isfinite(std) & np.isfinite(extent))
    if too_wide.any():
        raise ValueError(f"the spread of these columns overflows double precision: {name_columns(too_wide, names)}")
    fill = None if missing == "error" else mean if missing == "mean" else _medians(x)
    if kind == "standard":
        center, scale = np.where(constant, low, mean), std
    elif kind == "minmax":
        center, scale = low, extent
    else:
        center, scale = np.zeros_like(mean), np.ones_like(mean)
    return Scaler(kind, center, np.where(constant, 1.0, scale), constant, fill)


def _moments(parts: Iterable[NDArray[Any]]) -> tuple[NDArray[np.float64], ...]:
    """Mean, biased variance, minimum and maximum of every column, ignoring NaN; all NaN where there is no value.

    Each chunk's moments are taken in two passes and merged (Chan, Golub and LeVeque 1983, equation 2.1). scikit-learn's
    ``StandardScaler.partial_fit`` does the same, but a column whose first chunk is all NaN stays NaN there.
    """
    n: Any = 0
    mean: Any = 0.0
    m2: Any = 0.0
    low: Any = np.nan
    high: Any = np.nan
    # Squares of immense values overflow, columns without values divide by none: both are reported by name, later.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        for part in parts:
            rows = np.asarray(part, dtype=np.float64)
            low = np.fmin(low, np.fmin.reduce(rows, axis=0))
            high = np.fmax(high, np.fmax.reduce(rows, axis=0))
            present: Any = True
            n_part: Any = len(rows)
            if np.isnan(rows.sum()):
                present = ~np.isnan(rows)
                n_part = present.sum(axis=0)
            count = np.maximum(n_part, 1)
            mean_part = rows.sum(axis=0, where=present) / count
            deviation = rows - mean_part if present is True else np.where(present, rows - mean_part, 0.0)
            # The second term is zero but for the rounding of the mean, which it removes.
            m2_part = np.einsum("ij,ij->j", deviation, deviation) - np.square(deviation.sum(axis=0)) / count
            # Nothing to merge with yet: the mean itself is no distance (its square may overflow).
            delta, total = np.where(n, mean_part - mean, 0.0), np.maximum(n + n_part, 1)
            m2 = m2 + m2_part + delta**2 * n * n_part / total
            mean = np.where(n, mean + delta * n_part / total, mean_part)
            n = n + n_part
    return np.where(n, mean, np.nan), np.maximum(m2, 0.0) / np.maximum(n, 1), low, high


def _medians(x: Any) -> NDArray[np.float64]:
    """Median of every column, NaN ignored; holds one column at a time."""
    return np.array([np.nanmedian(np.asarray(x[:, j], dtype=np.float64)) for j in range(x.shape[1])])


@contextlib.contextmanager
def scaled_table(table: NDArray[Any], parts: Iterable[NDArray[np.float32]]) -> Iterator[NDArray[np.float32]]:
    """The scaled chunks of ``table`` as one array: in memory or, if the table is memory-mapped, in a temporary file."""
    with contextlib.ExitStack() as stack:
        rows: NDArray[np.float32]
        if is_mapped(table):
            file = stack.enter_context(tempfile.TemporaryFile(prefix="rvae_fast_"))
            _reserve(file, 4 * table.shape[0] * table.shape[1])
            rows = np.memmap(file, dtype=np.float32, mode="w+", shape=table.shape)
        else:
            rows = np.empty(table.shape, dtype=np.float32)
        start = 0
        for part in parts:
            rows[start : start + len(part)] = part
            start += len(part)
        yield rows


def _reserve(file: Any, size: int) -> None:
    """Have a file's blocks before it is mapped: on a full disk, writing to a page without one kills the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):  # not on this file system
            return
        raise OSError(
            error.errno,
            f"{error.strerror}: the scaled rows of a memory-mapped table take {size / 1e6:,.1f} MB in a temporary "
            "file; TMPDIR names another folder for it",
            tempfile.gettempdir(),
        ) from error


def is_mapped(array: Any) -> bool:
    """Whether an array is, or is a view of, a memory-mapped file."""
    while array is not None:
        if isinstance(array, np.memmap):
            return True
        array = getattr(array, "base", None)
    return False
