"""``rvae-fast evaluate``: measure a model against labelled rows."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
)
from rvae_fast.cli.csv_options import DecimalOption, DelimiterOption, EncodingOption, HeaderOption, csv_options
from rvae_fast.cli.data_options import (
    AnomalyOption,
    DataArgument,
    IdOption,
    KeyOption,
    LabelOption,
    ModelArgument,
    NovelOption,
    PartOption,
    SplitSeedOption,
)
from rvae_fast.cli.score import ChunkOption, DeviceOption, QuietOption, ReportOption, ShapeOption, ThresholdOption

if TYPE_CHECKING:
    from rich.table import Table

    from rvae_fast.report import Evaluation

__all__ = ["evaluate", "evaluation_table"]


def evaluation_table(evaluation: Evaluation, more: dict[str, str] | None = None) -> Table:
    """Return the figures as a table for the terminal."""
    from rich.table import Table

    def show(value: float | None) -> str:
        return "undefined" if value is None else f"{value:.4f}"

    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right")
    table.add_column()
    rows: list[tuple[str, str, str]] = [
        ("rows", f"{evaluation.rows:,}", f"{evaluation.anomalies:,} anomalies"),
        ("AUROC", show(evaluation.auroc), ""),
        ("average precision", show(evaluation.average_precision), ""),
        ("threshold", f"{evaluation.threshold:.6g}", ""),
        ("precision", show(evaluation.precision), f"{evaluation.false_positives:,} false alarms"),
        ("recall", show(evaluation.recall), f"{evaluation.false_negatives:,} missed"),
        ("F1", show(evaluation.f1), ""),
    ]
    rows += [(name, value, "") for name, value in (more or {}).items()]
    for name, value, remark in rows:
        table.add_row(name, f"[bold]{value}[/]" if name == "AUROC" else value, f"[dim]{remark}[/]")
    return table


@command
def evaluate(
    model: ModelArgument,
    data: DataArgument,
    label: LabelOption = None,
    anomaly_value: AnomalyOption = None,
    id_column: IdOption = None,
    threshold: ThresholdOption = None,
    report: ReportOption = None,
    image_shape: ShapeOption = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Also write the scores: .csv, .tsv (also .gz), .parquet, .npz."),
    ] = None,
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
    """Measure a model against rows whose anomalies are known.

    Prints AUROC and average precision (over all thresholds), and precision, recall and F1 at the model's threshold or
    at `--threshold`. The label column is read for this alone.

    **Examples**

    - `rvae-fast evaluate model.safetensors test.csv --label is_fraud --report report/`
    - `rvae-fast evaluate model.safetensors test.csv --label class --anomaly-value attack --anomaly-value probe`
    - `rvae-fast evaluate digits.safetensors digits --novel 0 --json`

    **Exit status**: 0 done, 1 failed, 2 wrong usage.
    """
    from rvae_fast.cli.common import console, usage_error
    from rvae_fast.cli.run import load_detector, rate, report_arguments, run_scoring
    from rvae_fast.cli.sink import ScoreSink, check_output
    from rvae_fast.cli.source import binary_labels, open_source, parse_shape
    from rvae_fast.report import evaluate_scores

    shape = parse_shape(image_shape)
    outputs = [] if out is None else [out]
    if out is not None:
        try:
            check_output(out)
        except ValueError as error:
            usage_error(str(error), "--out")
    if report is not None:
        refuse_report(report, force)
    refuse_to_overwrite(outputs, force)

    with contextlib.ExitStack() as stack:
        source = open_source(
            data, stack, label=label, id_column=id_column, key=key, novel=novel, part=part,
            csv=csv_options(delimiter, decimal, header, encoding),
            split_seed=split_seed,
        )  # fmt: skip
        if not source.labelled:
            usage_error("say which column holds the labels (built-in images: which class is --novel)", "--label")
        detector = load_detector(model, device)
        cut = detector.threshold_ if threshold is None else threshold
        sink = None if out is None else stack.enter_context(ScoreSink(out, id_type=source.id_type()))
        scored = run_scoring(
            detector, source, cut, chunk_rows=chunk_rows, sink=sink, keep_rows=report is not None, quiet=quiet
        )
        labels = binary_labels(scored.labels, anomaly_value)
    evaluation = evaluate_scores(scored.scores, labels, cut)
    speed = rate(scored.rows_per_second)
    page = None
    if report is not None:
        from rvae_fast.report import write_report

        page = write_report(
            report, scores=scored.scores, threshold=cut, labels=labels, detector=detector,
            image_shape=shape or source.image_shape, title=f"Evaluation on {source.name}",
            description=f"Model: {model.name}", facts={"Scoring": speed}, **report_arguments(scored),
        )  # fmt: skip
    if json_output:
        result: dict[str, Any] = evaluation.to_dict()
        result |= {"seconds": round(scored.seconds, 4), "rows_per_second": round(scored.rows_per_second, 1)}
        print_json(result | {"report": None if page is None else str(page)})
    else:
        console(stderr=False).print(evaluation_table(evaluation, {"scoring": speed}))
    if evaluation.auroc is None:
        note("warning: all labels are the same; AUROC and average precision need both classes")
    if not quiet:
        for path in (out, page):
            if path is not None:
                note(f"wrote {path}")
