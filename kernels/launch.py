"""Launching kernels: at once, or onto the tape that is being recorded (``tape.py``).

On a chip of compute capability 9.0 and later a kernel that takes ``CHAINED`` is launched while the one before it still
runs (programmatic dependent launch), and waits in :func:`follow` for that one's end and memory: what a launch costs is
then spent beside work. It lets its own successor be launched only once it has waited, so at most two are under way.

The launchers in the other files call :func:`launch` for kernels and :func:`call` for functions of PyTorch: outside a
recording both run at once. Kernels that are launched one at a time, and on no tape, go through :func:`quick_launch`,
which keeps what a call of Triton's would look up anew.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

if TYPE_CHECKING:
    from .tape import Tape


class _Current(threading.local):
    tape: Tape | None = None


#: The tape that this thread records, if it does.
current = _Current()


class Number:
    """The stand-in of a float that is only known when the tape is played."""


class Step:
    """A kernel (with its grid and options) or a function, and its arguments: stand-ins, lists of them, or constants."""

    def __init__(self, target: Any, grid: tuple[int, ...] | None, arguments: tuple[Any, ...], options: dict[str, Any]):
        self.target = target
        self.grid = grid
        self.arguments = arguments
        self.options = options


@triton.jit
def follow(CHAINED: tl.constexpr):
    """First in a kernel, before it touches memory: wait for the kernel before, then let the next one be launched."""
    if CHAINED:
        gdc_wait()
        gdc_launch_dependents()


@functools.lru_cache(maxsize=64)
def chains(device: torch.device) -> bool:
    """Whether kernels on this device are launched while the one before still runs."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] >= 9


#: Multiply and add in one instruction, as accuracy and speed were measured with. Triton does so by itself until 3.9,
#: which warns of the end of that.
_COMPILED = {"enable_fp_fusion": True}


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, options: dict[str, Any], **constants: Any) -> None:
    """Launch ``kernel[grid](*arguments, **constants, **options)``, or put it on the tape that is being recorded.

    Parameters
    ----------
    kernel : a ``@triton.jit`` function
    grid : one to three ints
    *arguments
        Its run-time arguments, in order: contiguous tensors, None, ints, floats.
    options : dict
        ``num_warps`` and ``num_stages``.
    **constants
        Its compile-time arguments, all of which follow the run-time ones; but not ``CHAINED``, which is set here.
    """
    if "CHAINED" in kernel.arg_names:
        constants["CHAINED"] = chains(place(next(a for a in arguments if isinstance(a, Tensor))))
        if constants["CHAINED"]:
            options = {**options, "launch_pdl": True}
    options = {**options, **_COMPILED}
    if current.tape is None:
        kernel[grid](*arguments, **constants, **options)
        return
    names = kernel.arg_names[len(arguments) :]
    current.tape.steps.append(Step(kernel, grid, (*arguments, *(constants[name] for name in names)), options))


#: Compiled kernels with the values they were compiled for; emptied when it is full.
_quick: dict[Any, Any] = {}
_QUICK_LIMIT = 4096


def quick_launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, options: dict[str, int], **constants: Any
) -> None:
    """As ``kernel[grid](*arguments, **constants, **options)`` on the device that is current, for less of the host.

    Triton works a kernel's specialisation out from the arguments at every call. Here the compiled kernel is looked up
    by the tensors' dtypes and alignment and the values of all else, which are expected to repeat.
    """
    if not isinstance(kernel, triton.runtime.JITFunction) or hooked():
        kernel[grid](*arguments, **constants, **options, **_COMPILED)
        return
    device = torch.cuda.current_device()
    addresses = []
    kinds: list[Any] = [id(kernel), device, options["num_warps"]]
    for argument in arguments:
        if isinstance(argument, Tensor):
            address = argument.data_ptr()
            addresses.append(address)
            kinds += (argument.dtype, address % 16 == 0)
        else:
            addresses.append(argument)
            kinds.append(argument)
    key = (*kinds, *constants.values())
    found = _quick.get(key)
    if found is None:
        prototypes = (prototype(a, not isinstance(a, Tensor) or a.data_ptr() % 16 == 0) for a in arguments)
        compiled = kernel.warmup(*prototypes, grid=grid, **constants, **options, **_COMPILED)
        if hasattr(compiled, "result"):  # under Triton's asynchronous compilation
            compiled = compiled.result()
        names = kernel.arg_names[len(arguments) :]
        if len(_quick) >= _QUICK_LIMIT:
            _quick.clear()
        found = _quick[key] = (Compiled(compiled, (1, 1, 1)), tuple(constants[name] for name in names))
    run, rest = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    run.on((*grid, 1, 1)[:3], stream, (*addresses, *rest))


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that writes into its arguments (tensors, lists of tensors, numbers), or put it on the tape."""
    if current.tape is None:
        function(*arguments)
    else:
        current.tape.steps.append(Step(function, None, arguments, {}))


def place(tensor: Tensor) -> torch.device:
    """The device that launches on this tensor go to: of a stand-in, the tape's."""
    return tensor.device if current.tape is None else current.tape.device


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Makes a CUDA device current inside: launches, events and the captures of graphs are of the one that is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def paused() -> Iterator[None]:
    """Inside, launches and calls run at once although a tape is being recorded."""
    tape, current.tape = current.tape, None
    try:
        yield
    finally:
        current.tape = tape


class Compiled:
    """A compiled kernel, loaded, on its grid."""

    __slots__ = ("_function", "_grid", "_kernel", "_metadata", "_run")

    def __init__(self, kernel: Any, grid: tuple[int, ...]) -> None:
        self._run = kernel.run  # loads the binary
        self._function, self._metadata = kernel.function, kernel.packed_metadata
        self._kernel, self._grid = kernel, grid

    def __call__(self, stream: int, arguments: tuple[Any, ...]) -> None:
        """As ``kernel[grid](*arguments, stream=stream)``, which spends 1.6 us in looking for hooks."""
        self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments)

    def on(self, grid: tuple[int, ...], stream: int, arguments: tuple[Any, ...]) -> None:
        """The same on another grid."""
        self._run(*grid, stream, self._function, self._metadata, None, None, None, *arguments)

    def observed(self, stream: int, arguments: tuple[Any, ...]) -> None:
        """The same with Triton's hooks."""
        self._kernel[self._grid](*arguments, stream=stream)


class Interpreted:
    """A kernel in Triton's interpreter, which takes tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any]) -> None:
        self._launch = kernel[grid]
        self._options = options

    def __call__(self, *arguments: Any) -> None:
        self._launch(*arguments, **self._options)


@triton.jit
def _probe_kernel(x_ptr):
    tl.store(x_ptr, 0.0)


def probe() -> None:
    """Compile a kernel for the current device and load it, without running it; raises what Triton raises.

    Triton's own part of this is C, compiled where it first runs: that takes a C compiler, Python's headers and a folder
    for its cache, which a machine may lack.
    """
    compiled = _probe_kernel.warmup(torch.float32, grid=(1,), **_COMPILED)
    if hasattr(compiled, "result"):  # under Triton's asynchronous compilation
        compiled = compiled.result()
    Compiled(compiled, (1, 1, 1))


def hooked() -> bool:
    """Whether somebody (a profiler) wants to be told of launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def compiles(step: Step) -> bool:
    return step.grid is not None and isinstance(step.target, triton.runtime.JITFunction)


def prototype(argument: Any, aligned: bool) -> Any:
    """What Triton's specialisation looks at: a tensor's dtype and whether its address is a multiple of 16."""
    if isinstance(argument, Tensor):
        return torch.empty(32, dtype=argument.dtype, device="cpu")[0 if aligned else 1 :]
    return 0.5 if isinstance(argument, Number) else argument
