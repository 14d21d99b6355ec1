"""Which implementation runs an op: the reference, the native C++ module, or Triton.

``"auto"`` (the default) takes the best implementation that the op has for the device its tensors are on.  Any other
name is an order: if that implementation cannot run, the call fails and says why, rather than quietly running another
one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Mapping
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch

from rvae_fast import _native

ENVIRONMENT_VARIABLE = "RVAE_FAST_BACKEND"
"""Environment variable that replaces ``"auto"`` as the process's default backend; read once, at import."""

NAMES = ("auto", "reference", "native", "triton")

_PREFERENCE = {"cpu": ("native",), "cuda": ("triton", "native")}
"""For each device type, the backends ``"auto"`` tries, best first, before the reference."""

_default = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
_selected: ContextVar[str | None] = ContextVar("rvae_fast_backend", default=None)

# Dynamo can neither read a ContextVar nor guard on one.  This plain global shadows the choice, so that a compiled
# function is compiled again when the backend changes.  It is process-wide: a thread that compiles while another one is
# inside ``backend(...)`` may take that thread's choice, which changes the speed and never the mathematics.
_traced: str | None = None


class backend:
    """Context manager that chooses the implementation of every op called inside it.

    The choice belongs to the current thread (and to the current ``asyncio`` task); other threads keep theirs.  The
    backward pass uses the implementation that its forward pass used.

    Parameters
    ----------
    name : {"auto", "reference", "native", "triton"}
        ``"auto"`` picks by device; ``"reference"`` is plain PyTorch; ``"native"`` the C++ module; ``"triton"`` the
        Triton kernels.

    Raises
    ------
    ValueError
        If the name is unknown.
    RuntimeError
        On entry, if the backend is not available here; the message says why.

    Examples
    --------
    >>> with rvae_fast.backend("reference"):
    ...     error, kld = rvae_fast.reconstruction_kld(x, x_hat, mu, logvar)
    """

    def __init__(self, name: str) -> None:
        if name not in NAMES:
            raise ValueError(f"backend: name must be one of {', '.join(NAMES)}; got {name!r}")
        self.name = name
        self._tokens: list[Token[str | None]] = []  # a stack, so that one object can be entered again
        self._outer: list[str | None] = []

    def __enter__(self) -> backend:
        global _traced
        self._outer.append(_traced)
        if not torch.compiler.is_compiling():
            _require(self.name)
            self._tokens.append(_selected.set(self.name))
        _traced = self.name
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _traced
        if not torch.compiler.is_compiling():
            _selected.reset(self._tokens.pop())
        _traced = self._outer.pop()


def current_backend() -> str:
    """Return the name in force here: the innermost :class:`backend`, else ``RVAE_FAST_BACKEND``, else ``"auto"``."""
    selected = _traced if torch.compiler.is_compiling() else _selected.get()
    name = _default if selected is None else selected
    if name not in NAMES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE} must be one of {', '.join(NAMES)}; got {name!r}")
    return name


def available_backends() -> dict[str, str | None]:
    """Return, for each backend by name, None if it can run here, else the reason why it cannot."""
    return {name: _why_not(name) for name in NAMES if name != "auto"}


def choose(op: str, device_type: str, implemented: Mapping[str, tuple[str, ...]]) -> str:
    """Name the backend that runs ``op`` on a device.

    Parameters
    ----------
    op : str
        The op's name, for messages.
    device_type : str
        ``tensor.device.type``.
    implemented : mapping of str to tuple of str
        For each backend other than the reference that has this op, the device types it covers.

    Raises
    ------
    RuntimeError
        If a backend was named and cannot run this op here.
    """
    name = current_backend()
    if name == "auto":
        for candidate in _PREFERENCE.get(device_type, ()):
            if device_type in implemented.get(candidate, ()) and is_available(candidate):
                return candidate
        return "reference"
    if name != "reference":
        _require(name)
        if device_type not in implemented.get(name, ()):
            devices = ", ".join(implemented.get(name, ())) or "no device"
            raise RuntimeError(
                f"{op}: backend {name!r} was asked for; it covers this op on {devices}, and the tensors are on "
                f"{device_type!r}; use backend('auto') or backend('reference')"
            )
    return name


def triton_devices() -> tuple[str, ...]:
    """Device types that Triton kernels cover: GPUs, and CPUs where Triton's interpreter was asked for.

    ``"auto"`` never takes the interpreter; ``backend("triton")`` does.
    """
    return ("cuda", "cpu") if os.environ.get("TRITON_INTERPRET") == "1" else ("cuda",)


def device_guard(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the device of ``tensor`` the current one: Triton launches on that."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def _why_not(name: str) -> str | None:
    if name == "native":
        return _native.why_not()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed (pip install rvae-fast[triton])"
        if importlib.util.find_spec("rvae_fast.kernels") is None:
            return "rvae_fast.kernels is not installed"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return (
                "there is no GPU that torch can use (torch.cuda.is_available() is False) and TRITON_INTERPRET is not 1"
            )
        if os.environ.get("TRITON_INTERPRET") != "1":
            return _triton_fails()
    return None


BROKEN = "Triton is installed and cannot compile a kernel"


def _triton_fails() -> str | None:
    """Why Triton fails on this GPU, which takes it a C compiler and a folder for its cache; None if it does not."""
    try:
        from rvae_fast.kernels import launch

        launch.probe()
    except Exception as error:  # whatever it is: the reference does not need Triton
        return f"{BROKEN} ({type(error).__name__}: {error}); does it find a C compiler and Python's headers?"
    return None


_availability: dict[str, bool] = {}


def is_available(name: str) -> bool:
    """Whether a backend can run here; looked up once, with a warning where it should and cannot."""
    if name not in _availability:
        reason = _why_not(name)
        _availability[name] = reason is None
        if reason is not None and reason.startswith(BROKEN):
            warnings.warn(f"rvae_fast runs on plain PyTorch: {reason}", RuntimeWarning, stacklevel=2)
    return _availability[name]


# As torch.compiler.assume_constant_result does, which would import the compiler: a graph that is the first to ask must
# not be traced through the look-up, which reads the file system.
is_available._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _require(name: str) -> None:
    if name not in ("auto", "reference") and not is_available(name):
        raise RuntimeError(f"backend {name!r} is not available: {_why_not(name)}")
