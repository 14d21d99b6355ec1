"""NAP's whitening: the Mahalanobis distance of differences, from a covariance that rows stream through."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

#: Directions whose variance is below this share of the largest one's are left out: the differences are of fp32 numbers,
#: whose rounding has a variance of about 1e-14 of their own, and whitening would raise it to the level of the rest.
TOLERANCE = 1e-10


@dataclass(frozen=True)
class NAP:
    """What NAP learns from normal rows: rows' differences are centred and whitened by it.

    Attributes
    ----------
    mean : ndarray [D] float64
    whitening : ndarray [D, rank] float64
        ``V S^-1 sqrt(n)``: a training row's centred differences times this have unit covariance.
    """

    mean: NDArray[np.float64]
    whitening: NDArray[np.float64]

    @property
    def rank(self) -> int:
        """Directions that were kept."""
        return int(self.whitening.shape[1])

    def scorer(self, device: torch.device) -> Callable[[Tensor], Tensor]:
        """Scores ``[n]`` fp64 of differences ``[n, D]``, as a function for tensors on ``device``."""
        # Zeros up to a multiple of 8 columns, so that every row begins on a vector's boundary: the product would sum
        # rows that do not in another order.
        short, narrow = -len(self.mean) % 8, -self.rank % 8
        mean = torch.nn.functional.pad(torch.from_numpy(self.mean), (0, short)).to(device)
        whitening = torch.nn.functional.pad(torch.from_numpy(self.whitening), (0, narrow, 0, short)).to(device)

        def score(d: Tensor) -> Tensor:
            return ((torch.nn.functional.pad(d.double(), (0, short)) - mean) @ whitening).square().sum(1)

        return score


def held_out(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """NAP of the rows that it was learnt from, each as if it had not been among them.

    A row that helped to find mean and covariance is too near by them, the more so the fewer rows there are to a
    direction; a threshold among such scores would flag most new rows. Leaving a row out changes the scatter matrix by
    one of rank one, whose inverse is known (Sherman and Morrison, 1950): with ``g`` the score by the scatter matrix of
    all ``n`` rows in place of their covariance,

        n^2 / (n - 1) * g / (1 - n / (n - 1) * g)

    Parameters
    ----------
    scores : ndarray [n] float64
        All of theirs.

    Returns
    -------
    ndarray [n] float64
        Exact but for a ridge and a tolerance, which would be of the other rows' variances. Where no other row varies in
        a direction of the row's own it is next to infinite.
    """
    n = len(scores)
    g = scores / n
    return n * n / (n - 1) * g / np.maximum(1.0 - n / (n - 1) * g, 1e-9)


class Moments:
    """Mean and scatter matrix of rows that stream past, in fp64; chunks merge by Chan's rule.

    Chan, Golub and LeVeque (1983), equation 2.1, for vectors: no sum of squares is ever taken about the origin, so a
    mean far from zero costs no digits.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(0)
        self.scatter: NDArray[np.float64] = np.zeros((0, 0))

    def update(self, rows: NDArray[np.float64]) -> None:
        """Take in rows ``[n, D]``; ``rows`` is overwritten."""
        n = len(rows)
        if n == 0:
            return
        mean = rows.mean(axis=0)
        rows -= mean
        if self.count == 0:
            self.count, self.mean, self.scatter = n, mean, rows.T @ rows  # NumPy sees a product with itself: dsyrk
            return
        delta, total = mean - self.mean, self.count + n
        self.scatter += rows.T @ rows
        self.scatter += np.outer(delta, delta * (self.count * n / total))
        self.mean = self.mean + delta * (n / total)
        self.count = total

    def whiten(self, tolerance: float = TOLERANCE, ridge: float = 0.0) -> NAP:
        """The whitening of what has been taken in; see :func:`fit_nap`."""
        if self.count < 2:
            raise ValueError(f"x must have at least 2 rows to find a covariance from, got {self.count}")
        from scipy.linalg import eigh

        values, vectors = eigh(self.scatter / self.count, overwrite_a=True, check_finite=False)
        largest = float(values[-1])
        if not math.isfinite(largest) or largest <= 0.0:
            raise ValueError("the differences of the rows do not vary: NAP has nothing to whiten")
        kept = values > tolerance * largest
        if not kept.any():
            raise ValueError(f"tolerance must be below 1 to keep a direction, got {tolerance!r}")
        variance = values[kept] + ridge * float(values[kept].mean())
        return NAP(self.mean, np.ascontiguousarray(vectors[:, kept] / np.sqrt(variance)))


def check_share(name: str, value: object) -> None:
    """Raise an error that names the argument unless ``value`` is a finite number of at least 0."""
    expected = f"{name} must be a finite number of at least 0, got {value!r}"
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(expected)
    if not 0 <= value < math.inf:
        raise ValueError(expected)
