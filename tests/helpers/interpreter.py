"""Whether Triton's interpreter can run here."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re

import numpy as np


def why_not() -> str | None:
    """The reason the interpreter cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed (pip install rvae-fast[triton])"
    version = importlib.metadata.version("triton")
    triton_release, numpy_release = (tuple(map(int, re.findall(r"\d+", v)[:2])) for v in (version, np.__version__))
    if triton_release < (3, 9) and numpy_release >= (2, 4):
        return f"Triton {version} cannot interpret loops to run-time bounds with NumPy {np.__version__}; Triton 3.9 can"
    return None
