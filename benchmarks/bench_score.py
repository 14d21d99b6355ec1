"""Scores of a batch, and of one row: the frozen scorer against the same network in eval by PyTorch and ONNX Runtime.

Floors: the network's matrix products by ``torch.mm`` in the same dtype ("products"), and by the micro-kernels and on
the tiles that the scorer itself uses, with nothing between them ("brgemm"). The short form leaves ``torch.compile``
out; its max-autotune, which compiles for minutes a network, takes part with ``--max-autotune``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import rivals
import torch
from torch import nn
from workloads import BATCH, model, products, rows

from rvae_fast import Scorer, freeze
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS


def floor(scorer: Scorer, batch: int) -> Callable[[Any], None]:
    program, weights, _ = scorer._program
    bf16 = scorer.precision == "bf16"
    return lambda _: torch.ops.rvae_fast.score_products(program, weights, batch, bf16)


@pytest.mark.parametrize("one_row", [False, True], ids=["batch", "row"])
@pytest.mark.parametrize("workload", ["article", "table", "deep", "wide"])
def test_score(
    workload: str,
    one_row: bool,
    compare: Callable[..., Any],
    device: torch.device,
    full: bool,
    deep: bool,
    autotune: bool,
) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    net = model(workload, deep).eval()
    layers = sum(isinstance(m, nn.Linear) for m in net.modules())
    batch = 1 if one_row else BATCH[workload]
    inputs = rows(workload, device, batch)
    precisions = ["bf16", "fp32"] if HAS_BF16_PRODUCTS else ["fp32"]
    scorers = {precision: freeze(net, precision) for precision in precisions}
    ours = [harness.Variant(f"rvae_fast {precision}", scorer) for precision, scorer in scorers.items()]
    others = []
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        others.append(harness.Variant(f"eager {name}", rivals.eager(net, dtype)))
        if full:
            for mode in ("default", "max-autotune") if autotune and not one_row else ("default",):
                others.append(harness.Variant(f"compile {mode} {name}", rivals.compiled(net, dtype, mode)))
    reason = rivals.why_no_onnx()
    if reason is None:
        others.append(harness.Variant("ONNX Runtime fp32", rivals.onnx_runtime(net, batch)))
    rivals.check(scorers["fp32"], others, inputs[0])
    floors = [harness.Variant(f"brgemm {precision}", floor(scorer, batch)) for precision, scorer in scorers.items()]
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        floors.append(harness.Variant(f"products {name}", products(net, batch, dtype, training=False)))
    case = {"workload": workload, "layers": layers, "batch": batch}
    quick = one_row or workload == "article"
    rounds = (50 if quick else 5) if full else (15 if quick else 3)
    comparison = compare(case, [*ours, *others, *floors], inputs, rounds=rounds)
    if reason is not None:
        comparison.notes["ONNX Runtime"] = reason
