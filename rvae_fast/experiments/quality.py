"""Beyond the article: other scores of the same networks, and other ways to train them, each against what it changes.

The cells without a variant are ``novelty``'s and ``rapp``'s RVAE, of the same names: with ``--models`` what these have
trained is only scored here. Ensembles are ``novelty --variant ensemble`` and ``two-rates``; the rank sum of scores is
one of ``novelty``'s own.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import greater
from rvae_fast.experiments.experiment import VARIANTS, Experiment, Settings
from rvae_fast.experiments.novelty import rvae_cells
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.tables import Row, paired, pick, summary

#: The error of a reconstruction in three ways, and the library's best score.
SCORES = ("reconstruction", "samples", "pixel", "hyperplane")

#: Those that stand in place of the error.
OTHER_ERRORS = {"samples": "the error averaged over samples of z", "pixel": "the error by each pixel's own spread"}

#: What a way to train is judged by: the article's score and the library's best.
JUDGES = ("reconstruction", "hyperplane")

#: The ways to train, of :data:`~rvae_fast.experiments.experiment.VARIANTS`.
TRIED = ("kl-half", "kl-warm-up", "noise", "absolute", "bernoulli")


def grid(settings: Settings) -> list[Cell]:
    """RVAE of ten layers by ten novel classes (one in a quick run) by seeds, as it is and then by each of `TRIED`.

    A variant of the user's is in every cell, and leaves no other to try beside it.
    """
    cells = rvae_cells(settings, SCORES)
    if settings.variant:
        return cells
    every = (dataclasses.replace(settings, variant=name) for name in TRIED)
    # Whole seeds are done one after another; those as they are come first of all, as they may only have to be scored.
    varied = [cell for variant in every for cell in rvae_cells(variant, SCORES)]
    return cells + sorted(varied, key=lambda cell: cell.seed)


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """Whether another error finds more than the error itself, and another training more than the plain one."""
    found = Findings()
    suffix = f" {settings.variant}" if settings.variant else ""
    for data in settings.data:
        here = pick(rows, data=data)
        own = pick(here, series="RVAE pre" + suffix)
        if not here:
            continue
        quantity = f"AUROC of RVAE on {data}"
        for score, what in OTHER_ERRORS.items():
            found.claims.append(
                greater(
                    f"{data}: {what} is above the error",
                    paired(own, f"auroc_{score}"), paired(own, "auroc_reconstruction"),
                    labels=(score, "reconstruction"), quantity=quantity,
                )
            )  # fmt: skip
        trained = {name: pick(here, series=f"RVAE pre {name}") for name in TRIED}
        for name, of in trained.items():
            if not of:
                continue
            for score in JUDGES:
                found.claims.append(
                    greater(
                        f"{data}: {VARIANTS[name][0]} is better by {score}",
                        paired(of, f"auroc_{score}"), paired(own, f"auroc_{score}"),
                        labels=(name, "none"), quantity=f"{quantity} by {score}",
                    )
                )  # fmt: skip
        ways = {"as it is" + suffix: own, **{name: of for name, of in trained.items() if of}}
        found.pictures.append(
            plot_means(
                f"quality-{data}", f"AUROC by score and way to train, {data}",
                {
                    name: {s: list(v.values()) for s in SCORES if (v := paired(of, f"auroc_{s}"))}
                    for name, of in ways.items()
                    if of
                },
                xlabel="score", ylabel="AUROC", joined=False, caption=_caption(own, trained),
            )
        )  # fmt: skip
    metrics = tuple(f"auroc_{name}" for name in SCORES)
    found.tables["By way to train"] = summary(rows, (*metrics, "eval_error"), ("data", "series"))
    found.tables["By class"] = summary(rows, metrics, ("data", "novel", "series"))
    return found


def _caption(own: list[Row], trained: dict[str, list[Row]]) -> str:
    """What the spread is over, and whether all means are of the same classes and seeds."""
    text = "The spread is over classes and seeds."
    cells = paired(own, "auroc_reconstruction").keys()
    others = {name: paired(of, "auroc_reconstruction").keys() for name, of in trained.items() if of}
    parts = [f"{name}: {len(of)}" for name, of in others.items() if of != cells]
    if parts:
        text += f" Not all are of the same classes and seeds: as it is {len(cells)} cells, {', '.join(parts)}."
    return text


EXPERIMENT = Experiment(
    name="quality",
    title="Beyond the article",
    description=(
        "Other errors (averaged over samples of z, by each pixel's own spread) and other ways to train (KL weight, its "
        "warm-up, noise on the input, absolute error, cross-entropy), each against the plain one over classes and "
        "seeds. RVAE of ten layers, one class novel."
    ),
    data=("mnist", "fashion_mnist"),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
