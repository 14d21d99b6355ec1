"""The options that say which rows a command reads, and what their columns are."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "AnomalyOption",
    "DataArgument",
    "IdOption",
    "KeyOption",
    "LabelOption",
    "ModelArgument",
    "NovelOption",
    "PartOption",
    "SplitSeedOption",
]

DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Rows: a .csv, .parquet, .npy, .npz or idx file; `-` for CSV on standard input; or a built-in data set"
        " (`rvae-fast data`).",
        show_default=False,
    ),
]
ModelArgument = Annotated[
    Path,
    typer.Argument(metavar="MODEL", help="File that `rvae-fast fit` (or rvae_fast.save) wrote.", show_default=False),
]
LabelOption = Annotated[
    str | None,
    typer.Option("--label", help="Column (or .npz array) that says which rows are anomalies; never a feature."),
]
AnomalyOption = Annotated[
    list[str] | None,
    typer.Option(
        "--anomaly-value",
        help="Label that means anomaly; may be repeated. Not needed for 0/1, true/false, +1/-1 (-1 is the anomaly)"
        " and normal/anomaly.",
    ),
]
IdOption = Annotated[str | None, typer.Option("--id", help="Column that names the rows; never a feature.")]
NovelOption = Annotated[
    str | None,
    typer.Option("--novel", help="Built-in images: the class that is the anomaly (`digits`, `mnist`: 0 to 9)."),
]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        help="Built-in data: all, train, validation or test. `fit` takes the normal training rows (60 %),"
        " `calibrate` the validation rows, `score` and `evaluate` the test rows, unless this says otherwise; `score` of"
        " images without `--novel` all rows.",
    ),
]
SplitSeedOption = Annotated[int, typer.Option("--split-seed", min=0, help="Built-in data: seed of that split.")]
KeyOption = Annotated[str | None, typer.Option("--key", help=".npz: name of the array that holds the rows.")]
