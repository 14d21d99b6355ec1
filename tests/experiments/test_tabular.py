"""The detectors on tables: what a cell records, and what is made of many."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast import RVAEDetector
from rvae_fast.experiments import by_name, reproduce
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import Claim
from rvae_fast.experiments.experiment import Settings
from rvae_fast.experiments.rivals import RIVALS, rival_scores
from rvae_fast.experiments.store import Results
from rvae_fast.experiments.table_work import FOLDS, MEMBERS, metric_names, options_of, run_table_cell, split_of
from rvae_fast.experiments.tabular import NAP, NAP_OF_PAPER, SCORES, grid
from rvae_fast.pathway import default_pathway

from .conftest import row

pytest.importorskip("matplotlib", reason="the report extra is not installed: no pictures")
pytest.importorskip("jinja2", reason="the report extra is not installed: no page")

QUICK = Settings(data=("digits",), seeds=1, quick=True)


def cells() -> dict[str, Cell]:
    return {cell.series: cell for cell in grid(QUICK)}


def test_the_split_holds_what_is_scored_apart() -> None:
    cell = dataclasses.replace(cells()["RVAE pre"], rows=None, novel="3", seed=1)
    train, test, labels = split_of(cell)
    assert len(train) + len(test) == 1797
    assert labels.sum() == 183, "all rows of the digit"
    assert abs(len(train) - (labels == 0).sum()) <= 1
    seen = {bytes(line) for line in train}
    assert not seen & {bytes(line) for line in test}


@pytest.mark.parametrize("name", sorted(RIVALS))
def test_rivals_tell_far_rows_from_near_ones(name: str) -> None:
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(2, 6))
    train, near = rng.normal(size=(300, 2)) @ mixing, rng.normal(size=(50, 2)) @ mixing
    far = 5.0 * rng.normal(size=(50, 6))
    scores = rival_scores(name, 1e3 * train + 7.0, 1e3 * np.concatenate([near, far]) + 7.0, seed=0)
    assert scores.shape == (100,)
    assert np.median(scores[50:]) > scores[:50].max()


@pytest.mark.filterwarnings("ignore:constant column", "ignore:anomaly_score='nap' found")
@pytest.mark.parametrize("series", ["RVAE pre", "AE", f"RVAE pre {next(iter(MEMBERS))}", f"RVAE pre {FOLDS}", "LOF"])
def test_a_cell_is_what_its_detector_gives(series: str) -> None:
    cell = cells()[series]
    result = run_table_cell(cell)
    assert result.keys() <= set(metric_names(cell.scores))
    assert all(0.5 < result[f"auroc_{name}"] <= 1.0 for name in cell.scores)
    assert result["train_rows"] == 300
    if series == "RVAE pre":
        train, test, labels = split_of(cell)
        detector = RVAEDetector(epochs=10, anomaly_score="nap", random_state=0, device="cpu").fit(train)
        new = detector.score_samples(test[labels == 0])
        assert result[f"flagged_{NAP}"] == pytest.approx((new < detector.offset_).mean())
        assert result["epochs"] == 10
    if series.endswith(FOLDS):
        plain = run_table_cell(dataclasses.replace(cell, variant=""))
        assert result["auroc_reconstruction"] == plain["auroc_reconstruction"]
        assert result["flagged_reconstruction"] < plain["flagged_reconstruction"]


def test_a_score_that_is_added_brings_its_threshold(folder: Path) -> None:
    cell = cells()["RVAE pre"]
    first = dataclasses.replace(cell, scores=("reconstruction",))
    results = Results(folder / "results.csv", metric_names(cell.scores))
    results.add(first, {"auroc_reconstruction": 0.9, "flagged_reconstruction": 0.1})
    assert "sap" in results.lacking(cell)
    results.add(dataclasses.replace(cell, scores=("sap",)), {"auroc_sap": 0.8, "flagged_sap": 0.2})
    kept = Results(folder / "results.csv", metric_names(cell.scores)).rows[cell.key]
    assert [kept[f"{prefix}_{name}"] for name in ("reconstruction", "sap") for prefix in ("auroc", "flagged")] == [
        "0.9", "0.1", "0.8", "0.2",
    ]  # fmt: skip


def test_names_of_scores() -> None:
    detector = RVAEDetector(epochs=1, device="cpu").fit(np.random.default_rng(0).normal(size=(40, 20)))
    pathway, include_input = default_pathway(detector.model_, "nap")
    expected = {"anomaly_score": "nap", "pathway": pathway, "pathway_input": include_input}
    assert options_of(NAP) == expected, "what the page calls NAP's default is it"
    assert options_of(NAP_OF_PAPER) == {"anomaly_score": "nap", "pathway": "stages", "pathway_input": True}
    assert options_of("elbo") == {"anomaly_score": "elbo"}


def rows_of(better: dict[tuple[str, str], float]) -> list[dict[str, str]]:
    """Three seeds of four tables; what is better than the rest by how much."""
    rng, rows = np.random.default_rng(0), []
    for table in ("digits", "wbc", "shuttle", "satellite"):
        for seed in range(3):
            for (model, order, variant), scores in SCORES.items():
                series = " ".join(part for part in (model, order, variant) if part)
                values = {n: 0.8 + better.get((series, n), 0.0) + 0.001 * rng.normal() for n in scores}
                given: dict[str, Any] = {f"auroc_{n}": v for n, v in values.items()}
                given |= {f"flagged_{n}": 0.1 for n in scores if n != "own"}
                rows.append(row(data=table, setting="table", novel="anomaly", model=model, order=order, seed=seed,
                                n_layers=0, variant=variant, **given))  # fmt: skip
    return rows


def test_findings(folder: Path) -> None:
    settings = Settings(data=("digits", "wbc", "shuttle", "satellite"), seeds=3)

    def claims(rows: list[dict[str, str]]) -> dict[str, Claim]:
        return {claim.name: claim for claim in by_name("tabular").findings(rows, settings, folder).claims}

    two = {(f"RVAE pre {name}", "hyperplane"): -0.02 for name in MEMBERS}
    held = claims(rows_of({("RVAE pre", "reconstruction"): 0.05, ("RVAE pre", NAP): 0.1, **two}))
    assert {name for name, claim in held.items() if claim.held} == {
        *(f"RVAE by its error is above {rival}" for rival in RIVALS),
        *(f"RVAE by its error is above {other} by its" for other in ("RAE pre", "VAE", "AE")),
        *(f"RVAE by {NAP} is above {rival}" for rival in RIVALS),
        f"RVAE by {NAP} is above RVAE by its error",
        f"NAP's default, {NAP}, is above the paper's, {NAP_OF_PAPER}",
    }
    assert "over 4 pairs" in held["RVAE by its error is above LOF"].sentence, "seeds of a table are one value"
    gained = claims(rows_of(dict.fromkeys(two, 0.02)))
    assert all(gained[f"two RVAEs of {name}, by hyperplane, is above one"].held for name in MEMBERS)
    beaten = claims(rows_of({(rival, "own"): 0.1 for rival in RIVALS}))
    assert not any(beaten[f"RVAE by its error is above {rival}"].held for rival in RIVALS)
    found = by_name("tabular").findings(rows_of({}), settings, folder)
    assert found.pictures[0].light.startswith(b"\x89PNG")
    assert list(found.tables["By table"][0]) == ["scored by", "digits", "wbc", "shuttle", "satellite", "mean"]
    assert {line["wbc"] for line in found.tables["New normal rows flagged, a tenth intended"]} == {"0.100"}
    assert all(line["above"].endswith("of 12") for line in found.tables["Against the error of RVAE"])


def test_findings_of_a_part(folder: Path) -> None:
    rows = [line for line in rows_of({}) if line["model"] == "LOF" and line["data"] == "wbc"]
    found = by_name("tabular").findings(rows, Settings(data=("wbc",), seeds=3), folder)
    assert {claim.held for claim in found.claims} == {None}
    assert [line["scored by"] for line in found.tables["By table"]] == ["LOF"]


def test_reproduce_quick(folder: Path) -> None:
    said: list[str] = []
    page = reproduce("tabular", quick=True, seeds=1, out=folder, jobs=1, say=said.append)
    text = page.read_text(encoding="utf-8")
    assert "isolation forest" in text
    listing = next(line for line in said if "cells, 0 of them done" in line)
    assert "digits, table: class 0" in listing
    assert "layers" not in listing, "the detectors' network is their own"
    columns = metric_names(by_name("tabular").scores)
    assert len(Results(folder / "results.csv", columns).rows) == len(SCORES)
    with pytest.raises(ValueError, match="models must be None for tabular"):
        reproduce("tabular", quick=True, models=folder)
    with pytest.raises(ValueError, match="variant must be empty for tabular"):
        reproduce("tabular", quick=True, variant="noise", out=folder)
    with pytest.raises(ValueError, match=r"data must be among digits, .* for tabular, got mnist"):
        reproduce("tabular", data=["digits", "mnist"], out=folder)
