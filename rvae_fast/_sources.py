"""Which C++ and CUDA sources a native module was built from. Read by the build as well: the standard library alone."""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = (".cpp", ".h", ".hpp", ".in", ".cu", ".cuh", ".inl")


def digest(root: Path) -> str | None:
    """A digest of ``csrc/`` in a source tree, the same wherever the tree lies; None where there are no sources."""
    if not (root / "CMakeLists.txt").is_file() or not (root / "csrc").is_dir():
        return None
    found = hashlib.sha256()
    for path in sorted((root / "csrc").rglob("*")):
        if path.suffix in _SUFFIXES:
            found.update(path.relative_to(root).as_posix().encode() + b"\0")
            found.update(path.read_bytes() + b"\0")
    return found.hexdigest()[:16]
