"""What a training step keeps: activations saved for the backward, and the process's peak; native against eager.

``kept`` counts the storages that autograd saves in a forward pass, parameters aside. ``peak`` is how far a whole step
(loss, backward, Adam) lifts the peak of the process's resident memory above what it held with the model built; every
figure is taken in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from workloads import BATCH, model, on, rows


def kept(backend: str, net: Any, x: torch.Tensor, bf16: bool) -> int:
    """Bytes saved for the backward of ``net.loss(x)``, parameters and the input aside."""
    own = {t.untyped_storage().data_ptr() for t in (x, *net.parameters(), *net.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no other takes its address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = on(backend, net.loss, bf16)(x)
    total = sum(storage.nbytes() for storage in saved.values())
    loss.backward()
    return total


def measure(workload: str, backend: str, bf16: bool, deep: bool) -> dict[str, int]:
    import resource

    net = model(workload, deep)
    x = rows(workload, torch.device("cpu"))[0]
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before = peak()
    on(backend, net.loss, bf16)(x).backward()
    optimizer.step()
    after = peak()
    return {"peak": after - before, "kept": kept(backend, net, x, bf16)}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("workload", ["article", "table", "deep", "wide"])
def test_memory(workload: str, bf16: bool, facts: Callable[..., Any], device: torch.device, deep: bool) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    figures = {}
    for name, backend in (("rvae_fast", "native"), ("eager", "reference")):
        call = f"measure({workload!r}, {backend!r}, {bf16}, {deep})"
        program = f"import json, bench_memory; print(json.dumps(bench_memory.{call}))"
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=Path(__file__).parent, check=True, capture_output=True, text=True
        )
        figures[name] = json.loads(done.stdout.splitlines()[-1])
    case = {"workload": workload, "batch": BATCH[workload], "dtype": "bf16" if bf16 else "fp32"}
    facts(case, figures)
