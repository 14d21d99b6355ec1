"""The typer application: its commands and its own help."""

from __future__ import annotations

import os
from typing import Annotated

import typer

from rvae_fast._version import __version__
from rvae_fast.cli import calibrate, data, demo, doctor, evaluate, fit, fit_score, reproduce, score

__all__ = ["app", "main"]

_HELP = """
Find the unusual rows of a table: sensor readings, transactions, flattened images.

A residual variational autoencoder learns what normal rows look like; a row that it reconstructs badly scores high.

**First steps**

- See it work, on data that come with it:
  `rvae-fast demo`
- Learn from rows that are (mostly) normal:
  `rvae-fast fit normal.csv --out model.safetensors`
- Place the threshold by other normal rows, for a rate of false alarms:
  `rvae-fast calibrate model.safetensors more.csv --false-alarms 0.01 --out calibrated.safetensors`
- Choose another score, or more rows to compare with, without training:
  `rvae-fast fit-score model.safetensors normal.csv --score-by hyperplane --out planes.safetensors`
- Score other rows:
  `rvae-fast score model.safetensors new.csv --out scores.csv`
- Measure against known anomalies:
  `rvae-fast evaluate model.safetensors labelled.csv --label y`

**Exit status**: 0 done; 1 the work failed; 2 wrong usage; 3 anomalies were found and `--fail-on-anomaly` was given.
Messages and progress go to standard error, results to standard output, so commands can be piped.
"""

app = typer.Typer(
    name="rvae-fast",
    help=_HELP,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"rvae-fast {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


app.command("fit")(fit.fit_command)
app.command("score")(score.score)
app.command("fit-score")(fit_score.fit_score)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("demo")(demo.demo)
app.command("reproduce")(reproduce.reproduce)
app.add_typer(data.app, name="data")
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; the entry point of ``rvae-fast``."""
    # Read by OpenMP when torch is imported. Spinning threads cost a small network on a busy machine three times the
    # processor time; whoever has the machine to himself may set the variable to "active".
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    app(prog_name="rvae-fast")
