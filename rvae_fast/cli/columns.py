"""Which columns of a file a command takes, by the model's names or the file's, and what is said of those it leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rvae_fast.cli.common import note

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rvae_fast.cli.source import Source
    from rvae_fast.datasets import Table

__all__ = ["learnt_names", "tell_columns", "use_columns"]


def learnt_names(source: Source, table: Table) -> Sequence[str] | None:
    """Return the names that a model is to know its columns by; None where a file has none, nor any were chosen.

    What counts is whether the file has names, not how they look: a file's own x0, x1, ... may come in another order.
    """
    from rvae_fast.datasets.types import numbered_names

    naming = source.naming()
    unnamed = naming is not None and not naming.named
    return None if unnamed and tuple(table.columns) == numbered_names(len(table.columns)) else table.columns


def use_columns(source: Source, names: Sequence[str] | None) -> None:
    """Read the features by a model's names; where the file has no names of its own, by position."""
    if names is None or source.path is None or source.options.get("columns"):
        return
    wanted = [str(name) for name in names]
    naming = source.naming()
    if naming is not None and not naming.named:
        # A line of numbers that holds every one of the model's names is no row: 3, 0, 5, ... or 2023, 2024, ...
        header = source.naming(header=True) if source.options.get("header") is None and source.kind == "csv" else None
        if header is None or not set(wanted) <= set(header.names):
            return
        source.options["header"] = True
    if naming is not None and naming.counted and not set(wanted) & set(naming.names):
        return  # 0, 1, 2, ... of a frame without names, for a model that has some
    source.options["columns"] = wanted
    source.by_model = True
    source.options["drop"] = ()


def tell_columns(source: Source) -> None:
    """Say which columns were left out though nobody asked for that, and which names are a guess."""
    naming = source.naming()
    if naming is None:
        return
    if naming.counted:
        shown = ", ".join([name for name in naming.names if name not in naming.left_out][:3])
        note(f"{source.name}: the first line, {shown}, ..., names the columns; with --no-header it is a row")
    if source.options.get("columns"):
        return
    apart = {*source.options.get("drop", ()), source.options.get("label"), source.options.get("id")}
    for name in naming.index:
        if name not in apart:
            what = "the first column, which has no name" if source.kind == "csv" else "the index that pandas wrote"
            note(
                f"{source.name}: left out {name!r}, {what}; --id {name} makes it the rows' ids, --columns of fit with "
                f"{name} among them a feature"
            )
    empty = [name for name in naming.empty if name not in apart]
    if empty:
        columns = "a column" if len(empty) == 1 else f"{len(empty)} columns"
        note(f"{source.name}: left out {columns} at the end without name and values")
