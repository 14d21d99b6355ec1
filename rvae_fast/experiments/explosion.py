"""Exploding gradients: the spike of unclipped deep autoencoders, its cures, and the library's defaults at depth."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from rvae_fast.datasets.cache import load_arrays
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import at_least, at_most
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means, plot_steps
from rvae_fast.experiments.tables import Row, grouped, pick, series, summary, value
from rvae_fast.experiments.work import steps_file

SCORES = ("reconstruction",)
DEPTHS = (10, 40, 80, 100)
DEEPEST = 200

#: Where the article has all rows and 200 epochs: 245 trainings of so many steps (192, of the large batches 12) are, by
#: arithmetic, about two hours of two cores.
EPOCHS, ROWS = 12, 4000

#: Times the running median of the steps before it: above this a step is a spike.
SPIKE = 10.0

#: The article's training, and what was tried against its spikes, one change at a time.
_PLAIN: dict[str, Any] = {
    "max_grad_norm": None, "warmup_epochs": 0.0, "schedule": "constant", "learning_rate": 1e-3, "optimizer": "adam",
}  # fmt: skip
CURES: dict[str, dict[str, Any]] = {
    "unclipped": _PLAIN,
    "clipped": {**_PLAIN, "max_grad_norm": 10.0},
    "warm-up": {**_PLAIN, "warmup_epochs": 5.0},
    "radam": {**_PLAIN, "optimizer": "radam"},
    "large batch": {**_PLAIN, "accumulate": 16},
}
DEFAULTS = "defaults"
#: By name: what the library chooses is what is looked at here.
_DEFAULTS: dict[str, Any] = {"learning_rate": "auto", "warmup_epochs": "auto"}


def grid(settings: Settings) -> list[Cell]:
    """RAE and RVAE by cure and depth, and the defaults once more at 200 layers."""
    if settings.variant:
        raise ValueError(
            f"variant must be empty for explosion, whose cells are variants of their own: {', '.join(CURES)}, "
            f"{DEFAULTS}; got {settings.variant!r}"
        )
    depths = (10, 32) if settings.quick else DEPTHS
    plain = {"init": "default"}
    cells = []
    for data in settings.data:
        for seed in range(settings.seeds):
            for model in ("RVAE",) if settings.quick else ("RAE", "RVAE"):
                for cure, changes in {**CURES, DEFAULTS: _DEFAULTS}.items():
                    deepest = () if settings.quick or model == "RAE" or cure != DEFAULTS else (DEEPEST,)
                    cells += [
                        Cell(
                            data=data, novel="0", model=model, order="pre", n_layers=depth, seed=seed, variant=cure,
                            network={} if cure == DEFAULTS else plain,
                            training=settings.training(EPOCHS, 8, **changes),
                            scores=SCORES, rows=settings.rows(1000, ROWS), steps=True,
                        )
                        for depth in (*depths, *deepest)
                    ]  # fmt: skip
    return cells


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """The spike, its cures, the defaults."""
    found = Findings()
    rows = [_measured(row) for row in rows]
    for data in settings.data:
        here = pick(rows, data=data)
        plain = _there(pick(here, variant="unclipped"), "norm_ratio")
        found.claims.append(
            at_least(
                f"{data}: without clipping the gradient norm explodes", plain, SPIKE,
                "gradient norm of a step without clipping, in running medians", largest=True,
            )
        )  # fmt: skip
        deep = [r for r in pick(here, variant=DEFAULTS, model="RVAE") if int(r["n_layers"]) >= 80]
        for metric, what in (("loss_ratio", "loss"), ("norm_ratio", "gradient norm")):
            spikes = _there(deep, metric)
            found.claims.append(
                at_most(
                    f"{data}: with the defaults 80 layers and more train without a spike of the {what}", spikes, SPIKE,
                    f"{what} of a step with the defaults at 80 layers and more, in running medians", largest=True,
                )
            )  # fmt: skip
        for model in ("RAE", "RVAE"):
            own = pick(here, model=model)
            if _there(own, "norm_ratio"):
                found.pictures.append(_spikes(own, data, model))
            found.pictures += _runs(own, data, model, folder)
    metrics = ("norm_ratio", "loss_ratio", "median_grad_norm", "max_grad_norm", "train_loss", "auroc_reconstruction")
    found.tables["By cure and depth"] = summary(rows, metrics, ("data", "series", "n_layers"))
    return found


def _measured(row: Row) -> Row:
    """A row without the 0 that stood, in results of before, for a run too short to have a spike."""
    return row | {name: "" for name in ("norm_ratio", "loss_ratio") if value(row, name) == 0.0}


def _there(rows: list[Row], metric: str) -> list[float]:
    return [v for row in rows if not math.isnan(v := value(row, metric))]


def _spikes(rows: list[Row], data: str, model: str) -> Any:
    by_cure = {cure: grouped(pick(rows, variant=cure), lambda r: int(r["n_layers"]), "norm_ratio")
               for cure in (*CURES, DEFAULTS)}  # fmt: skip
    short = [cure for cure, of in by_cure.items() if not of and pick(rows, variant=cure)]
    by_cure = {cure: of for cure, of in by_cure.items() if of}
    return plot_means(
        f"explosion-spikes-{data}-{model}", f"The largest spike by depth, {model}, {data}", by_cure,
        xlabel="linear layers of the encoder", ylabel="gradient norm, in running medians", logarithmic=True,
        caption=f"Too short to be measured: {', '.join(short)}." if short else "",
    )  # fmt: skip


def _runs(rows: list[Row], data: str, model: str, folder: Path) -> list[Any]:
    """The steps of the first seed's runs at the greatest depth that all cures have."""
    depths = [{int(r["n_layers"]) for r in pick(rows, variant=cure, seed=0)} for cure in (*CURES, DEFAULTS)]
    shared = set.intersection(*(of for of in depths if of)) if any(depths) else set()
    runs: dict[str, dict[str, np.ndarray]] = {"loss": {}, "grad_norm": {}}
    for row in pick(rows, seed=0, n_layers=max(shared, default=-1)):
        keys = ("data", "novel", "model", "order", "setting", "variant")
        cell = Cell(n_layers=int(row["n_layers"]), seed=0, **{k: row[k] for k in keys})  # type: ignore[arg-type]
        if steps_file(folder, cell).exists():
            arrays = load_arrays(steps_file(folder, cell))
            for name in runs:
                if len(arrays[name]):  # a run may diverge at its first step
                    runs[name][row["variant"]] = arrays[name]
    return [
        plot_steps(
            f"explosion-{name.replace('_', '-')}-{data}-{model}",
            f"{title} by step, {series(rows[0]).split()[0]}, {max(shared)} layers, {data}", of,
            ylabel=title, caption="Of each stretch of steps the largest value; seed 0.",
        )
        for name, title, of in (("grad_norm", "gradient norm", runs["grad_norm"]), ("loss", "loss", runs["loss"]))
        if of
    ]  # fmt: skip


EXPERIMENT = Experiment(
    name="explosion",
    title="Exploding gradients and their cures",
    description=(
        "Gradient norm and loss step by step, class '0' novel: the article's training without clipping, one cure at a "
        "time, and the library's defaults, by depth."
    ),
    data=("mnist",),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
    keeps_models=False,
)
