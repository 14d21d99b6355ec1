"""One training step of a whole model: loss, backward, and the fused Adam; native, eager and (in full) compiled.

bf16 is autocast with fp32 parameters; ``torch.compile``'s max-autotune takes part with ``--max-autotune``. The floor is
the network's matrix products by ``torch.mm``, three a layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor, nn
from workloads import BATCH, model, on, products, rows


def step(net: nn.Module, loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], None]:
    optimizer = torch.optim.Adam(net.parameters(), 1e-4, fused=True)

    def run(x: Tensor) -> None:
        loss(x).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("workload", ["article", "table", "deep", "wide"])
def test_train_step(
    workload: str,
    bf16: bool,
    compare: Callable[..., Any],
    device: torch.device,
    full: bool,
    deep: bool,
    autotune: bool,
) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    net = model(workload, deep)
    layers = sum(isinstance(m, nn.Linear) for m in net.modules())
    native, eager = copy.deepcopy(net), copy.deepcopy(net)
    dtype = torch.bfloat16 if bf16 else torch.float32
    variants = [
        harness.Variant("rvae_fast", on("native", step(native, native.loss), bf16)),
        harness.Variant("eager", on("reference", step(eager, eager.loss), bf16)),
        harness.Variant("products", products(net, BATCH[workload], dtype, training=True)),
    ]
    if bf16:
        plain = copy.deepcopy(net)
        variants.append(harness.Variant("eager fp32", on("reference", step(plain, plain.loss))))
    for mode in (["default"] if full else []) + (["max-autotune-no-cudagraphs"] if autotune else []):
        twin = copy.deepcopy(net)
        compiled = torch.compile(twin.loss, fullgraph=True, dynamic=False, mode=mode)
        name = f"compile {mode.removesuffix('-no-cudagraphs')}"
        variants.append(harness.Variant(name, on("reference", step(twin, compiled), bf16)))
    case = {"workload": workload, "layers": layers, "batch": BATCH[workload], "dtype": "bf16" if bf16 else "fp32"}
    quick = workload == "article" or not deep
    compare(case, variants, rows(workload, device), rounds=(20 if quick else 5) if full else 5)
