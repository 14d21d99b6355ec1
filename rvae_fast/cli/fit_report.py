"""What ``fit`` says of a training: the page, and whether there are rows enough for the threshold."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rvae_fast.cli.source import Source
    from rvae_fast.datasets import Table

#: Of fewer rows a threshold among their scores flagged most of the new normal rows where a tenth was intended (178 and
#: some 810 training rows in ``docs/results/README.md``), of twice as many little more than that.
FEW_ROWS = 1000


def check_folds_of_file(folds: int, contamination: float, n_rows: int, name: str) -> None:
    """Refuse, before anything is trained, what the threshold by folds will not have rows enough for."""
    from rvae_fast._cross_calibration import check_cross_calibration
    from rvae_fast.cli.common import usage_error

    try:
        check_cross_calibration(folds, contamination, n_rows)
    except ValueError as error:
        told = str(error).replace("false_alarm_rate=", "--contamination ").replace("X ", f"{name} ")
        usage_error(told, "--folds")


def write_fit_report(
    path: Path,
    detector: Any,
    table: Table,
    truth: Any,
    source: Source,
    shape: tuple[int, ...] | None,
    seconds: float,
) -> Path:
    """Write the report about all rows that were read, those left out of the training among them."""
    from rvae_fast.cli.run import rate, score_named
    from rvae_fast.report import write_report

    started = time.perf_counter()
    scores = score_named(detector, table.X)
    speed = len(scores) / max(time.perf_counter() - started, 1e-9)
    return write_report(
        path,
        scores=scores,
        threshold=detector.threshold_,
        labels=truth if truth is not None and truth.any() else None,
        detector=detector,
        X=table.X,
        ids=None if table.ids is None else table.ids.tolist(),
        image_shape=shape,
        feature_names=table.columns,
        title=f"Training on {source.name}",
        description="Scores of the rows read for training; rows that the model has not seen score somewhat higher.",
        facts={"Training": f"{seconds:.1f} s", "Scoring": rate(speed)},
    )
