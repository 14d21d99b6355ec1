"""CSV through Arrow's streaming reader, block by block: strict about the number of values in a row and about what is
a number. A column of true and false is one of 1 and 0.

When Arrow refuses a file, the file is read again row by row to say which line is at fault.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .csv_layout import (
    DELIMITERS,
    FALSE,
    TRUE,
    CsvOptions,
    Layout,
    decode,
    find_layout,
    is_boolean,
    is_number,
    pyarrow_csv,
    stream,
)
from .tables import MISSING, Batch, Opened, Selection, TableError, parse_labels

MAX_REPORTED = 5


def open_csv(path: Path, selection: Selection, options: CsvOptions) -> Opened:
    """Open a CSV file (plain, .gz, .bz2, .zst).

    Raises
    ------
    TableError
        An empty file, a column that is not there, and, while it is read: rows of unequal length, a feature that is
        not a number, damaged compression, an empty label.
    """
    layout = find_layout(path, options)
    features = selection.features(layout.naming.names, path, layout.naming.left_out)
    return Opened(features, _batches(path, layout, features, selection))


def _batches(path: Path, layout: Layout, features: tuple[str, ...], selection: Selection) -> Iterator[Batch]:
    pa = pyarrow_csv()
    # Texts as bytes: one line in another encoding must not stop the reading of numbers.
    texts = [name for name in (selection.label, selection.id) if name is not None]
    # Read as well what is left out for being empty: a value further down must not be lost without a word.
    empty = [name for name in layout.naming.empty if selection.columns is None and name not in selection.named]
    numbers = {name: pa.bool_() if name in layout.booleans else pa.float64() for name in features}
    types = {**numbers, **dict.fromkeys([*texts, *empty], pa.binary())}
    rows = 0
    try:
        with stream(path) as opened:
            reader = pa.csv.open_csv(
                opened,
                read_options=pa.csv.ReadOptions(
                    column_names=layout.naming.names,
                    skip_rows=layout.header_lines,
                    block_size=layout.block_bytes,
                    encoding=layout.encoding if layout.wide else "utf8",
                ),
                parse_options=pa.csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(types),
                    null_values=list(MISSING),
                    true_values=list(TRUE),
                    false_values=list(FALSE),
                    strings_can_be_null=False,
                    decimal_point=layout.decimal,
                ),
            )
            for batch in reader:
                if batch.num_rows == 0:
                    continue
                X = np.empty((batch.num_rows, len(features)))
                for index, name in enumerate(features):
                    X[:, index] = batch.column(name).cast(pa.float64()).to_numpy(zero_copy_only=False)
                for unnamed in empty:
                    _check_empty(path, unnamed, batch.column(unnamed).to_pylist(), rows)
                labels = _texts(batch, selection.label, layout)
                if labels is not None:
                    unlabelled = np.flatnonzero(np.isin(labels, MISSING))
                    if unlabelled.size:
                        raise TableError(
                            f"{path}: label {selection.label!r} has no value in data row {rows + unlabelled[0] + 1}"
                        )
                    labels = parse_labels(labels)
                yield Batch(X, _texts(batch, selection.id, layout), labels)
                rows += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _explain(path, layout, features, error) from error
    if rows == 0:
        raise TableError(f"{path}: it has column names but no rows")


def _check_empty(path: Path, name: str, values: list[bytes], start: int) -> None:
    missing = {text.encode() for text in MISSING}
    for row, value in enumerate(values, start + 1):
        if value not in missing and value.strip():
            raise TableError(
                f"{path}: column {name!r} has no name and no value at first, but {value.decode('latin-1')!r} in data "
                f"row {row}; give it a name, or leave it out (drop)"
            )


def _texts(batch: Any, name: str | None, layout: Layout) -> np.ndarray | None:
    if name is None:
        return None
    encoding = "utf-8" if layout.wide else layout.encoding
    return np.array([decode(value, encoding) for value in batch.column(name).to_pylist()])


def _explain(path: Path, layout: Layout, features: Sequence[str], cause: Exception) -> TableError:
    """Read the file again, a row at a time, to say in which line it goes wrong."""
    width = len(layout.naming.names)
    places = {name: layout.naming.names.index(name) for name in features}
    bad: dict[str, str] = {}
    commas = False
    others = [one for one in DELIMITERS if one != layout.delimiter and one != layout.decimal]
    # Only where it was a guess: who gave the delimiter knows it.
    separated = f" (separated by {layout.delimiter!r}; delimiter= says another)" if layout.guessed_delimiter else ""
    split = False
    line = 0  # the last one of the record before
    try:
        with stream(path) as opened:
            text = io.TextIOWrapper(opened, encoding=layout.encoding, errors="replace", newline="")
            reader = csv.reader(text, delimiter=layout.delimiter)
            for record in reader:
                line = reader.line_num
                if line <= layout.header_lines or not record:
                    continue
                if len(record) != width and not bad:
                    found = f"line {reader.line_num} has {len(record)} values, expected {width}"
                    return TableError(f"{path}: {found}{separated}")
                for name, place in places.items():
                    if name not in bad and place < len(record):
                        cell = record[place]
                        right = is_boolean(cell) if name in layout.booleans else is_number(cell, layout.decimal)
                        if cell not in MISSING and not right:
                            kind = ", after true and false alone" if name in layout.booleans else ""
                            if not kind and is_boolean(cell):
                                kind = ", in a column whose beginning is not true and false alone"
                            bad[name] = f"{name!r} (first {cell!r}, line {reader.line_num}{kind})"
                            commas |= layout.decimal == "." and "," in cell and is_number(cell, ",")
                            split |= any(one in cell for one in others)
                if len(bad) == len(places) or (bad and reader.line_num > 200_000):
                    break
    except csv.Error as error:
        return TableError(f"{path}: line {line + 1} cannot be read ({error}); is a quote in it not closed?")
    except (OSError, UnicodeError) as error:
        return TableError(f"{path}: cannot be read to its end; the file is damaged ({error})")
    if bad:
        shown = ", ".join(list(bad.values())[:MAX_REPORTED])
        more = f" and {len(bad) - MAX_REPORTED} more" if len(bad) > MAX_REPORTED else ""
        mark = "; with decimal=',' some would be" if commas else ""
        values = f"; these are values{separated}" if split and separated and not commas else ""
        return TableError(
            f"{path}: columns that are not numeric: {shown}{more}{mark}{values}; leave them out (drop or columns), "
            "or name one as label or id"
        )
    return TableError(f"{path}: cannot be read as CSV ({cause})")
