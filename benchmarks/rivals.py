"""Other ways to score the same network, each at its best setting: what the benchmarks compare with.

Every function returns ``run(x) -> scores`` for rows ``[batch, in_features]``, the reconstruction error of each.
"""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import harness
import torch
from torch import Tensor, nn
from workloads import on

from rvae_fast import RVAE

Run = Callable[[Tensor], Any]


class ReconstructionError(nn.Module):
    """A model's score as a user would write it, without this package's scorer."""

    def __init__(self, net: RVAE) -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent_features = net.encoder, net.decoder, net.latent_features

    def forward(self, x: Tensor) -> Tensor:
        parameter = next(self.decoder.parameters())
        mean = self.encoder(x.to(parameter.dtype))[:, : self.latent_features]
        return (self.decoder(mean).float() - x).square().sum(1)


def module(net: RVAE, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A copy in eval, all of it in ``dtype``: in eval PyTorch's best bf16 is a model cast to bf16, norms included."""
    return ReconstructionError(copy.deepcopy(net)).eval().requires_grad_(False).to(dtype)


def eager(net: RVAE, dtype: torch.dtype) -> Run:
    return on("reference", torch.inference_mode()(module(net, dtype)))


def compiled(net: RVAE, dtype: torch.dtype, mode: str) -> Run:
    """``torch.compile`` with freezing (weights are constants), in ``mode`` "default" or "max-autotune"."""
    options: dict[str, Any] = {"freezing": True}
    if mode == "max-autotune":
        options |= torch._inductor.list_mode_options("max-autotune-no-cudagraphs")
    return on("reference", torch.no_grad()(torch.compile(module(net, dtype), fullgraph=True, options=options)))


def why_no_onnx() -> str | None:
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        return f"ONNX Runtime is not measured: {error}; pip install 'rvae-fast[bench]'"
    return None


def onnx_runtime(net: RVAE, batch: int) -> Run:
    """ONNX Runtime on the CPU, all its graph optimisations on, as many threads as PyTorch."""
    import onnxruntime

    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = on("reference", lambda x: torch.onnx.export(module(net), (x,), file, input_names=["x"], dynamo=False))
        run(torch.zeros(batch, net.in_features))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    return lambda x: session.run(None, {"x": x.numpy()})[0]


def check(subject: Run, others: list[harness.Variant], x: Tensor) -> None:
    """Every rival computes the same scores (in bf16 roughly): a fast wrong answer is no rival."""
    right = torch.as_tensor(subject(x)).double()
    for other in others:
        got = torch.as_tensor(other.run(x)).double()
        rtol = 0.2 if "bf16" in other.name else 1e-3
        torch.testing.assert_close(got, right, rtol=rtol, atol=1e-2, msg=lambda m, o=other: f"{o.name}: {m}")
