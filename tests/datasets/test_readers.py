"""`read_table` and `iter_table`: the same rows from every format, and errors that name file, column, value and line."""

from __future__ import annotations

import gzip
import os
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest

from rvae_fast.datasets import TableError, iter_table, read_table
from rvae_fast.datasets import csv_layout as csv_module
from rvae_fast.datasets.formats import encode_idx

pa = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")

ROWS = np.random.default_rng(0).normal(size=(1003, 4))
NAMES = ("a", "b", "c", "d")


@pytest.fixture(params=["csv", "csv.gz", "tsv", "parquet", "npy", "npz", "idx"])
def table_file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The same rows in every format."""
    path = tmp_path / f"t.{request.param}"
    if "sv" in request.param:
        delimiter = "\t" if request.param == "tsv" else ","
        lines = [delimiter.join(NAMES), *(delimiter.join(map(repr, row)) for row in ROWS.tolist())]
        content = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(content) if request.param.endswith("gz") else content)
    elif request.param == "parquet":
        parquet.write_table(pa.table(dict(zip(NAMES, ROWS.T, strict=True))), path, row_group_size=100)
    elif request.param == "npy":
        np.save(path, ROWS)
    elif request.param == "npz":
        np.savez(path, X=ROWS, columns=np.array(NAMES))
    else:
        path.write_bytes(encode_idx(ROWS))
    return path


def test_every_format_gives_the_same_rows(table_file: Path) -> None:
    table = read_table(table_file)
    np.testing.assert_array_equal(table.X, ROWS)
    named = table_file.suffix not in (".npy", ".idx")
    assert table.columns == (NAMES if named else ("x0", "x1", "x2", "x3"))
    assert (table.ids, table.labels, len(table)) == (None, None, 1003)
    np.testing.assert_array_equal(table.row_ids(), np.arange(1003))


@pytest.mark.parametrize("chunk_rows", [1, 100, 333, 1003, 5000])
def test_chunks_join_to_the_table(table_file: Path, chunk_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "BLOCK_BYTES", 4096)  # several blocks, their ends away from those of chunks
    chunks = list(iter_table(table_file, chunk_rows))
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk_rows] * (len(chunks) - 1)
    assert [chunk.start for chunk in chunks] == list(range(0, 1003, chunk_rows))
    np.testing.assert_array_equal(np.concatenate([chunk.X for chunk in chunks]), ROWS)
    np.testing.assert_array_equal(np.concatenate([chunk.row_ids() for chunk in chunks]), np.arange(1003))


def test_columns_are_chosen_by_name_in_the_order_asked_for(table_file: Path) -> None:
    first, third = ("a", "c") if table_file.suffix not in (".npy", ".idx") else ("x0", "x2")
    table = read_table(table_file, columns=[third, first])
    assert table.columns == (third, first)
    np.testing.assert_array_equal(table.X, ROWS[:, [2, 0]])
    table = read_table(table_file, drop=[first], label=third)
    np.testing.assert_array_equal(table.X, ROWS[:, [1, 3]])
    np.testing.assert_array_equal(table.labels, ROWS[:, 2])


def test_missing_column_suggests_the_nearest_name(table_file: Path) -> None:
    wrong, right = ("A", "a") if table_file.suffix not in (".npy", ".idx") else ("X0", "x0")
    for arguments in ({"columns": [wrong]}, {"label": wrong}, {"id": wrong}, {"drop": [wrong]}):
        argument = next(iter(arguments))
        with pytest.raises(TableError, match=rf"{argument} '{wrong}' is not a column \(did you mean '{right}'\?\)"):
            read_table(table_file, **arguments)  # type: ignore[arg-type]
        with pytest.raises(TableError, match="is not a column"):
            iter_table(table_file, **arguments)  # type: ignore[arg-type]  # at once, not at the first chunk


def write(tmp_path: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_parquet_types(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    table = pa.table(
        {
            "i": pa.array([1, None, 2**60], pa.int64()),
            "b": pa.array([True, False, None]),
            "d": pa.array([Decimal(1), Decimal(2), Decimal(3)], pa.decimal128(5, 2)),
            "e": pa.array([1.5, 2.5, 1.5]).dictionary_encode(),
            "n": pa.nulls(3),
            "t": ["x", "y", "z"],
        }
    )
    parquet.write_table(table, path)
    read = read_table(path, id="t")
    np.testing.assert_array_equal(
        read.X, [[1, 1, 1, 1.5, np.nan], [np.nan, 0, 2, 2.5, np.nan], [2.0**60, np.nan, 3, 1.5, np.nan]]
    )
    assert read.ids is not None
    assert read.ids.tolist() == ["x", "y", "z"]
    with pytest.raises(TableError, match=r"not numeric: 't' \(string, first 'x', row 0\); leave them out"):
        read_table(path)
    with pytest.raises(TableError, match="label 'i' has no value in row 1"):
        read_table(path, label="i", columns=["b"])
    parquet.write_table(pa.table({"f": pa.array([1, 2], pa.float32()), "y": ["0", "1"]}), path)
    read = read_table(path, label="y")
    assert read.X.dtype == np.float32
    assert read.labels is not None
    assert read.labels.tolist() == [0, 1]
    parquet.write_table(pa.table({"f": pa.array([], pa.float32())}), path)
    with pytest.raises(TableError, match="no rows"):
        read_table(path)


def test_parquet_ids_are_exact_and_of_one_type(tmp_path: Path) -> None:
    big = 2**53 + 1  # no float64
    path = tmp_path / "t.parquet"
    ids = [big + row for row in range(8)]
    for columns, place in (({}, 5), ({"nested": [{"p": 1, "q": 2}] * 8}, 5), ({}, None)):
        some = [None if row == place else one for row, one in enumerate(ids)]
        table = pa.table({**columns, "serial": pa.array(some, pa.int64()), "a": np.arange(8.0)})
        parquet.write_table(table, path, row_group_size=2)
        chunks = list(iter_table(path, 2, id="serial", columns=["a"]))
        read = [chunk.ids for chunk in chunks if chunk.ids is not None]
        assert [one for part in read for one in part.tolist()] == some
        assert len({part.dtype for part in read}) == 1
        whole = read_table(path, id="serial", columns=["a"]).ids
        assert whole is not None
        assert whole.tolist() == some
    assert whole.dtype == np.int64  # an array of numbers where there are no nulls


def test_the_index_that_pandas_wrote_is_no_feature(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"a": [1.0, 2, 3], "b": [4.0, 5, 6]})
    path = tmp_path / "t.parquet"
    for index, name in (([2, 0, 1], "__index_level_0__"), (pandas.Index([7, 8, 9], name="serial"), "serial")):
        frame.set_axis(index, axis=0).to_parquet(path)
        assert read_table(path).columns == ("a", "b")
        read = read_table(path, columns=["a", name], id="b")
        assert read.X[:, 1].tolist() == list(index)
        read = read_table(path, id=name)
        assert read.ids is not None
        assert (read.columns, read.ids.tolist()) == (("a", "b"), list(index))
        assert read_table(path, drop=[name, "a"]).columns == ("b",)
    frame.to_parquet(path)  # a range is no column
    assert read_table(path).columns == ("a", "b")
    for foreign in (b"no json", b"[]", b"{}", b'{"index_columns": null}'):
        parquet.write_table(pa.table({"a": [1.0]}).replace_schema_metadata({b"pandas": foreign}), path)
        assert read_table(path).columns == ("a",)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    parquet.write_table(pa.table({"a": np.random.default_rng(0).normal(size=5000)}), path)
    content = path.read_bytes()
    middle = len(content) // 2
    broken = bytearray(content)
    broken[4:60] = b"\xff" * 56
    for damaged in (b"junk", content[:middle], content[4:], bytes(broken)):
        with pytest.raises(TableError, match=r"t.parquet: "):
            read_table(write(tmp_path, damaged, "t.parquet"))


def test_npy_is_mapped_and_images_are_flattened(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    images = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    np.save(path, images)
    table = read_table(path)
    assert table.X.dtype == np.uint8
    np.testing.assert_array_equal(table.X, images.reshape(7, -1))
    assert isinstance(table.X, np.memmap)
    assert not table.X.flags.writeable


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3), r"shape \(3,\), expected rows"),
        (np.zeros((0, 3)), "the array is empty"),
        (np.array([["a"]]), "holds <U1, expected numbers"),
        (np.zeros((2, 2), dtype=complex), "holds complex128"),
    ],
)
def test_arrays_that_are_not_rows(tmp_path: Path, array: np.ndarray, message: str) -> None:
    np.save(tmp_path / "t.npy", array)
    np.savez(tmp_path / "t.npz", X=array)
    for name in ("t.npy", "t.npz"):
        with pytest.raises(TableError, match=message):
            read_table(tmp_path / name)


class Trap:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_pickles_are_never_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "ran"
    array = np.array([[Trap(trap)]], dtype=object)
    np.save(tmp_path / "t.npy", array, allow_pickle=True)
    np.savez(tmp_path / "t.npz", X=array)
    for name in ("t.npy", "t.npz"):
        with pytest.raises(TableError, match=r"(?i)object"):
            read_table(tmp_path / name)
    assert not trap.exists()


def test_damaged_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", ROWS)
    np.savez_compressed(tmp_path / "whole.npz", X=ROWS)
    for kind in ("npy", "npz"):
        content = (tmp_path / f"whole.{kind}").read_bytes()
        for damaged in (content[:-100], content[:50], b"junk", content[:5]):
            with pytest.raises(TableError, match=rf"t.{kind}: "):
                read_table(write(tmp_path, damaged, f"t.{kind}"))
    with pytest.raises(TableError, match=r"t.idx: not an idx file"):
        read_table(write(tmp_path, b"junk", "t.idx"))


def test_npz_arrays_are_found(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    np.savez(path, pixels=ROWS, y=np.arange(1003), name=np.array(["r"] * 1003), short=np.arange(5))
    table = read_table(path, label="y", id="name")
    np.testing.assert_array_equal(table.X, ROWS)
    assert table.labels is not None
    assert table.labels[-1] == 1002
    assert table.row_ids()[0] == "r"
    chunk = list(iter_table(path, 1000, label="y"))[1]
    assert chunk.labels is not None
    assert chunk.labels.tolist() == [1000, 1001, 1002]
    with pytest.raises(TableError, match=r"'short' has shape \(5,\), expected one value a row"):
        read_table(path, label="short")
    with pytest.raises(TableError, match="no array 'Z' in it; it has pixels, y"):
        read_table(path, key="Z")
    np.savez(path, first=ROWS, second=ROWS[:, :2])
    with pytest.raises(TableError, match="which array holds the rows"):
        read_table(path)
    assert read_table(path, key="second").X.shape == (1003, 2)
    np.savez(path, X=ROWS, columns=np.array(["a"]))
    with pytest.raises(TableError, match="1 feature names for 4 columns"):
        read_table(path)


def test_idx_images_with_labels_beside_them(tmp_path: Path) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    path = write(tmp_path, gzip.compress(encode_idx(images)), "train-images-idx3-ubyte.gz")
    labels = write(tmp_path, encode_idx(np.array([4, 5], dtype=np.uint8)), "train-labels-idx1-ubyte")
    table = read_table(path, label=str(labels))
    np.testing.assert_array_equal(table.X, images.reshape(2, 12))
    assert table.labels is not None
    assert table.labels.tolist() == [4, 5]


def test_paths_and_arguments(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_table(tmp_path / "absent.csv")
    with pytest.raises(TableError, match="a folder, expected a file"):
        read_table(tmp_path)
    path = write(tmp_path, "a,b\n1,2\n", "t.data")
    with pytest.raises(TableError, match=r"cannot tell the format from the name; expected \.csv"):
        read_table(path)
    assert read_table(path, format="csv").X.tolist() == [[1, 2]]
    with pytest.raises(ValueError, match="format: expected one of csv, parquet"):
        read_table(path, format="excel")
    for chunk_rows in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="chunk_rows: expected a positive integer"):
            iter_table(path, chunk_rows, format="csv")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="columns: expected a sequence of column names, got the text 'a'"):
        read_table(path, columns="a", format="csv")
    with pytest.raises(ValueError, match="columns: expected at least one"):
        read_table(path, columns=[], format="csv")


@pytest.mark.parametrize("name", ["t.csv", "t.parquet"])
def test_without_pyarrow_the_error_says_what_to_install(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.csv", None)
    with pytest.raises(ImportError, match=r"pip install 'rvae-fast\[data\]'"):
        read_table(write(tmp_path, "a\n1\n", name))


def test_chunks_of_a_mapped_array_read_only_their_rows(tmp_path: Path) -> None:
    """64 GB that the disk does not hold: whoever reads them whole is out of memory."""
    path = tmp_path / "t.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (2**24, 1024)}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + 2**24 * 1024 * 4)  # a hole, but for the sixth row
        file.seek(start + 5 * 1024 * 4)
        file.write(np.arange(1024, dtype="<f4").tobytes())
    chunk = next(iter_table(path, 10, drop=["x0"], label="x7", id="x9"))
    assert chunk.X.shape == (10, 1021)
    assert chunk.X[5, :3].tolist() == [1, 2, 3]
    assert chunk.labels is not None
    assert chunk.labels[5] == 7
    assert chunk.row_ids()[5] == 9
