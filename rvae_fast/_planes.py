"""The geometry of the hyperplane score (:mod:`rvae_fast.hyperplane`): planes through the nearest of some rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._neighbours import Neighbours, leading
from rvae_fast.ops.planes import PackedPlanes, covered

#: Rows whose mean distance stands for the density around a row.
NEAREST = 10

#: Principal directions that the native search goes by. It needs fewer than PyTorch's, its bounds being narrower.
DIRECTIONS = 64

#: A neighbour nearer than this, in units of the mean squared distance to all of them, is the row itself.
SAME = 1e-6


def distinct(rows: NDArray[Any]) -> NDArray[Any]:
    """The first of every set of equal rows: copies of a row would be all its neighbours, at no distance."""
    seen: dict[bytes, int] = {}
    for i, row in enumerate(np.ascontiguousarray(rows) + 0.0):  # one zero, whatever its sign
        seen.setdefault(row.tobytes(), i)
    return rows[list(seen.values())]


def parts_of(logs: Tensor, log_distances: Tensor, nearest: Tensor) -> Tensor:
    """The four parts ``[n, 4]`` of logarithms ``[n, 3]`` (distance, mean distance, NAP), given the neighbours."""
    plane = logs[:, 0] - log_distances[nearest, 0].mean(1)
    density = logs[:, 1] - log_distances[nearest[:, :NEAREST], 1].mean(1)
    return torch.stack([plane, logs[:, 2], logs[:, 0], density], 1)


class Planes:
    """Distances from some reference rows and from the planes through the nearest of them."""

    def __init__(self, features: Tensor, squares: Tensor, middle: Tensor, neighbours: int, penalty: float) -> None:
        self.features, self.squares, self.middle = features, squares, middle
        self.neighbours, self.penalty = neighbours, penalty
        self._search: Neighbours | None = None
        self._packed: PackedPlanes | None = None

    @classmethod
    def of(cls, rows: Tensor, neighbours: int, penalty: float) -> Planes:
        """Those of rows ``[m, width]``, which are kept about their centre: far from the origin fp32 would lose the
        distances between them."""
        middle = rows.mean(0)
        features = rows - middle
        return cls(features, features.square().sum(1), middle, neighbours, penalty)

    def __call__(self, h: Tensor, own: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Look at rows ``[n, width]``.

        With ``own`` they are made of reference rows, by a small deformation: the nearest is then the row itself.

        Returns
        -------
        squared, mean : Tensor [n] fp64
            Squared distance from the plane, and mean distance to the nearest.
        neighbours : Tensor [n, k] int64
            By number, the nearest first; none is the row itself.
        """
        h = h.to(self.features.dtype)
        if covered():
            return self._native()(h, own)
        h = h - self.middle
        if self._search is None:
            self._search = Neighbours(self.features, self.squares)
        apart, found = self._search(h, self.neighbours + 1)
        itself = (apart[:, 0].square() <= SAME * apart.square().mean(1)) | own
        nearest = torch.where(itself[:, None], found[:, 1:], found[:, :-1])
        mean = torch.where(itself[:, None], apart[:, 1:], apart[:, :-1])[:, :NEAREST].double().mean(1)
        around = self.features[nearest]
        middle = around.mean(1)
        around, target = around - middle[:, None], h - middle
        products = (around @ around.transpose(1, 2)).double()
        weight = self.penalty * products.diagonal(dim1=1, dim2=2).mean(1) + torch.finfo(torch.float32).tiny
        products.diagonal(dim1=1, dim2=2).add_(weight[:, None])
        right = (around @ target[:, :, None]).double()
        point = torch.cholesky_solve(right, torch.linalg.cholesky(products)).to(around.dtype)
        residual = target - (point.transpose(1, 2) @ around)[:, 0]
        return residual.double().square().sum(1), mean, nearest

    def looks_at_rows_one_by_one(self) -> bool:
        """Whether what is found for a row is the same, to the bit, however many others come with it."""
        return covered()

    def _native(self) -> PackedPlanes:
        if self._packed is None:
            axes = leading(self.features, DIRECTIONS)
            self._packed = PackedPlanes(self.features, self.squares, self.middle, axes, self.neighbours, self.penalty)
        return self._packed
