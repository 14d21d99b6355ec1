"""The hyperplane score's geometry: rows to their 30 nearest of many, and to the planes through these.

The reference rows are like an image network's features: 593 columns, whose variance falls so that 96 directions of them
hold 99.5 %. Beside the kernel the same by PyTorch, whose search goes by bounds too, and the search alone, every row
compared with every other, by scikit-learn's ``NearestNeighbors`` (brute force, fp32) and by a product and ``topk``.
Last the kernel's own product, 64 directions, by a plain product, which writes its result (51 MB of 256 rows) where the
kernel does not: for one row it is the floor, reading the reference once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import pytest
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import rvae_fast
from rvae_fast._planes import DIRECTIONS, Planes

WIDTH, NEIGHBOURS, PENALTY = 593, 30, 0.05


def features(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    turned, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))
    scale = torch.arange(1, WIDTH + 1) ** -1.0
    return torch.randn(count, WIDTH, generator=generator) * scale @ turned


@pytest.mark.parametrize("batch", [1, 256])
def test_planes(batch: int, compare: Callable[..., Any], device: torch.device, full: bool) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    count = 50_000 if full else 10_000
    planes = Planes.of(features(count, 1), NEIGHBOURS, PENALTY)
    inputs = [features(batch, seed) for seed in range(2, 6)]
    nearest = NearestNeighbors(n_neighbors=NEIGHBOURS + 1, algorithm="brute").fit(planes.features.numpy())
    leading = planes.features[:, :DIRECTIONS].contiguous()

    def reference(h: Tensor) -> Any:
        with rvae_fast.backend("reference"):
            return planes(h)

    def product(h: Tensor) -> Any:
        found = torch.addmm(planes.squares, h - planes.middle, planes.features.T, alpha=-2.0)
        return found.topk(NEIGHBOURS + 1, largest=False)

    variants = [
        harness.Variant("rvae_fast", planes),
        harness.Variant("PyTorch, the same way", reference),
        harness.Variant("scikit-learn, search alone", lambda h: nearest.kneighbors((h - planes.middle).numpy())),
        harness.Variant("product and topk, search alone", product),
        harness.Variant("product of the bounds alone", lambda h: h[:, :DIRECTIONS] @ leading.T),
    ]
    assert torch.equal(planes(inputs[0])[2], reference(inputs[0])[2])
    compare(
        {"rows": batch, "reference": count, "width": WIDTH, "neighbours": NEIGHBOURS},
        variants,
        inputs,
        rounds=40 if full else 5,
    )
