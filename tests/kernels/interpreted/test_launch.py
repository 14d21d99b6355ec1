"""Tapes: what is recorded, what memory the temporaries share, and what cannot be recorded."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rvae_fast.kernels import configurations
from rvae_fast.kernels import residual_stack as driver
from rvae_fast.kernels import residual_stack_backward as way_back
from rvae_fast.kernels.launch import Tape, call

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
