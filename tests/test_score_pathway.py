"""``Scorer.pathway``: differences inside the encoder by the native scorer, against the same model in fp64."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rvae_fast import _backend, freeze
from rvae_fast._taps import COVERED, ends
from rvae_fast.models import MODELS, Autoencoder
from rvae_fast.ops import residual_stack
from rvae_fast.pathway import PATHWAYS, differences, reconstruct
from rvae_fast.rapp import fit_nap, nap_scores, sap_scores

needs_native = pytest.mark.skipif(
    _backend.available_backends()["native"] is not None, reason="there are no native kernels"
)
needs_bf16 = pytest.mark.skipif(not residual_stack.HAS_BF16_PRODUCTS, reason="this CPU has no bf16 products")

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "AE": ("AE", {"n_layers": 4}),
    "VAE": ("VAE", {"n_layers": 3, "likelihood": "bernoulli"}),
    "RAE post": ("RAE", {"n_layers": 7, "order": "post", "activation": "silu"}),
    "RVAE pre": ("RVAE", {"n_layers": 7, "order": "pre"}),
    "RVAE widths": ("RVAE", {"widths": (40, 9), "blocks": (2, 0), "layers": 3, "likelihood": "absolute"}),
}


def trained(kind: str, features: int = 35) -> Autoencoder:
    """Weights and statistics that are nobody's defaults, at which rows neither vanish nor overflow."""
    name, options = KINDS[kind]
    torch.manual_seed(2)
    model = MODELS[name](features, 6, init="default", **options).train()
    for _ in range(3):
        model(torch.rand(64, features))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return model.eval()


def in_fp64(model: Autoencoder, x: Tensor, pathway: str, include_input: bool) -> list[Tensor]:
    wide = copy.deepcopy(model).double()
    with torch.no_grad():
        x_hat = reconstruct(wide, x.double())
        return list(differences(wide, x.double(), x_hat, pathway, include_input))


@needs_native
@pytest.mark.parametrize("include_input", [True, False])
@pytest.mark.parametrize("pathway", COVERED)
@pytest.mark.parametrize("kind", KINDS)
def test_differences_are_those_of_the_model(kind: str, pathway: str, include_input: bool) -> None:
    model, x = trained(kind), torch.rand(131, 35)
    scorer = freeze(model, "fp32")
    assert scorer.backend == "native"
    found = scorer.pathway(x, pathway, include_input=include_input, latent=True, differences=True)
    expected = in_fp64(model, x, pathway, include_input)
    assert found.differences is not None
    split = found.differences.double().split([d.shape[1] for d in expected], 1)
    for own, right in zip(split, expected, strict=True):
        torch.testing.assert_close(own, right, rtol=0, atol=2e-5 * max(1.0, float(right.abs().max())))
    torch.testing.assert_close(found.sap, found.differences.double().square().sum(1), rtol=1e-12, atol=0)
    # Error and code are those of a plain scoring, bit for bit.
    plain = scorer.detailed(x, latent=True)
    assert torch.equal(found.error, plain.error)
    assert found.latent is not None
    assert plain.latent is not None
    assert torch.equal(found.latent, plain.latent)
    bare = scorer.pathway(x, pathway, include_input=include_input)
    assert bare.latent is None
    assert bare.differences is None
    assert torch.equal(bare.sap, found.sap)


@needs_native
@needs_bf16
@pytest.mark.parametrize("double", [False, True], ids=["native", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_first_modules_make_of_rows(kind: str, double: bool) -> None:
    model, x = trained(kind), torch.rand(70, 35)
    scorer = freeze(model.double() if double else model, "fp32")
    found = ends(model)
    assert len(model.encoder) in found, "the code's layer"
    if double:
        assert scorer.backend == "reference"
    for inside, (_, width) in found.items():
        for pathway in ("branches", "units"):  # with a tap at the same step and without one
            got = scorer.pathway(x, pathway, inside=inside, differences=True)
            with torch.no_grad():
                expected = copy.deepcopy(model).double().encoder[:inside](x.double())
            assert got.inside is not None
            assert got.inside.shape == (70, width)
            torch.testing.assert_close(got.inside.double(), expected, rtol=1e-4, atol=1e-4)
            plain = scorer.pathway(x, pathway, differences=True)
            assert plain.inside is None
            assert torch.equal(got.differences, plain.differences)  # type: ignore[arg-type]
            assert torch.equal(got.error, plain.error)
    with pytest.raises(ValueError, match=r"inside must be 0 or among .*, got 99"):
        scorer.pathway(x, inside=99)


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_differs_by_bf16(kind: str) -> None:
    model, x = trained(kind), torch.rand(131, 35)
    found = freeze(model, "bf16").pathway(x, "units", differences=True)
    expected = torch.cat(in_fp64(model, x, "units", True), 1)
    assert found.differences is not None
    scale = float(expected.abs().max())
    assert float((found.differences.double() - expected).abs().max()) < 0.05 * max(1.0, scale)
    torch.testing.assert_close(found.sap, expected.square().sum(1), rtol=0.1, atol=0)


@needs_native
@pytest.mark.parametrize("precision", ["fp32", pytest.param("bf16", marks=needs_bf16)])
def test_a_row_is_the_same_bit_for_bit_whatever_rows_are_beside_it(precision: str) -> None:
    scorer, x = freeze(trained("RVAE pre"), precision), torch.rand(300, 35)
    whole = scorer.pathway(x, "branches", differences=True)
    assert whole.differences is not None
    for start, n in ((0, 1), (17, 3), (100, 97)):
        part = scorer.pathway(x[start : start + n], "branches", differences=True)
        assert part.differences is not None
        assert torch.equal(part.differences, whole.differences[start : start + n]), n
        assert torch.equal(part.sap, whole.sap[start : start + n]), n


@needs_native
def test_a_row_that_overflows_leaves_its_neighbours_alone() -> None:
    scorer, x = freeze(trained("RVAE pre")), torch.rand(9, 35)
    expected = scorer.pathway(x, differences=True)
    x[4] = 3e38
    found = scorer.pathway(x, differences=True)
    others = [0, 1, 2, 3, 5, 6, 7, 8]
    assert torch.equal(found.sap[others], expected.sap[others])
    assert not torch.isfinite(found.sap[4])
    assert len(scorer.pathway(x[:0]).sap) == 0


@needs_native
@pytest.mark.parametrize("pathway", PATHWAYS)
def test_scores_do_not_depend_on_the_backend(pathway: str) -> None:
    model, x = trained("RVAE pre"), np.random.default_rng(1).random((400, 35), dtype=np.float32)
    nap = fit_nap(model, x, pathway=pathway, ridge=0.1)
    native = sap_scores(model, x, pathway=pathway), nap_scores(model, nap, x, pathway=pathway)
    with _backend.backend("reference"):
        plain = sap_scores(model, x, pathway=pathway), nap_scores(model, nap, x, pathway=pathway)
    for a, b in zip(native, plain, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_a_scorer_without_kernels_goes_every_pathway() -> None:
    model, x = trained("RVAE pre").double(), torch.rand(20, 35, dtype=torch.float64)
    scorer = freeze(model)
    assert (scorer.backend, scorer.pathways) == ("reference", tuple(PATHWAYS))
    found = scorer.pathway(x, "linears", latent=True, differences=True)
    expected = torch.cat(in_fp64(model, x, "linears", True), 1)
    assert found.differences is not None
    assert found.latent is not None
    torch.testing.assert_close(found.differences.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.sap, expected.square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(found.latent, model.encode(x)[0].float())


@needs_native
def test_bad_arguments_are_named() -> None:
    scorer = freeze(trained("AE"))
    with pytest.raises(ValueError, match=r"pathway must be one of .*stages.*, got 'linears'"):
        scorer.pathway(torch.rand(3, 35), "linears")
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 35\], got \[3, 4\]"):
        scorer.pathway(torch.rand(3, 4))
    with pytest.raises(TypeError, match="x must be a floating-point"):
        scorer.pathway(torch.zeros(3, 35, dtype=torch.int64))
