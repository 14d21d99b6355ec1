"""Scores of a batch, and of one row: the frozen scorer against the model in eval, eager and (in full) compiled.

In eval PyTorch's best bf16 is a model cast to bf16, its BatchNorms included. The floor is the network's matrix products
by ``torch.mm``, one a layer.
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

from rvae_fast import RVAE, freeze
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS


def eager(net: RVAE, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    net = copy.deepcopy(net).to(dtype)

    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            mean = net.encoder(x.to(dtype))[:, : net.latent_features]
            return (net.decoder(mean).float() - x).square().sum(1)

    return run


@pytest.mark.parametrize("one_row", [False, True], ids=["batch", "row"])
@pytest.mark.parametrize("workload", ["article", "table", "deep", "wide"])
def test_score(workload: str, one_row: bool, compare: Callable[..., Any], device: torch.device, full: bool) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    net = model(workload, full).eval()
    layers = sum(isinstance(m, nn.Linear) for m in net.modules())
    batch = 1 if one_row else BATCH[workload]
    variants = []
    if HAS_BF16_PRODUCTS:
        variants.append(harness.Variant("rvae_fast bf16", freeze(net, "bf16")))
    variants.append(harness.Variant("rvae_fast fp32", freeze(net, "fp32")))
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        variants.append(harness.Variant(f"eager {name}", on("reference", eager(net, dtype))))
        variants.append(harness.Variant(f"products {name}", products(net, batch, dtype, training=False)))
        if full:
            compiled = torch.compile(eager(net, dtype), fullgraph=True, dynamic=False, options={"freezing": True})
            variants.append(harness.Variant(f"compile {name}", on("reference", compiled)))
    case = {"workload": workload, "layers": layers, "batch": batch}
    compare(case, variants, rows(workload, device, batch), rounds=30 if full else 7)
