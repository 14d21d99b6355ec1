"""Selection of a backend: by context, by environment, by thread; and what a backend that cannot run says."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading

import pytest
import torch

from rvae_fast import _backend, _native
from rvae_fast.ops.reconstruction_kld import reconstruction_kld


def test_context_nests_and_restores() -> None:
    outside = _backend.current_backend()
    again = _backend.backend("reference")
    with again:
        assert _backend.current_backend() == "reference"
        with _backend.backend("auto"), again:
            assert _backend.current_backend() == "reference"
        assert _backend.current_backend() == "reference"
    assert _backend.current_backend() == outside


def test_restores_after_an_error() -> None:
    outside = _backend.current_backend()
    with pytest.raises(KeyError), _backend.backend("reference"):
        raise KeyError
    assert _backend.current_backend() == outside


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match="name must be one of auto, reference, native, triton; got 'cuda'"):
        _backend.backend("cuda")


def test_available_backends_gives_reasons() -> None:
    reasons = _backend.available_backends()
    assert set(reasons) == {"reference", "native", "triton"}
    assert reasons["reference"] is None
    assert reasons["native"] == _native.why_not()
    assert all(reason is None or len(reason) > 10 for reason in reasons.values())


def test_unavailable_backend_says_why(monkeypatch) -> None:
    monkeypatch.setattr(_backend, "_availability", {})
    monkeypatch.setattr(_native, "why_not", lambda: "it was built for another torch")
    with pytest.raises(RuntimeError, match="'native' is not available: it was built for another torch"):
        _backend.backend("native").__enter__()
    with _backend.backend("auto"):
        assert _backend.choose("op", "cpu", {"native": ("cpu",)}) == "reference"


def test_a_gpu_on_which_triton_fails(monkeypatch) -> None:
    """A machine without a C compiler, or with a home that cannot be written to: plain PyTorch, and said once."""
    launch = pytest.importorskip("rvae_fast.kernels.launch", reason="triton is not installed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend, "_availability", {})

    def fail() -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(launch, "probe", fail)
    with _backend.backend("auto"):
        with pytest.warns(
            RuntimeWarning, match="runs on plain PyTorch: Triton is installed .*Failed to find C compiler"
        ):
            assert _backend.choose("op", "cuda", {"triton": ("cuda",)}) == "reference"
        assert _backend.choose("op", "cuda", {"triton": ("cuda",)}) == "reference"
    with pytest.raises(
        RuntimeError, match="'triton' is not available: Triton is installed and cannot compile a kernel"
    ):
        _backend.backend("triton").__enter__()
    monkeypatch.setattr(launch, "probe", lambda: None)
    assert _backend.available_backends()["triton"] is None


@pytest.mark.parametrize("name", ["native", "triton"])
def test_a_graph_may_be_the_first_to_ask(name: str, monkeypatch) -> None:
    """The look-up reads the file system, which the compiler cannot trace."""
    torch.compiler.reset()
    monkeypatch.setattr(_backend, "_availability", {})
    compiled = torch.compile(lambda x: x + int(_backend.is_available(name)), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)).item() == float(_backend._why_not(name) is None)


def test_auto_takes_the_best_by_device(monkeypatch) -> None:
    both = {"native": ("cpu",), "triton": ("cuda",)}
    monkeypatch.setattr(_backend, "_availability", {"native": True, "triton": True})
    with _backend.backend("auto"):
        assert _backend.choose("op", "cpu", both) == "native"
        assert _backend.choose("op", "cuda", both) == "triton"
        assert _backend.choose("op", "mps", both) == "reference"
        assert _backend.choose("op", "cpu", {}) == "reference"
    monkeypatch.setattr(_backend, "_availability", {"native": False, "triton": False})
    with _backend.backend("auto"):
        assert _backend.choose("op", "cpu", both) == "reference"


def test_a_named_backend_is_an_order(monkeypatch) -> None:
    monkeypatch.setattr(_backend, "_availability", {"native": True, "triton": True})
    with _backend.backend("native"), pytest.raises(RuntimeError, match=r"covers this op on cpu.*tensors are on 'cuda'"):
        _backend.choose("op", "cuda", {"native": ("cpu",)})
    with _backend.backend("triton"), pytest.raises(RuntimeError, match="covers this op on no device"):
        _backend.choose("op", "cpu", {"native": ("cpu",)})


def test_each_thread_has_its_own() -> None:
    seen = {}
    entered, leave = threading.Event(), threading.Event()

    def inside() -> None:
        with _backend.backend("reference"):
            entered.set()
            leave.wait(10)
            seen["inside"] = _backend.current_backend()

    outside = _backend.current_backend()
    thread = threading.Thread(target=inside)
    thread.start()
    assert entered.wait(10)
    seen["outside"] = _backend.current_backend()
    leave.set()
    thread.join()
    assert seen == {"inside": "reference", "outside": outside}


def test_each_task_has_its_own() -> None:
    async def task(name: str) -> str:
        with _backend.backend(name):
            await asyncio.sleep(0)
            return _backend.current_backend()

    async def both() -> list[str]:
        return list(await asyncio.gather(task("reference"), task("auto")))

    assert asyncio.run(both()) == ["reference", "auto"]


def test_the_choice_reaches_the_op(native, monkeypatch) -> None:
    calls = []
    original = torch.ops.rvae_fast.reconstruction_kld.default
    module = sys.modules[reconstruction_kld.__module__]
    monkeypatch.setattr(module, "_forward_op", lambda *a: (calls.append("op"), original(*a))[1])
    x = torch.rand(3, 4)
    reconstruction_kld(x, x)
    with _backend.backend("reference"):
        reconstruction_kld(x, x)
    assert calls == ["op"]


def test_environment() -> None:
    code = "from rvae_fast import _backend; print(_backend.current_backend())"
    environment = {**os.environ, _backend.ENVIRONMENT_VARIABLE: "reference"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "reference", done.stderr


def test_environment_with_an_unknown_name(monkeypatch) -> None:
    monkeypatch.setattr(_backend, "_default", "fast")
    with pytest.raises(ValueError, match=f"{_backend.ENVIRONMENT_VARIABLE} must be one of.*got 'fast'"):
        _backend.current_backend()
    with _backend.backend("reference"):
        assert _backend.current_backend() == "reference"
