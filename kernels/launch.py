"""Launching kernels: one by one, or as a tape that is recorded once for a set of shapes and played at every call.

A stack of 100 layers is several hundred launches. Choosing tiles, making views and binding arguments anew for each of
them costs the host more than the GPU needs for a small layer; all of it depends on shapes and dtypes alone. So the
driver (``residual_stack*.py``) runs once for a set of shapes, on stand-ins without memory, and what it would have
launched is kept as a :class:`Tape`: kernels already compiled and loaded, arguments by number. Playing it takes the real
tensors, allocates the temporaries (memory of one serves another as soon as its last reader has been launched) and
launches.

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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


class _Recording(threading.local):
    tape: Tape | None = None


_recording = _Recording()


class Number:
    """The stand-in of a float that is only known when the tape is played."""


class _Step:
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
    if _recording.tape is None:
        kernel[grid](*arguments, **constants, **options)
        return
    names = kernel.arg_names[len(arguments) :]
    _recording.tape._steps.append(_Step(kernel, grid, (*arguments, *(constants[name] for name in names)), options))


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
    if not isinstance(kernel, triton.runtime.JITFunction) or _hooks():
        kernel[grid](*arguments, **constants, **options)
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
        prototypes = (_prototype(a, not isinstance(a, Tensor) or a.data_ptr() % 16 == 0) for a in arguments)
        compiled = kernel.warmup(*prototypes, grid=grid, **constants, **options)
        if hasattr(compiled, "result"):  # under Triton's asynchronous compilation
            compiled = compiled.result()
        names = kernel.arg_names[len(arguments) :]
        if len(_quick) >= _QUICK_LIMIT:
            _quick.clear()
        found = _quick[key] = (_Compiled(compiled, (1, 1, 1)), tuple(constants[name] for name in names))
    run, rest = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    run.on((*grid, 1, 1)[:3], stream, (*addresses, *rest))


def call(function: Callable[..., Any], *arguments: Any) -> None:
    """Call a function that writes into its arguments (tensors, lists of tensors, numbers), or put it on the tape."""
    if _recording.tape is None:
        function(*arguments)
    else:
        _recording.tape._steps.append(_Step(function, None, arguments, {}))


def place(tensor: Tensor) -> torch.device:
    """The device that launches on this tensor go to: of a stand-in, the tape's."""
    return tensor.device if _recording.tape is None else _recording.tape.device


@contextmanager
def paused() -> Iterator[None]:
    """Inside, launches and calls run at once although a tape is being recorded."""
    tape, _recording.tape = _recording.tape, None
    try:
        yield
    finally:
        _recording.tape = tape


class Tape:
    """A straight line of launches and calls over numbered values, recorded with stand-ins and played with tensors.

    Parameters
    ----------
    device : torch.device
        Where it will be played; kernels are compiled for it.
    aligned : bool
        Whether every tensor will start at a multiple of 16 bytes. Kernels compiled for that must not meet others.
    """

    def __init__(self, device: torch.device, aligned: bool) -> None:
        self.device = device
        self._aligned = aligned
        self._inputs: list[Any] = []
        self._parts: list[tuple[Tensor, list[Tensor]]] = []
        self._steps: list[_Step] = []
        self._temporaries: list[tuple[tuple[int, ...], torch.dtype]] = []
        self._unbound: list[tuple[int, bool]] = []  # which value, and whether its parts are wanted as tensors
        self._constants: list[Any] = []
        self._program: list[tuple[Callable[..., Any], Callable[[list[Any]], Any], bool]] = []

    # --- recording ---

    def input(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """The stand-in of the next tensor that :meth:`play` will be given."""
        self._inputs.append(torch.empty(tuple(shape), dtype=dtype, device="meta"))
        return self._inputs[-1]

    def inputs(self, count: int, shape: Sequence[int], dtype: torch.dtype | None) -> list[Tensor]:
        """``count`` of them, or none without a dtype."""
        return [] if dtype is None else [self.input(shape, dtype) for _ in range(count)]

    def number(self) -> Number:
        """The stand-in of a float among the values that :meth:`play` will be given."""
        self._inputs.append(Number())
        return self._inputs[-1]

    def unbind(self, tensor: Tensor) -> list[Tensor]:
        """Stand-ins of ``tensor.unbind(0)``, for an input or a temporary. No other views can be recorded."""
        parts = [torch.empty(tensor.shape[1:], dtype=tensor.dtype, device="meta") for _ in range(tensor.shape[0])]
        self._parts.append((tensor, parts))
        return parts

    @contextmanager
    def recording(self) -> Iterator[Tape]:
        """Inside, launches and calls of this thread go on the tape; at the end it is made ready to play."""
        if _recording.tape is not None:
            raise RuntimeError("a tape is being recorded already")
        _recording.tape = self
        try:
            yield self
        finally:
            _recording.tape = None
        self._finish()

    def _finish(self) -> None:
        """Number the values, share memory between temporaries, compile and load the kernels."""
        index = {id(value): i for i, value in enumerate(self._inputs)}
        owner = {id(part): tensor for tensor, parts in self._parts for part in parts}
        index |= self._place_temporaries(index, owner)
        count = len(self._inputs) + len(self._temporaries)
        as_tensors = {id(v) for step in self._steps if not _compiles(step) for v in _flat(step.arguments)}
        for tensor, parts in self._parts:
            if id(tensor) in index:  # a temporary that nothing uses has no place
                self._unbound.append((index[id(tensor)], any(id(part) in as_tensors for part in parts)))
                index |= {id(part): count + i for i, part in enumerate(parts)}
                count += len(parts)

        constants: dict[Any, int] = {}

        def place(value: Any) -> int:
            if isinstance(value, (Tensor, Number)):
                return index[id(value)]
            key = (type(value), value)
            if key not in constants:
                constants[key] = count + len(self._constants)
                self._constants.append(value)
            return constants[key]

        for step in self._steps:
            nested = any(isinstance(a, list) for a in step.arguments)
            places = [[place(v) for v in a] if isinstance(a, list) else place(a) for a in step.arguments]
            take: Callable[[list[Any]], Any]
            if nested or len(places) < 2:
                take = _nested(places)
            else:
                take = itemgetter(*places)
            self._program.append((self._bind(step), take, _compiles(step)))
        # What only recording needs.
        self._inputs, self._parts, self._steps = [], [], []

    def _place_temporaries(self, inputs: dict[int, int], owner: dict[int, Tensor]) -> dict[int, int]:
        """Where each temporary lies: in memory of its shape and dtype whose last reader comes before its writer."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        tensors: dict[int, Tensor] = {}
        for i, step in enumerate(self._steps):
            for value in _flat(step.arguments):
                tensor = owner.get(id(value), value)
                if isinstance(tensor, Tensor) and id(tensor) not in inputs:
                    if tensor._is_view():
                        raise RuntimeError("a view cannot be recorded; take it with Tape.unbind")
                    tensors[id(tensor)] = tensor
                    first.setdefault(id(tensor), i)
                    last[id(tensor)] = i
        place: dict[int, int] = {}
        free: dict[tuple[tuple[int, ...], torch.dtype], list[int]] = {}
        in_use: list[int] = []
        for key in sorted(first, key=first.__getitem__):
            for other in [k for k in in_use if last[k] < first[key]]:
                in_use.remove(other)
                free.setdefault(_kind(tensors[other]), []).append(place[other])
            kind = _kind(tensors[key])
            if free.get(kind):
                place[key] = free[kind].pop()
            else:
                place[key] = len(inputs) + len(self._temporaries)
                self._temporaries.append(kind)
            in_use.append(key)
        return place

    def _bind(self, step: _Step) -> Callable[..., Any]:
        if step.grid is None:
            return step.target
        if not _compiles(step):
            return _Interpreted(step.target, step.grid, step.options)
        arguments = (_prototype(a, self._aligned) for a in step.arguments)
        compiled = step.target.warmup(*arguments, grid=step.grid, **step.options)
        if hasattr(compiled, "result"):  # under Triton's asynchronous compilation
            compiled = compiled.result()
        return _Compiled(compiled, (*step.grid, 1, 1)[:3])

    # --- playing ---

    def play(self, values: Sequence[Any]) -> None:
        """Run on the current stream of the tape's device, with one value for each input, in order."""
        device = self.device
        state = list(values)
        for shape, dtype in self._temporaries:
            state.append(torch.empty(shape, dtype=dtype, device=device))
        # Compiled kernels take addresses: asking each tensor once costs less than letting every launch ask for its own.
        addresses = [v.data_ptr() if isinstance(v, Tensor) else v for v in state]
        for i, as_tensors in self._unbound:
            tensor, count = state[i], len(state[i])
            bytes_a_part = tensor.stride(0) * tensor.element_size()
            start = addresses[i]
            addresses += [start + n * bytes_a_part for n in range(count)]
            state += tensor.unbind(0) if as_tensors else [None] * count
        state += self._constants
        addresses += self._constants
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        if _hooks():
            for run, take, _ in self._program:
                if isinstance(run, _Compiled):
                    run.observed(stream, take(addresses))
                else:
                    run(*take(state))
            return
        for run, take, is_compiled in self._program:
            if is_compiled:
                run(stream, take(addresses))
            else:
                run(*take(state))

    @property
    def launches(self) -> int:
        """How many kernels a play launches, not counting those of PyTorch's functions."""
        return sum(isinstance(run, (_Compiled, _Interpreted)) for run, _, _ in self._program)

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the temporaries of a play, alive together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._temporaries)


class _Compiled:
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


class _Interpreted:
    """A kernel in Triton's interpreter, which takes tensors."""

    def __init__(self, kernel: Any, grid: tuple[int, ...], options: dict[str, Any]) -> None:
        self._launch = kernel[grid]
        self._options = options

    def __call__(self, *arguments: Any) -> None:
        self._launch(*arguments, **self._options)


def _hooks() -> bool:
    """Whether somebody (a profiler) wants to be told of launches."""
    runtime = triton.knobs.runtime
    hooks = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


def _compiles(step: _Step) -> bool:
    return step.grid is not None and isinstance(step.target, triton.runtime.JITFunction)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield from argument if isinstance(argument, list) else (argument,)


def _nested(places: list[Any]) -> Callable[[list[Any]], list[Any]]:
    def take(state: list[Any]) -> list[Any]:
        return [[state[i] for i in p] if isinstance(p, list) else state[p] for p in places]

    return take


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _prototype(argument: Any, aligned: bool) -> Any:
    """What Triton's specialisation looks at: a tensor's dtype and whether its address is a multiple of 16."""
    if isinstance(argument, Tensor):
        return torch.empty(32, dtype=argument.dtype, device="cpu")[0 if aligned else 1 :]
    return 0.5 if isinstance(argument, Number) else argument
