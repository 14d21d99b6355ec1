"""The planes' kernel against its definition in fp64; odd rows; and that rows do not see each other."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

import rvae_fast
from rvae_fast._neighbours import FEW, leading
from rvae_fast._planes import DIRECTIONS, NEAREST, SAME, Planes
from rvae_fast.ops.planes import PANEL, PackedPlanes

pytestmark = pytest.mark.usefixtures("native")
PENALTY = 0.05


def draw(kind: str, n: int, width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, width, generator=generator)
    if kind == "few directions":
        few = max(1, min(20, width // 2))
        return torch.randn(n, few, generator=generator) @ torch.randn(few, width, generator=generator) + 0.2 * noise
    if kind == "clusters":  # far from each other, each as wide in every direction
        return 0.1 * noise + 50.0 * torch.eye(width)[torch.arange(n) % min(7, width)]
    return noise  # the same in every direction: the bounds tell next to nothing


def packed(rows: Tensor, neighbours: int, directions: int | None) -> PackedPlanes:
    middle = rows.mean(0)
    features = rows - middle
    axes = None
    if directions is not None:
        values = torch.linalg.eigh((features.T @ features).double())
        axes = values.eigenvectors[:, -directions:].float()
    return PackedPlanes(features, features.square().sum(1), middle, axes, neighbours, PENALTY)


def expected(rows: Tensor, h: Tensor, nearest: Tensor) -> tuple[Tensor, Tensor]:
    """Distance from the plane through these neighbours, squared, and mean distance to the first of them, in fp64."""
    around = rows.double()[nearest]
    apart = (h.double()[:, None] - around).square().sum(2).sqrt()
    middle = around.mean(1)
    a, target = around - middle[:, None], h.double() - middle
    products = a @ a.transpose(1, 2)
    weight = PENALTY * products.diagonal(dim1=1, dim2=2).mean(1)
    eye = torch.eye(nearest.shape[1], dtype=torch.float64)
    point = torch.linalg.solve(products + weight[:, None, None] * eye, (a @ target[:, :, None])[..., 0])
    squared = (target - (point[:, None] @ a)[:, 0]).square().sum(1)
    return squared, apart[:, :NEAREST].mean(1)


def check(rows: Tensor, h: Tensor, found: tuple[Tensor, Tensor, Tensor], neighbours: int, own: bool) -> None:
    squared, mean, nearest = found
    assert (squared.dtype, mean.dtype, nearest.dtype) == (torch.float64, torch.float64, torch.int64)
    far = (h.double()[:, None] - rows.double()).square().sum(2)
    if own:
        assert not (nearest == torch.arange(len(h))[:, None]).any()
    first = far.topk(neighbours + 1, largest=False)
    itself = first.values[:, 0] <= SAME * first.values.mean(1)
    assert itself.all() or not own
    far[itself, first.indices[itself, 0]] = torch.inf
    best = far.topk(neighbours, largest=False).values.sqrt()
    # Rows of equal distance may be taken in any order, so what is found is told by its distance.
    torch.testing.assert_close(far.gather(1, nearest).sqrt(), best, rtol=2e-5, atol=1e-5)
    assert (nearest.sort(1).values.diff(dim=1) > 0).all()
    wanted, apart = expected(rows, h, nearest)
    torch.testing.assert_close(squared, wanted, rtol=2e-4, atol=1e-6 * float(far[far < torch.inf].mean()))
    torch.testing.assert_close(mean, apart, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["few directions", "clusters", "every direction"])
@pytest.mark.parametrize("own", [False, True], ids=["other rows", "its own rows"])
@pytest.mark.parametrize("directions", [None, 1, 31, 64])
def test_nearest_and_planes(kind: str, own: bool, directions: int | None) -> None:
    rows = draw(kind, 1003, 100, 0)
    h = rows[:150] if own else draw(kind, 150, 100, 1)
    check(rows, h, packed(rows, 20, directions)(h), 20, own)


@pytest.mark.parametrize("width", [1, 2, 15, 31, 65, 257, 1000])
@pytest.mark.parametrize(("count", "neighbours"), [(6, 4), (33, 31), (PANEL * 9, 10), (301, 1)])
def test_shapes(width: int, count: int, neighbours: int) -> None:
    rows, h = draw("every direction", count, width, 2), draw("every direction", 13, width, 3)
    for directions in (None, *([width // 2] if width > 3 else [])):
        found = packed(rows, neighbours, directions)(h)
        if neighbours > 1:
            check(rows, h, found, neighbours, own=False)
        else:  # the plane is a point
            torch.testing.assert_close(found[0].sqrt(), found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("directions", [None, 16])
def test_what_is_made_of_reference_rows_does_not_see_them(directions: int | None) -> None:
    """A row moved a little: with ``own`` all is as without the row that it was made of."""
    rows = draw("every direction", 400, 40, 21)
    h = rows[:50] + 0.02 * draw("every direction", 50, 40, 22)
    look = packed(rows, 20, directions)
    squared, mean, nearest = look(h, own=True)
    assert not (nearest == torch.arange(50)[:, None]).any()
    assert (look(h)[2] == torch.arange(50)[:, None]).sum(1).eq(1).all()
    before = Planes.of(rows, 20, PENALTY)
    with rvae_fast.backend("reference"):
        reference = before(h, own=True)
    for found, other in zip((squared, mean, nearest), reference, strict=True):
        torch.testing.assert_close(found, other, rtol=2e-4, atol=1e-6)
    for i in (0, 7, 49):
        without = packed(torch.cat([rows[:i], rows[i + 1 :]]), 20, None)(h[i : i + 1])
        torch.testing.assert_close(squared[i : i + 1], without[0], rtol=2e-4, atol=1e-6)
        torch.testing.assert_close(mean[i : i + 1], without[1], rtol=2e-5, atol=1e-5)


def test_more_candidates_than_there_is_room_for() -> None:
    """All rows at one distance from what is looked at: no bound excludes any."""
    rows = torch.nn.functional.normalize(draw("every direction", 5000, 40, 4))
    rows = torch.cat([rows, -rows])  # their middle is where all of them are 1 apart
    squared, mean, nearest = packed(rows, 30, 3)(torch.zeros(3, 40))
    torch.testing.assert_close(mean, torch.ones(3, dtype=torch.float64))
    assert all(len(set(row.tolist())) == 30 for row in nearest)
    assert ((squared > 0) & (squared < 1)).all()


def test_rows_do_not_see_each_other() -> None:
    """What is found for a row is the same, to the bit, however many come with it and however many threads look."""
    rows, h = draw("few directions", 3000, 150, 5), draw("few directions", 333, 150, 6)
    look = packed(rows, 30, DIRECTIONS)
    whole = look(h)
    for pick in (slice(0, 1), slice(7, 8), slice(3, 12), slice(100, 333)):
        for part, all_ in zip(look(h[pick]), whole, strict=True):
            assert torch.equal(part, all_[pick])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert all(torch.equal(a, b) for a, b in zip(look(h), whole, strict=True))
    finally:
        torch.set_num_threads(threads)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: look(h), range(16)):
            assert all(torch.equal(a, b) for a, b in zip(found, whole, strict=True))


def test_a_row_that_is_not_finite_stays_alone() -> None:
    rows, h = draw("few directions", 500, 60, 7), draw("few directions", 20, 60, 8)
    look = packed(rows, 10, 30)
    whole = look(h)
    spoilt = h.clone()
    spoilt[3], spoilt[4, 5], spoilt[17] = torch.nan, torch.inf, 3e38
    squared, mean, nearest = look(spoilt)
    assert torch.isnan(squared[[3, 4, 17]]).all()
    assert torch.isnan(mean[[3, 4, 17]]).all()
    assert (nearest[[3, 4, 17]] == 0).all()
    kept = [i for i in range(20) if i not in (3, 4, 17)]
    for found, before in zip((squared, mean, nearest), whole, strict=True):
        assert torch.equal(found[kept], before[kept])


def test_a_reference_that_is_not_finite_breaks_nothing() -> None:
    rows = draw("every direction", 100, 30, 9)
    look = packed(rows, 10, None)
    look.panels.fill_(torch.nan)  # a file that somebody spoilt
    squared, _, nearest = look(rows[:5])
    assert torch.isnan(squared).all()
    assert (nearest == 0).all()


def test_it_finds_what_the_search_in_pytorch_finds() -> None:
    rows, h = draw("few directions", FEW + 300, 2 * 96 + 9, 10), draw("few directions", 100, 2 * 96 + 9, 11)
    planes = Planes.of(rows, 30, PENALTY)
    assert leading(planes.features, DIRECTIONS) is not None
    found = planes(h)
    with rvae_fast.backend("reference"):
        assert not planes.looks_at_rows_one_by_one()
        before = planes(h)
    assert planes.looks_at_rows_one_by_one()
    assert torch.equal(found[2], before[2])
    torch.testing.assert_close(found[:2], before[:2], rtol=1e-4, atol=0)


def test_a_row_among_its_copies_is_not_its_own_neighbour() -> None:
    rows = draw("every direction", 200, 20, 12)
    near = rows[:1] * (1 + 0.1 * SAME)
    nearest = packed(rows, 5, None)(torch.cat([rows[:1], near]))[2]
    assert not (nearest == 0).any()
    assert torch.equal(nearest[0], nearest[1])


def test_no_rows() -> None:
    squared, mean, nearest = packed(draw("every direction", 50, 8, 13), 5, None)(torch.zeros(0, 8))
    assert (squared.shape, mean.shape, nearest.shape) == ((0,), (0,), (0, 5))


def test_schema_and_fake() -> None:
    look = packed(draw("few directions", 100, 40, 14), 7, 16)
    for axes, panels, directions in ((look.axes, look.panels, 16),):
        args = (torch.randn(9, 40), look.rows, look.middle, axes, panels, directions, look.longest, 7, PENALTY)
        torch.library.opcheck(torch.ops.rvae_fast.planes.default, args)
        torch.library.opcheck(torch.ops.rvae_fast.planes.default, (*args, True))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({0: torch.zeros(3, 7)}, "h must be contiguous and have shape"),
        ({0: torch.zeros(3, 8, dtype=torch.float64)}, "h must be float32"),
        ({0: torch.zeros(8)}, "must be matrices"),
        ({2: torch.zeros(7)}, "middle must"),
        ({4: torch.zeros(1, 10, PANEL)}, "panels must"),
        ({5: 6}, "panels must"),
        ({7: 50}, "neighbours must be at least 1 and less than the 50 rows"),
        ({7: 0}, "neighbours must be at least 1"),
    ],
)
def test_bad_arguments_are_named(change: dict[int, object], named: str) -> None:
    look = packed(draw("every direction", 50, 8, 15), 5, None)
    args = [torch.zeros(3, 8), look.rows, look.middle, None, look.panels, 8, look.longest, 5, PENALTY]
    for i, value in change.items():
        args[i] = value
    with pytest.raises((ValueError, TypeError), match=named):
        torch.ops.rvae_fast.planes(*args)


@pytest.mark.parametrize("isa", ["portable", "avx2", "avx512"])
def test_other_instruction_sets(isa: str) -> None:
    """Those this machine has, against the search in PyTorch."""
    program = """
import torch, rvae_fast
from rvae_fast._planes import Planes
torch.manual_seed(0)
for width in (1, 7, 200):
    rows, h = torch.randn(5000, width), torch.randn(203, width)
    planes = Planes.of(rows, 30, 0.05)
    found = planes(h)
    assert all(torch.equal(a[:n], b) for n in (1, 2, 9) for a, b in zip(found, planes(h[:n])))
    with rvae_fast.backend("reference"):
        before = planes(h)
    torch.testing.assert_close(found[:2], before[:2], rtol=1e-3, atol=1e-6)
    assert (found[2].sort(1).values == before[2].sort(1).values).all(1).float().mean() > 0.98
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "RVAE_FAST_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_looks_after_its_parent_did() -> None:
    program = """
import os, signal, torch
from rvae_fast._planes import Planes
torch.set_num_threads(2)
rows, h = torch.randn(5000, 200), torch.randn(500, 200)
planes = Planes.of(rows, 30, 0.05)
before = planes(h)
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if all(torch.equal(a, b) for a, b in zip(planes(h), before)) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
