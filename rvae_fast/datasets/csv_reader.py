"""CSV through Arrow's streaming reader, block by block: strict about the number of values in a row and about what is
a number.

When Arrow refuses a file, the file is read again row by row to say which line is at fault.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .tables import MISSING, Batch, Opened, Selection, TableError, parse_labels
from .types import numbered_names

BLOCK_BYTES = 2 << 20
HEAD_BYTES = 1 << 20
DELIMITERS = ",;\t|"
MAX_REPORTED = 5


@dataclass(frozen=True)
class CsvOptions:
    """How a file is written; None: found out from its beginning."""

    delimiter: str | None = None
    decimal: str = "."
    header: bool | None = None
    encoding: str | None = None


@dataclass(frozen=True)
class _Layout:
    names: tuple[str, ...]
    delimiter: str
    decimal: str
    header_lines: int
    encoding: str  # of the texts
    wide: bool  # UTF-16 and the like, which Arrow must transcode
    block_bytes: int  # read at once; a row must fit


def open_csv(path: Path, selection: Selection, options: CsvOptions) -> Opened:
    """Open a CSV file (plain, .gz, .bz2, .zst).

    Raises
    ------
    TableError
        An empty file, a column that is not there, and, while it is read: rows of unequal length, a feature that is
        not a number, damaged compression, an empty label.
    """
    layout = _layout(path, options)
    features = selection.features(layout.names, path)
    return Opened(features, _batches(path, layout, features, selection))


def has_header(path: Path, options: CsvOptions) -> bool:
    """Return whether the file names its columns."""
    return _layout(path, options).header_lines > 0


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.csv
    except ImportError as error:
        raise ImportError("reading CSV files needs pyarrow: pip install 'rvae-fast[data]'") from error
    return pyarrow


def _stream(path: Path) -> Any:
    return _pyarrow().input_stream(str(path), compression="detect")


def _batches(path: Path, layout: _Layout, features: tuple[str, ...], selection: Selection) -> Iterator[Batch]:
    pa = _pyarrow()
    # Texts as bytes: one line in another encoding must not stop the reading of numbers.
    texts = [name for name in (selection.label, selection.id) if name is not None]
    types = {**dict.fromkeys(features, pa.float64()), **dict.fromkeys(texts, pa.binary())}
    rows = 0
    try:
        with _stream(path) as stream:
            reader = pa.csv.open_csv(
                stream,
                read_options=pa.csv.ReadOptions(
                    column_names=layout.names,
                    skip_rows=layout.header_lines,
                    block_size=layout.block_bytes,
                    encoding=layout.encoding if layout.wide else "utf8",
                ),
                parse_options=pa.csv.ParseOptions(delimiter=layout.delimiter, newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(
                    column_types=types,
                    include_columns=list(types),
                    null_values=list(MISSING),
                    strings_can_be_null=False,
                    decimal_point=layout.decimal,
                ),
            )
            for batch in reader:
                if batch.num_rows == 0:
                    continue
                X = np.empty((batch.num_rows, len(features)))
                for index, name in enumerate(features):
                    X[:, index] = batch.column(name).to_numpy(zero_copy_only=False)
                labels = _texts(batch, selection.label, layout)
                if labels is not None:
                    empty = np.flatnonzero(np.isin(labels, MISSING))
                    if empty.size:
                        raise TableError(
                            f"{path}: label {selection.label!r} has no value in data row {rows + empty[0] + 1}"
                        )
                    labels = parse_labels(labels)
                yield Batch(X, _texts(batch, selection.id, layout), labels)
                rows += batch.num_rows
    except (pa.ArrowException, OSError, UnicodeError) as error:
        raise _explain(path, layout, features, error) from error
    if rows == 0:
        raise TableError(f"{path}: it has column names but no rows")


def _texts(batch: Any, name: str | None, layout: _Layout) -> np.ndarray | None:
    if name is None:
        return None
    encoding = "utf-8" if layout.wide else layout.encoding
    return np.array([_decode(value, encoding) for value in batch.column(name).to_pylist()])


def _decode(value: bytes, encoding: str) -> str:
    """Decode a text.

    Where a file mixes encodings, what is not in the main one is taken as Latin-1, which has every byte.
    """
    try:
        return value.decode(encoding)
    except UnicodeDecodeError:
        return value.decode("latin-1")


def _layout(path: Path, options: CsvOptions) -> _Layout:
    """Find encoding, delimiter and column names from the beginning of the file."""
    pa = _pyarrow()
    try:
        with _stream(path) as stream:
            head = stream.read(HEAD_BYTES)
            while b"\n" not in head and (more := stream.read(HEAD_BYTES)):  # a header of very many columns
                head += more
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path}: cannot be read; the file is damaged ({error})") from error
    encoding = _find_encoding(head) if options.encoding is None else options.encoding
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32"))
    try:
        # Line by line, as a file may mix encodings; but whole where a line end is not one byte.
        lines = [head] if wide else head.splitlines(keepends=True)
        text = "".join(line.decode(encoding, "replace") if wide else _decode(line, encoding) for line in lines)
    except LookupError as error:
        raise ValueError(f"encoding: unknown encoding {options.encoding!r}") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise TableError(f"{path}: the file is empty")
    if "\0" in text:
        raise TableError(f"{path}: not a text file (it holds zero bytes); expected CSV")
    delimiter = options.delimiter or _find_delimiter(text, options.decimal)
    first, n_lines = _first_record(text, delimiter)
    header = not all(_is_number(cell, options.decimal) for cell in first) if options.header is None else options.header
    names = tuple(_name(cell, index) for index, cell in enumerate(first)) if header else numbered_names(len(first))
    # Arrow counts skipped lines as they are in the file, blank ones too
    # A number takes some 25 bytes at most; a text may be longer, as the lines seen here tell.
    block = max(BLOCK_BYTES, 64 * len(names), 4 * max(map(len, head.splitlines())))
    return _Layout(names, delimiter, options.decimal, n_lines if header else 0, encoding, wide, block)


def _find_encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig" if head.startswith(b"\xef\xbb\xbf") else "utf-8"


def _find_delimiter(text: str, decimal: str) -> str:
    line = next(line for line in text.splitlines() if line.strip())
    counts = {delimiter: line.count(delimiter) for delimiter in DELIMITERS if delimiter != decimal}
    best = max(counts, key=lambda delimiter: counts[delimiter])
    return best if counts[best] else ","


def _first_record(text: str, delimiter: str) -> tuple[list[str], int]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for record in reader:
        if any(cell.strip() for cell in record):
            return record, reader.line_num
    raise AssertionError("an empty text was refused before")


def _name(cell: str, index: int) -> str:
    return cell.strip() or f"unnamed{index}"  # pandas writes its index under an empty name


def _is_number(cell: str, decimal: str = ".") -> bool:
    text = cell.strip()
    if not text or "_" in text or (decimal != "." and "." in text):
        return False
    try:
        float(text.replace(decimal, "."))
    except ValueError:
        return False
    return True


def _explain(path: Path, layout: _Layout, features: Sequence[str], cause: Exception) -> TableError:
    """Read the file again, a row at a time, to say in which line it goes wrong."""
    width = len(layout.names)
    places = {name: layout.names.index(name) for name in features}
    bad: dict[str, str] = {}
    commas = False
    try:
        with _stream(path) as stream:
            text = io.TextIOWrapper(stream, encoding=layout.encoding, errors="replace", newline="")
            reader = csv.reader(text, delimiter=layout.delimiter)
            for record in reader:
                if reader.line_num <= layout.header_lines or not record:
                    continue
                if len(record) != width and not bad:
                    return TableError(f"{path}: line {reader.line_num} has {len(record)} values, expected {width}")
                for name, place in places.items():
                    if name not in bad and place < len(record):
                        cell = record[place]
                        if cell not in MISSING and not _is_number(cell, layout.decimal):
                            bad[name] = f"{name!r} (first {cell!r}, line {reader.line_num})"
                            commas |= layout.decimal == "." and _is_number(cell, ",")
                if len(bad) == len(places) or (bad and reader.line_num > 200_000):
                    break
    except (OSError, csv.Error, UnicodeError) as error:
        return TableError(f"{path}: cannot be read to its end; the file is damaged ({error})")
    if bad:
        shown = ", ".join(list(bad.values())[:MAX_REPORTED])
        more = f" and {len(bad) - MAX_REPORTED} more" if len(bad) > MAX_REPORTED else ""
        mark = "; with decimal=',' some would be" if commas else ""
        return TableError(
            f"{path}: columns that are not numeric: {shown}{more}{mark}; leave them out (drop or columns), "
            "or name one as label or id"
        )
    return TableError(f"{path}: cannot be read as CSV ({cause})")
