"""PEP 517 backend: setuptools, plus torch among the build requirements where the target has none.

The native module is compiled against an installed PyTorch. Under build isolation the build looks for the one of the
environment that is being installed into (`native_build.find_torch`). Where that environment has no torch yet, pip
is about to install one as a dependency, *after* this build: naming it as a build requirement gets the same
release from the same index into the throw-away build environment, so that a first `pip install` ends with the fast
path.
"""

from __future__ import annotations

from typing import Any

import native_build
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403 - a backend is the hooks that it exposes

TORCH_REQUIREMENT = "torch>=2.9"


def _torch_if_needed() -> list[str]:
    if native_build.requested() == "0" or native_build.find_torch() is not None:
        return []
    if native_build.requested() == "auto" and native_build.find_compiler() is None:
        return []  # nothing will be compiled: spare the download
    return [TORCH_REQUIREMENT]


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """Build requirements of a wheel: those of setuptools, and torch if the target environment lacks it."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_needed()]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """Build requirements of an editable install: as for a wheel."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_needed()]
