"""``rvae-fast reproduce``: the article's experiments, on real data, with error bars."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from rvae_fast.cli.common import DebugOption, command, console, note, usage_error
from rvae_fast.cli.score import QuietOption

__all__ = ["reproduce"]

_ABOUT = {
    "degradation": "train loss and AUROC by depth, plain against residual",
    "explosion": "gradient norm and loss by step, and what tames them",
    "novelty": "RVAE against VAE, digit by digit",
    "deep": "80 layers, RVAE against VAE",
    "rapp": "reconstruction error, SAP, NAP and local score",
    "places": "SAP and NAP by where in a residual encoder they look",
    "views": "scores by the lowest over small deformations of an image",
    "quality": "other errors and other ways to train than the article's",
    "tabular": "the detectors on tables, beside scikit-learn's",
}


@command
def reproduce(
    name: Annotated[str, typer.Argument(help="; ".join(f"{k}: {v}" for k, v in _ABOUT.items()) + ".", metavar="NAME")],
    quick: Annotated[
        bool, typer.Option("--quick", help="A part of it in under three minutes: shows the machinery, proves nothing.")
    ] = False,
    seeds: Annotated[int | None, typer.Option("--seeds", min=1, help="How many [default: by the experiment].")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory; continued if it holds results [reproduce-NAME].")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option("--results", help="Results file, if not that of --out; novelty and rapp can share one."),
    ] = None,
    models: Annotated[
        Path | None, typer.Option("--models", help="Directory of trained models: kept there, and not trained again.")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option("--jobs", "-j", min=1, help="Processes of one thread each [default: one a core].")
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", help="Data sets [default: by the experiment].", metavar="NAME,NAME,...")
    ] = None,
    epochs: Annotated[int | None, typer.Option("--epochs", "-e", min=1, help="[default: by the experiment]")] = None,
    rows: Annotated[int | None, typer.Option("--rows", min=100, help="Training rows at most [default: all].")] = None,
    variant: Annotated[
        str, typer.Option("--variant", help="A change to every cell: kl-half, kl-warm-up, noise, absolute, ...")
    ] = "",
    page_only: Annotated[
        bool, typer.Option("--page-only", help="Run nothing; write the page of the cells that are done.")
    ] = False,
    quiet: QuietOption = False,
    debug: DebugOption = False,
) -> None:
    """Repeat one of the article's experiments.

    Lists its trainings with an estimate of the time, runs them side by side, and writes a page that says which claims
    held. Every finished training is a row of results.csv at once: the same command again goes on where it stopped.

    **Examples**

    - `rvae-fast reproduce novelty --quick`
    - `rvae-fast reproduce novelty --seeds 5 --out runs/novelty --jobs 2`
    - `rvae-fast reproduce rapp --data fashion_mnist --seeds 1`
    - `rvae-fast reproduce degradation --rows 6000 --epochs 10 --seeds 3`: a smaller one, on a part of the rows
    - `rvae-fast reproduce rapp --results runs/novelty/results.csv`: what `novelty` has run there is not run again
    """
    from rvae_fast import experiments
    from rvae_fast.experiments.experiment import VARIANTS

    if name not in experiments.NAMES:
        usage_error(f"no experiment {name!r}; there are {', '.join(experiments.NAMES)}", "NAME")
    if variant and variant not in VARIANTS:
        usage_error(f"no variant {variant!r}; there are {', '.join(VARIANTS)}", "--variant")
    folder = Path(f"reproduce-{name}") if out is None else out
    if folder.exists() and not folder.is_dir():
        usage_error(f"{folder} is a file", "--out")
    if results is not None and results.is_dir():
        usage_error(f"{results} is a directory", "--results")
    if models is not None and models.exists() and not models.is_dir():
        usage_error(f"{models} is a file", "--models")
    words = ["rvae-fast", "reproduce", name, *(["--quick"] if quick else [])]
    for flag, value in (
        ("--seeds", seeds),
        ("--data", data),
        ("--epochs", epochs),
        ("--rows", rows),
        ("--variant", variant or None),
    ):
        words += [] if value is None else [flag, str(value)]
    page = experiments.reproduce(
        name,
        quick=quick,
        seeds=seeds,
        data=None if data is None else [part.strip() for part in data.split(",") if part.strip()],
        out=folder,
        results=results,
        models=models,
        jobs=jobs,
        epochs=epochs,
        rows=rows,
        variant=variant,
        run=not page_only,
        command=shlex.join(words),
        say=(lambda text: None) if quiet else note,
        progress=not quiet,
    )
    console(stderr=False).print(f"page  {page}", soft_wrap=True, markup=False)
