"""The search by leading directions finds what a comparison with every row finds, whatever the rows are like."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rvae_fast._neighbours import FEW, HEAD, Neighbours

WIDTH = 2 * HEAD + 9
COUNT = 31


def rows(kind: str, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, WIDTH, generator=generator)
    if kind == "few directions":
        return torch.randn(n, 20, generator=generator) @ torch.randn(20, WIDTH, generator=generator) + 0.2 * noise
    if kind == "clusters":  # far from each other, each as wide in every direction
        return 0.1 * noise + 50.0 * torch.eye(WIDTH)[torch.arange(n) % 7]
    if kind == "copies":
        return noise[torch.arange(n) % 50]
    return noise  # the same in every direction: the bounds tell next to nothing


def searched(x: Tensor) -> tuple[Neighbours, Tensor]:
    centred = x - x.mean(0)
    return Neighbours(centred, centred.square().sum(1)), x.mean(0)


@pytest.mark.parametrize("kind", ["few directions", "clusters", "copies", "every direction"])
@pytest.mark.parametrize("own", [False, True], ids=["other rows", "its own rows"])
def test_it_finds_the_nearest(kind: str, own: bool) -> None:
    x = rows(kind, FEW + 300, 0)
    search, middle = searched(x)
    assert search.axes is not None
    h = (x[:150] if own else rows(kind, 150, 1)) - middle
    distances, nearest = search(h, COUNT)
    whole = torch.cdist(h.double(), search.rows.double())
    expected = whole.topk(COUNT, largest=False).values
    # Rows of equal distance may be taken in any order, so what is found is told by its distance.
    torch.testing.assert_close(whole.gather(1, nearest), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-4)
    assert (nearest.sort(1).values.diff(dim=1) > 0).all()


def test_one_row_far_from_the_sample_s_directions_is_compared_in_full() -> None:
    x = rows("few directions", FEW + 300, 0)
    search, middle = searched(x)
    assert search.axes is not None
    outside = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(2))
    outside = 1e3 * (outside - outside @ search.axes @ search.axes.T)  # the leading directions do not see it at all
    h = torch.cat([outside, x[:3] - middle])
    expected = torch.cdist(h.double(), search.rows.double()).topk(COUNT, largest=False)
    distances, nearest = search(h, COUNT)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-5, atol=1e-3)
    assert torch.equal(nearest[5:].sort(1).values, expected.indices[5:].sort(1).values)


def test_a_row_that_is_not_finite_stays_alone() -> None:
    x = rows("few directions", FEW + 300, 0)
    search, middle = searched(x)
    h = x[:70] - middle
    expected = search(h, COUNT)
    spoilt = h.clone()
    spoilt[3], spoilt[66] = torch.nan, torch.inf
    distances, nearest = search(spoilt, COUNT)
    assert not torch.isfinite(distances[[3, 66]]).any()
    kept = [i for i in range(70) if i not in (3, 66)]
    assert torch.equal(nearest[kept], expected[1][kept])
    assert torch.equal(distances[kept], expected[0][kept])


@pytest.mark.parametrize("count", [300, 2500, FEW])
def test_as_many_neighbours_as_asked_for(count: int) -> None:
    x = rows("few directions", FEW, 0)
    search, middle = searched(x)
    assert search.axes is not None
    distances, nearest = search(x[:5] - middle, count)
    expected = torch.cdist(x[:5].double(), x.double()).topk(count, largest=False).values
    torch.testing.assert_close(distances.double(), expected, rtol=1e-5, atol=1e-4)
    assert nearest.shape == (5, count)


@pytest.mark.parametrize(("n", "width"), [(FEW - 1, WIDTH), (FEW, 2 * HEAD - 1), (COUNT, 3)])
def test_few_or_narrow_rows_are_compared_in_full(n: int, width: int) -> None:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(0))
    search, middle = searched(x)
    assert search.axes is None
    distances, nearest = search(x[:9] - middle, COUNT)
    expected = torch.cdist(x[:9].double(), x.double()).topk(COUNT, largest=False)
    torch.testing.assert_close(distances.double(), expected.values, rtol=1e-5, atol=1e-4)
    assert torch.equal(nearest.sort(1).values, expected.indices.sort(1).values)
