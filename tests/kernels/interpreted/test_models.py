"""Whole models under ``backend("triton")``: loss and gradients with sampling, by the kernels, against plain PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast import RVAE, VAE, reference
from rvae_fast.ops import reparameterise as op


@pytest.mark.parametrize("kind", [VAE, RVAE])
@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
def test_a_training_step_with_the_same_random_numbers(
    kind: type, likelihood: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    net = kind(12, latent_features=3, n_layers=4, likelihood=likelihood, init="default")
    twin = copy.deepcopy(net)
    x = torch.rand(21, 12)
    drawn: list[Tensor] = []
    run = op._triton_forward
    monkeypatch.setattr(op, "_triton_forward", lambda m, v, seed: (drawn.append(seed), run(m, v, seed))[1])
    with rvae_fast.backend("triton"):
        loss = net.loss(x, kld_weight=0.7)
        loss.backward()
    assert len(drawn) == 1

    def same_numbers(like: Tensor) -> Tensor:
        return reference.philox_normal(drawn[0], *like.shape)

    with rvae_fast.backend("reference"):
        monkeypatch.setattr(torch, "randn_like", same_numbers)
        expected = twin.loss(x, kld_weight=0.7)
        expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, one), other in zip(net.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")
