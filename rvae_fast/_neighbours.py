"""The nearest of many rows, exactly, from their leading principal directions.

What an encoder makes of normal rows varies in few directions: 96 of 593 hold 99.6 % of the variance of MNIST's inside
an RVAE. Distances along those alone are bounds from below of the whole ones and cost a sixth. The rows that come first
by them are compared in full, and where the last of them is, by its bound alone, beyond the furthest row found, no other
can be nearer; where it is not, more are compared, in the end all.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Principal directions that the search begins with; rows of less than twice as many columns are compared in full.
HEAD = 96

#: Fewer rows than this are compared in full: the bounds would save little.
FEW = 4096

#: Rows that the directions are taken of, at most.
SAMPLE = 4096

#: Candidates of one row are less than one in so many of the rows: beyond, all are compared.
MOST = 8

#: Rows that are searched for at a time: their bounds and candidates are some 10 MB each.
TILE = 64

#: What rounding may add to a bound, in units of the squared lengths: a few hundred roundings of fp32.
SLACK = 1e-5


def leading(rows: Tensor, count: int) -> Tensor | None:
    """The leading principal directions ``[width, count]`` of rows about their mean.

    None of rows so few, or so narrow, that comparing them in full costs no more.
    """
    if len(rows) < FEW or rows.shape[1] < 2 * count:
        return None
    sample = rows[:: -(-len(rows) // SAMPLE)]
    found = torch.linalg.eigh((sample.T @ sample).double()).eigenvectors[:, -count:]
    return found.to(rows.dtype).contiguous()


class Neighbours:
    """Rows to be searched for the nearest of others.

    Parameters
    ----------
    rows : Tensor [m, width]
        About their mean: far from the origin fp32 would lose the distances between them.
    squares : Tensor [m]
        Sums of their squares.
    """

    def __init__(self, rows: Tensor, squares: Tensor) -> None:
        self.rows, self.squares = rows, squares
        self.axes = leading(rows, HEAD)
        if self.axes is not None:
            head = rows @ self.axes
            # |f|^2 - 2 h.f is one product where the squares are a column more.
            self.head = torch.cat([-2.0 * head, head.square().sum(1, keepdim=True)], 1)
            self.longest = squares.amax()

    def __call__(self, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Look for the nearest of rows ``[n, width]``.

        Returns
        -------
        distances : Tensor [n, count]
            The smallest first, from the differences themselves.
        nearest : Tensor [n, count] int64
            Which rows they are to.
        """
        if self.axes is None or 2 * count >= len(self.rows) // MOST:
            return self._in_full(h, count)
        distances, nearest = zip(*(self._by_bounds(tile, self.axes, count) for tile in h.split(TILE)), strict=True)
        return torch.cat(distances), torch.cat(nearest)

    def _by_bounds(self, h: Tensor, axes: Tensor, count: int) -> tuple[Tensor, Tensor]:
        along = h @ axes
        bounds = torch.cat([along, along.new_ones(len(h), 1)], 1) @ self.head.T
        shift = along.square().sum(1) - SLACK * (h.square().sum(1) + self.longest)
        candidates = 2 * count
        distances, nearest, sure = self._look(h, bounds, shift, candidates, count)
        while not bool(sure.all()):
            candidates *= 4
            left = torch.nonzero(~sure)[:, 0]
            if candidates >= len(self.rows) // MOST:
                distances[left], nearest[left] = self._in_full(h[left], count)
                break
            distances[left], nearest[left], sure[left] = self._look(
                h[left], bounds[left], shift[left], candidates, count
            )
        return distances, nearest

    def _look(
        self, h: Tensor, bounds: Tensor, shift: Tensor, candidates: int, count: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The nearest of those that come first by their bounds, and whether there can be no others."""
        lowest, first = bounds.topk(candidates, largest=False)
        distances, nearest = self._among(h, first, count)
        return distances, nearest, distances[:, -1].square() <= lowest[:, -1] + shift

    def _among(self, h: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
        there = self.rows[candidates]
        apart = torch.cdist(h[:, None], there, compute_mode="donot_use_mm_for_euclid_dist")[:, 0]
        distances, order = apart.topk(count, largest=False)
        return distances, candidates.gather(1, order)

    def _in_full(self, h: Tensor, count: int) -> tuple[Tensor, Tensor]:
        # |h|^2, the same for all of a row's candidates, is left out. These distances are rounded by the rows' lengths:
        # more are taken than asked for, and compared by their differences.
        distances = torch.addmm(self.squares, h, self.rows.T, alpha=-2.0)
        return self._among(h, distances.topk(min(2 * count, len(self.rows)), largest=False).indices, count)
