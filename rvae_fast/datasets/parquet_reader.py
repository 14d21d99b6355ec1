"""Parquet, row group by row group."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .tables import Batch, Naming, Opened, Selection, TableError, parse_labels

BATCH_BYTES = 32 << 20
BATCH_ROWS = 65_536  # at most


def open_parquet(path: Path, selection: Selection) -> Opened:
    """Open a Parquet file; only the columns asked for are read, and a batch of rows at a time.

    Integers, floats, decimals and booleans are numbers; a null is NaN. Of ids a null is None, and integers stay exact.

    Raises
    ------
    TableError
        A damaged file, no rows, a column that is not there, a feature of another type, a null label.
    """
    file = _open(path)  # says what to install where there is no pyarrow
    import pyarrow as pa

    naming = _naming(file)
    features = selection.features(naming.names, path, naming.left_out)
    if file.metadata.num_rows == 0:
        raise TableError(f"{path}: it has columns but no rows")
    _check_numeric(path, file, features)
    types = [_value_type(file.schema_arrow.field(name).type) for name in features]
    single = all(pa.types.is_float32(kind) or pa.types.is_float16(kind) for kind in types)
    return Opened(features, _batches(path, file, features, selection, np.float32 if single else np.float64))


def parquet_naming(path: Path) -> Naming:
    """Return what a file says of its columns."""
    return _naming(_open(path))


def id_type(path: Path, name: str) -> Any:
    """Return the Arrow type of a column of ids; KeyError if there is none of that name."""
    return _value_type(_open(path).schema_arrow.field(name).type)


def _open(path: Path) -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError("reading Parquet files needs pyarrow: pip install 'rvae-fast[data]'") from error
    try:
        return parquet.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path}: not a readable Parquet file ({error})") from error


def _naming(file: Any) -> Naming:
    names = tuple(file.schema_arrow.names)
    # A frame that was sorted or filtered has its index as a column, which pandas lists here; a range is no text.
    listed: list[Any] = []
    with contextlib.suppress(ValueError, KeyError, TypeError):  # others may write there what they like
        listed = list(json.loads((file.schema_arrow.metadata or {})[b"pandas"])["index_columns"])
    return Naming(names, index=tuple(name for name in names if name in listed))


def _value_type(kind: Any) -> Any:
    import pyarrow as pa

    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _check_numeric(path: Path, file: Any, features: tuple[str, ...]) -> None:
    import pyarrow as pa

    bad = []
    for name in features:
        kind = _value_type(file.schema_arrow.field(name).type)
        tests = (pa.types.is_integer, pa.types.is_floating, pa.types.is_boolean, pa.types.is_decimal, pa.types.is_null)
        if not any(test(kind) for test in tests):
            bad.append(f"{name!r} ({kind}{_first_value(file, name)})")
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise TableError(
            f"{path}: columns that are not numeric: {shown}; leave them out (drop or columns), "
            "or name one as label or id"
        )


def _first_value(file: Any, name: str) -> str:
    """Return ", first VALUE, row N" for a column that has a value in its first batch."""
    for batch in file.iter_batches(batch_size=1024, columns=[name]):
        for row, value in enumerate(batch.column(0).to_pylist()):
            if value is not None:
                return f", first {value!r}, row {row}"
        break
    return ""


def _batches(
    path: Path, file: Any, features: tuple[str, ...], selection: Selection, dtype: type[np.floating[Any]]
) -> Iterator[Batch]:
    import pyarrow as pa
    import pyarrow.compute as compute

    target = pa.float32() if dtype is np.float32 else pa.float64()
    batch_rows = min(BATCH_ROWS, max(1, BATCH_BYTES // (8 * len(features))))
    apart = [name for name in (selection.label, selection.id) if name is not None]
    objects = selection.id is not None and _integers_with_nulls(file, selection.id)
    start = 0
    try:
        for batch in file.iter_batches(batch_size=batch_rows, columns=[*features, *dict.fromkeys(apart)]):
            X = np.empty((batch.num_rows, len(features)), dtype=dtype)
            for index, name in enumerate(features):
                column = batch.column(name)
                if pa.types.is_dictionary(column.type):
                    column = column.dictionary_decode()
                # unsafe: integers above 2**53 may be rounded, as by any conversion to float64
                X[:, index] = compute.cast(column, target, safe=False).to_numpy(zero_copy_only=False)
            labels = _plain(batch, selection.label)
            if selection.label is not None and batch.column(selection.label).null_count:
                row = start + int(
                    np.flatnonzero(batch.column(selection.label).is_null().to_numpy(zero_copy_only=False))[0]
                )
                raise TableError(f"{path}: label {selection.label!r} has no value in row {row}")
            if labels is not None and labels.dtype.kind not in "biuf":
                labels = parse_labels(labels.astype(str))
            yield Batch(X, _plain(batch, selection.id, objects), labels)
            start += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path}: cannot be read to its end; the file is damaged ({error})") from error


def _integers_with_nulls(file: Any, name: str) -> bool:
    """Return whether a column of integers or booleans may have nulls, anywhere in the file.

    Floats, which stand in for them in NumPy, would round ids above 2**53; and a batch without nulls must not have
    another type than one with them.
    """
    import pyarrow as pa

    kind = _value_type(file.schema_arrow.field(name).type)
    if not (pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        return False
    place = file.schema_arrow.names.index(name)
    if file.metadata.num_columns != len(file.schema_arrow.names):
        return True  # nested columns are counted by their parts, so the place is not known
    groups = (file.metadata.row_group(i).column(place) for i in range(file.metadata.num_row_groups))
    return any(group.statistics is None or group.statistics.null_count != 0 for group in groups)


def _plain(batch: Any, name: str | None, objects: bool = False) -> np.ndarray | None:
    import pyarrow as pa

    if name is None:
        return None
    column = batch.column(name)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if objects:
        return np.array(column.to_pylist(), dtype=object)
    return np.asarray(column.to_numpy(zero_copy_only=False))
