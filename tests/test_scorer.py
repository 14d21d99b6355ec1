"""Frozen models: the scores of the model in eval, in fp32 and bf16, whole or in parts, from many threads at once."""

from __future__ import annotations

import copy
import os
import pickle
import resource
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import rvae_fast
from rvae_fast import AE, RAE, RVAE, VAE, freeze
from rvae_fast._activations import ACTIVATIONS
from rvae_fast.ops.residual_stack import HAS_BF16_PRODUCTS

needs_bf16 = pytest.mark.skipif(not HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")


@pytest.fixture(autouse=True)
def _native() -> None:
    reason = rvae_fast.available_backends()["native"]
    if reason is not None:
        pytest.skip(f"backend native: {reason}")


def make(kind: Any = RVAE, features: int = 33, noise: float = 0.1, **options: Any) -> Any:
    """A model in eval with state that training would leave: nothing is zero, no norm is the identity."""
    model = kind(features, 5, **{"n_layers": 7, "init": "default", **options})
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for b in model.buffers() if b.is_floating_point())):
            tensor.add_(noise * torch.rand_like(tensor))
    return model.eval()


def parts(model: Any, x: Tensor) -> dict[str, Tensor]:
    """What a scorer returns, computed by the model."""
    with torch.no_grad():
        out = model(x)
        error, kld = model.loss_terms(x)
    y = out.reconstruction
    features = {
        "squared": lambda: (y - x).square(),
        "absolute": lambda: (y - x).abs(),
        "bernoulli": lambda: nn.functional.binary_cross_entropy(y, x, reduction="none"),
    }[model.likelihood]()
    return {"error": error, "kld": kld, "latent": out.z, "reconstruction": y, "feature_error": features}


def check(model: Any, x: Tensor) -> None:
    """Every part within twice eager fp32's error against fp64, plus 1e-6, relative to the part's size."""
    exact = parts(copy.deepcopy(model).double(), x.double())
    eager = parts(model, x)
    frozen = freeze(model, "fp32")
    assert frozen.backend == "native"
    got = frozen.detailed(x, kld=True, latent=True, reconstruction=True, feature_error=True)._asdict()
    for name, right in exact.items():
        size = right.abs().max() + 1e-30
        bound = 2 * float((eager[name] - right).abs().max() / size) + 1e-6
        assert float((got[name] - right).abs().max() / size) <= bound, name
    torch.testing.assert_close(frozen(x), model.anomaly_score(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(frozen(x, 0.5), model.anomaly_score(x, 0.5), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("likelihood", ["squared", "absolute", "bernoulli"])
@pytest.mark.parametrize("kind", [AE, RAE, VAE, RVAE])
def test_models_and_likelihoods(kind: Any, likelihood: str) -> None:
    check(make(kind, likelihood=likelihood), torch.rand(50, 33))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_and_orders(activation: str, order: str) -> None:
    check(make(RVAE, activation=activation, order=order, negative_slope=0.2), torch.randn(50, 33))


@pytest.mark.parametrize(("features", "rows"), [(1, 3), (31, 1), (65, 97), (100, 203), (257, 64), (1000, 33)])
def test_widths_and_row_counts(features: int, rows: int) -> None:
    check(make(RVAE, features), torch.randn(rows, features))


@pytest.mark.parametrize("order", ["pre", "post"])
@pytest.mark.parametrize("layers", [1, 3])
def test_stages(layers: int, order: str) -> None:
    model = make(RVAE, 20, widths=[32, 17], blocks=[3, 2], layers=layers, order=order)
    check(model, torch.randn(40, 20))


def test_deep() -> None:
    check(make(RVAE, 24, 0.01, widths=[24], blocks=[50], init="zero"), torch.randn(40, 24))


@needs_bf16
@pytest.mark.parametrize("kind", [AE, RVAE])
def test_bf16_ranks_as_fp32_does(kind: Any) -> None:
    """On rows whose errors spread as those of real tables do."""
    model = make(kind, 64, n_layers=9, init="zero")
    x = torch.randn(2000, 64) * torch.logspace(-1, 1, 2000)[torch.randperm(2000), None]
    exact, scores = model.anomaly_score(x), freeze(model, "bf16")(x)
    torch.testing.assert_close(scores, exact, rtol=0.03, atol=0.0)

    def ranks(t: Tensor) -> Tensor:
        return t.argsort().argsort().double()

    assert torch.corrcoef(torch.stack([ranks(scores), ranks(exact)]))[0, 1] >= 0.9999


ROWS = [*range(1, 18), 31, 32, 33, 63, 64, 65, 95, 96, 97, 100, 191, 192, 193, 200, 289]


def every_part(scorer: Any, x: Tensor) -> list[Tensor]:
    return list(scorer.detailed(x, kld=True, latent=True, reconstruction=True, feature_error=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("features", [1, 31, 65, 100, 257, 1000])
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_row_is_the_same_bit_for_bit_whatever_rows_are_beside_it(precision: str, features: int, threads: int) -> None:
    scorer, x = freeze(make(RVAE, features), precision), torch.randn(290, features)
    before = torch.get_num_threads()
    whole = every_part(scorer, x)
    try:
        torch.set_num_threads(threads)
        for n in ROWS:
            start = 7 * n % (290 - n)
            for part, of_whole in zip(every_part(scorer, x[start : start + n]), whole, strict=True):
                assert torch.equal(part, of_whole[start : start + n]), n
        assert torch.equal(torch.cat([scorer(row[None]) for row in x]), whole[0])
    finally:
        torch.set_num_threads(before)


def test_a_row_overflowing_leaves_its_neighbours_alone() -> None:
    scorer, x = freeze(make(RVAE, 65)), torch.randn(100, 65)
    whole = scorer(x)
    x[[3, 50]] = torch.tensor([[1e38], [float("nan")]])
    others = torch.arange(100)[[i not in (3, 50) for i in range(100)]]
    assert torch.equal(scorer(x)[others], whole[others])


SETTINGS = [{"RVAE_FAST_CPU_ISA": isa} for isa in ("portable", "avx2", "avx512")]
SETTINGS += [{"ONEDNN_MAX_CPU_ISA": "SSE41"}, {"ONEDNN_MAX_CPU_ISA": "SSE41", "RVAE_FAST_CPU_ISA": "avx2"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=lambda settings: " ".join(settings.values()))
def test_other_instruction_sets(settings: dict[str, str]) -> None:
    """Those this machine has: the kernels chosen, and PyTorch's own products taken away from under them."""
    program = """
import torch
from rvae_fast import RVAE, freeze
torch.manual_seed(0)
model = RVAE(65, 5, n_layers=5, init="default").eval()
x, scorer = torch.randn(203, 65), freeze(model, "fp32")
whole = scorer(x)
torch.testing.assert_close(whole, model.anomaly_score(x), rtol=1e-4, atol=1e-4)
assert all(torch.equal(scorer(x[:n]), whole[:n]) for n in (1, 2, 3, 5, 13, 97, 150))
print(torch.ops.rvae_fast.cpu_kernel_isa())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    if settings.get("RVAE_FAST_CPU_ISA") == "portable":
        assert done.stdout.strip() == "portable"


@pytest.mark.parametrize("settings", [{}, {"ONEDNN_MAX_CPU_ISA": "SSE41"}], ids=["own", "SSE41"])
def test_wide_products_of_one_sign(settings: dict[str, str]) -> None:
    """Long sums within twice PyTorch's error, plus 1e-6, of PyTorch's products and of ours where these are not the same
    for every number of rows."""
    program = """
import torch
from rvae_fast import AE, freeze
torch.manual_seed(0)
model, x = AE(4096, 24, n_layers=1).eval(), torch.rand(50, 4096)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.abs_()
    eager, exact = model(x).z, model.double()(x.double()).z
scorer = freeze(model.float(), "fp32")
latent = scorer.detailed(x, latent=True).latent
ours, theirs = (float((z - exact).abs().max() / exact.max()) for z in (latent, eager))
assert ours <= 2 * theirs + 1e-6, (ours, theirs)
assert all(torch.equal(scorer.detailed(x[:n], latent=True).latent, latent[:n]) for n in (1, 2, 3, 5, 13))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **settings}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_scores_after_its_parent_did() -> None:
    """OpenMP's threads do not survive a fork: in PyTorch's own parallel regions such a child hangs."""
    program = """
import os, signal, torch
from rvae_fast import RVAE, freeze
torch.set_num_threads(2)
scorer, x = freeze(RVAE(33, 5, n_layers=5).eval()), torch.randn(5000, 33)
kinds = x, x.double(), x.bfloat16(), torch.randn(5000, 66)[:, ::2], x.t().double().t().contiguous(), x[:0].double()
before = [scorer(rows) for rows in kinds]
child = os.fork()
if child == 0:
    signal.alarm(60)
    same = all(torch.equal(scorer(rows), scores) for rows, scores in zip(kinds, before))
    same = same and torch.equal(scorer.pathway(kinds[1]).error, before[0])
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(scorer(x), before[0])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_inputs() -> None:
    scorer = freeze(make())
    assert scorer(torch.randn(0, 33)).shape == (0,)
    x = torch.randn(33, 40)
    torch.testing.assert_close(scorer(x.t()), scorer(x.t().contiguous()))
    torch.testing.assert_close(scorer(x.t().double()), scorer(x.t()))
    rows = torch.randn(6, 33)
    rows[2, 5], rows[4, 0] = float("nan"), float("inf")
    scores = scorer(rows)
    assert [bool(torch.isfinite(s)) for s in scores] == [True, True, False, True, False, True]
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 33\], got \[4, 32\]"):
        scorer(torch.randn(4, 32))
    with pytest.raises(TypeError, match="floating-point"):
        scorer(torch.ones(4, 33, dtype=torch.long))
    with pytest.raises(TypeError, match="ndarray"):
        scorer(np.zeros((4, 33)))


def test_freeze_refuses() -> None:
    with pytest.raises(TypeError, match="model must be an AE, RAE, VAE or RVAE, got Linear"):
        freeze(nn.Linear(3, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="precision must be one of"):
        freeze(make(), "int4")
    model = make()
    model.encoder[0][0].norms[0].running_mean = None
    with pytest.raises(ValueError, match=r"encoder\.0\.0\.norms\.0 has no running statistics"):
        freeze(model)


def test_a_scorer_is_a_copy() -> None:
    model, x = make(), torch.randn(20, 33)
    scorer = freeze(model)
    before = scorer(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(scorer(x), before)
    assert torch.equal(copy.deepcopy(scorer)(x), before)
    assert torch.equal(pickle.loads(pickle.dumps(scorer))(x), before)


def test_fp64_models_score_by_the_reference() -> None:
    model, x = make().double(), torch.rand(20, 33).double()
    scorer = freeze(model)
    assert scorer.backend == "reference"
    torch.testing.assert_close(scorer(x), model.anomaly_score(x).float())
    got = scorer.detailed(x, kld=True, latent=True, reconstruction=True, feature_error=True)._asdict()
    for name, right in parts(model, x).items():
        torch.testing.assert_close(got[name], right.float(), msg=lambda m, name=name: f"{name}: {m}")


def test_a_model_that_scores_itself_is_copied_to_the_cpu() -> None:
    """As the weights of others are; on "meta", where there is nothing to copy, that is an error at once."""
    with pytest.raises(NotImplementedError, match="meta"):
        freeze(make().double().to("meta"))


def test_the_backend_in_force_is_taken() -> None:
    model, x = RVAE(12, 3, n_layers=4).eval(), torch.rand(9, 12)
    with rvae_fast.backend("reference"):
        scorer = freeze(model)
    assert scorer.backend == "reference"
    torch.testing.assert_close(scorer(x), freeze(model)(x))
    with rvae_fast.backend("reference"):
        assert torch.equal(scorer(x), model.anomaly_score(x))


def test_many_threads_at_once() -> None:
    scorer = freeze(make(RVAE, 65))
    inputs = [torch.randn(40 + i, 65) for i in range(6)]
    expected = [scorer(x) for x in inputs]
    with ThreadPoolExecutor(8) as pool:
        for a, b in zip(pool.map(scorer, inputs * 20), expected * 20, strict=True):
            assert torch.equal(a, b)


def test_memory_does_not_grow() -> None:
    scorer, x = freeze(make()), torch.randn(1, 33)
    for _ in range(2000):
        scorer(x)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(20000):
        scorer(x)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096  # KiB; a leak of one score a call is 80
