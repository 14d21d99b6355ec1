"""``rvae-fast fit``: what it learns from, what it writes, and what it refuses."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast import serialization
from rvae_fast._stepper import Stepper
from rvae_fast.presets import ENSEMBLES, PRESETS, preset
from rvae_fast.serialization import load
from rvae_fast.training import NonFiniteError
from tests.cli.conftest import COLUMNS, make_rows, write_csv

QUICK = ("--epochs", 1, "--widths", "8", "--blocks", "1", "--latent", 2)


def test_model_knows_columns_and_leaves_id_label_and_anomalies_out(model: Path) -> None:
    detector = load(model)
    assert type(detector).__name__ == "RVAEDetector"
    assert detector.feature_names_in_.tolist() == list(COLUMNS)
    assert detector.n_iter_ == 15
    assert len(detector.history_.grad_norm) == 15 * 7  # 220 normal rows in batches of 32: the 20 anomalies are out


@pytest.mark.parametrize("name", ["rvae", "vae", "rae", "ae"])
def test_every_model(name: str, table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "m.safetensors"
    result = run("fit", table, "--id", "serial", "--model", name, "--out", out, "--epochs", 1, "--layers", 3, "--json")
    summary = json.loads(result.stdout)
    assert summary["detector"] == f"{name.upper()}Detector" == type(load(out)).__name__
    assert (summary["rows"], summary["features"], summary["epochs"]) == (240, 5, 1)
    assert summary["model"] == str(out)
    assert "trained" in result.stderr


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_its_name_here(name: str, table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "m.safetensors"
    base, members = ENSEMBLES.get(name, (name, None))
    is_image = name == "image-views"
    shape = ("--views", "1x5") if is_image else ()  # the table is none: "image" would be refused
    run("fit", table, "--id", "serial", "--preset", name, "--out", out, "--epochs", 1, "--layers", 4, "--json", *shape)
    loaded = load(out)
    for detector in getattr(loaded, "estimators_", [loaded]):
        assert detector.anomaly_score == preset(base).get("anomaly_score", "reconstruction")
        assert (detector.views == "1x5") is is_image is ("views" in preset(base))
    if members is not None:
        assert [detector.learning_rate for detector in loaded.estimators_] == [2e-3, 1e-3]


def test_options_reach_the_detector(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "m.safetensors"
    run(
        "fit", table, "--columns", "flow,temp", "--out", out, "--epochs", 2, "--widths", "8,4", "--blocks", "1,2",
        "--latent", 1, "--order", "post", "--activation", "silu", "--likelihood", "absolute", "--scaler", "minmax",
        "--kld-weight", 0.5, "--validation", 0.25, "--patience", 3, "--contamination", 0.2, "--seed", 7,
        "--learning-rate", 0.002, "--max-grad-norm", 3, "--score-by", "elbo", "--precision", "fp32",
    )  # fmt: skip
    detector = load(out)
    assert detector.feature_names_in_.tolist() == ["flow", "temp"]
    parameters = detector.get_params()
    expected = {
        "epochs": 2, "widths": [8, 4], "blocks": [1, 2], "latent_features": 1, "order": "post", "activation": "silu",
        "likelihood": "absolute", "scaler": "minmax", "kld_weight": 0.5, "validation_fraction": 0.25, "patience": 3,
        "contamination": 0.2, "random_state": 7, "learning_rate": 0.002, "max_grad_norm": 3.0, "anomaly_score": "elbo",
        "precision": "fp32",
    }  # fmt: skip
    assert {name: parameters[name] for name in expected} == expected
    assert detector.history_.epochs[0]["val_loss"] is not None


def test_the_same_seed_gives_the_same_model(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    thresholds = []
    for seed in (1, 1, 2):
        result = run(
            "fit", table, "--drop", "faulty,serial", "-o", tmp_path / "m", "-f", *QUICK, "--seed", seed, "--json"
        )
        thresholds.append(json.loads(result.stdout)["threshold"])
    assert thresholds[0] == thresholds[1] != thresholds[2]


def test_anomalies_by_value_and_kept(tmp_path: Path, run: Callable[..., Any]) -> None:
    X, labels = make_rows(60, 10)
    path = tmp_path / "t.csv"
    lines = ["temp,flow,pressure,load,class"]
    lines += [
        ",".join(map(repr, row)) + "," + ("worn" if bad else "fine")
        for row, bad in zip(X.tolist(), labels, strict=True)
    ]
    path.write_text("\n".join(lines))
    arguments = ("fit", path, "--label", "class", "--json", *QUICK)
    result = run(*arguments, "-o", tmp_path / "a", code=1)
    assert "--anomaly-value" in result.stderr
    assert "worn" in result.stderr
    result = run(*arguments, "-o", tmp_path / "a", "--anomaly-value", "worn")
    assert json.loads(result.stdout)["rows"] == 50
    assert "left out 10 labelled anomalies" in result.stderr
    result = run(*arguments, "-o", tmp_path / "b", "--anomaly-value", "worn", "--keep-anomalies")
    assert json.loads(result.stdout)["rows"] == 60
    result = run(*arguments, "-o", tmp_path / "c", "--anomaly-value", "rusty", code=1)
    assert "'rusty' is not among the labels" in result.stderr


def test_report_names_rows_and_features(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    pytest.importorskip("jinja2")
    out = tmp_path / "m"
    run("fit", table, "--id", "serial", "--label", "faulty", "-o", out, *QUICK, "--report", tmp_path / "r", "-q")
    page = (tmp_path / "r" / "index.html").read_text()
    assert "pressure" in page
    assert "AUROC" in page
    assert "Gradient norm" in page
    assert '<b class="id">00' in page


def test_a_missing_report_package_is_told_before_the_training(
    table: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    out = tmp_path / "m.safetensors"
    result = run("fit", table, "--label", "faulty", "-o", out, *QUICK, "--report", tmp_path / "r", code=1)
    assert "pip install 'rvae-fast[report]'" in result.stderr
    assert not out.exists()


@pytest.mark.parametrize("kind", ["npy", "npz", "parquet"])
def test_formats(kind: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    X, labels = make_rows(40)
    path = tmp_path / f"t.{kind}"
    options: tuple[Any, ...] = ()
    if kind == "npy":
        np.save(path, X)
    elif kind == "npz":
        np.savez(path, X=X, y=labels, feature_names=np.array(COLUMNS))
        options = ("--label", "y")
    else:
        pandas = pytest.importorskip("pandas")
        pandas.DataFrame(X, columns=list(COLUMNS)).assign(y=labels).to_parquet(path)
        options = ("--label", "y")
    result = run("fit", path, "-o", tmp_path / "m", *options, *QUICK, "--json")
    summary = json.loads(result.stdout)
    assert summary["features"] == 4
    assert summary["rows"] == (40 if kind == "npy" else 20)
    names = getattr(load(tmp_path / "m"), "feature_names_in_", None)
    assert (names is None) == (kind == "npy")


def test_outputs_are_not_overwritten(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    result = run("fit", table, "-o", out, *QUICK, code=2)
    assert "exists" in result.stderr
    assert "--force" in result.stderr
    assert out.read_bytes() == b"precious"
    page = tmp_path / "r.html"
    page.write_text("precious")
    run("fit", table, "-o", tmp_path / "n", "--report", page, *QUICK, code=2)
    assert page.read_text() == "precious"
    assert not (tmp_path / "n").exists()
    run("fit", table, "--id", "serial", "-o", out, "--force", *QUICK)
    assert load(out).n_features_in_ == 5


@pytest.mark.parametrize("option", ["-o", "--checkpoint"])
def test_an_output_that_is_no_file_is_told_before_the_training(
    option: str, table: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    given = ("fit", table, "--id", "serial", "-o", tmp_path / "m", option, folder, *QUICK)
    for force in ((), ("--force",)):
        assert "models is a directory, expected the name of a file" in run(*given, *force, code=2).stderr
    assert list(tmp_path.iterdir()) == [folder]
    if hasattr(os, "mkfifo"):
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        assert "pipe is a device or a pipe" in run(*given, option, pipe, "--force", code=2).stderr
        assert pipe.is_fifo()


def test_a_failed_run_leaves_the_old_model(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    out = tmp_path / "m.safetensors"
    out.write_bytes(b"precious")
    run("fit", table, "--id", "serial", "-o", out, "--force", "--epochs", 0, code=1)
    assert out.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.safetensors"]


def test_checkpoint_and_resume(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    state = tmp_path / "run.ckpt"
    arguments = ("fit", table, "--id", "serial", "--checkpoint", state, *QUICK[2:], "--epochs", 3, "--json", "-q")
    first = json.loads(run(*arguments, "-o", tmp_path / "a").stdout)
    assert state.exists()
    assert "exists" in run(*arguments, "-o", tmp_path / "b", code=2).stderr
    again = json.loads(run(*arguments, "-o", tmp_path / "b", "--resume").stdout)
    assert again["threshold"] == first["threshold"]
    assert again["epochs"] == 3
    anew = json.loads(run(*arguments, "-o", tmp_path / "c", "--force").stdout)
    assert anew["threshold"] == first["threshold"]
    assert "--checkpoint" in run("fit", table, "-o", tmp_path / "d", "--resume", code=2).stderr
    before = state.read_bytes()
    run(*arguments, "-o", tmp_path / "d", "--force", "--contamination", "0.9", code=1)
    assert state.read_bytes() == before  # what is refused replaces nothing


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--model", "ae", "--order", "pre"), 2, "--model ae has no such parameter"),
        (("--model", "gan"), 2, "'gan' is not one of"),
        (("--widths", "8,x"), 2, "not a list of whole numbers"),
        (("--image-shape", "8by8"), 2, "not of the form"),
        (("--novel", "0"), 2, "only built-in data sets"),
        (("--seed", str(2**32)), 2, "--seed"),
        (("--columns", " , "), 2, "--columns: ' , ' names none"),
        (("--epochs", "-3"), 1, "epochs"),
        (("--order", "middle"), 1, "order"),
        (("--contamination", "0.9"), 1, "contamination"),
        (("--label", "fauly"), 1, "did you mean 'faulty'"),
        (("--columns", "temp,flaw"), 1, "'flaw' is not a column (did you mean 'flow'?)"),
        (("--device", "abacus"), 1, "abacus"),
        (("--widths", "8,4", "--layers", "6"), 1, "--layers and --widths both say how deep the network is: give one"),
    ],
)
def test_wrong_options(
    options: tuple[str, ...], code: int, message: str, table: Path, tmp_path: Path, run: Callable[..., Any]
) -> None:
    result = run("fit", table, "-o", tmp_path / "m", *options, code=code)
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n", "minimum of 2 is required"),
        ("", "empty"),
        ("a,b\n1,2\n3,red\n", "'b' (first 'red', line 3)"),
        ("a,b\n1,2\n3,4,5\n", "line 3 has 3 values, expected 2"),
        ("a,b\n1,2\n3,\n5,6\n", "t.csv contains 1 NaN and 0 infinite values"),
        ("a,b\n1,2\n3,\n5,6\n", "in column 'b' (1 NaN); --missing mean or --missing median fills NaN"),
        ("a,b\n1,2\n3,inf\n5,6\n", "1 infinite"),
        ("a,b,odd\n1,2,1\n3,4,1\n", "t.csv: all of its 2 rows are labelled anomalies"),
    ],
)
def test_bad_tables(content: str, message: str, tmp_path: Path, run: Callable[..., Any]) -> None:
    path = tmp_path / "t.csv"
    path.write_text(content)
    label = ("--label", "odd") if "odd" in content else ()
    result = run("fit", path, "-o", tmp_path / "m", *QUICK, *label, code=1)
    assert message in result.stderr
    assert result.stderr.count("error:") == 1
    assert not (tmp_path / "m").exists()


def test_missing_values_are_filled_when_asked(tmp_path: Path, run: Callable[..., Any]) -> None:
    X, _ = make_rows(30, 0)
    X[3, 1] = np.nan
    path = write_csv(tmp_path / "t.csv", X, ids=False)
    assert "--missing mean or --missing median" in run("fit", path, "-o", tmp_path / "m", *QUICK, code=1).stderr
    run("fit", path, "-o", tmp_path / "m", *QUICK, "--missing", "median")
    scores = run("score", tmp_path / "m", path, "-q").stdout.splitlines()
    assert len(scores) == 31
    assert "nan" not in "".join(scores)


def test_debug_shows_the_traceback(table: Path, tmp_path: Path, run: Callable[..., Any]) -> None:
    result = run("fit", table, "-o", tmp_path / "m", "--order", "middle", "--debug", code=1)
    assert "Traceback (most recent call last)" in result.stderr
    assert "error: " in result.stderr


def test_ctrl_c_keeps_what_there_is(
    table: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: Stepper) -> None:
        read(self)
        if len(self.history.steps) == 3:
            raise KeyboardInterrupt

    read, out = Stepper.read, tmp_path / "m.safetensors"
    monkeypatch.setattr(Stepper, "read", interrupted)
    quick = ("--label", "faulty", "--id", "serial", "--epochs", 9, "--widths", 8, "--blocks", 1, "-o", out)
    result = run("fit", table, *quick, code=130)
    assert not out.exists()
    kept = tmp_path / "m.interrupted.safetensors"
    assert f"wrote {kept}; with --checkpoint" in result.stderr
    assert result.stderr.rstrip().endswith("interrupted")
    first = kept.read_bytes()
    run("score", kept, table, "--id", "serial", "-o", tmp_path / "scores.csv")
    assert "interrupted2" in run("fit", table, *quick, code=130).stderr
    assert kept.read_bytes() == first
    result = run("fit", table, *quick, "--checkpoint", tmp_path / "c", code=130)
    assert "wrote" not in result.stderr, "it can be resumed"


def test_a_number_that_is_not_finite_keeps_what_there_is(
    table: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(self: Stepper) -> None:
        read(self)
        if len(self.history.steps) == 3:
            raise NonFiniteError("the loss is inf", epoch=3, step=3, tensor="loss")

    read, out = Stepper.read, tmp_path / "m.safetensors"
    monkeypatch.setattr(Stepper, "read", diverged)
    quick = ("--label", "faulty", "--id", "serial", "--epochs", 9, "--widths", 8, "--blocks", 1, "-o", out)
    result = run("fit", table, *quick, code=1)
    kept = tmp_path / "m.interrupted.safetensors"
    assert f"wrote {kept}; with --checkpoint" in result.stderr
    assert result.stderr.rstrip().endswith("error: the loss is inf")
    run("score", kept, table, "--id", "serial", "-o", tmp_path / "scores.csv")


def test_a_model_without_room_goes_elsewhere(
    table: Path, tmp_path: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training is over, and may have taken hours."""
    out, elsewhere, write = tmp_path / "m.safetensors", tmp_path / "elsewhere", serialization._write

    def full(path: Path, *arguments: Any) -> None:
        if path == out:
            raise OSError(28, "No space left on device")
        write(path, *arguments)

    elsewhere.mkdir()
    monkeypatch.setattr(serialization, "_write", full)
    monkeypatch.setattr(tempfile, "tempdir", str(elsewhere))
    quick = ("--label", "faulty", "--id", "serial", *QUICK, "-o", out)
    result = run("fit", table, *quick, code=1)
    kept = elsewhere / "m.kept.safetensors"
    assert f"{out} cannot be written: No space left on device; the trained model is in {kept}" in result.stderr
    run("score", kept, table, "--id", "serial", "-o", tmp_path / "scores.csv")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    assert "error: No space left" in run("fit", table, *quick, code=1).stderr.replace("[Errno 28] ", "")
