"""RaPP's table: reconstruction error, SAP and NAP of four models, and the library's own scores beside them.

Its multimodal VAE and RVAE are cells of ``novelty``: with ``--results`` or ``--models`` they are trained once for both.
"""

from __future__ import annotations

import math
from pathlib import Path

from rvae_fast.experiments import article
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import at_least, greater
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.novelty import EPOCHS, QUICK_EPOCHS, QUICK_ROWS
from rvae_fast.experiments.novelty import SCORES as SHARED
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.tables import Row, paired, pick, summary, whole_seeds

MODELS = (("AE", ""), ("VAE", ""), ("RAE", "pre"), ("RVAE", "pre"))
SETTINGS = ("multimodal", "unimodal")

#: The last takes as long as half a training, and is for RVAE alone.
SCORES = (*SHARED, "hyperplane")

#: What the best score of RVAE is to reach, multimodal: the best published is .930 and .737. See also ``views``.
BOUNDS = {"mnist": 0.945, "fashion_mnist": 0.745}


def grid(settings: Settings) -> list[Cell]:
    """Four models by both of RaPP's settings by ten classes (one in a quick run) by seeds."""
    classes = ("0",) if settings.quick else article.DIGITS
    return settings.vary(
        [
            Cell(
                data=data, setting=setting, novel=novel, model=model, order=order, n_layers=10, seed=seed,
                training=settings.training(EPOCHS, QUICK_EPOCHS), scores=SCORES if model == "RVAE" else SHARED,
                rows=settings.rows(QUICK_ROWS),
            )
            for data in settings.data
            for seed in range(settings.seeds)
            for setting in SETTINGS
            for novel in classes
            for model, order in MODELS
        ]
    )  # fmt: skip


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """Which score is best, against the published ones and against the reconstruction error."""
    found = Findings()
    scores = [name for name in SCORES if any(row.get(f"auroc_{name}") for row in rows)]
    names = [f"{model} {order}".strip() for model, order in MODELS]
    suffix = f" {settings.variant}" if settings.variant else ""
    for data in settings.data:
        for setting in SETTINGS:
            here = pick(rows, data=data, setting=setting)
            own = {name: pick(here, series=name + suffix) for name in names}
            if not any(own.values()):
                continue  # nothing to draw beside the published values
            rvae = own["RVAE pre"]
            if rvae:
                best = max(scores, key=lambda s: _gain(rvae, s))
                where = f"{data}, {setting}"
                if best != "reconstruction":
                    found.claims.append(
                        greater(
                            f"{where}: the best score of RVAE is above its reconstruction error",
                            paired(rvae, f"auroc_{best}"), paired(rvae, "auroc_reconstruction"),
                            labels=(best, "reconstruction"), quantity=f"AUROC of RVAE on {where}",
                        )
                    )  # fmt: skip
                full = not settings.quick and len({row["novel"] for row in rvae}) == len(article.DIGITS)
                if setting == "multimodal" and data in BOUNDS and full:
                    values = whole_seeds(rvae, f"auroc_{best}", article.DIGITS)
                    found.claims.append(
                        at_least(
                            f"{where}: the best score of RVAE reaches {BOUNDS[data]}", values, BOUNDS[data],
                            f"mean AUROC of RVAE over the ten classes by {best} (the best of {len(scores)}, chosen on "
                            "these very results)",
                            of="whole seeds",
                        )
                    )  # fmt: skip
            published = {
                name: dict(zip(("reconstruction", "sap", "nap"), values, strict=True))
                for name, values in article.RAPP.get((data, setting), {}).items()
            }
            found.pictures.append(
                plot_means(
                    f"rapp-{data}-{setting}", f"AUROC by score, {data}, {setting}",
                    {name: {s: v for s in scores if (v := list(paired(of, f"auroc_{s}").values()))}
                     for name, of in own.items()},
                    published, xlabel="score", ylabel="AUROC", caption="The spread is over classes and seeds.",
                )
            )  # fmt: skip
    metrics = tuple(f"auroc_{name}" for name in scores)
    found.tables["By model"] = summary(rows, metrics, ("data", "setting", "series"))
    return found


def _gain(rows: list[Row], score: str) -> float:
    """By how much a score is above the error, in the mean of the cells that have both: not all may have it yet."""
    own, error = paired(rows, f"auroc_{score}"), paired(rows, "auroc_reconstruction")
    gains = [own[cell] - error[cell] for cell in own.keys() & error.keys()]
    return sum(gains) / len(gains) if gains else -math.inf


EXPERIMENT = Experiment(
    name="rapp",
    title="Scores along the projection pathway",
    description=(
        "Reconstruction error, SAP and NAP (Kim et al., ICLR 2020) of AE, VAE, RAE and RVAE, one class novel "
        "(multimodal) or one class normal (unimodal); beside them the library's local score (rvae_fast.local), the "
        "rank sum of these, and of RVAE the hyperplane score (rvae_fast.hyperplane)."
    ),
    data=("mnist", "fashion_mnist"),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
