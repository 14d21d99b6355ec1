"""The command line: ``rvae-fast fit | score | evaluate | data | doctor | demo``.

Only typer is imported here; a command imports what it works with when it runs, so that ``--help`` answers at once.
"""

from __future__ import annotations

from rvae_fast.cli.app import app, main

__all__ = ["app", "main"]
