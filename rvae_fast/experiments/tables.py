"""Rows of a results file, taken apart and summed up."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

Row = dict[str, str]


def series(row: Row) -> str:
    """Model, order and variant of a row, as :attr:`Cell.series`."""
    return " ".join(part for part in (row["model"], row["order"], row["variant"]) if part)


def value(row: Row, name: str) -> float:
    """A metric of a row, NaN where it has none."""
    return float(row[name]) if row.get(name) else math.nan


def diverged(rows: Iterable[Row]) -> list[str]:
    """The rows whose training ended at a loss or gradient that is not finite, in words."""
    return [
        f"{row['data']}, {row['novel']} novel, {series(row)}, {row['n_layers']} layers, seed {row['seed']}, at step "
        f"{int(row['steps']) + 1}"
        for row in rows
        if math.isinf(value(row, "loss_ratio"))
    ]


def pick(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """Rows whose columns (or ``series``) have these values."""

    def fits(row: Row) -> bool:
        return all((series(row) if k == "series" else row[k]) == str(v) for k, v in wanted.items())

    return [row for row in rows if fits(row)]


def paired(
    rows: Iterable[Row], metric: str, by: Sequence[str] = ("data", "novel", "seed")
) -> dict[tuple[str, ...], float]:
    """A metric by what makes a pair; rows without it are left out."""
    return {tuple(row[name] for name in by): v for row in rows if not math.isnan(v := value(row, metric))}


def grouped(rows: Iterable[Row], key: str | Callable[[Row], Any], metric: str) -> dict[Any, list[float]]:
    """Values of a metric by a column or a function of the row, in the order met."""
    groups: dict[Any, list[float]] = {}
    for row in rows:
        if not math.isnan(v := value(row, metric)):
            groups.setdefault(row[key] if isinstance(key, str) else key(row), []).append(v)
    return groups


def whole_seeds(rows: Iterable[Row], metric: str, classes: Sequence[str]) -> list[float]:
    """The mean of a metric over the classes, one a seed that has all of them: a part may be the easy ones."""
    seeds: dict[str, dict[str, float]] = {}
    for row in rows:
        if not math.isnan(v := value(row, metric)):
            seeds.setdefault(row["seed"], {})[row["novel"]] = v
    return [float(np.mean([of[name] for name in classes])) for of in seeds.values() if of.keys() >= set(classes)]


def by_depth(rows: Iterable[Row], metric: str) -> dict[int, dict[str, float]]:
    """A metric by depth and seed, as the claims about depth want it."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if not math.isnan(v := value(row, metric)):
            found.setdefault(int(row["n_layers"]), {})[row["seed"]] = v
    return found


def summary(rows: Sequence[Row], metrics: Sequence[str], by: Sequence[str]) -> list[dict[str, str]]:
    """Mean, standard deviation and number of each metric, by the given columns (``series`` among them or not)."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(series(row) if name == "series" else row[name] for name in by), []).append(row)
    table = []
    for key, members in groups.items():
        line = dict(zip(by, key, strict=True))
        line["cells"] = str(len(members))
        for metric in metrics:
            values = np.array([v for row in members if not math.isnan(v := value(row, metric))])
            line[metric] = f"{values.mean():.4g}" if len(values) else ""
            has_spread = len(values) > 1 and np.isfinite(values).all()
            line[f"{metric} sd"] = f"{values.std(ddof=1):.2g}" if has_spread else ""
        table.append(line)
    return table


def to_csv(table: Sequence[dict[str, str]]) -> str:
    """A summary as the text of a CSV file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(table[0]) if table else ["cells"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    return text.getvalue()
