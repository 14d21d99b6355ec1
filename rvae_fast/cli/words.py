"""Messages of the library in the words of the command line: its options, not Python's keywords."""

from __future__ import annotations

import re

__all__ = ["in_options"]

#: Of the readers and the training: what is said there, and here.
_PHRASES = (
    (r"train with resume=False or 'auto'", "train without --resume"),
    (r"give validation, or a validation_fraction above 0", "give --validation, a share above 0"),
    (
        r"\(drop or columns\), or name one as label or id",
        "(--drop or --columns of fit), or name one by --label or --id",
    ),
    (r"leave it out \(drop\)", "leave it out (--drop of fit)"),
    (r"decimal=','", "--decimal ,"),
    (r"delimiter= says", "--delimiter says"),
    (r", or give format=", "; CSV by another name is read from standard input: - < FILE"),
    (r"name one with key=", "name one with --key"),
    (r"say so with anomaly=\.\.\.", "say so with --anomaly-value VALUE"),
    (r"^anomaly: ", "--anomaly-value: "),
    (r": (columns|drop|label|id) ('.*?') (is not a column|has no value)", r": --\1 \2 \3"),
    (r": columns names a column twice", ": --columns names a column twice"),
    (r"is both in columns and the (label|id)", r"is both in --columns and --\1"),
    (r"but widths (?=\d)", "but --widths "),
    (
        r"^n_layers and widths both say (.*): leave one of them None, got .*",
        r"--layers and --widths both say \1: give one",
    ),
)


def in_options(text: str) -> str:
    """Return a message with the options' names where it has parameters' of the library."""
    from rvae_fast.cli.fit_options import PARAMETERS

    flags = {parameter.name: parameter.flag for parameter in PARAMETERS} | {
        "scaler": "--scaler",
        "missing": "--missing",
    }
    for phrase, here in _PHRASES:
        text = re.sub(phrase, here, text)
    # Only where it is sure to be the parameter: many of them are words, too.
    text = re.sub(r"^(\w+)(?= (?:must|needs|has) )", lambda found: flags.get(found[1], found[1]), text)

    def option(found: re.Match[str]) -> str:
        return f"{flags[found[1]]} {found[2] or 'none'}" if found[1] in flags else found[0]

    return re.sub(r"\b(\w+)=(?:'([\w-]+)'|None\b)", option, text)
