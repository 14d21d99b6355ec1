"""Degradation with depth: a plain autoencoder's train loss turns up, a residual one's keeps falling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rvae_fast.experiments import article
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import greater, keeps_falling, turns_up
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.tables import Row, by_depth, paired, pick, summary, value

MODELS = (("AE", ""), ("RAE", "pre"), ("RAE", "post"), ("VAE", ""), ("RVAE", "pre"))
SCORES = ("reconstruction",)
DEPTHS = (2, 4, 6, 8, 10, 12, 14, 16)
FURTHER = (32, 64, 100)

#: Where the article has all rows and some hundred epochs: 490 trainings of so many steps (240) are, by arithmetic,
#: about two hours of two cores.
EPOCHS, ROWS = 10, 6000

#: At every depth: with the library's own plan the number of transitions, which no unit skips, would change with depth.
STAGES = 2


def grid(settings: Settings) -> list[Cell]:
    """Five models by the article's depths, the residual ones further, with class '0' novel."""
    depths, further = ((2, 8, 16), (32,)) if settings.quick else (DEPTHS, FURTHER)
    return settings.vary(
        [
            Cell(
                data=data, novel="0", model=model, order=order, n_layers=depth, seed=seed,
                training=settings.training(EPOCHS, 6, learning_rate=_learning_rate(order, depth)),
                network={"stages": STAGES} if order else {}, scores=SCORES, rows=settings.rows(1500, ROWS),
            )
            for data in settings.data
            for seed in range(settings.seeds)
            for model, order in MODELS
            for depth in (*depths, *(further if order else ()))
        ]
    )  # fmt: skip


def _learning_rate(order: str, depth: int) -> float | str:
    """The library's, by depth. Plain networks, which it leaves alone, are better off with less past ten layers."""
    if order:
        return "auto"
    return 2e-3 * min(1.0, 10 / depth)


def _losses(rows: list[Row]) -> dict[int, dict[str, float]]:
    """Train loss a pixel, as the article has it, by depth and seed."""
    per_pixel = [{**row, "loss": repr(value(row, "train_loss") / value(row, "features"))} for row in rows]
    return by_depth(per_pixel, "loss")


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """The article's claims about depth, on each data set."""
    found = Findings()
    for data in settings.data:
        here = pick(rows, data=data)
        names = [" ".join(p for p in (m, o, settings.variant) if p) for m, o in MODELS]
        own = {name: pick(here, series=name) for name in names}
        losses = {name: _losses(own[name]) for name in names}
        deepest = max(losses[names[0]], default=16)
        far = max((d for name in (names[1], names[4]) for d in losses[name] if d <= 64), default=64)
        found.claims += [
            turns_up(f"{data}: AE's loss turns up", losses[names[0]], deepest, "AE's train loss a pixel"),
            *(
                keeps_falling(
                    f"{data}: {name}'s loss keeps falling to {far} layers",
                    {d: v for d, v in losses[name].items() if d <= far},
                    f"{name}'s train loss a pixel",
                )
                for name in (names[1], names[4])
            ),
            greater(
                f"{data}: at {deepest} layers RAE pre's loss is below AE's",
                paired(pick(own[names[0]], n_layers=deepest), "train_loss"),
                paired(pick(own[names[1]], n_layers=deepest), "train_loss"),
                labels=("AE", "RAE pre"),
                quantity=f"train loss on {data} at {deepest} layers",
            ),
        ]
        emnist = data == "emnist" and not settings.variant
        found.pictures += [
            plot_means(
                f"degradation-loss-{data}", f"Train loss by depth, {data}", _listed(losses),
                article.DEGRADATION if emnist else None,
                xlabel="linear layers of the encoder", ylabel="train loss a pixel", logarithmic=True,
                caption="A VAE's loss includes its KL divergence.",
            ),
            plot_means(
                f"degradation-auroc-{data}", f"AUROC by depth, {data}",
                _listed({name: by_depth(own[name], "auroc_reconstruction") for name in names}),
                article.DEGRADATION_AUROC if emnist else None,
                xlabel="linear layers of the encoder", ylabel="AUROC",
                caption="A lower loss is not a higher AUROC.",
            ),
        ]  # fmt: skip
    metrics = ("train_loss", "eval_error", "auroc_reconstruction")
    found.tables["By model and depth"] = summary(rows, metrics, ("data", "series", "n_layers"))
    return found


def _listed(values: dict[str, dict[int, dict[str, float]]]) -> dict[str, dict[Any, list[float]]]:
    return {name: {depth: list(depths[depth].values()) for depth in sorted(depths)} for name, depths in values.items()}


EXPERIMENT = Experiment(
    name="degradation",
    title="Degradation with depth",
    description=(
        "Train loss and AUROC by the number of layers, class '0' novel (RaPP's split), on a part of the rows; residual "
        "networks have two stages at every depth. The claim: a plain autoencoder's train loss turns up with depth, a "
        "residual one's keeps falling."
    ),
    data=("emnist", "mnist"),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
