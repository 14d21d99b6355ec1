"""Triton's interpreter without what it does again and again for nothing: half of the time of small kernels.

It replaces the functions of ``triton.language`` at every launch and at every call of a device function, and puts them
back after the launch; and it computes every 32-bit integer sum a second time in 64 bits, for a check of overflow whose
result it drops (``device_assert`` looks at ``options.debug``, which is False). What kernels compute stays the same.
"""

from __future__ import annotations

import dataclasses
from typing import Any


class _Kept:
    """A scope of replaced functions that stay replaced."""

    def restore(self) -> None:
        pass


def quicken() -> None:
    """For a process that only interprets, after its environment has ``TRITON_INTERPRET=1``.

    The names are Triton's own business (3.9 has them): where one is missing, that part stays as it is.
    """
    from triton.runtime import interpreter

    builder = getattr(interpreter, "interpreter_builder", None)
    options = getattr(builder, "options", None)
    if getattr(options, "debug", True) is False and hasattr(options, "sanitize_overflow"):
        builder.options = dataclasses.replace(options, sanitize_overflow=False)

    patch = getattr(interpreter, "_patch_lang", None)
    if patch is None:
        return
    replaced: set[frozenset[int]] = set()

    def once(function: Any) -> _Kept:
        # What is replaced depends on the function by the modules that it sees alone.
        seen = frozenset(id(value) for value in function.__globals__.values() if type(value) is type(dataclasses))
        if seen not in replaced:
            patch(function)
            replaced.add(seen)
        return _Kept()

    interpreter._patch_lang = once
