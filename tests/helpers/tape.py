"""A stand-in for CUDA graphs on the CPU, with their one essential property: Python runs at the capture only.

Capturing records every op that reaches PyTorch's dispatcher, with its arguments; replaying runs them again on the same
tensors and writes each result where the capture's lay. A number that Python computed anew in every step, a tensor that
was made outside and has been replaced since, a decision by value: all stay as they were at the capture, as in a graph.
Reading a value on the host fails, as it does there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)}
        fresh = [
            t if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in inputs else None
            for t in tree_flatten(result)[0]
        ]
        self.calls.append((func, args, kwargs, fresh))
        return result


class Tape:
    """What was captured. The capture ran the step once; the first replay stands for that."""

    def __init__(self, body: Callable[[], Tensor]) -> None:
        with _Recorder() as recorder:
            self.output = body()
        self._calls = recorder.calls
        self.replays = 0

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, fresh in self._calls:
            result = tree_flatten(func(*args, **kwargs))[0]
            for old, new in zip(fresh, result, strict=True):
                if old is not None:
                    old.copy_(new)


class TapeDevice:
    """A device for ``StepGraph`` whose clock says what it is told: seconds an eager step takes, and a replay."""

    def __init__(self, eager_seconds: float = 2.0, graph_seconds: float = 1.0, fail: bool = False) -> None:
        self.eager_seconds, self.graph_seconds, self.fail = eager_seconds, graph_seconds, fail
        self.eager_steps = 0
        self.tapes: list[Tape] = []
        self.readings = 0

    def eager(self, body: Callable[[], Tensor]) -> Tensor:
        self.eager_steps += 1
        return body()

    def capture(self, body: Callable[[], Tensor]) -> Tape:
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.tapes.append(Tape(body))
        return self.tapes[-1]

    @property
    def replays(self) -> int:
        return sum(tape.replays for tape in self.tapes)

    def seconds(self) -> float:
        self.readings += 1
        return self.eager_steps * self.eager_seconds + self.replays * self.graph_seconds
