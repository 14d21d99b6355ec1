"""``rvae-fast fit-score``: another score for a trained model, or more normal rows to compare with."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from rvae_fast.cli.common import DebugOption, ForceOption, JsonOption, command, note, print_json, refuse_to_overwrite
from rvae_fast.cli.csv_options import DecimalOption, DelimiterOption, EncodingOption, HeaderOption, csv_options
from rvae_fast.cli.data_options import (
    AnomalyOption,
    IdOption,
    KeyOption,
    LabelOption,
    ModelArgument,
    NovelOption,
    PartOption,
    SplitSeedOption,
)
from rvae_fast.cli.score import QuietOption

__all__ = ["fit_score"]


@command
def fit_score(
    model: ModelArgument,
    data: Annotated[
        list[str],
        typer.Argument(
            help="Files of normal rows, or built-in data sets: all of them together.",
            show_default=False,
            metavar="DATA",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the model; with --force it may be the same file.")
    ],
    score_by: Annotated[
        str | None,
        typer.Option(
            "--score-by", help="reconstruction, elbo, sap, nap, local or hyperplane [default: what the model has]."
        ),
    ] = None,
    views: Annotated[
        str | None,
        typer.Option(
            "--views",
            help="For flattened images: the lowest score over small deformations counts. image if square, or the "
            "shape: 28x28, or with the channels first 3x32x32; none for the image as it is [default: what the model "
            "has].",
            metavar="image|HxW|CxHxW|none",
        ),
    ] = None,
    contamination: Annotated[
        float | None,
        typer.Option("--contamination", help="Share of these rows to flag [default: what the model has]."),
    ] = None,
    label: LabelOption = None,
    anomaly_value: AnomalyOption = None,
    id_column: IdOption = None,
    key: KeyOption = None,
    delimiter: DelimiterOption = None,
    decimal: DecimalOption = ".",
    header: HeaderOption = None,
    encoding: EncodingOption = None,
    novel: NovelOption = None,
    part: PartOption = None,
    split_seed: SplitSeedOption = 0,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Give a trained model another score, or more normal rows to compare with, without training it.

    Some scores keep something of normal rows: `hyperplane` and `local` compare with them, `nap` has their covariance.
    This command learns that anew, and the threshold, from all the rows it is given, which should be normal and may be
    those that the model was trained on, others, or both; of labelled ones only the normal ones are used.

    **Examples**

    - `rvae-fast fit-score model.safetensors train.csv --score-by hyperplane --out planes.safetensors`
    - `rvae-fast fit-score planes.safetensors train.csv held_out.csv --out planes.safetensors --force`
    - `rvae-fast fit-score m.safetensors digits --novel 0 --part train,validation --score-by local -o l.safetensors`

    **Exit status**: 0 done, 1 failed, 2 wrong usage.
    """
    from rvae_fast.cli.columns import tell_columns, use_columns
    from rvae_fast.cli.common import usage_error
    from rvae_fast.cli.run import load_detector, split_names, told_of_file
    from rvae_fast.cli.source import binary_labels, frame, normal_rows, open_source

    refuse_to_overwrite([out], force)

    import numpy as np

    from rvae_fast.serialization import save

    detector = load_detector(model, None)
    names = getattr(detector, "feature_names_in_", None)
    tables: list[Any] = []
    left_out = 0
    for given in data:
        parts: Sequence[str | None] = split_names(part) or [None]
        for of in parts:
            with contextlib.ExitStack() as stack:
                source = open_source(
                    given, stack, label=label, id_column=id_column, key=key, novel=novel, part=of,
                    csv=csv_options(delimiter, decimal, header, encoding),
                    default_part="train", split_seed=split_seed,
                )  # fmt: skip
                if anomaly_value and not source.labelled:
                    usage_error("needs --label, the column of these values", "--anomaly-value")
                if source.image_shape is not None and novel is None:
                    usage_error("say which class is no normal one: the others' rows are used", "--novel")
                use_columns(source, names)
                if not quiet:
                    tell_columns(source)
                table = source.read()
            X = table.X
            if table.labels is not None:
                X = normal_rows(X, binary_labels([table.labels], anomaly_value), source.name)
                left_out += len(table.X) - len(X)
            if tables and X.shape[1] != tables[0].shape[1]:
                raise ValueError(f"{source.name} has {X.shape[1]} columns, {data[0]} has {tables[0].shape[1]}")
            tables.append(X)
    rows = tables[0] if len(tables) == 1 else np.concatenate(tables)
    before = detector.threshold_
    changes: dict[str, Any] = {"anomaly_score": score_by, "contamination": contamination}
    members = getattr(detector, "estimators_", ())
    for one in (detector, *members, *([detector.estimator] if members and detector.estimator is not None else ())):
        known = one.get_params(deep=False)
        one.set_params(**{name: value for name, value in changes.items() if value is not None and name in known})
        if views is not None and "views" in known:
            one.set_params(views=None if views == "none" else views)
    filled = told_of_file(", ".join(data), "a model fitted with --missing mean or --missing median fills NaN")
    shown = {one: one.verbose for one in (detector, *members) if hasattr(one, "verbose")}
    for one in shown:
        one.verbose = 0 if quiet else 1
    with filled, warnings.catch_warnings():
        # A file without column names goes by position; its width is checked.
        warnings.filterwarnings("ignore", message="X does not have valid feature names", category=UserWarning)
        detector.fit_score(frame(rows, None if names is None else [str(name) for name in names]))
    for one, verbose in shown.items():
        one.verbose = verbose
    out.parent.mkdir(parents=True, exist_ok=True)
    save(detector, out)
    scored_by = (members or [detector])[0].anomaly_score
    if json_output:
        print_json(
            {
                "model": str(out),
                "rows": len(rows),
                "left_out": left_out,
                "anomaly_score": scored_by,
                "threshold": detector.threshold_,
                "threshold_before": before,
            }
        )
    if not quiet:
        note(f"{len(rows):,} normal rows" + (f"; left out {left_out:,} labelled anomalies" if left_out else ""))
        note(f"scores by {scored_by}; threshold {detector.threshold_:.6g}")
        note(f"wrote {out}")
