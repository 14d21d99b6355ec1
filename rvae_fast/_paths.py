"""Where a file that is written beside its place and renamed may end up."""

from __future__ import annotations

import os
from pathlib import Path


def replaceable(path: str | os.PathLike[str]) -> Path:
    """The file that a rename should replace for ``path``: what a link points at, and never anything but a file.

    A rename puts the new file in the place of whatever has the name. A link would become a copy beside its old target;
    a device or a pipe (``/dev/null``, with the rights to it) would be gone for every other program.

    Raises
    ------
    OSError
        IsADirectoryError or FileNotFoundError naming ``path``, or one that says it is no regular file.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a directory, expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)} is a device or a pipe, expected the name of a file to write")
    if not target.parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)} cannot be written: there is no directory {target.parent}")
    return target
