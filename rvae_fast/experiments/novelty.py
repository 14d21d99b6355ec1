"""RVAE against VAE, digit by digit: the article's second experiment, over seeds."""

from __future__ import annotations

from pathlib import Path

from rvae_fast.experiments import article
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import at_least, greater, near_or_above, untested
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.tables import Row, grouped, paired, pick, summary, whole_seeds

MODELS = (("RVAE", "pre"), ("RVAE", "post"), ("VAE", ""))
#: Those of ``rapp`` too, so that a cell that both experiments have is run once: recipes are compared with their scores.
SCORES = ("reconstruction", "sap", "nap", "local", "rank")
METRIC = "auroc_reconstruction"

#: The article trains for 200 epochs; so many take about three hours of two cores, see docs/results/README.md.
EPOCHS = 12
QUICK_EPOCHS, QUICK_ROWS = 8, 2000


def grid(settings: Settings) -> list[Cell]:
    """Ten novel classes (two in a quick run) by three models by seeds."""
    classes = ("0", "9") if settings.quick else article.DIGITS
    training = settings.training(EPOCHS, QUICK_EPOCHS)
    return settings.vary(
        [
            Cell(
                data=data, novel=novel, model=model, order=order, n_layers=10, seed=seed,
                training=training, scores=SCORES, rows=settings.rows(QUICK_ROWS),
            )
            for data in settings.data
            for seed in range(settings.seeds)
            for novel in classes
            for model, order in MODELS
        ]
    )  # fmt: skip


def rvae_cells(settings: Settings, scores: tuple[str, ...]) -> list[Cell]:
    """The cells of RVAE ``pre`` (one class in a quick run) with other scores: kept models are not trained again."""
    return settings.vary(
        [
            Cell(
                data=data, novel=novel, model="RVAE", order="pre", n_layers=10, seed=seed,
                training=settings.training(EPOCHS, QUICK_EPOCHS), scores=scores, rows=settings.rows(QUICK_ROWS),
            )
            for data in settings.data
            for seed in range(settings.seeds)
            for novel in (("0",) if settings.quick else article.DIGITS)
        ]
    )  # fmt: skip


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """The article's claims about the table, on each data set."""
    found = Findings()
    suffix = f" {settings.variant}" if settings.variant else ""
    for data in settings.data:
        here = pick(rows, data=data)
        by_series = {
            f"{model} {order}".strip(): pick(here, series=f"{model} {order}".strip() + suffix)
            for model, order in MODELS
        }
        quantity = f"AUROC by reconstruction error on {data}"
        pre, post, plain = (by_series[name] for name in ("RVAE pre", "RVAE post", "VAE"))
        for other, name in ((plain, "VAE"), (post, "RVAE post")):
            found.claims.append(
                greater(
                    f"{data}: RVAE pre is above {name}", paired(pre, METRIC), paired(other, METRIC),
                    labels=("RVAE pre", name), quantity=quantity,
                )
            )  # fmt: skip
        if data == "mnist" and not settings.quick:
            by_digit = grouped(pre, "novel", METRIC)
            name = "mnist: RVAE pre reaches a mean of .900 over the ten digits"
            if len(by_digit) < len(article.DIGITS):
                found.claims.append(untested(name, f"results are there for {len(by_digit)} of ten digits"))
            else:
                whole = whole_seeds(pre, METRIC, article.DIGITS)
                found.claims.append(
                    at_least(name, whole, 0.900, "mean AUROC of RVAE pre over the ten digits", of="whole seeds")
                )
            but_one = {digit: v for digit, v in article.NOVELTY["RVAE pre"].items() if digit != "1"}
            found.claims.append(
                near_or_above("mnist: every digit but 1 as in the article", by_digit, but_one, 0.01, "Mean AUROC")
            )
        found.pictures.append(
            plot_means(
                f"novelty-{data}", f"AUROC by novel class, {data}",
                {name: grouped(own, "novel", METRIC) for name, own in by_series.items()},
                article.NOVELTY if data == "mnist" else None,
                xlabel="novel class", ylabel="AUROC",
            )
        )  # fmt: skip
    found.tables["By model"] = summary(rows, (METRIC, "train_loss", "cpu_seconds"), ("data", "series"))
    found.tables["By novel class"] = summary(rows, (METRIC, "train_loss"), ("data", "novel", "series"))
    return found


EXPERIMENT = Experiment(
    name="novelty",
    title="RVAE against VAE, novelty by novelty",
    description=(
        "RaPP's split: one class is novel, 60 % of the other rows are trained on. AUROC by the squared reconstruction "
        "error, for residual VAEs with pre- and post-activation units and the plain VAE, 10 layers a side."
    ),
    data=("mnist", "fashion_mnist"),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
