"""Tapes: what is recorded, what memory the temporaries share, and what cannot be recorded."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import triton
from torch import Tensor

from rvae_fast.kernels import configurations, launch
from rvae_fast.kernels import residual_stack as driver
from rvae_fast.kernels import residual_stack_backward as way_back
from rvae_fast.kernels.launch import call
from rvae_fast.kernels.tape import Tape

CPU = torch.device("cpu")


def double(out: Tensor, x: Tensor) -> None:
    torch.mul(x, 2, out=out)


def scale(out: Tensor, x: Tensor, by: float) -> None:
    torch.mul(x, by, out=out)


def test_a_chain_of_temporaries_needs_two() -> None:
    with Tape(CPU, False).recording() as tape:
        x, out = tape.input((5, 3), torch.float32), tape.input((5, 3), torch.float32)
        value = x
        for _ in range(6):
            following = torch.empty_like(value)
            call(double, following, value)
            value = following
        by = tape.number()
        call(scale, out, value, by)
    assert tape.temporary_bytes == 2 * 5 * 3 * 4
    for _ in range(2):
        x, out = torch.randn(5, 3), torch.empty(5, 3)
        tape.play([x, out, 0.5])
        torch.testing.assert_close(out, x * 32)


def test_parts_of_inputs_and_of_temporaries() -> None:
    with Tape(CPU, False).recording() as tape:
        whole, out = tape.input((3, 4), torch.float32), tape.input((3, 4), torch.float32)
        between = tape.unbind(torch.empty_like(whole))
        for source, middle in zip(tape.unbind(whole), between, strict=True):
            call(double, middle, source)
        call(torch._foreach_copy_, tape.unbind(out), between)
    x, out = torch.randn(3, 4), torch.empty(3, 4)
    tape.play([x, out])
    torch.testing.assert_close(out, 2 * x)


def test_views_and_nested_recordings_are_refused() -> None:
    tape = Tape(CPU, False)
    x = tape.input((4, 3), torch.float32)
    with pytest.raises(RuntimeError, match="a view cannot be recorded"), tape.recording():
        call(double, torch.empty_like(x)[1:], x)
    with (
        pytest.raises(RuntimeError, match="recorded already"),
        Tape(CPU, False).recording(),
        Tape(CPU, False).recording(),
    ):
        pass
    out = torch.empty(2)
    call(double, out, torch.ones(2))  # and nothing is left behind
    assert out.tolist() == [2, 2]


def test_launches_and_memory_of_a_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two launches a layer forward, at most four backward, and temporaries that do not grow with depth; of a stack that
    is not small enough for fewer (``test_small_stacks.py``)."""
    monkeypatch.setattr(configurations, "DEFERRED_TILES", 0)
    monkeypatch.setattr(configurations, "GROUPED_ROWS", 0)
    found, play = [], Tape.play
    for depth in (4, 12):
        x, weights, vectors = torch.randn(9, 8), [torch.randn(8, 8)] * depth, [torch.ones(8)] * depth
        options = driver.StackOptions(2, "pre", "relu", 0.0, True, torch.float32)
        driver._forward_tape.cache_clear()
        way_back._backward_tape.cache_clear()
        played: list[Tape] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tape, "play", lambda tape, values, seen=played: (seen.append(tape), play(tape, values)))
            _, kept = driver.stack_forward(x, weights, *[vectors] * 5, 1e-5, options)
            way_back.stack_backward(x, x, weights, kept, options)
        forward, backward = played
        assert forward.launches == 2 * depth + 1
        assert backward.launches <= 4 * depth + 1
        found.append((forward.temporary_bytes, backward.temporary_bytes))
    assert found[0] == found[1]


class _Kernel:
    """Stands for a kernel that Triton compiles."""

    arg_names = ("x_ptr", "y_ptr", "size", "BLOCK", "NAME")

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.launched: list[tuple[Any, ...]] = []

    def warmup(self, *arguments: Any, grid: Any, **options: Any) -> _Kernel:
        aligned = [a.data_ptr() % 16 == 0 for a in arguments if isinstance(a, torch.Tensor)]
        self.compiled.append((aligned, arguments[2], options))
        self.function, self.packed_metadata = "function", "metadata"
        return self

    def run(self, *arguments: Any) -> None:
        self.launched.append(arguments)


def test_quick_launches_look_a_compiled_kernel_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton.runtime, "JITFunction", _Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    kernel, x = _Kernel(), torch.zeros(64)

    def go(x: torch.Tensor, y: torch.Tensor | None, size: int, grid: tuple[int, ...] = (3,), warps: int = 4) -> None:
        launch.quick_launch(kernel, grid, x, y, size, NAME="n", BLOCK=16, options={"num_warps": warps})

    go(x, None, 5)
    go(x.clone(), None, 5, (2, 9))
    assert kernel.compiled == [([True], 5, {"NAME": "n", "BLOCK": 16, "num_warps": 4, "enable_fp_fusion": True})]
    rest = (7, "function", "metadata", None, None, None)
    assert kernel.launched[0] == (3, 1, 1, *rest, x.data_ptr(), None, 5, 16, "n")
    assert kernel.launched[1][:3] == (2, 9, 1)
    go(x[1:], None, 5)
    go(x, x, 5)
    go(x, None, 6)
    go(x, None, 5, warps=8)
    go(x.double(), None, 5)
    assert len(kernel.compiled) == 6
    assert [c[0] for c in kernel.compiled[1:3]] == [[False], [True, True]]
    assert kernel.launched[2][9] == x.data_ptr() + 4


def test_quick_launches_are_seen_by_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A profiler's hooks are called by Triton's own launch."""
    calls: list[Any] = []

    class Observed(_Kernel):
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *a, **k: calls.append((grid, a, k))

    monkeypatch.setattr(triton.runtime, "JITFunction", _Kernel)
    monkeypatch.setattr(launch, "hooked", lambda: True)
    launch.quick_launch(Observed(), (4,), 1, NAME="n", options={"num_warps": 4})
    assert calls == [((4,), (1,), {"NAME": "n", "num_warps": 4, "enable_fp_fusion": True})]
