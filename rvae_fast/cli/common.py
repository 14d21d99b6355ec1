"""What all commands share: exit codes, error messages, consoles, and the rule that nothing is overwritten unasked."""

from __future__ import annotations

import functools
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rich.console import Console

__all__ = [
    "ANOMALIES_FOUND",
    "DebugOption",
    "ForceOption",
    "JsonOption",
    "command",
    "console",
    "fail",
    "note",
    "print_json",
    "refuse_report",
    "refuse_to_overwrite",
    "usage_error",
]

FAILURE, USAGE, ANOMALIES_FOUND, INTERRUPTED, BROKEN_PIPE = 1, 2, 3, 130, 141

ForceOption = Annotated[bool, typer.Option("--force", "-f", help="Overwrite output files that exist.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output, for scripts.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

# What wrong data, files or parameters raise. Anything else is a mistake of this program, and its message says so.
_EXPECTED = (ValueError, TypeError, OSError, RuntimeError, ImportError, MemoryError)

P = ParamSpec("P")
R = TypeVar("R")


def console(*, stderr: bool = True) -> Console:
    """Return a rich console; by default on standard error, where messages belong."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def note(message: str) -> None:
    """Print one line for the person at the terminal, on standard error."""
    typer.echo(message, err=True)


def print_json(value: Mapping[str, Any]) -> None:
    """Print a JSON object on standard output; NaN and infinity, which JSON does not have, are an error."""
    import json

    typer.echo(json.dumps(value, indent=2, allow_nan=False, default=str))


def usage_error(message: str, option: str | None = None) -> NoReturn:
    """Stop with exit status 2: the command was given wrongly, and nothing has been done."""
    raise typer.BadParameter(message, param_hint=option)


def fail(message: str) -> NoReturn:
    """Stop with exit status 1 and a message."""
    raise RuntimeError(message)


def refuse_to_overwrite(paths: Iterable[Path], force: bool) -> None:
    """Stop with exit status 2, before any work, if an output exists and ``--force`` was not given.

    Also where it is no file (a directory, a device), with ``--force`` too, and where its directory is a file or cannot
    be written to: better now than after an hour of training.
    """
    for path in paths:
        if path.exists() and not path.is_file():
            kind = "a directory" if path.is_dir() else "a device or a pipe"
            usage_error(f"{path} is {kind}, expected the name of a file to write")
        if path.exists() and not force:
            usage_error(f"{path} exists; --force overwrites it")
        parent = Path(os.path.realpath(path)).parent  # a link's target is what will be written
        while not parent.exists():
            parent = parent.parent
        if not parent.is_dir():
            usage_error(f"{path} cannot be written: {parent} is not a directory")
        if not os.access(parent, os.W_OK):
            usage_error(f"{path} cannot be written: no permission to write in {parent}")


def refuse_report(path: Path, force: bool) -> None:
    """Stop, before any work, if a report cannot be drawn here or would replace a file: the page, a picture beside it.

    Pictures beside an earlier report are that report's.
    """
    from rvae_fast.report.page import is_report, output_files, require_packages

    require_packages()
    page, pictures = output_files(path)
    refuse_to_overwrite([page], force)
    refuse_to_overwrite(pictures.values(), force or is_report(page))


def _describe(error: BaseException) -> str:
    from rvae_fast.cli.words import in_options

    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError):
        return "out of memory" + (f": {error}" if str(error) else "")
    text = str(error) or type(error).__name__
    if isinstance(error, _EXPECTED):
        return in_options(text)
    return f"{type(error).__name__}: {text} (probably a mistake in rvae-fast; --debug shows where)"


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    from rvae_fast.cli.words import in_options

    note(f"warning: {in_options(str(message))}")


def command(function: Callable[P, R]) -> Callable[P, R]:
    """Give a command its error handling: one clear message on standard error and an exit status, no traceback.

    The wrapped function must have a ``debug`` parameter.
    """

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            try:
                return function(*args, **kwargs)
            except (typer.Exit, typer.Abort, typer.BadParameter):
                raise
            except KeyboardInterrupt:
                note("interrupted")
                raise typer.Exit(INTERRUPTED) from None
            except BrokenPipeError:
                # The reader (head, say) has gone: what Python flushes at its end must not raise once more.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise typer.Exit(BROKEN_PIPE) from None
            except Exception as error:
                if kwargs.get("debug"):
                    traceback.print_exc()
                note(f"error: {_describe(error)}")
                raise typer.Exit(FAILURE) from None

    return run
