"""What each experiment makes of rows, and the page of it; the rows are made up, so that claims hold or do not."""

from __future__ import annotations

import base64
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.datasets.cache import store_arrays
from rvae_fast.experiments import article, by_name, places, quality, reproduce, views
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import Claim
from rvae_fast.experiments.experiment import Settings
from rvae_fast.experiments.page import Findings, write_page
from rvae_fast.experiments.plots import plot_steps
from rvae_fast.experiments.tables import diverged, summary, to_csv
from rvae_fast.experiments.work import steps_file

from .conftest import row

pytest.importorskip("matplotlib", reason="the report extra is not installed: no pictures")
pytest.importorskip("jinja2", reason="the report extra is not installed: no page")


def found(name: str, rows: list[dict[str, str]], folder: Path, **settings: Any) -> dict[str, Claim]:
    given: dict[str, Any] = {"data": ("mnist",), "seeds": 3, **settings}
    result = by_name(name).findings(rows, Settings(**given), folder)
    assert result.pictures
    assert all(picture.light.startswith(b"\x89PNG") for picture in result.pictures)
    assert all(table for table in result.tables.values())
    return {claim.name: claim for claim in result.claims}


def novelty_rows(gain: float, digits: str = "0123456789") -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [
        row(model=model, order=order, novel=digit, seed=seed, n_layers=10, train_loss=25.0,
            auroc_reconstruction=article.NOVELTY["RVAE pre"][digit] + 0.005 + better + 0.002 * rng.normal())
        for digit in digits for seed in range(3)
        for model, order, better in (("RVAE", "pre", gain), ("RVAE", "post", 0.0), ("VAE", "", 0.0))
    ]  # fmt: skip


def test_novelty(folder: Path) -> None:
    held = found("novelty", novelty_rows(0.01), folder)
    assert len(held) == 4
    assert all(claim.held for claim in held.values())
    failed = found("novelty", novelty_rows(-0.05), folder)
    assert not any(claim.held for claim in failed.values())
    partial = found("novelty", novelty_rows(0.01, "09"), folder)
    assert partial["mnist: RVAE pre is above VAE"].held
    assert partial["mnist: RVAE pre reaches a mean of .900 over the ten digits"].held is None
    assert partial["mnist: every digit but 1 as in the article"].held is None


def degradation_rows(plain: dict[int, float], residual: dict[int, float]) -> list[dict[str, str]]:
    rng = np.random.default_rng(0)
    return [
        row(model=model, order=order, novel="0", seed=seed, n_layers=depth, auroc_reconstruction=0.5, eval_error=1.0,
            train_loss=loss + 0.01 * rng.normal())
        for model, order, losses in (("AE", "", plain), ("RAE", "pre", residual), ("RVAE", "pre", residual),
                                     ("RAE", "post", residual), ("VAE", "", plain))
        for depth, loss in losses.items() for seed in range(3)
    ]  # fmt: skip


def test_degradation(folder: Path) -> None:
    down, up = {2: 9.0, 8: 7.0, 16: 6.0, 64: 5.0}, {2: 9.0, 8: 7.0, 16: 9.5}
    held = found("degradation", degradation_rows(up, down), folder)
    assert len(held) == 4
    assert all(claim.held for claim in held.values())
    falls = {d: v for d, v in down.items() if d <= 16}
    rises = {**up, 64: 12.0}
    failed = found("degradation", degradation_rows(falls, rises), folder)
    assert not any(claim.held for claim in failed.values())


@pytest.mark.parametrize("spikes", [False, True])
def test_explosion(spikes: bool, folder: Path) -> None:
    rows = []
    for cure, ratio in (("unclipped", 1000.0 if not spikes else 3.0), ("defaults", 50.0 if spikes else 2.0)):
        for depth in (80, 200):
            name: dict[str, Any] = {"model": "RVAE", "order": "pre", "novel": "0", "n_layers": depth, "variant": cure}
            metrics = {"norm_ratio": ratio, "loss_ratio": ratio, "median_grad_norm": 1.0, "max_grad_norm": ratio}
            rows.append(row(**name, **metrics, train_loss=30.0, auroc_reconstruction=0.9))
            folder.mkdir(exist_ok=True)
            steps = np.abs(np.random.default_rng(0).normal(size=3000)) + 1
            arrays = {"loss": steps, "grad_norm": steps}
            store_arrays(steps_file(folder, Cell(data="mnist", seed=0, **name)), arrays)
    claims = found("explosion", rows, folder)
    assert [claim.held for claim in claims.values()] == [not spikes] * 3
    pictures = by_name("explosion").findings(rows, Settings(data=("mnist",), seeds=1), folder).pictures
    assert {p.name for p in pictures} == {f"explosion-{n}-mnist-RVAE" for n in ("spikes", "grad-norm", "loss")}


@pytest.mark.parametrize("nothing", ["", 0.0])
def test_runs_too_short_for_a_spike_tell_nothing(nothing: Any, folder: Path) -> None:
    """0 stands for it in results of before."""
    rows = [
        row(model="RVAE", order="pre", novel="0", n_layers=80, variant=cure, train_loss=30.0, auroc_reconstruction=0.9,
            norm_ratio=ratio, loss_ratio=ratio, median_grad_norm=1.0, max_grad_norm=1.0)
        for cure, ratio in (("unclipped", 20.0), ("large batch", nothing), ("defaults", nothing))
    ]  # fmt: skip
    claims = found("explosion", rows, folder)
    assert [claim.held for claim in claims.values()] == [True, None, None]
    made = by_name("explosion").findings(rows, Settings(data=("mnist",), seeds=1), folder)
    (picture,) = made.pictures
    assert "Too short to be measured: large batch, defaults." in picture.caption
    assert [line["norm_ratio"] for line in made.tables["By cure and depth"]] == ["20", "", ""]


def test_explosion_takes_neither_variant_nor_models(folder: Path) -> None:
    """Its cells never had the variant that the page named, and keep no models."""
    with pytest.raises(ValueError, match="variant must be empty for explosion"):
        by_name("explosion").grid(Settings(data=("mnist",), seeds=1, variant="noise"))
    with pytest.raises(ValueError, match="models must be None for explosion"):
        reproduce("explosion", quick=True, data=["digits"], out=folder, models=folder / "models")


def test_explosion_of_runs_that_diverged(folder: Path) -> None:
    rows = []
    for cure, depth, ratio in (("unclipped", 10, math.inf), ("unclipped", 80, 4.0), ("defaults", 80, 2.0)):
        name: dict[str, Any] = {"model": "RVAE", "order": "pre", "novel": "0", "n_layers": depth, "variant": cure}
        metrics = {"norm_ratio": ratio, "loss_ratio": ratio, "median_grad_norm": 1.0, "max_grad_norm": ratio}
        trained = {} if math.isinf(ratio) else {"train_loss": 30.0, "auroc_reconstruction": 0.9}
        rows.append(row(**name, **metrics, **trained, steps=6))
        folder.mkdir(exist_ok=True)
        steps = np.ones(0 if math.isinf(ratio) else 50)
        store_arrays(steps_file(folder, Cell(data="mnist", seed=0, **name)), {"loss": steps, "grad_norm": steps})
    claims = found("explosion", rows, folder)
    assert all(claim.held for claim in claims.values())
    made = by_name("explosion").findings(rows, Settings(data=("mnist",), seeds=1), folder)
    spikes = next(p for p in made.pictures if p.name == "explosion-spikes-mnist-RVAE")
    assert "Without a point, some of their runs having diverged: unclipped at 10." in spikes.caption
    assert made.tables["By cure and depth"][0]["norm_ratio"] == "inf"
    assert diverged(rows) == ["mnist, 0 novel, RVAE pre unclipped, 10 layers, seed 0, at step 7"]


def test_a_run_that_diverges_leaves_the_picture_of_steps() -> None:
    runs = {"radam": np.array([1.0, 1e3, 1e17]), "defaults": np.linspace(20.0, 10.0, 50)}
    wild = plot_steps("steps", "loss by step", runs, ylabel="loss", caption="Seed 0.")
    assert wild.caption == "Seed 0. Beyond the picture: radam."
    assert "radam: median 1,000, largest 1.000e+17" in wild.alt
    calm = plot_steps("steps", "loss by step", {"defaults": runs["defaults"]}, ylabel="loss", caption="Seed 0.")
    assert calm.caption == "Seed 0."


@pytest.mark.parametrize("good", [True, False])
def test_deep(good: bool, folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(model=model, order=order, novel=novel, seed=seed, n_layers=80, norm_ratio=1.0, loss_ratio=1.0,
            train_loss=loss, auroc_reconstruction=auroc + 0.01 * rng.normal(), auroc_sap=auroc,
            auroc_hyperplane=auroc - 0.04)
        for novel in "01" for seed in range(3)
        for model, order, loss, auroc in (("RVAE", "pre", 28.0 if good else 40.0, 0.8 if good else 0.6),
                                          ("VAE", "", 48.0, 0.62))
    ]  # fmt: skip
    claims = found("deep", rows, folder)
    assert [claim.held for claim in claims.values()] == [good] * 4


@pytest.mark.parametrize("good", [True, False])
def test_rapp(good: bool, folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(model=model, order=order, setting=setting, novel=digit, seed=seed, n_layers=10,
            auroc_reconstruction=0.88 + 0.01 * rng.normal(), auroc_sap=0.9,
            auroc_nap=(0.96 if good else 0.881) + 0.01 * rng.normal())
        for setting in ("multimodal", "unimodal") for digit in article.DIGITS for seed in range(3)
        for model, order in (("RVAE", "pre"), ("VAE", ""))
    ]  # fmt: skip
    claims = found("rapp", rows, folder)
    assert claims["mnist, multimodal: the best score of RVAE reaches 0.945"].held is good


@pytest.mark.parametrize("good", [True, False])
def test_places(good: bool, folder: Path) -> None:
    rng = np.random.default_rng(0)
    better = {"sap/stages": 0.02, "sap/branches": 0.04, "nap/stages": 0.02, "ridge-/units": 0.05} if good else {}
    rows = [
        row(model="RVAE", order="pre", novel=digit, seed=seed, n_layers=10,
            **{f"auroc_{name}": (0.9 if good or name not in ("sap/stages", "nap/stages") else 0.95)
               + better.get(name, 0.0) + 0.002 * rng.normal() for name in places.SCORES})
        for digit in article.DIGITS for seed in range(2)
    ]  # fmt: skip
    claims = found("places", rows, folder)
    assert [claim.held for claim in claims.values()] == [good] * 2
    if good:
        assert (
            "AUROC on mnist of ridge-/units"
            in claims["mnist: another place is better for NAP than the paper's"].sentence
        )
        assert "over 10 pairs" in claims["mnist: another place is better for NAP than the paper's"].sentence
    else:
        assert all("By seed 0 the paper's place is the best of" in claim.sentence for claim in claims.values())
    tables = by_name("places").findings(rows, Settings(("mnist",), 2), folder).tables
    against = {line["score"]: line for line in tables["Against the paper's place, mnist"]}
    assert len(against) == len(places.SCORES) - 3  # less the error and the two themselves
    assert against["ridge-/units"]["above"] == ("20 of 20" if good else "0 of 20")
    assert float(against["ridge-/units"]["difference"]) == pytest.approx(0.03 if good else -0.05, abs=2e-3)
    assert float(against["ridge-/units"]["p"]) < 1e-6
    one = found("places", [r for r in rows if r["seed"] == "0"], folder)
    assert [claim.held for claim in one.values()] == [None] * 2


@pytest.mark.parametrize("good", [True, False])
def test_views(good: bool, folder: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [
        row(model="RVAE", order="pre", novel=digit, seed=seed, n_layers=10,
            **{f"auroc_{name}": 0.94 + (0.02 if good else -0.01) * ("@views" in name) + 0.002 * rng.normal()
               - (0.2 if digit == "1" and not good else 0.0) for name in views.SCORES})
        for digit in article.DIGITS for seed in range(2)
    ]  # fmt: skip
    claims = found("views", rows, folder)
    assert list(claims) == [
        *(f"mnist: {score} is better by the lowest over views" for score in ("reconstruction", "sap", "hyperplane")),
        "mnist: hyperplane@views reaches 0.945",
        "mnist: hyperplane@views of digit 1 is above 0.75",
    ]
    assert [claim.held for claim in claims.values()] == [good] * 5
    tables = by_name("views").findings(rows, Settings(("mnist",), 2), folder).tables
    lines = {(line["score"], line["views"]): line["mnist, RVAE pre"] for line in tables["By views"]}
    assert len(lines) == len(views.SCORES)
    gain = float(lines["sap", "views"]) - float(lines["sap", "none"])
    assert gain == pytest.approx(0.02 if good else -0.01, abs=2e-3)
    assert not any(name.startswith("mnist: hyperplane@views") for name in found("views", rows[:3], folder))


@pytest.mark.parametrize("good", [True, False])
def test_quality(good: bool, folder: Path) -> None:
    rng, gain = np.random.default_rng(0), 0.02 if good else -0.01
    rows = [
        row(model="RVAE", order="pre", novel=digit, seed=seed, n_layers=10, variant=variant, eval_error=1.0,
            **{f"auroc_{name}": 0.9 + gain * (name in ("samples", "pixel")) + gain * bool(variant)
               + 0.002 * rng.normal() for name in quality.SCORES})
        for seed in range(2) for variant in ("", "noise", "bernoulli") for digit in article.DIGITS
        if not variant or seed == 0
    ]  # fmt: skip
    claims = found("quality", rows, folder)
    assert list(claims) == [
        "mnist: the error averaged over samples of z is above the error",
        "mnist: the error by each pixel's own spread is above the error",
        *(f"mnist: {way} is better by {score}" for way in (
            "Gaussian noise of standard deviation 0.2 on the input while training",
            "binary cross-entropy in place of squared error",
        ) for score in ("reconstruction", "hyperplane")),
    ]  # fmt: skip
    assert [claim.held for claim in claims.values()] == [good] * 6
    assert all("over 10 pairs" in claim.sentence for name, claim in claims.items() if " by " in name.split("is")[-1])
    picture = by_name("quality").findings(rows, Settings(("mnist",), 2), folder).pictures[0]
    assert picture.caption.endswith("as it is 20 cells, noise: 10, bernoulli: 10.")
    doubled = [{**r, "variant": "double-rate"} for r in rows if not r["variant"]]
    assert len(found("quality", doubled, folder, variant="double-rate")) == 2


def test_quality_tries_each_training_after_the_plain_one() -> None:
    """A user's variant is in every cell, and leaves none to try."""
    cells = by_name("quality").grid(Settings(("mnist",), 2))
    plain, varied = cells[:20], cells[20:]
    assert {c.variant for c in plain} == {""}
    assert [c.seed for c in varied] == [0] * 50 + [1] * 50
    assert {c.variant for c in varied} == set(quality.TRIED)
    alone = by_name("quality").grid(Settings(("mnist",), 2, variant="double-rate"))
    assert {c.variant for c in alone} == {"double-rate"}
    assert len(alone) == 20


def test_bounds_are_held_against_whole_seeds(folder: Path) -> None:
    """Of a run that is not done, the classes of its last seed may be the easy ones."""
    easy = {digit: 0.97 if digit == "0" else 0.36 for digit in "01"}
    rows = [
        row(model="RVAE", order="pre", novel=novel, seed=seed, n_layers=80, train_loss=28.0, norm_ratio=1.0,
            loss_ratio=1.0, **{f"auroc_{score}": easy[novel] for score in ("reconstruction", "sap", "hyperplane")})
        for novel, seed in (("0", 0), ("0", 1), ("0", 2), ("1", 2))
    ]  # fmt: skip
    first, whole = found("deep", rows[:1], folder), found("deep", rows, folder)
    name = "mnist: RVAE's AUROC by the error reaches 0.75"
    assert first[name].held is None
    assert whole[name].held is False
    assert whole[name].sentence.startswith("0.665 is the mean AUROC of RVAE over the digits 0 and 1 by the error (1 wh")
    scored = [
        row(model="RVAE", order="pre", novel=digit, seed=seed, n_layers=10,
            **{f"auroc_{name}": 0.93 + 0.001 * int(digit) for name in views.SCORES}, auroc_nap=0.8, auroc_local=0.8,
            auroc_rank=0.8)
        for seed, digits in ((0, article.DIGITS), (1, "0")) for digit in digits
    ]  # fmt: skip
    scored[-1] |= {f"auroc_{score}": "0.99999" for score in ("sap", "hyperplane", "hyperplane@views")}
    views_, rapp = found("views", scored, folder), found("rapp", scored, folder)
    assert "(1 whole seeds)" in views_["mnist: hyperplane@views reaches 0.945"].sentence
    assert "(1 whole seeds)" in rapp["mnist, multimodal: the best score of RVAE reaches 0.945"].sentence
    assert views_["mnist: hyperplane@views reaches 0.945"].sentence.startswith("0.9345 is the mean")


def test_the_best_score_is_not_one_that_only_easy_cells_have(folder: Path) -> None:
    rows = [
        row(model="RVAE", order="pre", novel=digit, seed=0, n_layers=10, auroc_reconstruction=error,
            auroc_sap=error + 0.05, **({"auroc_hyperplane": error + 0.01} if digit == "0" else {}))
        for digit, error in zip(article.DIGITS, [0.94] + [0.5] * 9, strict=True)
    ]  # fmt: skip
    claims = found("rapp", rows, folder)
    assert "by sap (the best of" in claims["mnist, multimodal: the best score of RVAE reaches 0.945"].sentence


def test_a_quick_run_is_not_held_against_the_article(folder: Path) -> None:
    claims = found("novelty", novelty_rows(0.01, "09"), folder, quick=True)
    assert list(claims) == ["mnist: RVAE pre is above VAE", "mnist: RVAE pre is above RVAE post"]


def test_summary_is_mean_deviation_and_number() -> None:
    rows = [row(model="AE", seed=s, loss=v) for s, v in enumerate((1.0, 2.0, 3.0))] + [row(model="VAE", loss="")]
    table = summary(rows, ("loss",), ("series",))
    assert table[0] == {"series": "AE", "cells": "3", "loss": "2", "loss sd": "1"}
    assert table[1] == {"series": "VAE", "cells": "1", "loss": "", "loss sd": ""}
    assert to_csv(table).splitlines()[1] == "AE,3,2,1"


def test_the_page_needs_nothing_else_and_says_what_became_of_each_claim(folder: Path) -> None:
    findings = Findings(
        claims=[Claim("first", True, "It is so <b>."), Claim("second", False, "It is not."), Claim("third", None, "?")],
        pictures=by_name("novelty").findings(novelty_rows(0.0), Settings(("mnist",), 3), folder).pictures,
        tables={"By model": [{"series": "AE", "auroc": ".9"}]},
    )
    page = write_page(
        folder, title="T & U", description="D", findings=findings, configuration={"command": "x"}, notes=["Quick!"]
    )
    text = page.read_text()
    assert [re.search(f"{name}</b> <span[^>]*>([^<]*)<", text)[1] for name in ("first", "second", "third")] == [  # type: ignore[index]
        "held", "did not hold", "not tested",
    ]  # fmt: skip
    assert "It is so &lt;b&gt;." in text
    assert "T &amp; U" in text
    assert "Quick!" in text
    assert not re.search(r'(src|href)="(?!data:)', text)
    encoded = base64.b64encode((folder / "novelty-mnist.png").read_bytes()).decode()
    assert encoded in text
