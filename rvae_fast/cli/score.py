"""``rvae-fast score``: anomaly scores for new rows."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Annotated

import typer

from rvae_fast.cli.common import (
    ANOMALIES_FOUND,
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
    DataArgument,
    IdOption,
    KeyOption,
    LabelOption,
    ModelArgument,
    NovelOption,
    PartOption,
    SplitSeedOption,
)

__all__ = ["score"]

ChunkOption = Annotated[int, typer.Option("--chunk-rows", min=1, help="Rows in memory at a time.")]
DeviceOption = Annotated[
    str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...; by default the model's own.")
]


def _finite(value: float | None) -> float | None:
    # Nothing is above NaN: every row would pass as normal.
    if value is not None and not math.isfinite(value):
        usage_error(f"must be a finite number, got {value:g}", "--threshold")
    return value


ThresholdOption = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        callback=_finite,
        help="Flag rows scoring above this, instead of above the model's own threshold.",
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", help="Write a report here: a directory, or an .html file.", show_default=False),
]
ShapeOption = Annotated[
    str | None,
    typer.Option(
        "--image-shape",
        help="Rows are images of this shape, which the report shows: 28x28, or with the channels last (each pixel's"
        " together) 32x32x3; --views has them first.",
        metavar="HxW|HxWxC",
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no summary.")]


@command
def score(
    model: ModelArgument,
    data: DataArgument,
    out: Annotated[
        str,
        typer.Option("--out", "-o", help="Where to write scores: .csv, .tsv (also .gz), .parquet, .npz, or - ."),
    ] = "-",
    id_column: IdOption = None,
    label: LabelOption = None,
    threshold: ThresholdOption = None,
    fail_on_anomaly: Annotated[
        bool, typer.Option("--fail-on-anomaly", help="Exit with status 3 if any row is flagged.")
    ] = False,
    explain: Annotated[
        int | None,
        typer.Option(
            "--explain",
            min=1,
            help="Say of each flagged row which columns make it one, so many at most (it is scored once a column).",
        ),
    ] = None,
    report: ReportOption = None,
    image_shape: ShapeOption = None,
    chunk_rows: ChunkOption = 65_536,
    key: KeyOption = None,
    delimiter: DelimiterOption = None,
    decimal: DecimalOption = ".",
    header: HeaderOption = None,
    encoding: EncodingOption = None,
    novel: NovelOption = None,
    part: PartOption = None,
    split_seed: SplitSeedOption = 0,
    device: DeviceOption = None,
    json_output: JsonOption = False,
    quiet: QuietOption = False,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Score rows with a trained model.

    Writes one line a row: its id (its number in the file, from 0, without `--id`), its score (higher is more
    anomalous) and whether it is flagged (score above the threshold). Columns are found by the names that the model was
    trained on, so further columns, and their order, do not matter; files without names go by position. Large files are
    read in chunks. With `--explain 3` a fourth column, `because`, names of a flagged row the three columns whose
    expected value would lower its score most.

    **Examples**

    - `rvae-fast score model.safetensors new.csv --id serial --out scores.csv`
    - `rvae-fast score model.safetensors new.csv --explain 3 | grep expected`
    - `zcat log.csv.gz | rvae-fast score model.safetensors - | sort -t, -k2 -gr | head`
    - `rvae-fast score model.safetensors batch.parquet --out s.parquet --fail-on-anomaly || alert`

    **Exit status**: 0 done, 1 failed, 2 wrong usage, 3 with `--fail-on-anomaly` if a row is flagged.
    """
    from rvae_fast.cli.run import load_detector, rate, report_arguments, run_scoring
    from rvae_fast.cli.sink import ScoreSink, check_output
    from rvae_fast.cli.source import open_source, parse_shape

    target = None if out == "-" else Path(out)
    shape = parse_shape(image_shape)
    if target is not None:
        try:
            check_output(target)
        except ValueError as error:
            usage_error(str(error), "--out")
    outputs = [] if target is None else [target]
    if report is not None:
        refuse_report(report, force)
    refuse_to_overwrite(outputs, force)

    with contextlib.ExitStack() as stack:
        detector = load_detector(model, device)
        cut = detector.threshold_ if threshold is None else threshold
        source = open_source(
            data, stack, label=label, id_column=id_column, key=key, novel=novel, part=part,
            csv=csv_options(delimiter, decimal, header, encoding),
            split_seed=split_seed,
        )  # fmt: skip
        # With --json standard output belongs to the summary; rows are then written only where --out says.
        written = target is not None or not json_output
        if explain is not None and not written:
            usage_error("needs --out, the file to explain the rows in, beside --json", "--explain")
        sink = (
            stack.enter_context(ScoreSink(target, explained=explain is not None, id_type=source.id_type()))
            if written
            else None
        )
        scored = run_scoring(
            detector,
            source,
            cut,
            chunk_rows=chunk_rows,
            sink=sink,
            keep_rows=report is not None,
            explain=explain,
            quiet=quiet,
        )
    flagged = int((scored.scores > cut).sum())
    page = None
    if report is not None:
        from rvae_fast.report import write_report

        page = write_report(
            report, scores=scored.scores, threshold=cut, detector=detector, image_shape=shape or source.image_shape,
            title=f"Scores of {source.name}", description=f"Model: {model.name}",
            facts={"Scoring": rate(scored.rows_per_second)}, **report_arguments(scored),
        )  # fmt: skip
    if json_output:
        highest = float(scored.scores.max())
        print_json(
            {
                "rows": scored.scores.size,
                "flagged": flagged,
                "threshold": cut,
                "highest_score": highest if highest < float("inf") else None,
                "highest_id": scored.highest_id,
                "out": None if target is None else str(target),
                "report": None if page is None else str(page),
                "seconds": round(scored.seconds, 4),
                "rows_per_second": round(scored.rows_per_second, 1),
            }
        )
    if not quiet:
        share = flagged / scored.scores.size
        note(
            f"{flagged:,} of {scored.scores.size:,} rows flagged ({share:.2%}, threshold {cut:.6g}) in "
            f"{scored.seconds:.2f} s ({rate(scored.rows_per_second)})"
        )
        for path in (target, page):
            if path is not None:
                note(f"wrote {path}")
    if fail_on_anomaly and flagged:
        raise typer.Exit(ANOMALIES_FOUND)
