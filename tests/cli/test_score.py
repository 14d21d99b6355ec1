"""``rvae-fast score``: scores beside their ids, in any format and chunk size, and exit statuses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.serialization import load
from tests.cli.conftest import COLUMNS, make_rows, parse, write_csv

Run = Callable[..., Any]


def test_scores_go_to_standard_output_with_their_ids(model: Path, table: Path, expected: np.ndarray, run: Run) -> None:
    result = run("score", model, table, "--id", "serial")
    ids, scores, flags = parse(result.stdout)
    assert ids == [f"{i:05d}" for i in range(240)]
    assert scores.tolist() == expected.tolist()
    assert flags.tolist() == (expected > load(model).threshold_).astype(int).tolist()
    assert f"{flags.sum()} of 240 rows flagged" in result.stderr


@pytest.mark.parametrize("chunk", [1, 7, 239, 240, 10_000])
def test_chunks_equal_the_whole(chunk: int, model: Path, table: Path, expected: np.ndarray, run: Run) -> None:
    if chunk == 1:
        short = table.read_text().splitlines()[:20]
        ids, scores, _ = parse(run("score", model, "-", "--chunk-rows", 1, stdin="\n".join(short) + "\n").stdout)
        assert ids == [str(i) for i in range(19)]
        assert scores.tolist() == expected[:19].tolist()
        return
    ids, scores, _ = parse(run("score", model, table, "--chunk-rows", chunk, "--id", "serial").stdout)
    assert len(set(ids)) == 240
    assert scores.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", ["csv", "csv.gz", "tsv", "parquet", "npz"])
def test_output_formats(kind: str, model: Path, table: Path, expected: np.ndarray, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "sub" / f"scores.{kind}"
    result = run("score", model, table, "--id", "serial", "--out", out, "--chunk-rows", 50)
    assert result.stdout == ""
    if kind == "npz":
        with np.load(out, allow_pickle=False) as file:
            ids, scores, flags = (file[name].tolist() for name in ("id", "score", "anomaly"))
    elif kind == "parquet":
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_parquet(out)
        ids, scores, flags = (frame[name].tolist() for name in ("id", "score", "anomaly"))
    else:
        pandas = pytest.importorskip("pandas")
        frame = pandas.read_csv(out, sep="\t" if kind == "tsv" else ",", dtype={"id": str})
        ids, scores, flags = (frame[name].tolist() for name in ("id", "score", "anomaly"))
    assert ids == [f"{i:05d}" for i in range(240)]
    assert scores == expected.tolist()
    assert set(flags) == {0, 1}
    assert [p.name for p in out.parent.iterdir()] == [out.name]


def test_a_name_in_capitals_is_compressed_too(model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    run("score", model, table, "-o", tmp_path / "S.TSV.GZ")
    assert gzip.decompress((tmp_path / "S.TSV.GZ").read_bytes()).startswith(b"id\tscore\tanomaly\n")
    for name in ("s.csv.BZ2", "s.parquet.gz", "s.npz.gz", "s.json"):  # none of them would be what its name says
        result = run("score", model, table, "-o", tmp_path / name, code=2)
        assert "scores are written as .csv, .tsv (also .gz), .parquet or .npz" in " ".join(result.stderr.split())


def test_columns_are_found_by_name(model: Path, tmp_path: Path, expected: np.ndarray, run: Run) -> None:
    X, _ = make_rows()
    lines = ["note,load,pressure,temp,flow"]
    lines += [f"hello,{d!r},{c!r},{a!r},{b!r}" for a, b, c, d in X.tolist()]
    path = tmp_path / "t.csv"
    path.write_text("\n".join(lines))
    assert parse(run("score", model, path).stdout)[1].tolist() == expected.tolist()


def test_arrays_go_by_position(model: Path, tmp_path: Path, expected: np.ndarray, run: Run) -> None:
    X, _ = make_rows()
    for name in ("t.npy", "t.npz"):
        np.save(tmp_path / name, X) if name == "t.npy" else np.savez(tmp_path / name, X=X)
        result = run("score", model, tmp_path / name)
        assert parse(result.stdout)[1].tolist() == expected.tolist()
        assert "warning" not in result.stderr


def test_a_csv_file_without_names_goes_by_position(model: Path, tmp_path: Path, expected: np.ndarray, run: Run) -> None:
    X, _ = make_rows()
    bare = tmp_path / "bare.csv"
    np.savetxt(bare, X, delimiter=",")
    np.testing.assert_allclose(parse(run("score", model, bare, "-q").stdout)[1], expected, rtol=1e-6)
    np.savetxt(bare, X[:, :3], delimiter=",")
    assert "3 features, but RVAEDetector is expecting 4" in run("score", model, bare, "-q", code=1).stderr


def test_a_csv_file_says_how_it_is_written(tmp_path: Path, run: Run) -> None:
    """Decimal commas and a header of years, by the commands that read rows."""
    X, labels = make_rows()
    text = "\n".join(["2021;2022;2023;2024;odd"] + [
        ";".join([*(f"{v:.6f}".replace(".", ",") for v in row), str(int(label))])
        for row, label in zip(X, labels, strict=True)
    ])  # fmt: skip
    path, out = tmp_path / "years.csv", tmp_path / "m.safetensors"
    path.write_bytes(text.replace("odd", "fällt").encode("cp1252"))
    written = ("--decimal", ",", "--header", "--encoding", "cp1252", "--label", "fällt")
    run("fit", path, *written, "--out", out, "--epochs", 1, "--layers", 3, "-q")
    assert load(out).feature_names_in_.tolist() == ["2021", "2022", "2023", "2024"]
    scores = parse(run("score", out, path, *written, "-q").stdout)[1]
    np.testing.assert_allclose(scores, -load(out).score_samples(np.round(X, 6)), rtol=1e-5)
    measured = json.loads(run("evaluate", out, path, *written, "-q", "--json").stdout)
    assert measured["rows"] == len(X)
    # Without them the names are a row of numbers, or the numbers are texts.
    said = run("score", out, path, "-q", code=1).stderr
    assert "columns that are not numeric: '2021'" in said
    assert "with --decimal , some would be" in said
    bare = tmp_path / "bare.csv"
    np.savetxt(bare, X, delimiter=",")
    by_place = parse(run("score", out, bare, "--no-header", "-q").stdout)[1]
    bare.write_text(bare.read_text().replace(",", ";").replace(".", ","))  # more commas in a line than separators
    np.testing.assert_array_equal(parse(run("score", out, bare, "--decimal", ",", "-q").stdout)[1], by_place)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--decimal", "x"), "must be . or , and not 'x'"),
        (("--delimiter", ",", "--decimal", ","), "is the decimal mark too"),
        (("--delimiter", "--"), "must be one character"),
        (("--delimiter", "é"), "must be one character of ASCII"),
        (("--encoding", "utf-9"), "no encoding 'utf-9' is known"),
    ],
    ids=["decimal", "both", "delimiter", "ascii", "encoding"],
)
def test_what_a_csv_file_cannot_be(options: tuple[str, ...], message: str, model: Path, table: Path, run: Run) -> None:
    assert message in " ".join(run("score", model, table, *options, code=2).stderr.split())


def test_standard_input(model: Path, table: Path, expected: np.ndarray, run: Run) -> None:
    result = run("score", model, "-", "--id", "serial", "-q", stdin=table.read_bytes())
    ids, scores, _ = parse(result.stdout)
    assert ids[:2] == ["00000", "00001"]
    assert scores.tolist() == expected.tolist()
    assert result.stderr == ""
    result = run("score", model, "-", stdin="temp,flow\n1,2\n", code=1)
    assert "standard input: the model's column 'pressure' is not in it" in result.stderr


def test_threshold_and_fail_on_anomaly(model: Path, table: Path, expected: np.ndarray, run: Run) -> None:
    cut = float(np.sort(expected)[-11])
    result = run("score", model, table, "--threshold", cut, "--fail-on-anomaly", code=3)
    assert parse(result.stdout)[2].sum() == 10  # the output is complete all the same
    run("score", model, table, "--threshold", expected.max(), "--fail-on-anomaly", code=0)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_threshold_is_a_finite_number(value: str, model: Path, table: Path, run: Run) -> None:
    for command in (("score",), ("evaluate", "--label", "faulty")):
        result = run(*command, model, table, "--id", "serial", "--threshold", value, code=2)
        assert f"must be a finite number, got {value}" in result.stderr


def test_json_summary(model: Path, table: Path, expected: np.ndarray, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "s.csv"
    summary = json.loads(run("score", model, table, "--id", "serial", "--json", "--out", out, "-q").stdout)
    assert summary["rows"] == 240
    assert summary["flagged"] == int((expected > summary["threshold"]).sum())
    assert summary["highest_score"] == expected.max()
    assert summary["highest_id"] == f"{int(expected.argmax()):05d}"
    assert summary["out"] == str(out)
    assert len(out.read_text().splitlines()) == 241
    assert json.loads(run("score", model, table, "--json", "-q").stdout)["out"] is None


def test_score_report_keeps_ids(model: Path, table: Path, expected: np.ndarray, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("jinja2")
    page = tmp_path / "r.html"
    run("score", model, table, "--id", "serial", "--report", page, "--chunk-rows", 17, "-q", "-o", tmp_path / "s.csv")
    text = page.read_text()
    assert f'<b class="id">{int(expected.argmax()):05d}</b>' in text
    assert "share of error" in text


def test_outputs_are_not_overwritten(model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    out = tmp_path / "s.csv"
    out.write_text("precious")
    assert "--force" in run("score", model, table, "-o", out, code=2).stderr
    assert out.read_text() == "precious"
    bad = write_csv(tmp_path / "bad.csv", make_rows(50)[0])
    bad.write_text(bad.read_text() + "x,1,2,3\n")
    run("score", model, bad, "-o", out, "--force", "--chunk-rows", 10, code=1)
    assert out.read_text() == "precious"  # written whole, or not at all
    run("score", model, table, "-o", out, "--force")
    assert out.read_text().startswith("id,score")
    assert {p.name for p in tmp_path.iterdir()} == {"s.csv", "bad.csv"}


def test_the_pictures_of_a_report_replace_no_file_either(model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    pytest.importorskip("jinja2")
    quick = ("--label", "faulty", "--epochs", 1, "--widths", 8, "--blocks", 1, "-q")
    for name, page, command in (
        ("loss.png", ".", ("fit", table, "--id", "serial", *quick, "-o", tmp_path / "m")),
        ("roc.png", ".", ("evaluate", model, table, "--label", "faulty")),
        ("score-histogram.png", ".", ("score", model, table, "-o", tmp_path / "s.csv")),
        ("page-roc.png", "page.html", ("evaluate", model, table, "--label", "faulty")),
    ):
        folder = tmp_path / command[0]
        folder.mkdir(exist_ok=True)
        own = folder / name
        own.write_bytes(b"precious")
        result = run(*command, "--report", folder / page, code=2)
        assert f"{name} exists; --force overwrites it" in result.stderr
        assert own.read_bytes() == b"precious"
        run(*command, "--report", folder / page, "--force")
        assert own.read_bytes() != b"precious"

        assert ".html exists" in run(*command, "--report", folder / page, code=2).stderr


def corrupt(path: Path, kind: str, tmp_path: Path) -> Path:
    data = path.read_bytes()
    changed = {
        "truncated": data[: len(data) // 2],
        "flipped": data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        "text": b"not a model at all",
        "empty": b"",
    }[kind]
    target = tmp_path / f"{kind}.safetensors"
    target.write_bytes(changed)
    return target


@pytest.mark.parametrize("kind", ["truncated", "flipped", "text", "empty"])
def test_corrupt_models(kind: str, model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    path = corrupt(model, kind, tmp_path)
    for arguments in (("score", path, table), ("evaluate", path, table, "--label", "faulty")):
        result = run(*arguments, code=1)
        assert str(path) in result.stderr
        assert "damaged" in result.stderr
        assert "Traceback" not in result.stderr


def test_other_wrong_input(model: Path, table: Path, tmp_path: Path, run: Run) -> None:
    X, _ = make_rows(30)
    narrow = tmp_path / "narrow.npy"
    np.save(narrow, X[:, :3])
    assert "3 features" in run("score", model, narrow, code=1).stderr
    missing = tmp_path / "missing.csv"
    missing.write_text("temp,flow,load\n1,2,3\n")
    assert "missing.csv: the model's column 'pressure' is not in it" in run("score", model, missing, code=1).stderr
    learnt = "table.csv: 'load' was a feature when the model was fitted (leave it out there), and cannot be the "
    assert learnt + "id now" in run("score", model, table, "--id", "load", code=1).stderr
    assert learnt + "label now" in run("evaluate", model, table, "--label", "load", code=1).stderr
    holes = write_csv(tmp_path / "holes.csv", np.where(X[2, 1] == X, np.nan, X))
    error = run("score", model, holes, code=1).stderr
    assert "holes.csv contains 1 NaN" in error
    assert "flow" in error
    assert "a model fitted with --missing mean or --missing median fills NaN" in error
    assert "no such file" in run("score", model, tmp_path / "nowhere.csv", code=1).stderr
    assert "did you mean 'digits'" in run("score", model, "digit", code=1).stderr
    assert "nowhere" in run("score", tmp_path / "nowhere.safetensors", table, code=1).stderr
    assert ".csv" in run("score", model, table, "-o", tmp_path / "s.xlsx", code=2).stderr
    assert "not a directory" in run("score", model, table, "-o", narrow / "s.csv", code=2).stderr


def test_a_bare_network_is_no_detector(tmp_path: Path, table: Path, run: Run) -> None:
    from rvae_fast import AE
    from rvae_fast.serialization import save

    save(AE(4, 2, n_layers=2), tmp_path / "net.safetensors")
    assert "bare network (AE)" in run("score", tmp_path / "net.safetensors", table, code=1).stderr


@pytest.mark.parametrize("kind", ["csv", "parquet", "npz"])
def test_explanations(kind: str, model: Path, table: Path, expected: np.ndarray, tmp_path: Path, run: Run) -> None:
    pandas = pytest.importorskip("pandas")
    out = tmp_path / f"scores.{kind}"
    run("score", model, table, "--id", "serial", "--out", out, "--explain", 2, "--chunk-rows", 50)
    if kind == "npz":
        with np.load(out, allow_pickle=False) as file:
            flags, because = file["anomaly"], file["because"].tolist()
    else:
        read = pandas.read_csv if kind == "csv" else pandas.read_parquet
        frame = read(out).fillna("")
        assert list(frame) == ["id", "score", "anomaly", "because"]
        flags, because = frame["anomaly"].to_numpy(), frame["because"].tolist()
    assert [bool(text) for text in because] == flags.astype(bool).tolist()
    X, _ = make_rows()
    rows = pandas.DataFrame(X, columns=list(COLUMNS))
    detector = load(model)
    row = int(np.flatnonzero(flags)[0])
    falls, guess = detector.feature_attributions(rows[row : row + 1])[0], detector.reconstruct(rows[row : row + 1])[0]
    first = int(falls.argmax())
    assert because[row].startswith(f"{COLUMNS[first]}={X[row, first]:.6g} (expected {guess[first]:.6g})")
    assert max(text.count("expected") for text in because) == 2


@pytest.mark.parametrize("kind", ["int64", "uint64", "bool", "decimal", "timestamp", "string", "float64", "category"])
def test_ids_keep_their_value_and_type(kind: str, model: Path, tmp_path: Path, run: Run) -> None:
    """Ids with nulls, none of them in the first chunk, or nothing else in it."""
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    big = 2**53 + 1  # no float64
    ids, type_ = {
        "int64": ([big + i for i in range(12)], pa.int64()),
        "uint64": ([*range(6), *(2**63 + i for i in range(6))], pa.uint64()),
        "bool": ([i % 2 == 0 for i in range(12)], pa.bool_()),
        "decimal": ([Decimal(i**3) / 4 for i in range(12)], pa.decimal128(12, 2)),
        "timestamp": ([datetime(2024, 1, 1 + i, tzinfo=timezone.utc) for i in range(12)], pa.timestamp("ns", "UTC")),
        "string": ([f"r{i}" for i in range(12)], pa.string()),
        "float64": ([i / 4 for i in range(12)], pa.float64()),
        "category": ([f"r{i % 3}" for i in range(12)], pa.string()),
    }[kind]
    X, _ = make_rows(12, 2)
    path, out = tmp_path / "t.parquet", tmp_path / "s.parquet"
    for nulls in ((), (7,), (0, 1, 2, 3), range(12)):
        some = pa.array([None if i in nulls else one for i, one in enumerate(ids)], type_)
        given = some.dictionary_encode() if kind == "category" else some
        parquet.write_table(pa.table(dict(zip(COLUMNS, X.T, strict=True)) | {"serial": given}), path, row_group_size=4)
        arguments = ("score", model, path, "--id", "serial", "-q", "-f", "--chunk-rows", 4)
        run(*arguments, "-o", out)
        written = parquet.read_table(out)["id"]
        assert written.type == type_
        if kind == "float64":  # a null is NaN there
            assert np.array_equal(written.to_numpy(), some.to_numpy(zero_copy_only=False), equal_nan=True)
        else:
            assert written.to_pylist() == some.to_pylist()
        texts = [line.split(",")[0] for line in run(*arguments).stdout.splitlines()[1:]]
        run(*arguments, "-o", tmp_path / "s.npz")
        with np.load(tmp_path / "s.npz", allow_pickle=False) as file:
            stored = file["id"].astype(str).tolist()
        if kind != "float64":
            assert [not text for text in texts] == [i in nulls for i in range(12)]
        if kind == "int64":
            assert texts == ["" if one is None else str(one) for one in some.to_pylist()]
            assert stored == texts
        if kind == "timestamp":
            assert stored == texts
            assert texts[5] in ("2024-01-06T00:00:00.000000000", "")


def test_explanations_need_a_place_to_go(model: Path, table: Path, run: Run) -> None:
    assert "needs --out" in run("score", model, table, "--explain", 1, "--json", code=2).stderr
    lines = run("score", model, table, "--id", "serial", "--explain", 1, "--threshold", 1e9).stdout.splitlines()
    assert lines[0] == "id,score,anomaly,because"
    assert all(line.endswith(",0,") for line in lines[1:])
