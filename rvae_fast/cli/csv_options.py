"""How a CSV file is written, where its beginning does not tell."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rvae_fast.cli.common import usage_error

DelimiterOption = Annotated[
    str | None, typer.Option("--delimiter", help="CSV: the separator, where the guess is wrong.")
]
DecimalOption = Annotated[str, typer.Option("--decimal", help="CSV: the decimal mark, a point or a comma.")]
HeaderOption = Annotated[
    bool | None,
    typer.Option(
        "--header/--no-header",
        help="CSV: whether the first line names the columns [default: unless all of it is numbers, NA or ?, true or "
        "false; but 0,1,2,... and 1,2,3,... are names].",
        show_default=False,
    ),
]
EncodingOption = Annotated[
    str | None,
    typer.Option("--encoding", help="CSV: the encoding of its texts [default: UTF-8, UTF-16 by its mark, or Latin-1]."),
]


def csv_options(delimiter: str | None, decimal: str, header: bool | None, encoding: str | None) -> dict[str, Any]:
    """Check the options and name them as the readers do."""
    from rvae_fast.datasets.csv_layout import is_delimiter

    if decimal not in (".", ","):
        usage_error(f"must be . or , and not {decimal!r}", "--decimal")
    delimiter = "\t" if delimiter == "\\t" else delimiter  # what a shell makes of a tab in quotes
    if delimiter is not None and not is_delimiter(delimiter):
        usage_error(f"must be one character of ASCII, got {delimiter!r}", "--delimiter")
    if delimiter == decimal:
        usage_error(f"{delimiter!r} is the decimal mark too", "--delimiter")
    if encoding is not None:
        try:
            "".encode(encoding)
        except LookupError:
            usage_error(f"no encoding {encoding!r} is known", "--encoding")
    return {"delimiter": delimiter, "decimal": decimal, "header": header, "encoding": encoding}
