"""Where row scores go: CSV, Parquet or .npz, chunk by chunk, whole or not at all; or CSV on standard output."""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

__all__ = ["ScoreSink", "check_output"]

COLUMNS = ("id", "score", "anomaly")
#: One more, if asked for: which columns make a flagged row anomalous.
BECAUSE = "because"


def check_output(path: Path) -> str:
    """Return the format that a file of scores will have; ValueError if its name tells none that can be written."""
    from rvae_fast.datasets.readers import table_format

    kind = None
    with contextlib.suppress(ValueError):  # what can be read is not what can be written
        kind = table_format(path)
    packed = path.suffix.lower() in {".bz2", ".zst", *({".gz"} if kind != "csv" else ())}
    if kind not in {"csv", "parquet", "npz"} or packed:
        raise ValueError(f"{path}: scores are written as .csv, .tsv (also .gz), .parquet or .npz")
    return kind


class ScoreSink(contextlib.AbstractContextManager["ScoreSink"]):
    """Write ``id``, ``score``, ``anomaly`` (0 or 1) for each row, in the order in which they come.

    A file appears under its name when the block ends without an error; until then, what was there stays.

    Parameters
    ----------
    path : Path or None
        None writes CSV to standard output.
    explained : bool, default False
        Whether a further column, ``because``, holds a text for each row.
    id_type : pyarrow.DataType, optional
        Type of the ids in a Parquet file; by the first chunk where not given, which is right only where all chunks
        have the same, as they do of any file but a Parquet file.
    """

    def __init__(self, path: Path | None, *, explained: bool = False, id_type: Any = None) -> None:
        self._path = path
        self._id_type = id_type
        self._columns = (*COLUMNS, BECAUSE) if explained else COLUMNS
        self._stack = contextlib.ExitStack()
        self._csv: Any = None
        self._text: IO[str] | None = None
        self._parquet: Any = None
        self._kind = "csv"
        self._kept: list[tuple[Any, ...]] = []
        self._temporary: Path | None = None

    def __enter__(self) -> ScoreSink:
        if self._path is None:
            self._open_csv(sys.stdout, ",")
            return self
        from rvae_fast.datasets.cache import atomic_path

        self._kind = check_output(self._path)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = self._stack.enter_context(atomic_path(self._path))
        self._temporary.touch()
        if self._kind == "csv":
            suffixes = [suffix.lower() for suffix in self._path.suffixes]
            raw: Any = gzip.open(self._temporary, "wb") if suffixes[-1] == ".gz" else open(self._temporary, "wb")
            self._stack.enter_context(raw)
            text = self._stack.enter_context(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
            self._open_csv(text, "\t" if ".tsv" in suffixes else ",")
        return self

    def _open_csv(self, text: IO[str], delimiter: str) -> None:
        self._text = text
        self._csv = csv.writer(text, delimiter=delimiter, lineterminator="\n")
        self._csv.writerow(self._columns)

    def write(
        self,
        ids: NDArray[Any],
        scores: NDArray[np.float64],
        flags: NDArray[np.bool_],
        because: Sequence[str] | None = None,
    ) -> None:
        """Add rows, with a text for each if the sink is one of explained rows."""
        columns = [ids, scores, flags.astype(np.int64)]
        if because is not None:
            columns.append(np.array(because, dtype=object))
        if self._kind != "parquet":
            from rvae_fast.datasets.writers import in_words

            columns[0] = in_words(ids)
        if self._csv is not None:
            # tolist gives Python floats, whose text is the shortest that reads back as the same value.
            self._csv.writerows(zip(*(column.tolist() for column in columns), strict=True))
        elif self._kind == "parquet":
            self._write_parquet(columns)
        else:
            self._kept.append(tuple(columns))

    def _write_parquet(self, columns: Sequence[NDArray[Any]]) -> None:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise ImportError("writing Parquet files needs pyarrow: pip install 'rvae-fast[data]'") from error
        arrays = [
            pyarrow.array(c.tolist() if c.dtype.kind in "OUS" else c, type=self._id_type if name == "id" else None)
            for name, c in zip(self._columns, columns, strict=True)
        ]
        table = pyarrow.table(dict(zip(self._columns, arrays, strict=True)))
        if self._parquet is None:
            self._parquet = self._stack.enter_context(parquet.ParquetWriter(self._temporary, table.schema))
        self._parquet.write_table(table.cast(self._parquet.schema))

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None and self._path is None and self._text is not None:
            self._text.flush()  # here, so that a closed pipe is noticed where it can be handled
        if error is None and self._path is not None and self._kind == "npz":
            assert self._temporary is not None
            parts = zip(*self._kept, strict=True)
            joined = dict(zip(self._columns, (np.concatenate(part) for part in parts), strict=True))
            # An .npz must not hold pickles.
            joined = {name: column.astype(str) if column.dtype == object else column for name, column in joined.items()}
            with open(self._temporary, "wb") as file:
                np.savez_compressed(file, **joined)  # type: ignore[arg-type]
        self._stack.__exit__(kind, error, trace)
