"""What a command reads: a file of rows, standard input, or a built-in data set by name."""

from __future__ import annotations

import contextlib
import re
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rvae_fast.cli.common import fail, usage_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import numpy as np

    from rvae_fast.datasets import Dataset, Table
    from rvae_fast.datasets.tables import Naming

__all__ = ["Source", "binary_labels", "frame", "normal_rows", "open_source", "parse_shape"]

PARTS = ("all", "train", "validation", "test")

#: Options of a reader that say how a CSV file is written.
CSV = ("delimiter", "decimal", "header", "encoding")


@dataclass
class Source:
    """Rows to read, once or chunk by chunk.

    Attributes
    ----------
    name : str
        What to call it in messages and reports.
    path : Path or None
        The file; None for a built-in data set.
    dataset : str or None
        Name of the built-in data set.
    labelled : bool
        Whether chunks carry labels.
    image_shape : tuple or None
        Of built-in images.
    by_model : bool
        Whether the columns to read are those of a model, not the user's.
    """

    name: str
    path: Path | None = None
    dataset: str | None = None
    image_shape: tuple[int, int] | None = None
    labelled: bool = False
    by_model: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    arrays: tuple[np.ndarray, np.ndarray | None, np.ndarray, tuple[str, ...]] | None = None

    @property
    def kind(self) -> str | None:
        """Return the format of the file; None for a built-in data set."""
        from rvae_fast.datasets.readers import table_format

        return None if self.path is None else self.options.get("format") or table_format(self.path)

    def naming(self, **changes: Any) -> Naming | None:
        """Return what the file says of its columns, read with these options; None where that cannot be told."""
        from rvae_fast.datasets.csv_layout import CsvOptions
        from rvae_fast.datasets.readers import table_naming

        written = {name: self.options[name] for name in CSV if name in self.options} | changes
        with contextlib.suppress(Exception):  # whatever is wrong, reading will say so properly
            return None if self.path is None else table_naming(self.path, self.kind, CsvOptions(**written))
        return None

    def id_type(self) -> Any:
        """Return the Arrow type of the ids in a Parquet file; None for others."""
        from rvae_fast.datasets.parquet_reader import id_type

        name = self.options.get("id")
        with contextlib.suppress(Exception):  # whatever is wrong, reading will say so properly
            return id_type(self.path, name) if self.path is not None and name and self.kind == "parquet" else None
        return None

    def read(self) -> Table:
        """Read all rows."""
        from rvae_fast.datasets import Table, read_table

        if self.arrays is not None:
            X, labels, rows, names = self.arrays
            return Table(X, names, rows, labels)
        assert self.path is not None
        with self._own_name():
            return read_table(self.path, **self.options)

    def chunks(self, rows: int) -> Iterator[Table]:
        """Read the rows in chunks of at most ``rows``."""
        from rvae_fast.datasets import Table, iter_table

        if self.arrays is not None:
            X, labels, numbers, names = self.arrays
            for start in range(0, len(X), rows):
                part = slice(start, start + rows)
                yield Table(X[part], names, numbers[part], None if labels is None else labels[part], start)
            return
        assert self.path is not None
        with self._own_name():
            yield from iter_table(self.path, rows, **self.options)

    def count(self) -> int | None:
        """Return the number of rows where the file tells it at once, for the progress bar."""
        if self.arrays is not None:
            return len(self.arrays[0])
        assert self.path is not None
        with contextlib.suppress(Exception):  # only a nicety: whatever is wrong, reading will say so properly
            if self.path.suffix == ".npy":
                import numpy as np

                return len(np.load(self.path, mmap_mode="r", allow_pickle=False))
            if self.path.suffix in {".parquet", ".pq"}:
                import pyarrow.parquet as parquet

                return int(parquet.ParquetFile(self.path).metadata.num_rows)
        return None

    @contextlib.contextmanager
    def _own_name(self) -> Iterator[None]:
        """Put into messages the name that the user gave, not a temporary file's, and whose the columns' names are."""
        try:
            yield
        except ValueError as error:
            told = str(error) if self.path is None else str(error).replace(str(self.path), self.name)
            if self.by_model:
                told = re.sub(r": columns ('.*?') is not a column", r": the model's column \1 is not in it", told)
                told = re.sub(
                    r"('.*?') is both in columns and the (label|id); a feature must not be either",
                    r"\1 was a feature when the model was fitted (leave it out there), and cannot be the \2 now",
                    told,
                )
            if told == str(error):
                raise
            raise ValueError(told) from error


def _spool_standard_input(stack: contextlib.ExitStack) -> Path:
    """Copy standard input to a temporary file, in bounded memory: a reader needs to look at its beginning twice."""
    import shutil

    stream = getattr(sys.stdin, "buffer", None)
    if stream is None or sys.stdin.isatty():
        usage_error("nothing is piped into standard input", "DATA")
    temporary = tempfile.NamedTemporaryFile(prefix="rvae-fast-", suffix=".csv")  # noqa: SIM115  (the stack closes it)
    file = stack.enter_context(temporary)
    shutil.copyfileobj(stream, file, 1 << 20)
    file.flush()
    return Path(file.name)


def open_source(
    data: str,
    stack: contextlib.ExitStack,
    *,
    label: str | None = None,
    id_column: str | None = None,
    columns: Sequence[str] = (),
    drop: Sequence[str] = (),
    key: str | None = None,
    csv: Mapping[str, Any] | None = None,
    novel: str | None = None,
    part: str | None = None,
    default_part: str = "test",
    split_seed: int = 0,
) -> Source:
    """Find out what ``data`` is. An existing file wins over a data set of the same name.

    Parameters
    ----------
    data : str
        Path, ``-`` or the name of a built-in data set.
    stack : ExitStack
        Keeps a temporary copy of standard input until the command ends.
    csv : mapping, optional
        From :func:`rvae_fast.cli.csv_options.csv_options`.
    default_part : str
        Part of a built-in data set to take where ``part`` is None; all rows of images without ``novel``, which is what
        splits them.
    """
    if part is not None and part not in PARTS:
        usage_error(f"{part!r} is not one of {', '.join(PARTS)}", "--part")
    from rvae_fast import datasets

    path = Path(data)
    if data != "-" and not path.exists() and data in datasets.names():
        for option, value in (("--label", label), ("--id", id_column), ("--columns", columns), ("--drop", drop)):
            if value:
                usage_error(f"the built-in data set {data!r} knows its own columns and labels", option)
        return _builtin(datasets.load(data), novel, part, default_part, split_seed)
    if novel is not None or part is not None:
        usage_error(f"only built-in data sets have classes and parts; {data} is a file", "--novel/--part")
    if data == "-":
        path = _spool_standard_input(stack)
    elif not path.exists():
        from rvae_fast.datasets.types import nearest_name

        fail(f"{data}: no such file, and no built-in data set of that name{nearest_name(data, datasets.names())}")
    options: dict[str, Any] = {"label": label, "id": id_column, "drop": tuple(drop), "key": key, **(csv or {})}
    options["columns"] = list(columns) or None
    if data == "-":
        options["format"] = "csv"
    return Source("standard input" if data == "-" else data, path, labelled=label is not None, options=options)


def _builtin(dataset: Dataset, novel: str | None, part: str | None, default_part: str, seed: int) -> Source:
    import numpy as np

    from rvae_fast.datasets import anomaly_split, novelty_split

    X = dataset.scaled() if dataset.value_range is not None else dataset.X
    if dataset.is_image:
        if novel is None:
            if part not in (None, "all"):
                usage_error("say which class is the anomaly", "--novel")
            rows = np.arange(len(X))
            return Source(
                dataset.name, None, dataset.name, dataset.image_shape, arrays=(X, None, rows, dataset.feature_names)
            )
        split = novelty_split(X, dataset.y, dataset.class_index(novel), seed=seed)
        labels = (dataset.y == dataset.class_index(novel)).astype(np.int64)
        name = f"{dataset.name} (novel class {novel})"
    else:
        if novel is not None:
            usage_error(f"{dataset.name} says itself which rows are anomalies", "--novel")
        split = anomaly_split(X, dataset.y, seed=seed)
        labels, name = dataset.y, dataset.name
    part = part or default_part
    rows = np.arange(len(X)) if part == "all" else getattr(split, f"{part}_indices")
    return Source(
        name if part == "all" else f"{name}, {part} rows",
        dataset=dataset.name,
        image_shape=dataset.image_shape,
        labelled=True,
        arrays=(X[rows], labels[rows], rows, dataset.feature_names),
    )


def binary_labels(labels: Sequence[np.ndarray], anomaly_values: Sequence[str] | None) -> np.ndarray:
    """Join the labels of all chunks and turn them into 0 and 1."""
    import numpy as np

    from rvae_fast.datasets import anomaly_labels

    parts = list(labels)
    if len({part.dtype.kind in "biuf" for part in parts}) > 1:
        parts = [part.astype(str) for part in parts]
    return anomaly_labels(np.concatenate(parts), list(anomaly_values) if anomaly_values else None)


def normal_rows(X: np.ndarray, truth: np.ndarray, name: str) -> np.ndarray:
    """Return the rows that are not labelled anomalies; an error where all of them are."""
    if truth.all():
        fail(f"{name}: all of its {len(X):,} rows are labelled anomalies; normal ones are learnt from")
    return X[truth == 0]


def frame(X: np.ndarray, names: Sequence[str] | None) -> Any:
    """Give the columns of ``X`` their names, so that a detector's messages can use them; needs pandas, else ``X``."""
    if names is None:
        return X
    try:
        import pandas
    except ImportError:
        return X
    return pandas.DataFrame(X, columns=list(names), copy=False)


def parse_shape(text: str | None) -> tuple[int, ...] | None:
    """Read ``28x28`` or ``32x32x3``."""
    if text is None:
        return None
    try:
        shape = tuple(int(side) for side in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) not in (2, 3) or min(shape, default=0) < 1:
        usage_error(f"{text!r} is not of the form 28x28 or 32x32x3", "--image-shape")
    if len(shape) == 3 and shape[2] not in (1, 3):
        usage_error(f"{text!r} has {shape[2]} channels, expected 1 or 3, and them last: 32x32x3", "--image-shape")
    return shape
