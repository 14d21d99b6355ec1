"""A tape of launches, recorded once for a set of shapes and played at every call.

A stack of 100 layers is several hundred launches. Choosing tiles, making views and binding arguments anew for each of
them costs the host more than the GPU needs for a small layer; all of it depends on shapes and dtypes alone. So the
driver (``residual_stack*.py``) runs once for a set of shapes, on stand-ins without memory, and what it would have
launched is kept as a :class:`Tape`: kernels already compiled and loaded, arguments by number. Playing it takes the real
tensors, allocates the temporaries (memory of one serves another as soon as its last reader has been launched) and
launches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from .launch import Compiled, Interpreted, Number, Step, compiles, current, hooked, prototype


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
        self.steps: list[Step] = []
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
        if current.tape is not None:
            raise RuntimeError("a tape is being recorded already")
        current.tape = self
        try:
            yield self
        finally:
            current.tape = None
        self._finish()

    def _finish(self) -> None:
        """Number the values, share memory between temporaries, compile and load the kernels."""
        index = {id(value): i for i, value in enumerate(self._inputs)}
        owner = {id(part): tensor for tensor, parts in self._parts for part in parts}
        index |= self._place_temporaries(index, owner)
        count = len(self._inputs) + len(self._temporaries)
        as_tensors = {id(v) for step in self.steps if not compiles(step) for v in _flat(step.arguments)}
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

        for step in self.steps:
            nested = any(isinstance(a, list) for a in step.arguments)
            places = [[place(v) for v in a] if isinstance(a, list) else place(a) for a in step.arguments]
            take: Callable[[list[Any]], Any]
            if nested or len(places) < 2:
                take = _nested(places)
            else:
                take = itemgetter(*places)
            self._program.append((self._bind(step), take, compiles(step)))
        # What only recording needs.
        self._inputs, self._parts, self.steps = [], [], []

    def _place_temporaries(self, inputs: dict[int, int], owner: dict[int, Tensor]) -> dict[int, int]:
        """Where each temporary lies: in memory of its shape and dtype whose last reader comes before its writer."""
        first: dict[int, int] = {}
        last: dict[int, int] = {}
        tensors: dict[int, Tensor] = {}
        for i, step in enumerate(self.steps):
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

    def _bind(self, step: Step) -> Callable[..., Any]:
        if step.grid is None:
            return step.target
        if not compiles(step):
            return Interpreted(step.target, step.grid, step.options)
        arguments = (prototype(a, self._aligned) for a in step.arguments)
        compiled = step.target.warmup(*arguments, grid=step.grid, **step.options)
        if hasattr(compiled, "result"):  # under Triton's asynchronous compilation
            compiled = compiled.result()
        return Compiled(compiled, (*step.grid, 1, 1)[:3])

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
        if hooked():
            for run, take, _ in self._program:
                if isinstance(run, Compiled):
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
        return sum(isinstance(run, (Compiled, Interpreted)) for run, _, _ in self._program)

    @property
    def temporary_bytes(self) -> int:
        """Bytes of the temporaries of a play, alive together."""
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in self._temporaries)


def _flat(arguments: Sequence[Any]) -> Iterator[Any]:
    for argument in arguments:
        yield from argument if isinstance(argument, list) else (argument,)


def _nested(places: list[Any]) -> Callable[[list[Any]], list[Any]]:
    def take(state: list[Any]) -> list[Any]:
        return [[state[i] for i in p] if isinstance(p, list) else state[p] for p in places]

    return take


def _kind(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype
