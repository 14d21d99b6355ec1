"""``rvae-fast doctor``: which fast paths this installation has, and why not the others."""

from __future__ import annotations

from rvae_fast.cli.common import DebugOption, JsonOption, command

__all__ = ["doctor"]


@command
def doctor(json_output: JsonOption = False, debug: DebugOption = False) -> None:
    """Say which backends are on, why the others are not, and what the machine offers.

    Lines marked - are parts that are not there, which narrows what is fast and never what works; lines marked ✗ are
    worth mending.

    **Exit status**: 0 all in order, 1 something is broken.
    """
    import typer

    from rvae_fast.cli.common import FAILURE, console, print_json
    from rvae_fast.doctor import collect, render

    diagnosis = collect()
    if json_output:
        print_json(diagnosis.to_dict())
    else:
        render(diagnosis, console(stderr=False))
    if diagnosis.problems:
        raise typer.Exit(FAILURE)
