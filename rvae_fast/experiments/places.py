"""Where to look: SAP and NAP of every place in a residual encoder, against those of the paper's.

RaPP compares a row with its reconstruction after every layer. A residual network has more places: each unit's output,
each branch, each linear layer. Its cells are ``novelty``'s and ``rapp``'s RVAE, of the same names: with ``--models``
what these have trained is only scored here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rvae_fast.experiments.cells import Cell
from rvae_fast.experiments.claims import Claim, greater, untested
from rvae_fast.experiments.experiment import Experiment, Settings
from rvae_fast.experiments.novelty import rvae_cells
from rvae_fast.experiments.page import Findings
from rvae_fast.experiments.plots import plot_means
from rvae_fast.experiments.tables import Row, grouped, paired, pick, summary
from rvae_fast.pathway import PATHWAYS

#: NAP of all linear layers or of all activations would take as long as a training: of them only single layers are.
WHITENED = ("stages", "units", "branches")

#: In the encoder of ten layers: every transition (the last gives the code) and branch, and the linear layer inside each
#: of the three units. The other linear layers' outputs are the branches and what transitions hand on.
SINGLE_PLACES = {"branches": (1, 2, 3, 4, 5, 6, 7), "linears": (1, 4, 7)}

SCORES = (
    "reconstruction",
    *(f"{kind}/{pathway}" for pathway in PATHWAYS for kind in ("sap", "sap-")),
    *(f"{kind}/{pathway}" for pathway in WHITENED for kind in ("nap", "nap-", "ridge", "ridge-")),
    *(
        f"{kind}/{pathway}:{place}"
        for pathway, places in SINGLE_PLACES.items()
        for place in places
        for kind in ("sap", "nap", "ridge")
    ),
)

#: A quick run leaves out what takes longest whatever the number of rows: the eigenvectors of some 3,800 columns.
QUICK_SCORES = tuple(
    name
    for name in SCORES
    if name not in {f"{kind}/{where}" for kind in ("nap", "nap-", "ridge", "ridge-") for where in ("units", "branches")}
)

#: The paper's: after every stage (of a plain network after every layer), and the input too.
DEFAULTS = {"SAP": "sap/stages", "NAP": "nap/stages"}


def grid(settings: Settings) -> list[Cell]:
    """RVAE of ten layers by ten novel classes (one in a quick run) by seeds."""
    return rvae_cells(settings, QUICK_SCORES if settings.quick else SCORES)


def findings(rows: list[Row], settings: Settings, folder: Path) -> Findings:
    """Whether another place is better than the paper's, chosen by the first seed and tested by the others."""
    found = Findings()
    suffix = f" {settings.variant}" if settings.variant else ""
    for data in settings.data:
        own = pick(rows, data=data, setting="multimodal", series="RVAE pre" + suffix)
        for family, default in DEFAULTS.items():
            there = [name for name in SCORES[1:] if paired(own, f"auroc_{name}")]
            names = [name for name in there if _family(name) == family]
            found.claims.append(_better_place(data, family, default, names, own))
        for title, key in (("whole pathways", ""), ("single places", ":")):
            series: dict[str, dict[str, list[float]]] = {}
            for name in SCORES[1:]:
                kind, _, place = name.partition("/")
                values = grouped(own, "data", f"auroc_{name}").get(data, [])
                if (":" in place) == bool(key) and values:
                    label = f"{place[0]}{place.partition(':')[2]}" if key else place  # whole names would overlap
                    series.setdefault(kind, {})[label] = values
            if series:
                found.pictures.append(
                    plot_means(
                        f"places-{title.replace(' ', '-')}-{data}", f"AUROC by place, {title}, {data}", series,
                        xlabel="place", ylabel="AUROC", joined=False,
                        caption="The spread is over classes and seeds. A minus leaves out the input; ridge is NAP with "
                        "one mean variance added to every variance."
                        + (" b: transitions and branches in order; l: linear layers inside a unit." if key else ""),
                    )
                )  # fmt: skip
    metrics = tuple(f"auroc_{name}" for name in SCORES)
    whole = summary(rows, metrics, ("data", "series"))
    found.tables["By place"] = [
        {"score": name, **{f"{line['data']}, {line['series']}": line[f"auroc_{name}"] for line in whole}}
        for name in SCORES
    ]
    for data in settings.data:
        own = pick(rows, data=data, setting="multimodal", series="RVAE pre" + suffix)
        if against := _against_the_papers(own):
            found.tables[f"Against the paper's place, {data}"] = against
    return found


def _family(name: str) -> str:
    return "SAP" if name.startswith("sap") else "NAP"


def _against_the_papers(rows: list[Row]) -> list[dict[str, str]]:
    """Every score beside that of the paper's place, pair by pair: p is two-sided and not corrected for their number."""
    from scipy import stats

    table = []
    for name in SCORES[1:]:
        first = paired(rows, f"auroc_{name}")
        second = paired(rows, f"auroc_{DEFAULTS[_family(name)]}")
        pairs = sorted(first.keys() & second.keys())
        if name in DEFAULTS.values() or len(pairs) < 2:
            continue
        a, b = (np.array([side[pair] for pair in pairs]) for side in (first, second))
        table.append(
            {
                "score": name, "mean": f"{a.mean():.4f}", "difference": f"{(a - b).mean():+.4f}",
                "above": f"{(a > b).sum()} of {len(pairs)}", "p": f"{stats.ttest_rel(a, b).pvalue:.2g}",
            }
        )  # fmt: skip
    return table


def _better_place(data: str, family: str, default: str, names: list[str], rows: list[Row]) -> Claim:
    claim = f"{data}: another place is better for {family} than the paper's"
    seeds = sorted({row["seed"] for row in rows}, key=int)
    if len(seeds) < 2:
        return untested(claim, f"Seeds run: {len(seeds)}; one to choose by and one to test by are needed")
    first = pick(rows, seed=seeds[0])
    best = max(names, key=lambda name: float(np.mean([*paired(first, f"auroc_{name}").values()] or [-1.0])))
    if best == default:
        return Claim(
            claim, False, f"By seed {seeds[0]} the paper's place is the best of {len(names)}. The claim did not hold."
        )
    others = [row for row in rows if row["seed"] != seeds[0]]
    return greater(
        claim, paired(others, f"auroc_{best}"), paired(others, f"auroc_{default}"), labels=(best, default),
        quantity=f"Chosen by seed {seeds[0]} from {len(names)}, tested by the others: AUROC on {data}",
    )  # fmt: skip


EXPERIMENT = Experiment(
    name="places",
    title="Where to look",
    description=(
        "SAP and NAP of RVAE by where row and reconstruction are compared: after each stage, as in RaPP, each "
        "residual unit, each branch, each linear layer, with and without the input, and NAP with a ridge. One class "
        "novel."
    ),
    data=("mnist", "fashion_mnist"),
    seeds=2,
    scores=SCORES,
    grid=grid,
    findings=findings,
)
