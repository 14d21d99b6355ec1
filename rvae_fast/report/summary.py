"""What the head of the report says: a sentence, figures, and the rows that the threshold gets most wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from rvae_fast.report.rows import extreme_positions
from rvae_fast.report.theme import number

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from rvae_fast.report.metrics import Evaluation


def lead(scores: NDArray[np.float64], above: int, threshold: float, evaluation: Evaluation | None) -> str:
    """Say in one or two plain sentences what came out."""
    rows = "row scores" if above == 1 else "rows score"
    text = (
        f"{above:,} of {scores.size:,} {rows} above the threshold of {number(threshold)} ({above / scores.size:.1%})."
    )
    if evaluation is None:
        return text
    if evaluation.auroc is None:
        kind = "normal" if evaluation.anomalies == 0 else "an anomaly"
        return (
            f"{text} Every row is labelled {kind}, so how well the scores separate the two classes cannot be measured."
        )
    return (
        f"{text} {evaluation.true_positives:,} of the {evaluation.anomalies:,} labelled anomalies are among them, and "
        f"{evaluation.false_positives:,} of the {evaluation.rows - evaluation.anomalies:,} normal rows."
    )


def cards(
    scores: NDArray[np.float64], above: int, evaluation: Evaluation | None, facts: Mapping[str, Any] | None
) -> list[tuple[str, str, str]]:
    """Return name, figure and a note to the figure of each card at the head of the page."""
    found = [("Rows", f"{scores.size:,}", ""), ("Flagged", f"{above:,}", f"{above / scores.size:.1%}")]
    if evaluation is not None and evaluation.auroc is not None and evaluation.average_precision is not None:
        found += [
            ("AUROC", f"{evaluation.auroc:.4f}", ""),
            ("Avg. precision", f"{evaluation.average_precision:.4f}", ""),
        ]
        found.append(("F1 at threshold", "–" if evaluation.f1 is None else f"{evaluation.f1:.4f}", ""))
    for name, value in (facts or {}).items():
        figure, _, unit = value.partition(" ") if isinstance(value, str) else (number(value), "", "")
        found.append((name, figure, unit))
    return found


def worst_mistakes(scores: NDArray[np.float64], threshold: float, truth: NDArray[np.bool_], k: int = 10) -> list[int]:
    """Return the rows that the threshold gets most wrong: ``k`` normal ones far above it, ``k`` anomalies below."""
    flagged = scores > threshold
    alarms, missed = np.flatnonzero(flagged & ~truth), np.flatnonzero(~flagged & truth)
    highest, lowest = extreme_positions(scores[alarms], k)[0], extreme_positions(scores[missed], k)[1]
    return [int(row) for row in (*alarms[highest], *missed[lowest])]
