"""`read_table` and `iter_table`: one way into every file of rows that users have."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from .array_reader import has_names, open_idx, open_npy, open_npz
from .csv_layout import CsvOptions, find_layout
from .csv_reader import open_csv
from .parquet_reader import open_parquet, parquet_naming
from .tables import Batch, Naming, Opened, Selection, Table, TableError

FORMATS = ("csv", "parquet", "npy", "npz", "idx")
_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".npy": "npy",
    ".npz": "npz",
}
_COMPRESSED = (".gz", ".bz2", ".zst")


def read_table(
    path: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    label: str | None = None,
    id: str | None = None,
    format: str | None = None,
    key: str | None = None,
    delimiter: str | None = None,
    decimal: str = ".",
    header: bool | None = None,
    encoding: str | None = None,
) -> Table:
    """Read a file of rows into memory (an .npy file is mapped, not read).

    Parameters
    ----------
    path : path
        .csv, .tsv, .txt (also .gz, .bz2, .zst), .parquet, .npy, .npz, idx (also .gz).
    columns : sequence of str, optional
        The features, in this order. Default: every column but the label, the id, those in `drop`, the index that
        pandas wrote (in CSV a first column without a name, called unnamed0) and, in CSV, columns at the end without
        name and value. Arrays without names have x0, x1, ...
    drop : sequence of str
        Columns to leave out.
    label, id : str, optional
        The columns that hold the label and the id of a row; neither is a feature. In an .npz file, the name of
        another array.
    format : {"csv", "parquet", "npy", "npz", "idx"}, optional
        Default: by the name of the file.
    key : str, optional
        For .npz: the array that holds the rows.
    delimiter, decimal, header, encoding : optional
        For CSV. Default: delimiter found among comma, semicolon, tab and bar; decimal point; the first line holds
        column names unless all of it is numbers, missing values, true or false (but 0, 1, 2, ... and 1, 2, 3, ... are
        names); UTF-8, UTF-16 by its mark, else Latin-1. A column of true and false, as Python, R or JSON has them, is
        one of 1 and 0.

    Returns
    -------
    Table

    Raises
    ------
    FileNotFoundError
        No such file.
    TableError
        (A ValueError.) The file is empty, damaged or of another format; rows of unequal length; a column that does
        not exist (the nearest name is suggested); features that are not numeric, each with its first bad value and
        line.
    """
    opened = _open(
        path, Selection.of(columns, drop, label, id), format, key, CsvOptions(delimiter, decimal, header, encoding)
    )
    whole = opened.whole() if opened.whole is not None else _join(list(opened.batches))
    return Table(whole.X, opened.columns, whole.ids, whole.labels)


def iter_table(
    path: str | os.PathLike[str],
    chunk_rows: int = 65_536,
    *,
    columns: Sequence[str] | None = None,
    drop: Sequence[str] = (),
    label: str | None = None,
    id: str | None = None,
    format: str | None = None,
    key: str | None = None,
    delimiter: str | None = None,
    decimal: str = ".",
    header: bool | None = None,
    encoding: str | None = None,
) -> Iterator[Table]:
    """Read a file of rows chunk by chunk, for data larger than memory.

    Parameters
    ----------
    path, columns, drop, label, id, format, key, delimiter, decimal, header, encoding
        As for `read_table`.
    chunk_rows : int
        Rows in every chunk but the last, which may have fewer.

    Returns
    -------
    iterator of Table
        `Table.start` is the number of a chunk's first row. An .npz or idx file is held in memory whole.

    Raises
    ------
    ValueError, FileNotFoundError, TableError
        As `read_table`: what the names and types of the columns tell at once, a bad value when its chunk is reached.
    """
    if isinstance(chunk_rows, bool) or not isinstance(chunk_rows, (int, np.integer)) or chunk_rows < 1:
        raise ValueError(f"chunk_rows: expected a positive integer, got {chunk_rows!r}")
    opened = _open(
        path, Selection.of(columns, drop, label, id), format, key, CsvOptions(delimiter, decimal, header, encoding)
    )
    return _chunks(opened, int(chunk_rows))


def _chunks(opened: Opened, chunk_rows: int) -> Iterator[Table]:
    waiting: list[Batch] = []
    n_waiting = start = 0
    for batch in opened.batches:
        waiting.append(batch)
        n_waiting += len(batch.X)
        if n_waiting < chunk_rows:
            continue
        joined = _join(waiting)
        position = 0
        while n_waiting - position >= chunk_rows:
            yield _table(_cut(joined, position, position + chunk_rows), opened.columns, start)
            position += chunk_rows
            start += chunk_rows
        waiting = [_cut(joined, position, n_waiting)] if position < n_waiting else []
        n_waiting -= position
    if n_waiting:
        yield _table(_join(waiting), opened.columns, start)


def _open(
    path: str | os.PathLike[str], selection: Selection, format_name: str | None, key: str | None, csv: CsvOptions
) -> Opened:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    if path.is_dir():
        raise TableError(f"{path}: a folder, expected a file")
    kind = table_format(path) if format_name is None else format_name
    if kind not in FORMATS:
        raise ValueError(f"format: expected one of {', '.join(FORMATS)}, got {format_name!r}")
    if path.stat().st_size == 0:
        raise TableError(f"{path}: the file is empty")
    if kind == "csv":
        return open_csv(path, selection, csv)
    if kind == "parquet":
        return open_parquet(path, selection)
    if kind == "npz":
        return open_npz(path, selection, key)
    return open_npy(path, selection) if kind == "npy" else open_idx(path, selection)


def table_naming(path: str | os.PathLike[str], format: str | None = None, csv: CsvOptions | None = None) -> Naming:
    """Return what a file says of its columns; without a list of them where it has no names and is no text.

    Raises
    ------
    FileNotFoundError, TableError
        As `read_table`.
    """
    path = Path(path)
    kind = table_format(path) if format is None else format
    if kind == "csv":
        return find_layout(path, csv or CsvOptions()).naming
    if kind == "parquet":
        return parquet_naming(path)
    return Naming((), named=kind == "npz" and has_names(path))


def table_format(path: str | os.PathLike[str]) -> str:
    """Return the format that the name of a file tells; TableError if it tells none."""
    path = Path(path)
    name = path.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    if name.endswith(("-ubyte", ".idx", ".idx1", ".idx3")):
        return "idx"
    kind = _SUFFIXES.get(Path(name).suffix)
    if kind is None:
        raise TableError(
            f"{path}: cannot tell the format from the name; expected {', '.join(_SUFFIXES)} or idx, or give format="
        )
    return kind


def _join(batches: list[Batch]) -> Batch:
    if len(batches) == 1:
        return batches[0]
    return Batch(
        np.concatenate([batch.X for batch in batches]),
        None if batches[0].ids is None else np.concatenate([batch.ids for batch in batches if batch.ids is not None]),
        None if batches[0].labels is None else _join_labels([b.labels for b in batches if b.labels is not None]),
    )


def _join_labels(parts: list[np.ndarray]) -> np.ndarray:
    """Join labels; where some blocks held only numbers and others texts, all become texts."""
    if len({part.dtype.kind in "biuf" for part in parts}) > 1:
        parts = [part.astype(str) for part in parts]
    return np.concatenate(parts)


def _cut(batch: Batch, start: int, stop: int) -> Batch:
    return Batch(
        batch.X[start:stop],
        None if batch.ids is None else batch.ids[start:stop],
        None if batch.labels is None else batch.labels[start:stop],
    )


def _table(batch: Batch, columns: tuple[str, ...], start: int) -> Table:
    return Table(batch.X, columns, batch.ids, batch.labels, start)
