"""How a CSV file is written, as its beginning tells: encoding, delimiter, and which columns have which names."""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .tables import MISSING, Naming, TableError
from .types import numbered_names

BLOCK_BYTES = 2 << 20
HEAD_BYTES = 1 << 20
DELIMITERS = ",;\t|"
#: True and false as Python, R and JSON write them.
WORDS = {True: ("True", "TRUE", "true"), False: ("False", "FALSE", "false")}


def _cells(words: tuple[str, ...]) -> tuple[str, ...]:
    """Return cells that are one of the words: Arrow, which strips numbers, wants a space beside a word told."""
    return tuple(f"{before}{word}{after}" for word in words for before in ("", " ") for after in ("", " "))


#: Cells of a column of booleans, which may have 0 and 1 for them too.
TRUE, FALSE = _cells((*WORDS[True], "1")), _cells((*WORDS[False], "0"))

#: Records that are compared to find the delimiter.
COMPARED = 20


@dataclass(frozen=True)
class CsvOptions:
    """How a file is written; None: found out from its beginning."""

    delimiter: str | None = None
    decimal: str = "."
    header: bool | None = None
    encoding: str | None = None

    def __post_init__(self) -> None:
        if self.decimal not in (".", ","):
            raise ValueError(f"decimal: expected '.' or ',', got {self.decimal!r}")
        if self.delimiter is not None and not is_delimiter(self.delimiter):
            raise ValueError(
                f"delimiter: expected one ASCII character, neither a quote nor a line's end, got {self.delimiter!r}"
            )
        if self.delimiter == self.decimal:
            raise ValueError(f"delimiter: {self.delimiter!r} is the decimal mark too")
        if self.header is not None and not isinstance(self.header, bool):  # pandas' header=0 means another thing
            raise TypeError(f"header: expected True, False or None, got {self.header!r}")
        if self.encoding is not None and not isinstance(self.encoding, str):
            raise TypeError(f"encoding: expected the name of one or None, got {self.encoding!r}")


@dataclass(frozen=True)
class Layout:
    """How a file is written, all of it."""

    naming: Naming
    delimiter: str
    guessed_delimiter: bool
    decimal: str
    header_lines: int
    encoding: str  # of the texts
    wide: bool  # UTF-16 and the like, which Arrow must transcode
    block_bytes: int  # read at once; a row must fit
    booleans: frozenset[str]  # columns of true and false


def is_delimiter(text: Any) -> bool:
    """Return whether a text can be a delimiter."""
    return isinstance(text, str) and len(text) == 1 and text.isascii() and text not in '\r\n"'


def pyarrow_csv() -> Any:
    """Import pyarrow with its CSV part; ImportError says what to install."""
    try:
        import pyarrow
        import pyarrow.csv
    except ImportError as error:
        raise ImportError("reading CSV files needs pyarrow: pip install 'rvae-fast[data]'") from error
    return pyarrow


def stream(path: Path) -> Any:
    """Open a file for reading, decompressed if its name says that it is compressed."""
    # Arrow detects it by lower-case names alone.
    kind = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}.get(path.suffix.lower(), "detect")
    return pyarrow_csv().input_stream(str(path), compression=kind)


def decode(value: bytes, encoding: str) -> str:
    """Decode a text.

    Where a file mixes encodings, what is not in the main one is taken as Latin-1, which has every byte.
    """
    try:
        return value.decode(encoding)
    except UnicodeDecodeError:
        return value.decode("latin-1")


def is_number(cell: str, decimal: str = ".") -> bool:
    """Return whether a cell is a number as Arrow reads it."""
    text = cell.strip()
    if not text or "_" in text or (decimal != "." and "." in text):
        return False
    try:
        float(text.replace(decimal, "."))
    except ValueError:
        return False
    return True


def is_boolean(cell: str) -> bool:
    """Return whether a cell is true or false as Arrow is told to read it."""
    return cell in TRUE or cell in FALSE


def find_layout(path: Path, options: CsvOptions) -> Layout:
    """Find encoding, delimiter and column names from the beginning of the file."""
    pa = pyarrow_csv()
    try:
        with stream(path) as opened:
            head = opened.read(HEAD_BYTES)
            while b"\n" not in head and (more := opened.read(HEAD_BYTES)):  # a header of very many columns
                head += more
    except (pa.ArrowException, OSError) as error:
        raise TableError(f"{path}: cannot be read; the file is damaged ({error})") from error
    encoding = _find_encoding(head) if options.encoding is None else options.encoding
    wide = encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32"))
    try:
        # Line by line, as a file may mix encodings; but whole where a line end is not one byte.
        lines = [head] if wide else head.splitlines(keepends=True)
        text = "".join(line.decode(encoding, "replace") if wide else decode(line, encoding) for line in lines)
    except LookupError as error:
        raise ValueError(f"encoding: unknown encoding {options.encoding!r}") from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise TableError(f"{path}: the file is empty")
    if "\0" in text:
        raise TableError(f"{path}: not a text file (it holds zero bytes); expected CSV")
    delimiter = options.delimiter or _find_delimiter(text, options.decimal)
    try:
        first, n_lines = _first_record(text, delimiter)
        naming = _naming(first, text, delimiter, options)
    except csv.Error as error:  # which is no ValueError
        raise TableError(f"{path}: cannot be read as CSV ({error}); is a quote at its beginning not closed?") from error
    # Arrow counts skipped lines as they are in the file, blank ones too
    # A number takes some 25 bytes at most; a text may be longer, as the lines seen here tell.
    block = max(BLOCK_BYTES, 64 * len(first), 4 * max(map(len, head.splitlines())))
    return Layout(
        naming=naming,
        delimiter=delimiter,
        guessed_delimiter=options.delimiter is None,
        decimal=options.decimal,
        header_lines=n_lines if naming.named else 0,
        encoding=encoding,
        wide=wide,
        block_bytes=block,
        booleans=_booleans(naming, text, delimiter),
    )


def _booleans(naming: Naming, text: str, delimiter: str) -> frozenset[str]:
    """Find the columns that have true and false, and nothing else but 0, 1 and missing values."""
    words = (*WORDS[True], *WORDS[False])
    if not any(word in text for word in words):
        return frozenset()
    try:
        rows = _records(text, delimiter)[1 if naming.named else 0 :]
    except csv.Error:  # whoever reads the rows will say so
        return frozenset()
    found = []
    for i, name in enumerate(naming.names):
        cells = [row[i] for row in rows if len(row) > i and row[i] not in MISSING]
        if all(map(is_boolean, cells)) and any(cell.strip() in words for cell in cells):
            found.append(name)
    return frozenset(found)


def _find_encoding(head: bytes) -> str:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "utf-16"
    return "utf-8-sig" if head.startswith(b"\xef\xbb\xbf") else "utf-8"


def _records(text: str, delimiter: str, most: int | None = None) -> list[list[str]]:
    """Return the first records that are not blank and, unless they are all there is, whole."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    found = list(itertools.islice((record for record in reader if any(cell.strip() for cell in record)), most))
    if len(found) > 2 and not text.endswith(("\n", "\r")):
        found.pop()  # the text may end within it
    return found


def _find_delimiter(text: str, decimal: str) -> str:
    """Return the delimiter of which every record has as many as the first line; else that of which this has most."""
    line = next(line for line in text.splitlines() if line.strip())
    counts = {delimiter: line.count(delimiter) for delimiter in DELIMITERS if delimiter != decimal}
    found = [delimiter for delimiter in counts if counts[delimiter]]
    try:
        widths = {one: {len(record) for record in _records(text, one, COMPARED)} for one in found}
    except csv.Error:  # whoever reads the rows will say so
        widths = {}
    # Column names may hold commas ("a, C;b, bar"), and numbers too, but not equally many in every line.
    level = [one for one in found if len(widths.get(one, ())) == 1 and widths[one] != {1}]
    return max(level or found, key=lambda delimiter: counts[delimiter], default=",")


def _first_record(text: str, delimiter: str) -> tuple[list[str], int]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    for record in reader:
        if any(cell.strip() for cell in record):
            return record, reader.line_num
    raise AssertionError("an empty text was refused before")


def _naming(first: Sequence[str], text: str, delimiter: str, options: CsvOptions) -> Naming:
    """Find the columns' names, which of them hold pandas' index and which nothing at all."""
    cells = [cell.strip() for cell in first]
    filled = len(cells)  # a comma ends every line of some files
    while not cells[filled - 1]:
        filled -= 1
    counted = _counted(cells[:filled] if cells[0] else cells[1:filled])
    header = options.header
    if header is None:
        # An empty first name is pandas' or R's index; an empty cell further on is a missing value among numbers, as is
        # NA or ? anywhere.
        values = [is_number(cell, options.decimal) or is_boolean(cell) for cell in cells[:filled]]
        others = [cell for cell, value in zip(cells, values, strict=False) if not value]
        numbers = any(values) and all(cell in MISSING for cell in others)
        header = not cells[0] or counted or not numbers
    names = tuple(cell or f"unnamed{i}" for i, cell in enumerate(cells)) if header else numbered_names(len(cells))
    empty: tuple[str, ...] = ()
    if filled < len(cells):
        rows = _records(text, delimiter)[1 if header else 0 :]
        empty = tuple(
            name
            for i, name in enumerate(names[filled:], filled)
            if not any(row[i].strip() for row in rows if len(row) > i)
        )
    return Naming(
        names,
        named=header,
        index=names[:1] if header and not cells[0] and filled > 1 else (),
        empty=empty,
        counted=counted and header and options.header is None,
    )


def _counted(cells: Sequence[str]) -> bool:
    """Return whether a first line is how pandas numbers columns without names: 0, 1, ... or 1, 2, 3, ...

    A row of numbers may look so too, the likelier the shorter it is: two cells 1 and 2 are taken as one.
    """
    return any(
        list(cells) == [str(first + i) for i in range(len(cells))] and len(cells) > 1 + first for first in (0, 1)
    )
