"""An optimiser step as a CUDA graph: when it is captured, when it is replayed, and when the step stays eager.

A step of a deep, narrow network is hundreds of kernels of a few microseconds; launching them one by one takes the host
longer than running them takes the GPU. A graph launches all of them at once. What a captured step reads must lie where
it lay at the capture: the caller keeps batch, learning rate and KL weight in tensors of their own and fills them before
each step. Random numbers need nothing: torch's generators keep seed and offset in device memory for captured kernels
and fill it at every replay, so a generator reseeded before a replay gives the numbers that an eager step would draw.

Every step taken here, whichever way, is a step of the training: none is run for the timing alone.
"""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

#: Eager steps before a capture (they compile kernels and fill caches), and steps that each way is timed over.
WARMUP, TIMED = 3, 10

Body = Callable[[], Tensor]


class Captured(Protocol):
    """A captured step; each replay overwrites ``output``."""

    output: Tensor

    def replay(self) -> None: ...


class Device(Protocol):
    """Where steps run."""

    def eager(self, body: Body) -> Tensor:
        """Run a step that warms up for a capture."""

    def capture(self, body: Body) -> Captured:
        """Capture a step without running it."""

    def seconds(self) -> float:
        """A clock that is read when the device is idle."""


class StepGraph:
    """Runs steps of one shape, by a graph where that is asked for or proves faster.

    Parameters
    ----------
    always : bool
        Capture without timing, and fail if that fails; otherwise time both ways, keep the faster, and where the capture
        fails go on eagerly with a warning.
    device : Device
    """

    def __init__(self, always: bool, device: Device) -> None:
        self._always, self._device = always, device
        #: ``"graph"`` or ``"eager"`` once it is settled.
        self.choice: str | None = "graph" if always else None
        #: Seconds a step, where they were measured.
        self.eager_seconds: float | None = None
        self.graph_seconds: float | None = None
        self._captured: Captured | None = None
        self._warm = self._replays = 0
        self._began = 0.0

    def run(self, prepare: Callable[[], None], body: Body) -> Tensor:
        """Take one step.

        Parameters
        ----------
        prepare : callable
            What must run before each attempt, outside of a graph: seeding.
        body : callable
            The step, on tensors that stay where they are; returns its record.

        Returns
        -------
        Tensor
            The record, which later steps leave alone.

        Raises
        ------
        RuntimeError
            When the step cannot be captured and a graph was asked for.
        """
        if self.choice != "eager" and self._captured is None:
            if self._warm < WARMUP + (0 if self.choice else TIMED):
                return self._warm_up(prepare, body)
            self._captured = self._capture(prepare, body)
        if self._captured is None:
            prepare()
            return body()
        return self._replay(self._captured, prepare)

    def invalidate(self) -> None:
        """Capture again before the next replay: something outside may have changed what a step does."""
        if self._captured is not None:
            self._captured, self._warm, self._replays = None, WARMUP + TIMED - 1, 0
            if self.choice:
                self._warm = WARMUP - 1

    def _warm_up(self, prepare: Callable[[], None], body: Body) -> Tensor:
        if self._warm == WARMUP:
            self._began = self._device.seconds()
        prepare()
        record = self._device.eager(body)
        self._warm += 1
        # Not again after an invalidation: the clock has run since, through replays and what was between them.
        if self._warm == WARMUP + TIMED and self.eager_seconds is None:
            self.eager_seconds = (self._device.seconds() - self._began) / TIMED
        return record

    def _capture(self, prepare: Callable[[], None], body: Body) -> Captured | None:
        prepare()
        try:
            return self._device.capture(body)
        except Exception as error:
            if self._always:
                raise RuntimeError(
                    "cuda_graph=True was asked for, and the training step cannot be captured "
                    f"({type(error).__name__}: {error}); cuda_graph='auto' goes on without"
                ) from error
            self.choice = "eager"
            warnings.warn(
                "training goes on without a CUDA graph: the step cannot be captured "
                f"({type(error).__name__}: {error}); cuda_graph=False says so from the start",
                stacklevel=2,
            )
            return None

    def _replay(self, captured: Captured, prepare: Callable[[], None]) -> Tensor:
        timing = self.choice is None
        # Not the first: it brings the graph to the device.
        if timing and self._replays == 1:
            self._began = self._device.seconds()
        prepare()
        captured.replay()
        record = captured.output.clone()
        self._replays += 1
        if timing and self._replays == 1 + TIMED:
            self.graph_seconds = (self._device.seconds() - self._began) / TIMED
            assert self.eager_seconds is not None
            self.choice = "graph" if self.graph_seconds <= self.eager_seconds else "eager"
            if self.choice == "eager":
                self._captured = None  # and with it the memory that it holds
        return record


class _CudaCaptured:
    def __init__(self, graph: torch.cuda.CUDAGraph, output: Tensor) -> None:
        self._graph, self.output = graph, output

    def replay(self) -> None:
        self._graph.replay()


class CudaDevice:
    """Steps on a CUDA device: captured, and warmed up for it, on a stream of their own, as capturing demands."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def eager(self, body: Body) -> Tensor:
        """Run ``body`` on the side stream, ordered before and after what the current one does."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            record = body()
        current.wait_stream(self._stream)
        record.record_stream(current)
        return record

    def capture(self, body: Body) -> Captured:
        """Capture ``body`` into a graph with a memory pool of its own."""
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        # Not by torch.cuda.graph: when a capture fails, that leaves the side stream the current one.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            try:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                output = body()
                graph.capture_end()
            except BaseException:
                with contextlib.suppress(Exception):
                    graph.capture_end()
                with contextlib.suppress(Exception):
                    self._clean_up(pool)
                raise
        return _CudaCaptured(graph, output)

    def _clean_up(self, pool: Any) -> None:
        """Leave nothing of a capture that has failed.

        When CUDA calls a capture invalid (something in it waited for the device), PyTorch's ``capture_end`` raises at
        once: its allocator takes the capture to go on, never to give memory back to the device again, and up to torch
        2.11 the default generator does, to refuse every random number outside of one. The former has functions to end
        it, which raise when it has ended, and the latter ends with the next capture.
        """
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(self._device.index, pool)
            torch._C._cuda_releasePool(self._device.index, pool)
        graph, scratch = torch.cuda.CUDAGraph(), torch.zeros(1, device=self._device)
        graph.capture_begin(capture_error_mode="thread_local")
        scratch.zero_()  # PyTorch warns of empty graphs
        graph.capture_end()

    def seconds(self) -> float:
        """``time.perf_counter()`` once the device is idle."""
        torch.cuda.synchronize(self._device)
        return time.perf_counter()


def step_graph(cuda_graph: bool | str, device: torch.device, dtype: torch.dtype, optimizer: str) -> StepGraph | None:
    """The :class:`StepGraph` for a ``cuda_graph`` option (True, False or "auto"), None where steps stay eager.

    A model in fp64 stays eager: PyTorch's fused optimiser reads a learning rate on the device in fp32. So does RAdam,
    which has no fused kernel: whether it takes a step is decided on the host.

    Raises
    ------
    ValueError
        For True on a device that has no CUDA graphs, for such a model, or such an optimiser.
    """
    why_not = None
    if device.type != "cuda":
        why_not = f"on {device}, which has no CUDA graphs"
    elif dtype == torch.float64:
        why_not = f"for a model of {dtype}, whose learning rate a graph would round"
    elif optimizer == "radam":
        why_not = "with optimizer='radam', whose steps are decided on the host"
    if cuda_graph is True and why_not is not None:
        raise ValueError(f"cuda_graph must be 'auto' or False {why_not}, got True")
    if cuda_graph is False or why_not is not None:
        return None
    return StepGraph(cuda_graph is True, CudaDevice(device))
