"""The detectors with their defaults on tables, beside scikit-learn's: which network, which score, where NAP looks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import Claim, greater
from rvae_fast.experiments.experiment import EMBEDDED, Experiment, Settings
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.rivals import RIVALS
from rvae_fast.experiments.table_work import FLAGGED, FOLDS, MEMBERS, OWN, estimate, metric_names, run_table_cell
from rvae_fast.experiments.tables import Row, grouped, paired, pick

#: What NAP of a residual network takes on tables unless told otherwise, and what the paper's would be.
NAP, NAP_OF_PAPER = "nap-/units", "nap/stages"

#: Scores by network: (model, order, variant).
SCORES: dict[tuple[str, str, str], tuple[str, ...]] = {
    ("RVAE", "pre", ""): (
        "reconstruction", "elbo", "sap", NAP, NAP_OF_PAPER, "nap-/stages", "nap/units", "local", "hyperplane",
    ),
    ("RAE", "pre", ""): ("reconstruction", "sap", NAP, "local", "hyperplane"),
    ("VAE", "", ""): ("reconstruction", "sap", NAP_OF_PAPER, "local", "hyperplane"),
    ("AE", "", ""): ("reconstruction", "sap", NAP_OF_PAPER, "local", "hyperplane"),
    **{("RVAE", "pre", variant): ("reconstruction", NAP, "hyperplane") for variant in MEMBERS},
    ("RVAE", "pre", FOLDS): ("reconstruction",),
    **{(rival, "", ""): (OWN,) for rival in RIVALS},
}  # fmt: skip

ERROR = ("RVAE pre", "reconstruction")

TABLES = (EMBEDDED, "annthyroid", "pendigits", "satellite", "wbc", "covertype", "kddcup99", "shuttle")

#: For a test over so few tables.
ALPHA = 0.05

QUICK_ROWS, QUICK_EPOCHS = 300, 10


def grid(settings: Settings) -> list[Cell]:
    """Every network and every rival by tables by seeds; of the digits another one is novel by each seed."""
    if settings.variant:
        raise ValueError(
            f"variant must be empty for tabular, whose detectors are as they are by default, got {settings.variant!r}"
        )
    if others := [name for name in settings.data if name not in TABLES]:
        raise ValueError(f"data must be among {', '.join(TABLES)} for tabular, got {', '.join(others)}")
    epochs = settings.epochs or (QUICK_EPOCHS if settings.quick else None)
    given = {} if epochs is None else {"epochs": epochs}
    return [
        Cell(
            data=data, setting="table", novel=str(seed % 10) if data == EMBEDDED else "anomaly", model=model,
            order=order, n_layers=0, seed=seed, variant=variant, network={} if model in RIVALS else given,
            scores=scores, rows=settings.rows(QUICK_ROWS),
        )
        for seed in range(settings.seeds)
        for data in settings.data
        for (model, order, variant), scores in SCORES.items()
    ]  # fmt: skip


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """What is better than what, over tables: the mean of a table's seeds is one value of the test."""
    found = Findings()
    values = {
        (series, score): there
        for series, scores in _series().items()
        for score in scores
        if (there := paired(pick(rows, series=series), f"auroc_{score}"))
    }
    error = values.get(ERROR, {})
    for rival in RIVALS:
        found.claims.append(_greater("RVAE by its error", error, rival, values.get((rival, OWN), {})))
    for score in (NAP, "hyperplane"):
        scored = values.get(("RVAE pre", score), {})
        for rival in RIVALS:
            found.claims.append(_greater(f"RVAE by {score}", scored, rival, values.get((rival, OWN), {})))
    for other in ("RAE pre", "VAE", "AE"):
        found.claims.append(
            _greater("RVAE by its error", error, f"{other} by its", values.get((other, "reconstruction"), {}))
        )
    for score in ("sap", NAP, "local", "hyperplane"):
        scored = values.get(("RVAE pre", score), {})
        found.claims.append(_greater(f"RVAE by {score}", scored, "RVAE by its error", error))
    found.claims.append(
        _greater(
            f"NAP's default, {NAP},", values.get(("RVAE pre", NAP), {}), f"the paper's, {NAP_OF_PAPER}",
            values.get(("RVAE pre", NAP_OF_PAPER), {}),
        )
    )  # fmt: skip
    for variant in MEMBERS:
        for score, how in (("reconstruction", "the error"), (NAP, NAP), ("hyperplane", "hyperplane")):
            two, one = (values.get((series, score), {}) for series in (f"RVAE pre {variant}", "RVAE pre"))
            found.claims.append(_greater(f"two RVAEs of {variant}, by {how},", two, "one", one))
    shown = {
        "RVAE: error": ERROR, "RVAE: NAP": ("RVAE pre", NAP), "RVAE: hyperplane": ("RVAE pre", "hyperplane"),
        **{rival: (rival, OWN) for rival in RIVALS},
    }  # fmt: skip
    found.pictures.append(
        plot_means(
            "tabular", "AUROC by table",
            {label: grouped(pick(rows, series=of), "data", f"auroc_{score}") for label, (of, score) in shown.items()},
            xlabel="table", ylabel="AUROC", joined=False, caption="The spread is over seeds, each of another split.",
        )
    )  # fmt: skip
    found.tables["By table"] = _by_table(rows, "auroc_", list(values))
    if against := [_against(key, values[key], error) for key in values if key != ERROR and error]:
        found.tables["Against the error of RVAE"] = against
    flagged = [key for key in values if key[1] != OWN]
    if flagged:
        found.tables["New normal rows flagged, a tenth intended"] = _by_table(rows, FLAGGED, flagged)
    return found


def _series() -> dict[str, tuple[str, ...]]:
    return {" ".join(part for part in name if part): scores for name, scores in SCORES.items()}


def _label(series: str, score: str) -> str:
    return series if score == OWN else f"{series}: {score}"


def _means(values: dict[tuple[str, ...], float]) -> dict[tuple[str, ...], float]:
    """By table, over its seeds."""
    tables = dict.fromkeys(key[0] for key in values)
    return {(table,): float(np.mean([v for key, v in values.items() if key[0] == table])) for table in tables}


def _greater(first: str, a: dict[tuple[str, ...], float], second: str, b: dict[tuple[str, ...], float]) -> Claim:
    shared = a.keys() & b.keys()  # of a run that is not done, the cells that both have
    return greater(
        f"{first} is above {second}",
        _means({key: v for key, v in a.items() if key in shared}),
        _means({key: v for key, v in b.items() if key in shared}),
        labels=(first, second), quantity="AUROC, a mean a table,", alpha=ALPHA,
    )  # fmt: skip


def _by_table(rows: list[Row], prefix: str, keys: list[tuple[str, str]]) -> list[dict[str, str]]:
    """Means over seeds, a line a network and score, a column a table."""
    table = []
    for series, score in keys:
        means = _means(paired(pick(rows, series=series), prefix + score))
        line = {"scored by": _label(series, score), **{name: f"{v:.3f}" for (name,), v in means.items()}}
        table.append({**line, "mean": f"{np.mean(list(means.values())):.3f}" if means else ""})
    names = list(dict.fromkeys(name for line in table for name in line if name != "mean"))
    return [{name: line.get(name, "") for name in (*names, "mean")} for line in table]


def _against(
    key: tuple[str, str], own: dict[tuple[str, ...], float], error: dict[tuple[str, ...], float]
) -> dict[str, str]:
    """A score beside RVAE's error, pair by pair of table and seed."""
    pairs = sorted(own.keys() & error.keys())
    difference = np.array([own[pair] - error[pair] for pair in pairs])
    return {
        "scored by": _label(*key),
        "difference": f"{difference.mean():+.4f}" if len(pairs) else "",
        "above": f"{int((difference > 0).sum())} of {len(pairs)}",
    }


EXPERIMENT = Experiment(
    name="tabular",
    title="Tables",
    description=(
        "The detectors with their defaults on tables of 9 to 64 columns, half of the normal rows (5,000 at most) to "
        "learn from, the other half (10,000 at most) and all anomalies to test with; beside them isolation forest, "
        "PCA, nearest neighbours, local outlier factor and one-class SVM of scikit-learn, on standardised columns. "
        "The tests are over tables, whose number is small; their p are not corrected for how many they are."
    ),
    data=TABLES,
    seeds=5,
    scores=tuple(dict.fromkeys(score for scores in SCORES.values() for score in scores)),
    grid=grid,
    findings=findings,
    work=run_table_cell,
    estimate=estimate,
    metrics=metric_names,
    keeps_models=False,
)
