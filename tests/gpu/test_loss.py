"""Reconstruction error with KL, sampling, and the last layer with its error, on the GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast import reference
from rvae_fast.ops.decoder_error import decoder_error
from rvae_fast.ops.reconstruction_kld import reconstruction_kld
from rvae_fast.ops.reparameterise import reparameterise

SHAPES = [(1, 1, 1), (3, 31, 7), (130, 20, 65), (257, 784, 20), (5, 2049, 3)]
NAMES = ("x", "x_hat", "mu", "logvar", "weight")
forward_op = torch.ops.rvae_fast.reparameterise.default


def make(
    rows: int, features: int, latent: int, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    x, x_hat = torch.rand(rows, features, generator=g), 3 * torch.randn(rows, features, generator=g)
    mu, logvar = torch.randn(2, rows, latent, generator=g)
    return [t.to(device, dtype) for t in (x, x_hat, mu, logvar, torch.rand(features, generator=g))]


def run(function: Any, inputs: list[Tensor], likelihood: str, reduction: str = "sum") -> dict[str, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    error, kld = function(*leaves[:4], feature_weight=leaves[4], likelihood=likelihood, reduction=reduction)
    up = torch.linspace(0.5, 1.5, len(error), device=error.device, dtype=error.dtype)
    grads = torch.autograd.grad((error * up).sum() + (kld * up).sum(), leaves)
    return {"error": error.detach(), "kld": kld.detach(), **dict(zip(NAMES, grads, strict=True))}


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(
    shape: tuple[int, int, int], likelihood: str, dtype: torch.dtype, triton: torch.device, within: Any
) -> None:
    rows = min(shape[0], 40) if triton.type == "cpu" else shape[0]
    inputs, reduction = make(rows, *shape[1:], dtype, triton), "mean" if shape[0] % 2 else "sum"
    ours, theirs = (run(f, inputs, likelihood, reduction) for f in (reconstruction_kld, reference.reconstruction_kld))
    exact = run(reference.reconstruction_kld, [t.double() for t in inputs], likelihood, reduction)
    for name, value in exact.items():
        assert ours[name].dtype == theirs[name].dtype
        within(name, ours[name], theirs[name], value)


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_large_magnitudes(likelihood: str, triton: torch.device, within: Any) -> None:
    logvar = torch.tensor([[-80.0, 80.0, 0.0, 1e-3], [88.6, 20.0, -80.0, 5.0]])
    mu = torch.tensor([[1e4, -1e4, 0.0, 1.0], [0.0, 1e-8, 3.0, 4.0]])
    x = torch.tensor([[0.0, 1.0, 0.5, 0.999, 1e-3], [1.0, 0.0, 1.0, 0.0, 0.25]])
    logits = torch.tensor([[1e4, 1e4, -1e4, 1e4, 1e4], [-1e4, 1e4, 90.0, -90.0, 0.0]])
    inputs = [t.to(triton) for t in (x, logits, mu, logvar, torch.ones(5))]
    ours, theirs = (run(f, inputs, likelihood) for f in (reconstruction_kld, reference.reconstruction_kld))
    exact = run(reference.reconstruction_kld, [t.double() for t in inputs], likelihood)
    for name, value in exact.items():
        within(name, ours[name], theirs[name], value)


def test_loss_repeats_bit_for_bit(triton: torch.device) -> None:
    inputs = make(40 if triton.type == "cpu" else 5000, 257, 20, torch.float32, triton)
    one, two = (run(reconstruction_kld, inputs, "bernoulli") for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("shape", [(1, 1), (130, 20), (70, 257)], ids=str)
def test_sampling(shape: tuple[int, int], dtype: torch.dtype, triton: torch.device, within: Any) -> None:
    mu, logvar = (t.requires_grad_() for t in make(shape[0], 1, shape[1], dtype, triton)[2:4])
    torch.manual_seed(11)
    z, kld = reparameterise(mu, logvar)
    torch.manual_seed(11)
    seed = torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=triton)
    again, _ = reparameterise(mu, logvar)
    assert not torch.equal(z, again)
    leaves: dict[torch.dtype, Any] = {}
    for wide in (dtype, torch.float64):
        pair = [t.detach().to(wide).requires_grad_() for t in (mu, logvar)]
        outs = reference.reparameterise(*pair, seed)
        leaves[wide] = (*outs, *torch.autograd.grad(outs[0].sum() + outs[1].sum(), pair))
    ours = (z, kld, *torch.autograd.grad(z.sum() + kld.sum(), (mu, logvar)))
    for name, one, *pair in zip(("z", "kld", "mu", "logvar"), ours, leaves[dtype], leaves[torch.float64], strict=True):
        within(name, one.detach(), pair[0].detach(), pair[1].detach())


def test_samples_are_standard_normal(triton: torch.device) -> None:
    rows = 4000 if triton.type == "cpu" else 400_000
    z, _ = reparameterise(torch.zeros(rows, 5, device=triton), torch.zeros(rows, 5, device=triton))
    n, z = rows * 5, z.double()
    assert abs(float(z.mean())) < 5 / n**0.5
    assert abs(float(z.var()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float((z**4).mean()) - 3) < 5 * (96 / n) ** 0.5


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize("shape", [(1, 1, 1), (33, 65, 31), (70, 40, 257)], ids=str)
def test_last_layer(
    shape: tuple[int, int, int], likelihood: str, dtype: torch.dtype, triton: torch.device, within: Any
) -> None:
    rows, inner, features = shape
    g = torch.Generator().manual_seed(rows)
    h, weight = torch.randn(rows, inner, generator=g), torch.randn(features, inner, generator=g) / inner**0.5
    bias, x = torch.randn(features, generator=g), torch.rand(rows, features, generator=g)
    inputs = [t.to(triton, dtype) for t in (h, weight, bias, x)]
    ours = decoder_error(*inputs, likelihood=likelihood)
    theirs = reference.decoder_error(*inputs, None, likelihood)
    within("error", ours, theirs, reference.decoder_error(*(t.double() for t in inputs), None, likelihood))
    assert torch.equal(ours, decoder_error(*inputs, likelihood=likelihood))


def test_a_model_scores_as_by_pytorch(device: torch.device) -> None:
    torch.manual_seed(0)
    net = rvae_fast.RVAE(40, latent_features=4, widths=[24], blocks=[2], init="default").to(device)
    x = torch.randn(70, 40, device=device)
    net(x)
    with rvae_fast.backend("triton"):
        ours = net.anomaly_score(x, kld_weight=0.5)
    with rvae_fast.backend("reference"):
        theirs = net.anomaly_score(x, kld_weight=0.5)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


# --- CUDA itself ---


def captured(body: Any, *, warmup: int = 2) -> tuple[torch.cuda.CUDAGraph, Any]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(warmup):
            body()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = body()
    return graph, out


def test_loss_replays_in_a_graph(cuda: torch.device, triton: torch.device) -> None:
    inputs = make(64, 100, 10, torch.float32, cuda)
    graph, out = captured(lambda: run(reconstruction_kld, inputs, "squared"))
    for seed in (1, 2):
        for static, new in zip(inputs, make(64, 100, 10, torch.float32, cuda, seed), strict=True):
            static.copy_(new)
        graph.replay()
        fresh = run(reconstruction_kld, inputs, "squared")
        assert all(torch.equal(out[name], fresh[name]) for name in fresh)


def test_a_replay_samples_anew_and_as_an_eager_step_would(cuda: torch.device, triton: torch.device) -> None:
    mu, logvar = make(64, 1, 10, torch.float32, cuda)[2:4]
    graph, out = captured(lambda: reparameterise(mu, logvar))
    seen = []
    for seed in (5, 6, 5):
        torch.manual_seed(seed)
        graph.replay()
        seen.append(out[0].clone())
        torch.manual_seed(seed)
        assert torch.equal(seen[-1], reparameterise(mu, logvar)[0])
    assert torch.equal(seen[0], seen[2])
    graph.replay()
    assert not torch.equal(out[0], seen[2])


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_by_value(mode: str, cuda: torch.device) -> None:
    torch.compiler.reset()

    def loss(x: Tensor, x_hat: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
        error, kld = reconstruction_kld(x, x_hat, mu, logvar)
        return (error + 0.5 * kld).mean()

    compiled = torch.compile(loss, fullgraph=True, mode=mode)
    for seed in range(3):  # of 66 rows: a result that lay behind another would not begin at a multiple of 16 bytes
        inputs = [t.requires_grad_() for t in make(66, 100, 10, torch.float32, cuda, seed)[:4]]
        torch.compiler.cudagraph_mark_step_begin()
        expected, got = loss(*inputs), compiled(*inputs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True):
            torch.testing.assert_close(a, b)
