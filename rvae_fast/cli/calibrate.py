"""``rvae-fast calibrate``: place a trained model's threshold by normal rows it has not seen."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from rvae_fast.cli.common import DebugOption, ForceOption, JsonOption, command, note, print_json, refuse_to_overwrite
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
from rvae_fast.cli.score import ChunkOption, DeviceOption, QuietOption

__all__ = ["calibrate"]


@command
def calibrate(
    model: ModelArgument,
    data: DataArgument,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Where to write the model; with --force it may be the same file.")
    ],
    false_alarms: Annotated[
        float,
        typer.Option("--false-alarms", help="Share of new normal rows that may be flagged, above 0 and at most 0.5."),
    ] = 0.01,
    label: LabelOption = None,
    anomaly_value: AnomalyOption = None,
    id_column: IdOption = None,
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
    """Place a trained model's threshold by normal rows that it has not seen.

    The threshold that `fit` places is one of its training rows' scores, which the model knows: of new rows it flags
    more. This command writes the model again with a threshold that, in the mean over such files, at most the share
    `--false-alarms` of further normal rows exceeds. The rows must be normal; of labelled ones only the normal ones are
    used.

    **Examples**

    - `rvae-fast calibrate model.safetensors last_month.csv --false-alarms 0.001 --out calibrated.safetensors`
    - `rvae-fast calibrate model.safetensors test.csv --label is_fraud --out model.safetensors --force`
    - `rvae-fast calibrate digits.safetensors digits --novel 0 --part validation --false-alarms 0.05 -o d.safetensors`

    **Exit status**: 0 done, 1 failed, 2 wrong usage.
    """
    from rvae_fast.cli.common import usage_error
    from rvae_fast.cli.run import load_detector, run_scoring
    from rvae_fast.cli.source import binary_labels, open_source

    if not 0 < false_alarms <= 0.5:
        usage_error(f"must be above 0 and at most 0.5, got {false_alarms:g}", "--false-alarms")
    refuse_to_overwrite([out], force)

    from rvae_fast._conformal import conformal_offset
    from rvae_fast.serialization import save

    with contextlib.ExitStack() as stack:
        detector = load_detector(model, device)
        source = open_source(
            data, stack, label=label, id_column=id_column, key=key, novel=novel, part=part,
            csv=csv_options(delimiter, decimal, header, encoding),
            default_part="validation", split_seed=split_seed,
        )  # fmt: skip
        if anomaly_value and not source.labelled:
            usage_error("needs --label, the column of these values", "--anomaly-value")
        if source.image_shape is not None and novel is None:
            usage_error("say which class is no normal one: the others' validation rows are used", "--novel")
        before = detector.threshold_
        scored = run_scoring(detector, source, before, chunk_rows=chunk_rows, quiet=quiet)
        scores = scored.scores
        if scored.labels:
            scores = scores[binary_labels(scored.labels, anomaly_value) == 0]
    try:
        threshold = -conformal_offset(-scores, false_alarms)
    except ValueError as error:
        told = str(error).replace("false_alarm_rate=", "--false-alarms ")
        raise ValueError(told.replace("X has", f"those that are normal in {source.name} are")) from error
    # --device says where to score now; what the file says of it stays.
    written = detector if device is None else load_detector(model, None)
    written.threshold_ = threshold
    out.parent.mkdir(parents=True, exist_ok=True)
    save(written, out)
    flagged = int((scores > threshold).sum())
    if json_output:
        print_json(
            {
                "model": str(out),
                "rows": len(scores),
                "left_out": scored.scores.size - len(scores),
                "false_alarms": false_alarms,
                "threshold": threshold,
                "threshold_before": before,
                "flagged": flagged,
                "flagged_before": int((scores > before).sum()),
            }
        )
    if not quiet:
        left = scored.scores.size - len(scores)
        note(f"{len(scores):,} normal rows" + (f"; left out {left:,} labelled anomalies" if left else ""))
        above = int((scores > before).sum())
        note(f"threshold {threshold:.6g}, with {flagged:,} of them above it; it was {before:.6g}, with {above:,}")
        note(f"wrote {out}")
