"""`write_scores`: scores and flags beside the ids of their rows, as CSV, Parquet or .npz."""

from __future__ import annotations

import csv
import gzip
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from .cache import atomic_path
from .readers import table_format


def write_scores(
    path: str | os.PathLike[str],
    ids: np.ndarray | Sequence[Any],
    scores: np.ndarray | Sequence[float],
    flags: np.ndarray | Sequence[Any] | None = None,
    *,
    extra: Mapping[str, np.ndarray | Sequence[Any]] | None = None,
    overwrite: bool = True,
) -> Path:
    """Write one line a row: `id`, `score`, `anomaly` (0 or 1), and the columns of `extra`. The file appears whole or
    not at all.

    Parameters
    ----------
    path : path
        .csv, .tsv (also .gz), .parquet or .npz.
    ids : array-like, shape [n_rows]
    scores : array-like of float, shape [n_rows]
        Written so that reading them gives the same float64.
    flags : array-like of 0/1 or bool, shape [n_rows], optional
        Whether a row is flagged as an anomaly; without it there is no column `anomaly`.
    extra : mapping of name to array-like [n_rows], optional
    overwrite : bool, default True

    Returns
    -------
    Path
        The file written.

    Raises
    ------
    ValueError
        Lengths that differ, flags other than 0 and 1, a name in `extra` that is taken, or a format that cannot be
        written.
    FileExistsError
        The file is there and `overwrite` is off.
    """
    path = Path(path)
    columns: dict[str, np.ndarray] = {"id": np.asarray(ids), "score": np.asarray(scores, dtype=np.float64)}
    if flags is not None:
        marks = np.asarray(flags)
        if not np.isin(marks, (0, 1)).all():
            raise ValueError(f"flags: expected 0 (normal) and 1 (anomaly), got {np.unique(marks)[:10].tolist()}")
        columns["anomaly"] = marks.astype(np.int64)
    for name, values in (extra or {}).items():
        if name in columns:
            raise ValueError(f"extra: the column name {name!r} is taken")
        columns[name] = np.asarray(values)
    for name, values in columns.items():
        if values.shape != columns["score"].shape or values.ndim != 1:
            raise ValueError(f"{name}: expected one value a row, shape {columns['score'].shape}, got {values.shape}")
    kind = table_format(path)
    if kind not in ("csv", "parquet", "npz") or (kind != "csv" and path.suffix.lower() == ".gz"):
        raise ValueError(f"path: scores are written as .csv, .tsv, .parquet or .npz, got {path.name!r}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path}: the file exists")
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        if kind == "csv":
            _write_csv(temporary, path, columns)
        elif kind == "parquet":
            _write_parquet(temporary, columns)
        else:
            with open(temporary, "wb") as file:
                np.savez_compressed(file, **{name: _storable(values) for name, values in columns.items()})  # type: ignore[arg-type]
    return path


def in_words(values: np.ndarray) -> np.ndarray:
    """Return times as texts, where a list would have the nanoseconds since 1970, and what is missing as ''."""
    if values.dtype.kind in "mM":
        return np.where(np.isnat(values), "", values.astype(str))
    if values.dtype == object:
        return np.array(["" if one is None else one for one in values], dtype=object)
    return values


def _storable(values: np.ndarray) -> np.ndarray:
    """Texts in an object array become an array of texts: an .npz must not hold pickles."""
    values = in_words(values)
    return values.astype(str) if values.dtype == object else values


def _write_csv(temporary: Path, path: Path, columns: Mapping[str, np.ndarray]) -> None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1] in (".bz2", ".zst"):
        raise ValueError(f"path: compressed CSV is written as .gz, got {path.name!r}")
    raw: IO[bytes] = gzip.open(temporary, "wb") if suffixes[-1] == ".gz" else open(temporary, "wb")  # type: ignore[assignment] # noqa: SIM115
    with raw, io.TextIOWrapper(raw, encoding="utf-8", newline="") as text:
        writer = csv.writer(text, delimiter="\t" if ".tsv" in suffixes else ",", lineterminator="\n")
        writer.writerow(columns)
        # tolist gives Python floats, whose text is the shortest that reads back as the same value
        writer.writerows(zip(*(in_words(values).tolist() for values in columns.values()), strict=True))


def _write_parquet(temporary: Path, columns: Mapping[str, np.ndarray]) -> None:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("writing Parquet files needs pyarrow: pip install 'rvae-fast[data]'") from error
    lists = {name: values if values.dtype.kind in "mM" else values.tolist() for name, values in columns.items()}
    parquet.write_table(pa.table({name: pa.array(values) for name, values in lists.items()}), temporary)
