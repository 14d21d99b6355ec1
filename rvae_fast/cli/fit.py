"""``rvae-fast fit``: train a detector on a file of rows."""

from __future__ import annotations

import contextlib
import inspect
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from rvae_fast.cli.common import (
    DebugOption,
    ForceOption,
    JsonOption,
    command,
    note,
    print_json,
    refuse_report,
    refuse_to_overwrite,
    usage_error,
)
from rvae_fast.cli.csv_options import DecimalOption, DelimiterOption, EncodingOption, HeaderOption, csv_options
from rvae_fast.cli.data_options import (
    AnomalyOption,
    DataArgument,
    IdOption,
    KeyOption,
    LabelOption,
    NovelOption,
    PartOption,
    SplitSeedOption,
)
from rvae_fast.cli.fit_options import (
    MODEL,
    PARAMETERS,
    TRAINING,
    Kind,
    Missing,
    Preset,
    Scaling,
    as_parameters,
)
from rvae_fast.cli.score import QuietOption, ReportOption, ShapeOption

__all__ = ["fit"]


def fit(
    data: DataArgument,
    out: Annotated[Path, typer.Option("--out", "-o", help="Where to write the model.")] = Path("model.safetensors"),
    label: LabelOption = None,
    anomaly_value: AnomalyOption = None,
    keep_anomalies: Annotated[
        bool, typer.Option("--keep-anomalies", help="Train on labelled anomalies too, instead of leaving them out.")
    ] = False,
    id_column: IdOption = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="The features, comma-separated, a name with a comma in double quotes [default: all but label and id].",
        ),
    ] = None,
    drop: Annotated[str | None, typer.Option("--drop", help="Columns to leave out, as --columns.")] = None,
    missing: Annotated[
        Missing | None, typer.Option("--missing", help="A missing value is an error, or filled [default: error].")
    ] = None,
    key: KeyOption = None,
    delimiter: DelimiterOption = None,
    decimal: DecimalOption = ".",
    header: HeaderOption = None,
    encoding: EncodingOption = None,
    novel: NovelOption = None,
    part: PartOption = None,
    split_seed: SplitSeedOption = 0,
    model: Annotated[
        Kind,
        typer.Option("--model", "-m", help="Residual (r) or plain, variational (v) or not.", rich_help_panel=MODEL),
    ] = Kind.rvae,
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset",
            help="Defaults of the other options, by kind of data; image...: pixels in 0..1 [default: by the data].",
            rich_help_panel=MODEL,
        ),
    ] = None,
    members: Annotated[
        int | None,
        typer.Option(
            "--members",
            min=2,
            help="An ensemble: so many models of different seeds, their scores averaged.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            min=2,
            help="For few rows: the threshold by rows that a copy has not seen, which takes so many more trainings.",
            rich_help_panel=MODEL,
        ),
    ] = None,
    scaler: Annotated[
        Scaling | None,
        typer.Option("--scaler", help="[default: standard; with --preset image...: none]", rich_help_panel=MODEL),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            "--seed", min=0, max=2**32 - 1, help="The same seed gives the same model.", rich_help_panel=TRAINING
        ),
    ] = 0,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Keep the state of the training in this file.", rich_help_panel=TRAINING),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on from --checkpoint, with the same data and options.", rich_help_panel=TRAINING
        ),
    ] = False,
    report: ReportOption = None,
    image_shape: ShapeOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
    **options: Any,
) -> None:
    """Train a detector on rows that are (mostly) normal.

    Every column but label and id is a feature and must be a number. Labels are not learnt from: they only keep known
    anomalies out of the training. The model file holds network, scaler, threshold and column names.

    **Examples**

    - `rvae-fast fit normal.csv --id serial --out model.safetensors --report report/`
    - `rvae-fast fit readings.parquet --label faulty --epochs 200 --validation 0.1 --patience 20`
    - `rvae-fast fit big.npy --checkpoint run.ckpt`, and if it is interrupted the same with `--resume`
    - `rvae-fast fit few_rows.csv --folds 5 --contamination 0.05`: a threshold that holds for new rows
    - `rvae-fast fit mnist --novel 0 --out mnist.safetensors`

    **Exit status**: 0 done, 1 failed, 2 wrong usage, 130 interrupted.
    """
    from rvae_fast.cli.columns import learnt_names, tell_columns
    from rvae_fast.cli.defaults import starting_parameters
    from rvae_fast.cli.fit_report import FEW_ROWS, check_folds_of_file, write_fit_report
    from rvae_fast.cli.interrupted import keep_trained, keep_what_there_is, name_columns, save_trained
    from rvae_fast.cli.members import checkpoint_files, summary
    from rvae_fast.cli.run import split_names, told_of_file
    from rvae_fast.cli.source import binary_labels, frame, normal_rows, open_source, parse_shape

    shape = parse_shape(image_shape)
    outputs = [out]
    if report is not None:
        refuse_report(report, force)
    if resume and checkpoint is None:
        usage_error("needs --checkpoint, the file to go on from", "--resume")

    from rvae_fast import presets

    preset_name = "table" if preset is None else preset.value
    base, several = presets.ENSEMBLES.get(preset_name, (preset_name, members))
    if members is not None and several is not members:
        usage_error(f"--preset {preset_name} has its own", "--members")
    chosen, dropped = split_names(columns), split_names(drop)
    if columns is not None and not chosen:
        usage_error(f"{columns!r} names none", "--columns")
    checkpoints = checkpoint_files(checkpoint, several)
    if not resume:
        outputs += checkpoints
    refuse_to_overwrite(outputs, force)
    if anomaly_value and label is None:
        usage_error("needs --label, the column of these values", "--anomaly-value")

    from rvae_fast import detector as detectors
    from rvae_fast.training import NonFiniteError

    detector_class = getattr(detectors, f"{model.value.upper()}Detector")
    known = inspect.signature(detector_class.__init__).parameters
    given = as_parameters(options, known, model.value)
    if missing is not None:
        given["missing"] = missing.value
    if scaler is not None:
        given["scaler"] = None if scaler is Scaling.none else scaler.value

    with contextlib.ExitStack() as stack:
        source = open_source(
            data,
            stack,
            label=label,
            id_column=id_column,
            columns=chosen,
            drop=dropped,
            key=key,
            csv=csv_options(delimiter, decimal, header, encoding),
            novel=novel,
            part=part,
            default_part="train",
            split_seed=split_seed,
        )
        if not quiet:
            tell_columns(source)
        table = source.read()
        X, truth = table.X, None
        if table.labels is not None:
            truth = binary_labels([table.labels], anomaly_value)
            if truth.any() and not keep_anomalies:
                X = normal_rows(table.X, truth, source.name)
                if not quiet:
                    note(f"left out {len(table.X) - len(X):,} labelled anomalies; training on {len(X):,} rows")
        names = learnt_names(source, table)
        # What is given one by one wins over the preset, whose parameters the chosen model may not all have.
        if preset is None:
            start = starting_parameters(source.dataset or "", is_image=source.image_shape is not None)
        else:
            start = presets.preset(base)
        if given.keys() & (depths := {"n_layers", "widths"}):  # one of them says it all
            start = {name: value for name, value in start.items() if name not in depths}
        both = sorted({name for own in several for name in own} & given.keys()) if isinstance(several, list) else []
        if both:
            usage_error(f"--preset {preset_name} has its own {', '.join(both)} for each member", "--preset")
        given = {name: value for name, value in start.items() if name in known} | given
        if checkpoint is not None:
            checkpoint.parent.mkdir(parents=True, exist_ok=True)
            given["checkpoint"] = str(checkpoint)
        started = time.perf_counter()
        detector: Any = detector_class(**given, random_state=seed, resume=resume, verbose=0 if quiet else 1)
        if several is not None:
            from rvae_fast.ensemble import EnsembleDetector

            detector = EnsembleDetector(
                detector, members=several, contamination=detector.contamination, random_state=seed
            )
        if folds is not None:
            check_folds_of_file(folds, detector.contamination, len(X), source.name)
        try:
            with told_of_file(source.name, "--missing mean or --missing median fills NaN"):
                detector.fit(frame(X, names))
        except (KeyboardInterrupt, NonFiniteError) as error:
            if checkpoint is None:
                keep_what_there_is(detector, frame(X, names), names, out, error)
            raise
        seconds = time.perf_counter() - started
        if folds is not None:
            if not quiet:
                note(f"placing the threshold by {folds} trainings on parts of the rows")
            try:
                detector.cross_calibrate(frame(X, names), folds=folds)
            except BaseException:  # a copy may have too few rows, or diverge
                keep_trained(detector, names, out)
                raise
        fitted = getattr(detector, "estimators_", [detector])
        name_columns((detector, *fitted), names)
        save_trained(detector, out)
        page = None
        if report is not None:
            page = write_fit_report(report, detector, table, truth, source, shape or source.image_shape, seconds)
    found = summary(fitted)
    if json_output:
        print_json(
            {
                "model": str(out),
                "detector": detector_class.__name__,
                "members": len(fitted),
                "rows": len(X),
                "features": X.shape[1],
                **found,
                "threshold": detector.threshold_,
                "folds": folds,
                "seconds": round(seconds, 3),
                "report": None if page is None else str(page),
            }
        )
    if not quiet:
        times = f"{len(fitted)} times " if len(fitted) > 1 else ""
        note(
            f"trained {detector_class.__name__} {times}on {len(X):,} rows x {X.shape[1]:,} features: "
            f"{found['epochs']} epochs in {seconds:.1f} s, loss {found['train_loss']:.5g}, "
            f"threshold {detector.threshold_:.6g}"
        )
        if folds is None and len(X) < FEW_ROWS:
            note(
                f"{len(X):,} rows are few: the model knows them nearly by heart, and of new ones more are beyond the "
                "threshold than --contamination says; --folds 5 places it by rows that a copy has not seen"
            )
        for path in (out, page):
            if path is not None:
                note(f"wrote {path}")


def _with_parameters() -> Any:
    """Spell out ``**options`` in the signature, one argument a parameter of the detector, for typer to read."""
    signature = inspect.signature(fit, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    more = [
        inspect.Parameter(p.variable, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=p.annotation())
        for p in PARAMETERS
    ]
    wrapped = command(fit)
    everything = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + more
    wrapped.__signature__ = signature.replace(parameters=everything)  # type: ignore[attr-defined]
    wrapped.__annotations__ = {p.name: p.annotation for p in everything} | {"return": None}
    del wrapped.__wrapped__  # type: ignore[attr-defined]
    return wrapped


fit_command = _with_parameters()
