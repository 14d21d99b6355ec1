"""Tests that run on a CUDA device: every dtype, determinism, graphs, the compiler, one distributed rank.

``make gpu`` starts them. Without a GPU they skip, saying so; with ``RVAE_FAST_GPU_TESTS_ON_CPU=1`` and
``TRITON_INTERPRET=1`` those that a CPU can take run there, small, in Triton's interpreter: that proves the tests, not
the kernels (``tests/kernels/test_gpu_suite.py`` does it).

With ``RVAE_FAST_GPU_TESTS_LOG=PATH`` each result is written there at once, so that a run that is broken off leaves what
it found.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import interpreter
import pytest
import quick_interpreter
import torch
from torch import Tensor

import rvae_fast

LOG = os.environ.get("RVAE_FAST_GPU_TESTS_LOG")
ON_CPU = os.environ.get("RVAE_FAST_GPU_TESTS_ON_CPU") == "1" and os.environ.get("TRITON_INTERPRET") == "1"
if ON_CPU:
    quick_interpreter.quicken()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest last; in several processes early, in two of them: each begins with a share in this order."""
    slow = [item for item in items if item.path.name == "test_sanitizer.py"]
    rest = [item for item in items if item not in slow]
    if "PYTEST_XDIST_WORKER" in os.environ:
        middle = len(rest) // 2
        items[:] = slow[-1:] + rest[:middle] + slow[:-1] + rest[middle:]
    else:
        items[:] = rest + slow


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Write the result down, in the process that has it; and end a process whose device is lost.

    An illegal access in a kernel stays with its process: every test after it would fail there, whatever it tests.
    pytest-xdist starts another process; without it, the run ends with a reason rather than with a hundred failures.
    """
    if not (report.when == "call" or report.failed or report.skipped):
        return
    # pytest-xdist's first process has all reports a second time, and those of processes that have crashed.
    controller = "PYTEST_XDIST_WORKER" not in os.environ and getattr(report, "node", None) is not None
    controller = controller and report.when != "???"
    if LOG and not controller:
        with open(LOG, "a") as file:
            file.write(f"{report.outcome} {report.nodeid} {report.duration:.1f} s\n")
            if report.failed:
                file.write(f"{report.longreprtext}\n")
    if report.failed and not controller and (lost := device_lost()) is not None:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(3)
        pytest.exit(f"the CUDA device is lost to this process since {report.nodeid}: {lost}", returncode=1)


def device_lost() -> str | None:
    """The error that the device's context is left with, if there is one."""
    if not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return None
    try:
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return None


@pytest.fixture
def device() -> torch.device:
    """The CUDA device; in a dry run the CPU; else the test is skipped."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if ON_CPU:
        reason = interpreter.why_not()
        return pytest.skip(reason) if reason is not None else torch.device("cpu")
    return pytest.skip("needs a CUDA device; torch finds none")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The CUDA device, for tests that nothing else can take."""
    if device.type != "cuda":
        pytest.skip("needs a CUDA device itself (graphs, streams, the compiler)")
    return device


@pytest.fixture
def triton(device: torch.device) -> Iterator[torch.device]:
    """The device, with the Triton kernels ordered: what they do not cover fails rather than running elsewhere."""
    reason = rvae_fast._backend.available_backends()["triton"]
    assert reason is None, reason
    with rvae_fast.backend("triton"):
        yield device


@pytest.fixture(params=["fp32", "bf16", "fp16"])
def dtype(request: pytest.FixtureRequest, device: torch.device) -> torch.dtype:
    """Each dtype that the kernels take; the interpreter cuts bf16 off where GPUs round."""
    if device.type == "cpu" and request.param == "bf16":
        pytest.skip("the interpreter does not round bf16")
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[request.param]


@pytest.fixture
def within() -> Any:
    """The bound of every kernel: at most twice PyTorch's own error in the same dtype, plus 1e-6 of the scale."""

    def check(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
        assert ours.shape == exact.shape, f"{name}: shape {list(ours.shape)}, expected {list(exact.shape)}"
        assert exact.isfinite().all(), f"{name}: the test itself is not finite"
        scale = max(1.0, float(exact.abs().max()))
        bound = 2 * float((theirs.double() - exact).abs().max()) + 1e-6 * scale
        error = float((ours.double() - exact).abs().max())
        assert error <= bound, f"{name}: error {error:.3g} exceeds {bound:.3g}"

    return check
