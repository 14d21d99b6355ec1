"""Children of ``os.fork``, where no other thread goes on: neither OpenMP's, for which who divides work among them would
wait, nor one that holds a lock.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch


class ForkLock:
    """A lock, taken by ``with lock():``, reentrant; a child of ``os.fork`` has a new one, which nobody holds."""

    def __init__(self) -> None:
        self._make_new()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._make_new)

    def _make_new(self) -> None:
        self._lock = threading.RLock()

    def __call__(self) -> contextlib.AbstractContextManager[Any]:
        return self._lock


_is_child = False
#: Whether this process has divided work among threads, as far as is known here, and whether one that it descends from
#: had when it forked.
_used = _inherited = False
_lock = ForkLock()
_inside, _before = 0, 1


def _notice() -> None:
    global _is_child, _used, _inherited, _inside
    _is_child, _used, _inherited = True, False, _inherited or _used
    _inside = 0


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_notice)


def alone_in_a_child(*, training: bool = False) -> contextlib.AbstractContextManager[Any]:
    """Inside, PyTorch computes in the calling thread if this process is a child of ``os.fork``.

    With ``training``, which is slow without them, only where threads would never come back: if the parent has used
    them here.
    """
    global _used
    if _is_child and (_inherited or not training):
        return _alone()
    _used = True
    return contextlib.nullcontext()


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    global _inside, _before
    with _lock():  # of several threads at once the last to leave restores what the first has found
        if _inside == 0:
            _before = torch.get_num_threads()
            torch.set_num_threads(1)
        _inside += 1
    try:
        yield
    finally:
        with _lock():
            _inside -= 1
            if _inside == 0:
                torch.set_num_threads(_before)
