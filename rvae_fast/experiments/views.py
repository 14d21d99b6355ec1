"""Views of an image: the lowest score over small deformations, against that of the image as it is.

Its cells are ``novelty``'s and ``rapp``'s RVAE, of the same names: with ``--models`` what these have trained is only
scored here.
"""

from __future__ import annotations

from pathlib import Path

from rvae_fast.experiments import article
from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import at_least, greater
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.novelty import rvae_cells
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.rapp import BOUNDS
from rvae_fast.experiments.tables import Row, grouped, paired, pick, summary, whole_seeds
from rvae_fast.experiments.view_scores import ALL, OF
from rvae_fast.views import KINDS

SCORES = tuple(name for score in OF for name in (score, *(f"{score}@{kind}" for kind in (ALL, *KINDS))))

#: What digit 1, the hardest of MNIST's, is to have.
DIGIT_ONE = 0.75


def grid(settings: Settings) -> list[Cell]:
    """RVAE of ten layers by ten novel classes (one in a quick run) by seeds."""
    return rvae_cells(settings, SCORES)


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """Whether views make each score better, and what the best of them reaches."""
    found = Findings()
    suffix = f" {settings.variant}" if settings.variant else ""
    for data in settings.data:
        own = pick(rows, data=data, setting="multimodal", series="RVAE pre" + suffix)
        if not own:
            continue
        for score in OF:
            found.claims.append(
                greater(
                    f"{data}: {score} is better by the lowest over views",
                    paired(own, f"auroc_{score}@{ALL}"), paired(own, f"auroc_{score}"),
                    labels=(f"{score}@{ALL}", score), quantity=f"AUROC on {data}",
                )
            )  # fmt: skip
        if not settings.quick and len({row["novel"] for row in own}) == len(article.DIGITS):
            best = f"hyperplane@{ALL}"
            if data in BOUNDS:
                found.claims.append(
                    at_least(
                        f"{data}: {best} reaches {BOUNDS[data]}",
                        whole_seeds(own, f"auroc_{best}", article.DIGITS), BOUNDS[data],
                        f"mean AUROC of RVAE on {data} by {best} over the ten classes", of="whole seeds",
                    )
                )  # fmt: skip
            if data == "mnist":
                found.claims.append(
                    at_least(
                        f"mnist: {best} of digit 1 is above {DIGIT_ONE}",
                        list(paired(pick(own, novel="1"), f"auroc_{best}").values()), DIGIT_ONE,
                        f"AUROC of RVAE on digit 1 by {best}",
                    )
                )  # fmt: skip
        found.pictures.append(
            plot_means(
                f"views-{data}", f"AUROC by novel class, {data}",
                {name: grouped(own, "novel", f"auroc_{name}") for score in OF for name in (score, f"{score}@{ALL}")},
                xlabel="novel class", ylabel="AUROC", joined=False,
                caption="The spread is over seeds. @views is the lowest score over small shifts, rotations, zooms and "
                "shears of the image.",
            )
        )  # fmt: skip
    metrics = tuple(f"auroc_{name}" for name in SCORES)
    whole = summary(rows, metrics, ("data", "series"))
    found.tables["By views"] = [
        {
            "score": score, "views": kind or "none",
            **{f"{line['data']}, {line['series']}": line[f"auroc_{score}{'@' * bool(kind)}{kind}"] for line in whole},
        }
        for score in OF
        for kind in ("", *KINDS, ALL)
    ]  # fmt: skip
    both = tuple(f"auroc_{score}{views}" for score in OF for views in ("", f"@{ALL}"))
    found.tables["By class"] = summary(rows, both, ("data", "series", "novel"))
    return found


EXPERIMENT = Experiment(
    name="views",
    title="Views of an image",
    description=(
        "Reconstruction error, SAP and the hyperplane score of RVAE, of the image as it is and the lowest over small "
        "deformations of it (rvae_fast.views): shifts, rotations, zooms, shears, and all of them. One class novel."
    ),
    data=("mnist", "fashion_mnist"),
    seeds=5,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
