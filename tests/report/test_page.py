"""The page: well-formed, self-contained, escaped, complete, and right in degenerate cases."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.report import write_report
from rvae_fast.report.page import is_report, output_files

HOSTILE = '<script>alert("x")</script>&amp;\'"'


def test_page_is_well_formed_and_complete(full_report: Path, everything: dict[str, Any], read_page: Any) -> None:
    assert full_report.name == "index.html"
    page = read_page(full_report)
    headings = re.findall(r"<h[123][^>]*>(.*?)</h", page.source)
    for expected in (
        *("Pumps", "Distribution", "ROC curve", "Precision and recall", "At the threshold", "Loss", "Gradient norm"),
        *("Highest scores", "Lowest scores", "The 20 highest scores", "Configuration", "Versions"),
    ):
        assert expected in headings
    assert "n_layers" in page.text
    assert "120,000" in page.text
    above = int((everything["scores"] > 4.5).sum())
    assert f"{above} of 400 rows score above the threshold of 4.500" in page.text
    top = everything["ids"][int(np.argmax(everything["scores"]))]
    assert top in page.text


def test_pictures_are_embedded_decodable_and_described(full_report: Path, read_page: Any) -> None:
    page = read_page(full_report)
    pictures = page.images()
    assert len(pictures) == 10  # five figures, each for light and for dark pages
    assert all(picture.width > 600 for picture in pictures)
    assert all(len(str(image["alt"])) > 40 for image in page.all("img"))
    assert len({image["src"] for image in page.all("img")}) == 5
    for picture in pictures:  # something is drawn: more than the background's one colour
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 20


def test_pictures_lie_beside_the_page(tmp_path: Path, everything: dict[str, Any]) -> None:
    from PIL import Image

    write_report(tmp_path / "run.html", **everything)
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        *(
            "run-gradient-norm.png",
            "run-loss.png",
            "run-precision-recall.png",
            "run-roc.png",
            "run-score-histogram.png",
        ),
        "run.html",
    ]
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            picture.verify()


def test_nothing_external_is_referenced(full_report: Path, read_page: Any) -> None:
    page = read_page(full_report)
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster"):
            assert str(attributes.get(name, "data:")).startswith("data:")
    assert "http:" not in page.source
    assert "https:" not in page.source
    assert "@import" not in page.source
    assert "url(" not in page.source


def test_users_text_is_escaped(tmp_path: Path, everything: dict[str, Any], read_page: Any) -> None:
    names = [HOSTILE] * 6
    page = read_page(
        write_report(
            tmp_path,
            **everything
            | {
                "ids": [HOSTILE + str(i) for i in range(400)],
                "feature_names": names,
                "title": HOSTILE,
                "description": HOSTILE,
                "configuration": {HOSTILE: HOSTILE},
                "facts": {HOSTILE: HOSTILE},
            },
        )
    )
    assert not page.all("script")
    assert "alert(" not in re.sub(r"&lt;script&gt;alert\(", "", page.source)
    assert page.text.count(HOSTILE) > 30  # and the reader sees it as it was written


def test_without_labels_history_or_rows(tmp_path: Path, read_page: Any) -> None:
    page = read_page(write_report(tmp_path, scores=[1.0, 2.0, 3.0], threshold=2.5))
    assert len(page.images()) == 2
    assert "ROC" not in page.text
    assert "Training" not in page.text
    assert "1 of 3 row scores above" in page.text
    assert "row 2" in page.text


@pytest.mark.parametrize(
    "case",
    [
        {"scores": [1.0, 2.0, 3.0], "labels": [0, 0, 0]},
        {"scores": [1.0, 2.0, 3.0], "labels": [1, 1, 1]},
        {"scores": [2.0, 2.0, 2.0], "labels": [0, 1, 0]},
        {"scores": [0.0]},
        {"scores": [-3.0, -3.0]},
        {"scores": [1.0, np.inf, 3.0], "labels": [0, 1, 0]},
        {"scores": [np.inf, np.inf]},
        {"scores": [1e-300, 1e300]},
        {"scores": np.zeros(500), "labels": np.arange(500) % 2, "threshold": 1e6},
        {"scores": [1.0, 2.0], "history": {"epochs": [], "grad_norm": [], "best_epoch": None}},
        {"scores": [1.0, 2.0], "history": {"epochs": [{"epoch": 1, "train_loss": 3.0}], "grad_norm": [0.0]}},
        {"scores": [1.0, 2.0], "history": {"epochs": [{"train_loss": None}], "grad_norm": [np.nan, np.inf, 1.0]}},
        {"scores": [1.0, 2.0], "X": np.ones((2, 3)), "reconstruction": np.ones((2, 3))},
        {"scores": [1.0], "X": [[np.nan, 2.0]], "reconstruction": np.ones((1, 2))},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("error")
def test_degenerate_input(tmp_path: Path, case: dict[str, Any], read_page: Any) -> None:
    page = read_page(write_report(tmp_path, **{"threshold": 2.0, **case}))
    page.images()
    assert not re.search(r"\b(nan|None)\b", page.text.replace("random_state", ""), flags=re.IGNORECASE)


def test_one_class_says_so(tmp_path: Path, read_page: Any) -> None:
    page = read_page(write_report(tmp_path, scores=[1.0, 3.0], threshold=2.0, labels=[0, 0]))
    assert "Every row is labelled normal" in page.text
    assert "need rows of both classes" in page.text


def test_images(tmp_path: Path, read_page: Any) -> None:
    rng = np.random.default_rng(0)
    X = rng.uniform(size=(50, 64))
    guess = rng.uniform(size=(50, 64))
    scores = ((X - guess) ** 2).sum(axis=1)
    page = read_page(
        write_report(tmp_path, scores=scores, threshold=10.0, X=X, reconstruction=guess, image_shape=(8, 8))
    )
    strips = [image for image in page.all("img") if image.get("class") == "strip"]
    assert len(strips) == 16
    assert f"Row row {int(np.argmax(scores))}:" in str(strips[0]["alt"])
    assert {p.name for p in tmp_path.glob("recon*")} == {"reconstructions-worst.png", "reconstructions-best.png"}


def test_image_strip_shows_input_reconstruction_and_difference() -> None:
    import io

    from PIL import Image

    from rvae_fast.report.reconstructions import image_strip

    row, guess = np.zeros(4), np.ones(4)
    row[3] = guess[3] = 0.5
    with Image.open(io.BytesIO(image_strip(row, guess, (2, 2, 1), (0.0, 1.0), 1.0))) as image:
        pixels = np.asarray(image)
    side = pixels.shape[0]
    first, second, third = (pixels[:, start : start + side] for start in (0, side + 4, 2 * side + 8))
    assert first[0, 0].tolist() == [0, 0, 0]
    assert second[0, 0].tolist() == [255, 255, 255]
    assert first[-1, -1].tolist() == second[-1, -1].tolist() == [128, 128, 128]
    assert third[0, 0].sum() > 500  # the largest difference is bright, none is dark
    assert third[-1, -1].sum() < 20


@pytest.mark.parametrize("shape", [(8, 9), (8, 8, 2), (8,), (0, 64)])
def test_wrong_image_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    X = np.zeros((3, 64))
    with pytest.raises(ValueError, match="image_shape"):
        write_report(tmp_path, scores=[1.0, 2.0, 3.0], threshold=1.0, X=X, reconstruction=X, image_shape=shape)


def test_features_are_ranked_by_scaled_error_and_shown_in_input_units(tmp_path: Path, read_page: Any) -> None:
    X = np.array([[1000.0, 1.0], [1000.0, 1.0]])
    guess = np.array([[1010.0, 5.0], [1000.0, 1.0]])  # off by 10 of 1000 units, and by 4 of 1
    page = read_page(
        write_report(
            tmp_path, scores=[9.0, 0.0], threshold=1.0, X=X, reconstruction=guess, feature_scale=[1000.0, 1.0],
            feature_names=["pressure", "flow"],
        )
    )  # fmt: skip
    first = page.text[page.text.index("Highest scores") :]
    assert first.index("flow") < first.index("pressure")
    assert re.search(r"flow\s*1\s*5\s*100 %", first)
    assert re.search(r"pressure\s*1,000\s*1,010\s*0 %", first)


@pytest.mark.parametrize("score", ["hyperplane", "reconstruction"])
def test_features_are_ranked_by_the_score_that_is_taken(score: str, tmp_path: Path, read_page: Any) -> None:
    class Detector:
        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {"anomaly_score": score}

        def reconstruct(self, X: Any) -> Any:
            return X + np.array([1.0, 4.0, 0.0])

        def feature_attributions(self, X: Any) -> Any:
            return np.array([[3.0, -2.0, 1.0]] * len(X))

    page = read_page(
        write_report(
            tmp_path, scores=[9.0, 7.0, 0.0], threshold=1.0, X=np.zeros((3, 3)), detector=Detector(),
            feature_names=["pressure", "flow", "heat"],
        )
    )  # fmt: skip
    first = page.text[page.text.index("Highest scores") :]
    behind = first[first.index("Features behind") :]
    if score == "reconstruction":
        assert re.search(r"flow\s*0\s*4\s*94 %\s*pressure", first)
        assert "share of error" in first
    else:
        assert re.search(r"pressure\s*0\s*1\s*75 %\s*heat\s*0\s*0\s*25 %\s*flow\s*0\s*4\s*0 %", first)
        assert re.search(r"pressure\s*1\s*75 %\s*heat", behind)
        assert "share of error" not in page.text
        assert "as expected" in page.text


def test_shares_are_of_the_error_by_the_likelihood(tmp_path: Path, read_page: Any) -> None:
    class Detector:
        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {"anomaly_score": "reconstruction", "likelihood": "absolute"}

        def reconstruct(self, X: Any) -> Any:
            return X + np.array([1.0, 4.0])

        def feature_errors(self, X: Any, units: str) -> Any:
            assert units == "score"
            return np.abs(X - self.reconstruct(X))

    page = read_page(
        write_report(
            tmp_path, scores=[9.0, 0.0], threshold=1.0, X=np.zeros((2, 2)), detector=Detector(),
            feature_names=["pressure", "flow"],
        )
    )  # fmt: skip
    assert re.search(r"flow\s*0\s*4\s*80 %\s*pressure\s*0\s*1\s*20 %", page.text)
    assert "squared error" not in page.text


def test_a_frame_with_its_columns_in_another_order(tmp_path: Path, read_page: Any) -> None:
    pandas = pytest.importorskip("pandas")

    class Detector:
        feature_names_in_ = np.array(["pressure", "flow"], dtype=object)

        def reconstruct(self, X: Any) -> Any:
            return np.tile([1.0, 5.0], (len(X), 1))

    options: dict[str, Any] = {"scores": [9.0, 0.0], "threshold": 1.0, "detector": Detector()}
    frame = pandas.DataFrame({"flow": [2.0, 5.0], "pressure": [1.0, 1.0]})
    page = read_page(write_report(tmp_path, X=frame, **options))
    assert re.search(r"flow\s*2\s*5\s*100 %\s*pressure\s*1\s*1\s*0 %", page.text)
    with pytest.raises(ValueError, match="columns that the detector was fitted to; not in both are flow, heat"):
        write_report(tmp_path, X=frame.rename(columns={"flow": "heat"}), **options)


def test_where_a_fall_is_infinite_it_has_the_whole_share() -> None:
    from rvae_fast.report.reconstructions import leading_features

    found = leading_features(np.zeros(3), np.ones(3), np.array([5.0, np.inf, 0.0]), ["a", "b", "c"])
    assert [(f.name, f.share) for f in found] == [("b", 1.0), ("a", 0.0), ("c", 0.0)]


def test_a_detector_lends_what_is_not_given(tmp_path: Path, read_page: Any) -> None:
    class Scaler:
        scale = np.array([1000.0, 1.0])

    class Detector:
        history_ = {"epochs": [{"epoch": 1, "train_loss": 3.0}], "grad_norm": [1.0, 2.0], "best_epoch": None}  # noqa: RUF012
        feature_names_in_ = np.array(["pressure", "flow"])
        scaler_ = Scaler()

        def get_params(self, deep: bool = True) -> dict[str, Any]:
            return {"max_grad_norm": 1.5, "epochs": 77}

        def reconstruct(self, X: Any) -> Any:
            return X + np.array([10.0, 4.0])

    page = read_page(
        write_report(tmp_path, scores=[9.0, 1.0], threshold=2.0, detector=Detector(), X=np.array([[1000.0, 1.0]] * 2))
    )
    assert "77" in page.text
    assert any("clipped above 1.500, which happened in 50.0%" in str(image["alt"]) for image in page.all("img"))
    assert re.search(r"flow\s*1\s*5", page.text)


def test_only_some_rows_at_hand(tmp_path: Path, read_page: Any) -> None:
    scores = np.arange(1000.0)
    rows = np.array([0, 1, 998, 999])
    X = np.zeros((4, 2))
    page = read_page(
        write_report(
            tmp_path, scores=scores, threshold=900.0, rows=rows, X=X, reconstruction=X + 1, ids=["w", "x", "y", "z"]
        )
    )
    listed = re.search(r"The 20 highest scores.*", page.text, re.DOTALL)
    assert listed is not None
    assert re.search(r"1\s+z\s+999", listed[0])
    assert re.search(r"3\s+row 997\s+997", listed[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": []}, "scores is empty"),
        ({"scores": [[1.0]]}, "one dimension"),
        ({"scores": [1.0, np.nan, np.nan]}, "holds 2 NaN"),
        ({"threshold": np.nan}, "threshold must be a finite number"),
        ({"labels": [0, 1]}, r"labels must have shape \(3,\)"),
        ({"labels": [0, 1, 7]}, "also found: 7"),
        ({"X": np.zeros((2, 2)), "reconstruction": np.zeros((3, 2))}, "X has 2 rows, expected 3"),
        ({"ids": ["a"]}, "ids has 1 entries"),
        ({"rows": [0, 3]}, "rows must be"),
        ({"X": np.zeros((3, 2)), "reconstruction": np.zeros((3, 2)), "feature_names": ["a"]}, "feature_names has 1"),
        ({"X": np.zeros((3, 2)), "reconstruction": np.zeros((3, 2)), "feature_scale": [1.0]}, "feature_scale must"),
    ],
)
def test_bad_input(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_report(tmp_path / "r", **{"scores": [1.0, 2.0, 3.0], "threshold": 2.0, **change})
    assert not (tmp_path / "r").exists()


def test_a_second_report_replaces_the_first_and_leaves_other_files(tmp_path: Path, everything: dict[str, Any]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    write_report(tmp_path, **everything)
    assert (tmp_path / "roc.png").exists()
    write_report(tmp_path, scores=[1.0], threshold=2.0)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "notes.txt", "score-histogram.png"]


def test_files_that_are_not_a_reports_are_not_removed(tmp_path: Path) -> None:
    (tmp_path / "roc.png").write_bytes(b"a user's own")
    write_report(tmp_path, scores=[1.0], threshold=2.0)
    assert (tmp_path / "roc.png").read_bytes() == b"a user's own"
    assert is_report(tmp_path / "index.html")
    assert not is_report(tmp_path / "roc.png")
    assert output_files(tmp_path)[1]["roc"] == tmp_path / "roc.png"


def test_importing_the_report_imports_no_plotting() -> None:
    code = (
        "import sys, rvae_fast.report; "
        "heavy = {'matplotlib', 'jinja2', 'torch', 'sklearn', 'PIL'}; "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
