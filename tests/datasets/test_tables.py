"""Labels as 0 and 1, and scores written beside the ids of their rows."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pytest

from rvae_fast.datasets import anomaly_labels, read_table, write_scores
from rvae_fast.datasets import writers as writers_module

SCORES = np.array([0.1, 1e-300, 123456.789012345678, np.pi])
IDS = ["007", "b,c", 'd"e', "é"]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 1], [0, 1, 1]),
        ([0.0, 1.0], [0, 1]),
        ([True, False], [1, 0]),
        ([1, -1, 1], [0, 1, 0]),
        ([1, 1], [1, 1]),
        ([0, 0], [0, 0]),
        (["Normal", "ANOMALY"], [0, 1]),
        (np.array(["inlier", "outlier"], dtype=object), [0, 1]),
    ],
)
def test_plain_labels(labels, expected: list[int]) -> None:  # type: ignore[no-untyped-def]
    marks = anomaly_labels(labels)
    assert marks.tolist() == expected
    assert marks.dtype == np.int64


def test_labels_whose_meaning_is_given() -> None:
    assert anomaly_labels(["x", "y", "z"], anomaly="y").tolist() == [0, 1, 0]
    assert anomaly_labels([3, 4, 5], anomaly=[3, 5]).tolist() == [1, 0, 1]
    assert anomaly_labels([3, 4, 5], anomaly="4").tolist() == [0, 1, 0]  # as typed on a command line
    assert anomaly_labels([0, 1], anomaly=0).tolist() == [1, 0]
    assert anomaly_labels([0.0, 2.0, np.nan], anomaly="2").tolist() == [0, 1, 0]
    assert anomaly_labels([0, 2], anomaly=["2.0", 0.0]).tolist() == [1, 1]
    assert anomaly_labels([2**53, 2**53 + 1], anomaly=str(2**53 + 1)).tolist() == [0, 1]
    assert anomaly_labels(["2.0", "2"], anomaly="2").tolist() == [0, 1]  # texts are texts
    assert anomaly_labels([True, False], anomaly="False").tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"anomaly: 'q' is not among the labels; they are \['x', 'y'\]"):
        anomaly_labels(["x", "y"], anomaly="q")


@pytest.mark.parametrize("labels", [["x", "y"], [0, 1, 2], [0.5, 1.0]])
def test_labels_whose_meaning_is_not_plain(labels: list) -> None:
    with pytest.raises(ValueError, match=r"cannot tell which of .* mean anomaly; say so with anomaly="):
        anomaly_labels(labels)
    with pytest.raises(ValueError, match="at least one row"):
        anomaly_labels([])


@pytest.mark.parametrize("name", ["s.csv", "s.csv.gz", "s.tsv", "s.parquet", "s.npz"])
def test_scores_read_back_exactly(tmp_path: Path, name: str) -> None:
    pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    path = tmp_path / "deep" / name
    extra = {"kld": SCORES[::-1]}
    assert write_scores(path, IDS, SCORES, SCORES > 1, extra=extra) == path
    arguments = {"key": "score"} if name.endswith("npz") else {"id": "id", "label": "anomaly"}
    if name.endswith("npz"):
        with np.load(path, allow_pickle=False) as stored:
            read = {key: stored[key] for key in stored.files}
        ids, scores, kld, flags = read["id"], read["score"], read["kld"], read["anomaly"]
    else:
        table = read_table(path, **arguments)  # type: ignore[arg-type]
        assert table.columns == ("score", "kld")
        assert table.ids is not None
        assert table.labels is not None
        ids, scores, kld, flags = table.ids, table.X[:, 0], table.X[:, 1], table.labels
    assert list(ids) == IDS
    np.testing.assert_array_equal(scores, SCORES)
    np.testing.assert_array_equal(kld, SCORES[::-1])
    assert flags.tolist() == [0, 0, 1, 1]
    assert sorted(file.name for file in path.parent.iterdir()) == [name]


def test_without_flags_there_is_no_such_column(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.csv", np.arange(2), [0.5, 2])
    assert path.read_text() == "id,score\n0,0.5\n1,2.0\n"


def test_object_ids_need_no_pickle(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.npz", np.array(["a", 2], dtype=object), [1, 2])
    with np.load(path, allow_pickle=False) as stored:
        assert stored["id"].tolist() == ["a", "2"]


@pytest.mark.parametrize("kind", ["csv", "npz", "parquet"])
def test_times_are_times_and_what_is_missing_is_empty(kind: str, tmp_path: Path) -> None:
    times, names = np.array(["2026-11-28T06", "NaT"], dtype="M8[ns]"), np.array(["a", None], dtype=object)
    path = write_scores(tmp_path / f"s.{kind}", times, [1.0, 2.0], extra={"name": names})
    if kind == "parquet":
        found = pytest.importorskip("pyarrow.parquet").read_table(path).to_pydict()
        assert [None if one is None else one.isoformat() for one in found["id"]] == ["2026-11-28T06:00:00", None]
        assert found["name"] == ["a", None]
        return
    if kind == "csv":
        rows = [line.split(",") for line in path.read_text().splitlines()[1:]]
        ids, found_names = [row[0] for row in rows], [row[2] for row in rows]
    else:
        with np.load(path, allow_pickle=False) as stored:
            ids, found_names = stored["id"].tolist(), stored["name"].tolist()
    assert ids == ["2026-11-28T06:00:00.000000000", ""]
    assert found_names == ["a", ""]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_scores(tmp_path / "s.csv", [1], [2.0])
    before = path.read_text()

    def full(temporary: Path, *_: object) -> None:
        temporary.write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(writers_module, "_write_csv", full)
    with pytest.raises(OSError, match="no space"):
        write_scores(path, [1, 2], [2.0, 3.0])
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ids": [1]}, r"id: expected one value a row, shape \(2,\), got \(1,\)"),
        ({"flags": [0, 2]}, r"flags: expected 0 .* got \[0, 2\]"),
        ({"flags": [1, -1]}, r"got \[-1, 1\]"),
        ({"extra": {"score": [1, 2]}}, "the column name 'score' is taken"),
        ({"extra": {"z": [1]}}, "z: expected one value a row"),
        ({"path": "s.npy"}, "scores are written as .csv"),
        ({"path": "s.csv.bz2"}, "written as .gz"),
        ({"path": "s.parquet.gz"}, "scores are written as .csv"),
        ({"path": "s.xlsx"}, "cannot tell the format"),
    ],
)
def test_write_scores_refuses(tmp_path: Path, arguments: dict, message: str) -> None:
    full = {"ids": [1, 2], "scores": [0.5, 0.6], **arguments}
    path = tmp_path / str(full.pop("path", "s.csv"))
    with pytest.raises(ValueError, match=message):
        write_scores(path, **full)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_file_is_kept_on_request(tmp_path: Path) -> None:
    path = write_scores(tmp_path / "s.npz", [1], [2.0])
    assert zipfile.is_zipfile(path)
    with pytest.raises(FileExistsError, match="the file exists"):
        write_scores(path, [1], [3.0], overwrite=False)
