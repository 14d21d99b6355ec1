"""CSV as people write it, and the files that are refused: by line, column and value."""

from __future__ import annotations

import bz2
import gzip
from pathlib import Path

import numpy as np
import pytest

from rvae_fast.datasets import TableError, iter_table, read_table
from rvae_fast.datasets import csv_layout as csv_module

pytest.importorskip("pyarrow", reason="pyarrow is not installed")


def write(tmp_path: Path, content: str | bytes, name: str = "t.csv") -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_csv_ids_labels_and_missing_values(tmp_path: Path) -> None:
    path = write(tmp_path, 'id,a,y,b\n007,1,0,\n"x,1",NA,1, 2.5 \n008,-inf,0,?\n')
    table = read_table(path, id="id", label="y")
    assert table.ids is not None
    assert table.labels is not None
    assert table.ids.tolist() == ["007", "x,1", "008"]
    assert table.labels.tolist() == [0, 1, 0]
    np.testing.assert_array_equal(table.X, [[1, np.nan], [np.nan, 2.5], [-np.inf, np.nan]])
    assert table.columns == ("a", "b")
    assert table.row_ids() is table.ids


@pytest.mark.parametrize(
    ("content", "arguments", "columns", "X"),
    [
        ("1,2\n3,4\n", {}, ("x0", "x1"), [[1, 2], [3, 4]]),  # no names
        ("1,2\n3,4\n", {"header": True}, ("1", "2"), [[3, 4]]),
        (",a\n0,5\n", {}, ("a",), [[5]]),  # an index that pandas wrote
        (",a\n0,5\n", {"columns": ["unnamed0", "a"]}, ("unnamed0", "a"), [[0, 5]]),  # asked for
        ("\n0\n5\n", {}, ("x0",), [[0], [5]]),
        ("0,1,2\n3,4,5\n", {}, ("0", "1", "2"), [[3, 4, 5]]),  # as pandas names columns without names
        ("0,1\n3,4\n", {}, ("0", "1"), [[3, 4]]),
        ("1,2,3\n3,4,5\n", {}, ("1", "2", "3"), [[3, 4, 5]]),
        (",0,1\n0,3,4\n", {}, ("0", "1"), [[3, 4]]),
        ("0,1,2\n3,4,5\n", {"header": False}, ("x0", "x1", "x2"), [[0, 1, 2], [3, 4, 5]]),
        ("0,2,1\n3,4,5\n", {}, ("x0", "x1", "x2"), [[0, 2, 1], [3, 4, 5]]),
        ("0.0,1.0\n3,4\n", {}, ("x0", "x1"), [[0, 1], [3, 4]]),
        ("5,,7\n1,2,3\n", {}, ("x0", "x1", "x2"), [[5, np.nan, 7], [1, 2, 3]]),  # a missing value is no name
        ("5,NA,7\n1,2,3\n", {}, ("x0", "x1", "x2"), [[5, np.nan, 7], [1, 2, 3]]),
        ("?,true,7\n1,false,3\n", {}, ("x0", "x1", "x2"), [[np.nan, 1, 7], [1, 0, 3]]),
        ("NA\n1\n2\n", {}, ("NA",), [[1], [2]]),  # nor is it a row without a number
        ("a,b,\n1,2,\n3,4, \n", {}, ("a", "b"), [[1, 2], [3, 4]]),  # a comma at the end of every line
        ("a,b,,\n1,2,,\n", {}, ("a", "b"), [[1, 2]]),
        ("1,2,\n3,4,\n", {}, ("x0", "x1"), [[1, 2], [3, 4]]),
        ("a,b,\n1,2,3\n", {}, ("a", "b", "unnamed2"), [[1, 2, 3]]),
        ("a, C;b, bar;c, l;d\n1;2;3;4\n", {}, ("a, C", "b, bar", "c, l", "d"), [[1, 2, 3, 4]]),
        ("a;b;c\n1,5;2,5;3\n", {"decimal": ","}, ("a", "b", "c"), [[1.5, 2.5, 3]]),
        ("a;b\n1,5;2\n", {"decimal": ","}, ("a", "b"), [[1.5, 2]]),
        ("a|b\n1|2\n", {}, ("a", "b"), [[1, 2]]),
        ("a,b\nTrue,1\nFalse,2\n?,3\n", {}, ("a", "b"), [[1, 1], [0, 2], [np.nan, 3]]),  # as Python writes them
        ("a,b\nTRUE,1\n0, 2\n FALSE,NA\n", {}, ("a", "b"), [[1, 1], [0, 2], [0, np.nan]]),
        ("true,1\nfalse,2\n", {}, ("x0", "x1"), [[1, 1], [0, 2]]),
        ("a\n1\n2\n", {}, ("a",), [[1], [2]]),
        ("\n\na,b\r\n\r\n1,2\r\n", {}, ("a", "b"), [[1, 2]]),  # blank lines, CRLF
        ('a,"b\nc"\n1,2\n', {}, ("a", "b\nc"), [[1, 2]]),  # a name of two lines
        ('a,"b,c"\n1,"2"', {}, ("a", "b,c"), [[1, 2]]),  # no newline at the end
        (" a , b \n1,2\n", {}, ("a", "b"), [[1, 2]]),
    ],
)
def test_csv_as_people_write_it(tmp_path: Path, content: str, arguments: dict, columns: tuple, X: list) -> None:
    table = read_table(write(tmp_path, content), **arguments)
    assert table.columns == columns
    np.testing.assert_array_equal(table.X, X)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252"])
def test_csv_encodings(tmp_path: Path, encoding: str) -> None:
    path = write(tmp_path, "größe,id\n1,é\n".encode(encoding))
    table = read_table(path, id="id")
    assert (table.columns, table.X.tolist()) == (("größe",), [[1]])
    assert table.ids is not None
    assert table.ids.tolist() == ["é"]
    explicit = read_table(path, id="id", encoding=encoding)
    assert explicit.ids is not None
    assert explicit.ids.tolist() == ["é"]


def test_csv_that_mixes_encodings(tmp_path: Path) -> None:
    path = write(tmp_path, "größe,id\n1,é\n".encode() + "2,è\n".encode("latin-1") + b"3,\xff\xfe\n")
    table = read_table(path, id="id")
    assert table.columns == ("größe",)
    assert table.ids is not None
    assert table.ids.tolist() == ["é", "è", "ÿþ"]
    assert table.X.tolist() == [[1], [2], [3]]
    with pytest.raises(ValueError, match="encoding: unknown encoding 'utf-9'"):
        read_table(path, encoding="utf-9")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("delimiter", value) for value in ("", "ab", "\n", '"', "é", 9, ".")],
        *[("decimal", value) for value in ("", ";", ",,", None)],
        *[("header", value) for value in (0, "no", "infer")],
        ("encoding", 8),
    ],
)
def test_what_a_file_cannot_be_is_named(name: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n1,2\n")
    for read in (read_table, lambda path, **given: list(iter_table(path, **given))):
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            read(path, **{name: value})


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ("a,b\n1,2\n3\n", {}, "line 3 has 1 values, expected 2"),
        ("a,b\n1,2\n\n3,4,5\n", {}, "line 4 has 3 values, expected 2"),
        (
            "a,b,c\n1,x,2\n3,4,z\n",
            {},
            r"not numeric: 'b' \(first 'x', line 2\), 'c' \(first 'z', line 3\); leave them out",
        ),
        ('a,id\n1,"two\nlines"\nred,3\n', {"id": "id"}, r"not numeric: 'a' \(first 'red', line 4\)"),
        ("1,2\n3,four\n", {}, r"'x1' \(first 'four', line 2\)"),
        ("a,b\n1,TrUe\n", {}, r"'b' \(first 'TrUe', line 2\)"),
        ("a,b\n1,true\n2,maybe\n", {}, r"'b' \(first 'true', line 2, in a column"),
        ("a,b\n1,true\n2,false\n3,0.5\n", {}, r"'b' \(first 'true', line 2, in a column whose beginning is not true"),
        ("a,b\n1,1_000\n", {}, r"'b' \(first '1_000', line 2\)"),
        ("a,b\n1,2.5\n", {"decimal": ","}, r"'b' \(first '2.5', line 2\)"),
        ("", {}, "the file is empty"),
        ("\n \n", {}, "the file is empty"),
        ("a,b\n", {}, "column names but no rows"),
        ("a,y\n1,0\n2,\n", {"label": "y"}, "label 'y' has no value in data row 2"),
        ("a,b,a\n1,2,3\n", {}, "columns that occur twice: 'a'"),
        ("a,b\n1,2\n", {"columns": ["a", "b"], "label": "b"}, "'b' is both in columns and the label"),
        ("a,b\n1,2\n", {"drop": ["a"], "id": "b"}, "no feature columns are left of 'a', 'b'"),
        ("a,b\n1,2\n", {"columns": ["a", "a"]}, "columns names a column twice"),
        (b"\0\1\2\3,4\n", {}, "not a text file"),
    ],
)
def test_csv_errors(tmp_path: Path, content: str | bytes, arguments: dict, message: str) -> None:
    path = write(tmp_path, content)
    with pytest.raises(TableError, match=f"t.csv: .*{message}"):
        read_table(path, **arguments)
    with pytest.raises(ValueError, match=message):
        list(iter_table(path, 1, **arguments))


def test_a_value_in_a_column_that_seemed_empty_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "HEAD_BYTES", 256)
    monkeypatch.setattr(csv_module, "BLOCK_BYTES", 1024)
    path = write(tmp_path, "a,b,\n" + "1,2,\n" * 2000 + "1,2,3\n")
    with pytest.raises(TableError, match=r"'unnamed2' has no name and no value at first, but '3' in data row 2001"):
        read_table(path)
    assert read_table(path, columns=["a", "unnamed2"]).X[-1].tolist() == [1, 3]
    assert read_table(path, drop=["unnamed2"]).columns == ("a", "b")


def test_the_delimiter_that_was_guessed_is_named_in_errors(tmp_path: Path) -> None:
    path = write(tmp_path, "a,b\n1,2\n3\n")
    with pytest.raises(TableError, match=r"expected 2 \(separated by ','; delimiter= says another\)"):
        read_table(path)
    with pytest.raises(TableError, match=r"expected 2$"):
        read_table(path, delimiter=",")
    path = write(tmp_path, "a,b\n1:2;3,4\n5,6\n")
    with pytest.raises(TableError, match=r"these are values \(separated by ','; delimiter= says another\)"):
        read_table(path)


def test_csv_bad_value_far_down_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "BLOCK_BYTES", 1024)
    path = write(tmp_path, "a,b\n" + "1,2\n" * 5000 + "1,oops\n" + "1,2\n" * 10)
    with pytest.raises(TableError, match=r"'b' \(first 'oops', line 5002\)"):
        read_table(path)
    chunks = iter_table(path, 100)
    assert len(next(chunks)) == 100  # the rows before it are read
    with pytest.raises(TableError, match="line 5002"):
        list(chunks)


def test_many_bad_columns_are_counted(tmp_path: Path) -> None:
    names = ",".join(f"c{i}" for i in range(9))
    with pytest.raises(TableError, match=r"'c4' \(first 'x', line 2\) and 4 more; leave"):
        read_table(write(tmp_path, names + "\n" + ",".join("x" * 9) + "\n"))


def test_label_types(tmp_path: Path) -> None:
    rows = "a,y\n1,{}\n2,{}\n"
    for texts, dtype in ((("0", "1"), "i"), (("0.5", "1"), "f"), (("no", "yes"), "U"), (("1", "yes"), "U")):
        table = read_table(write(tmp_path, rows.format(*texts)), label="y")
        assert table.labels is not None
        assert table.labels.dtype.kind == dtype
    # blocks of numbers and blocks of texts join as texts
    path = write(tmp_path, "a,y\n" + "1,0\n" * 2000 + "1,x\n")
    csv_block, csv_module.BLOCK_BYTES = csv_module.BLOCK_BYTES, 1024
    try:
        table = read_table(path, label="y")
    finally:
        csv_module.BLOCK_BYTES = csv_block
    assert table.labels is not None
    assert (table.labels[0], table.labels[-1]) == ("0", "x")


@pytest.mark.parametrize(("name", "squeeze"), [("t.csv.gz", gzip.compress), ("t.csv.bz2", bz2.compress)])
def test_damaged_compression(tmp_path: Path, name: str, squeeze, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(csv_module, "HEAD_BYTES", 4096)  # the damage is past the part that is looked at first
    content = squeeze(b"a,b\n" + b"".join(b"%d,%d\n" % (i, i * i) for i in range(90_000)))
    assert len(read_table(write(tmp_path, content, name))) == 90_000
    for damaged in (content[: len(content) * 2 // 3], content[:30], b"not compressed"):
        with pytest.raises(TableError, match="damaged"):
            read_table(write(tmp_path, damaged, name))


@pytest.mark.parametrize("name", ["T.CSV.GZ", "t.csv.Bz2"])
def test_compression_by_a_name_in_capitals(tmp_path: Path, name: str) -> None:
    squeeze = gzip.compress if name.endswith("GZ") else bz2.compress
    assert read_table(write(tmp_path, squeeze(b"a,b\n1,2\n"), name)).X.tolist() == [[1, 2]]


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ('a,b\n1,2\n3,"4\n', r"line 3 cannot be read .*is a quote in it not closed\?"),
        ('a,b,\n1,"2,\n', r"cannot be read as CSV .*is a quote at its beginning not closed\?"),
        ('a,"b\n', r"cannot be read as CSV .*is a quote at its beginning not closed\?"),
    ],
)
def test_a_quote_that_is_not_closed(start: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TableError, match=message):
        read_table(write(tmp_path, start + "1,2\n" * 50_000))


def test_texts_of_several_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "BLOCK_BYTES", 256)  # blocks end inside texts
    path = write(tmp_path, "id,a\n" + "".join(f'"first {row}\nsecond",{row}\n' for row in range(200)))
    table = read_table(path, id="id")
    np.testing.assert_array_equal(table.X[:, 0], np.arange(200))
    assert table.ids is not None
    assert table.ids[-1] == "first 199\nsecond"


def test_utf_16_errors_name_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, "größe,b\n1,2\n3,drei\n".encode("utf-16"))
    with pytest.raises(TableError, match=r"'b' \(first 'drei', line 3\)"):
        read_table(path)


def test_header_longer_than_the_first_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "HEAD_BYTES", 64)
    names = tuple(f"column_{index}" for index in range(500))
    path = write(tmp_path, ",".join(names) + "\n" + ",".join("7" * 500) + "\n")
    table = read_table(path)
    assert table.columns == names
    np.testing.assert_array_equal(table.X, np.full((1, 500), 7.0))


def test_rows_longer_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "BLOCK_BYTES", 1024)
    X = np.random.default_rng(0).normal(size=(50, 300))  # about 6,000 characters a row
    lines = [",".join(f"c{index}" for index in range(300)), *(",".join(map(repr, row)) for row in X.tolist())]
    np.testing.assert_array_equal(read_table(write(tmp_path, "\n".join(lines))).X, X)


def test_a_value_that_is_not_boolean_after_many_that_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_module, "HEAD_BYTES", 256)
    path = write(tmp_path, "a,b\n" + "1,true\n" * 100 + "2,0.5\n")
    message = r"'b' \(first '0.5', line 102, after true and false alone\); leave them"  # a comma would not help
    with pytest.raises(TableError, match=message):
        read_table(path)
