"""A residual stack by itself, forward with backward: the native op against the same units in PyTorch.

The floor is the stack's matrix products by ``torch.mm`` in the same dtype: three a layer. On CPUs where PyTorch's fp32
products are slow (its library has no AVX-512 path for AMD's), the native op, which has other products, beats it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from torch import Tensor
from workloads import on, products

from rvae_fast import ResidualStack


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("width", "batch"), [(128, 4096), (256, 4096), (512, 4096), (593, 256)])
def test_stack(
    width: int, batch: int, bf16: bool, order: str, compare: Callable[..., Any], device: torch.device, full: bool
) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    units = 8 if full else 2
    stack = ResidualStack(width, units, order=order)

    def make(seed: int) -> Tensor:
        return torch.randn(batch, width, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def step(net: Any) -> Callable[[Tensor], Any]:
        leaves = list(net.parameters())
        return lambda x: torch.autograd.grad(net(x).square().sum(), [x, *leaves])

    variants = [
        harness.Variant("rvae_fast", on("native", step(stack), bf16)),
        harness.Variant("eager", on("reference", step(copy.deepcopy(stack)), bf16)),
        harness.Variant("products", products(stack, batch, torch.bfloat16 if bf16 else torch.float32, training=True)),
    ]
    if bf16:
        variants.append(harness.Variant("eager fp32", on("reference", step(copy.deepcopy(stack)))))
    if full:
        compiled = torch.compile(copy.deepcopy(stack), fullgraph=True, dynamic=False)
        variants.append(harness.Variant("compile", on("reference", step(compiled), bf16)))
    case = {"shape": f"{batch} x {width}", "layers": 2 * units, "order": order, "dtype": "bf16" if bf16 else "fp32"}
    compare(case, variants, harness.rotation(make, batch * width * 4, device), rounds=30 if full else 5)
