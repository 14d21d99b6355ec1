"""Arrays: .npy (memory-mapped), .npz, idx (.gz). Rows are flattened, so a stack of images is a table of pixels."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .cache import load_arrays
from .formats import decode_idx
from .tables import Batch, Opened, Selection, TableError
from .types import numbered_names

FEATURE_KEYS = ("X", "x", "data", "features", "images", "arr_0")
NAME_KEYS = ("feature_names", "columns")
BATCH_BYTES = 8 << 20


def open_npy(path: Path, selection: Selection) -> Opened:
    """Open an .npy file without reading it: its rows are a read-only memory map. Columns are named x0, x1, ...

    Raises
    ------
    TableError
        A damaged file, pickled objects, or an array that is not rows of numbers.
    """
    with path.open("rb") as file:
        start = file.read(6)
    if start != b"\x93NUMPY":
        raise TableError(f"{path}: not an .npy file (it starts with {start!r})")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise TableError(f"{path}: not a readable .npy array ({error})") from error
    return _open_array(path, array, None, selection, {})


def open_npz(path: Path, selection: Selection, key: str | None) -> Opened:
    """Open an .npz file. The rows are under `key`, by default X, x, data, features, images or arr_0, or its only 2-D
    array.

    `label` and `id` of the selection name other arrays of the file, or else columns of the rows; `feature_names` or
    `columns` in the file name the columns. The rows are read whole: for data larger than memory, use .npy or Parquet.
    """
    try:
        arrays = load_arrays(path)
    except ValueError as error:
        raise TableError(str(error)) from error
    if key is not None and key not in arrays:
        raise TableError(f"{path}: no array {key!r} in it; it has {', '.join(arrays) or 'none'}")
    chosen = key or next((name for name in FEATURE_KEYS if name in arrays), None)
    if chosen is None:
        wide = [name for name, array in arrays.items() if array.ndim >= 2]
        if len(wide) != 1:
            raise TableError(
                f"{path}: which array holds the rows? It has {', '.join(arrays) or 'none'}; name one with key="
            )
        chosen = wide[0]
    X = arrays.pop(chosen)
    stored = next((arrays[name] for name in NAME_KEYS if name in arrays), None)
    names = None if stored is None else tuple(str(name) for name in stored.ravel())
    return _open_array(path, X, names, selection, arrays)


def has_names(path: Path) -> bool:
    """Return whether an .npz file names the columns of its rows; the rows are not read."""
    with np.load(path, allow_pickle=False) as file:
        return any(name in file.files for name in NAME_KEYS)


def open_idx(path: Path, selection: Selection) -> Opened:
    """Open an idx file, gzipped or not; `label` of the selection may be the path of the idx file with the labels."""
    try:
        array = decode_idx(path.read_bytes(), str(path))
        beside = {}
        if selection.label is not None and Path(selection.label).is_file():
            beside[selection.label] = decode_idx(Path(selection.label).read_bytes(), selection.label)
    except ValueError as error:
        raise TableError(str(error)) from error
    return _open_array(path, array, None, selection, beside)


def _open_array(
    path: Path,
    array: np.ndarray,
    names: tuple[str, ...] | None,
    selection: Selection,
    beside: dict[str, np.ndarray],
) -> Opened:
    if array.dtype.kind not in "biuf":
        raise TableError(f"{path}: the array holds {array.dtype}, expected numbers")
    if array.ndim < 2:
        raise TableError(f"{path}: the array has shape {array.shape}, expected rows of features [n_rows, n_features]")
    if array.size == 0:
        raise TableError(f"{path}: the array is empty (shape {array.shape})")
    rows = array.reshape(len(array), -1)
    if names is not None and len(names) != rows.shape[1]:
        raise TableError(f"{path}: {len(names)} feature names for {rows.shape[1]} columns")
    all_names = names or numbered_names(rows.shape[1])
    outside = {name: beside[name] for name in (selection.label, selection.id) if name is not None and name in beside}
    for name, values in outside.items():
        if values.shape != (len(rows),):
            raise TableError(f"{path}: {name!r} has shape {values.shape}, expected one value a row, ({len(rows)},)")
    inside = Selection(
        selection.columns,
        selection.drop,
        None if selection.label in outside else selection.label,
        None if selection.id in outside else selection.id,
    )
    features = inside.features(all_names, path)
    place = {name: index for index, name in enumerate(all_names)}
    chosen = None if features == all_names else [place[name] for name in features]

    def beside_rows(wanted: str | None, part: slice) -> np.ndarray | None:
        if wanted is None:
            return None
        return outside[wanted][part] if wanted in outside else np.array(rows[part, place[wanted]])

    def cut(part: slice) -> Batch:  # only these rows of a memory map are read
        X = rows[part] if chosen is None else rows[part][:, chosen]
        return Batch(X, beside_rows(selection.id, part), beside_rows(selection.label, part))

    def batches() -> Iterator[Batch]:
        step = max(1, BATCH_BYTES // (rows.shape[1] * rows.itemsize))
        for start in range(0, len(rows), step):
            yield cut(slice(start, start + step))

    return Opened(features, batches(), lambda: cut(slice(None)))
