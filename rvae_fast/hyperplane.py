"""The hyperplane score: how far inside the encoder a row lies from the plane through its neighbours, beside theirs.

Near a normal row the normal rows fill a piece of a curved surface, and what the encoder has made of the row after its
second stage, ``h``, lies close to the plane through the k reference rows nearest to it there. The distance is that of
the local hyperplane classifier (Vincent and Bengio, "K-local hyperplane and convex distance nearest neighbor
algorithms", NIPS 2001), with its penalty on far-fetched points of the plane::

    d2(x) = |h - c - w A|^2   for the w that minimises  |h - c - w A|^2 + penalty |w|^2

with ``c`` the mean of the neighbours, the rows of ``A`` the neighbours less ``c``, and the penalty a share of the mean
``|A_i|^2``. Where normal rows vary much it is large for all of them, so, as the local outlier factor does with
densities (Breunig et al., SIGMOD 2000), it is compared with what is usual nearby; and so is the density itself, by the
mean distance ``r`` to the nearest ten::

    plane(x) = log d2(x) - mean of log d2 over the same k reference rows
    density(x) = log r(x) - mean of log r over the same ten

To them is added RaPP's NAP (:mod:`rvae_fast.rapp`) at the last residual unit, the distance between what the unit adds
to its input for ``x`` and what it adds for the reconstruction::

    score(x) = z(plane(x)) + z(log NAP(x)) + 3/2 z(log d2(x)) + z(density(x)) / 2

where ``z`` subtracts the mean and divides by the standard deviation over the reference rows, which are distinct rows
of those given to :func:`fit_hyperplane`. No row is its own neighbour. The reconstruction error itself does not count:
a row that is easy to reconstruct is not more normal for that.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._architecture import positive_int
from rvae_fast._inside import Inside
from rvae_fast._modes import in_eval
from rvae_fast._planes import Planes, distinct, parts_of
from rvae_fast._whitening import NAP, Moments, check_share
from rvae_fast.local import ROUNDING, sample_rows
from rvae_fast.models import Autoencoder
from rvae_fast.rapp import GATHERED, TILE, scored_parts
from rvae_fast.scoring import map_rows

#: Rows that are kept to compare with, at most: more of them are better, and cost memory and time by their number.
REFERENCE = 60_000

#: Nearest rows that span a plane.
NEIGHBOURS = 30

#: Weights of the four parts: plane, NAP, distance from the plane, density. They are not sharp: half of the plane,
#: half or 3/2 of NAP, a third or 4/3 of the distance, no density or twice that change mean AUROC by less than .003, on
#: MNIST and on eight tables alike (docs/results/README.md).
WEIGHTS = (1.0, 1.0, 1.5, 0.5)

#: The penalty, in units of the mean squared distance of the neighbours from their mean.
PENALTY = 0.05

#: Added to the variances of NAP, in units of their mean.
RIDGE = 1.0

#: A squared distance below this share of the mean one counts as that: next to rows that are all but equal, any
#: other would be infinitely far.
FLOOR = 1e-4

#: Rows that NAP's product takes at a time.
ROWS = 32

_ARRAYS = ("features", "squares", "middle", "log_distances", "center", "scale", "floors", "weights")


@dataclass(frozen=True)
class Hyperplane:
    """What the hyperplane score keeps of its reference rows.

    Attributes
    ----------
    features : ndarray [m, width] float32
        What the encoder makes of them at the place that counts (see :func:`rvae_fast._inside.depth`), less ``middle``.
    squares : ndarray [m] float32
        Sums of their squares.
    middle : ndarray [width] float32
        Their mean.
    log_distances : ndarray [m, 2] float64
        Logarithms of their own squared distances from the plane and of their mean distances to the nearest.
    nap : NAP
        At the last residual unit.
    center, scale : ndarray [4] float64
        Mean and standard deviation over the reference rows of the parts of the score.
    floors : ndarray [3] float64
        What a squared distance, a mean distance and NAP count as at least.
    weights : ndarray [4] float64
        Of the parts, :data:`WEIGHTS` when it was fitted.
    neighbours : int
    penalty : float
    """

    features: NDArray[np.float32]
    squares: NDArray[np.float32]
    middle: NDArray[np.float32]
    log_distances: NDArray[np.float64]
    nap: NAP
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    floors: NDArray[np.float64]
    weights: NDArray[np.float64]
    neighbours: int
    penalty: float

    @functools.cached_property
    def planes(self) -> Planes:
        """What finds the planes: made when it is first asked for, and not saved."""
        features, squares, middle = (torch.from_numpy(a) for a in (self.features, self.squares, self.middle))
        return Planes(features, squares, middle, self.neighbours, self.penalty)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "planes"}

    def scorer(self, own: bool = False) -> Callable[[Tensor, Tensor], Tensor]:
        """Scores ``[n]`` fp64 of features and of differences at the last unit, as a function on the CPU.

        With ``own`` the rows are small deformations of reference rows: the nearest of them is then the row itself.
        """
        nap, planes = self.nap.scorer(torch.device("cpu")), self.planes
        log_distances = torch.from_numpy(self.log_distances)
        center, scale, floors, weights = (
            torch.from_numpy(a) for a in (self.center, self.scale, self.floors, self.weights)
        )

        def score(features: Tensor, difference: Tensor) -> Tensor:
            squared, apart, nearest = planes(features.cpu(), own)
            # Always as many rows at a time: the order that the product adds up a row's terms in may depend on it.
            whole = torch.nn.functional.pad(difference.double().cpu(), (0, 0, 0, -len(difference) % ROWS))
            naps = torch.cat([nap(tile) for tile in whole.split(ROWS)])[: len(difference)]
            values = torch.stack([squared, apart, naps], 1)
            parts = parts_of(torch.log(torch.maximum(values, floors)), log_distances, nearest)
            return ((parts - center) / scale * weights).sum(1)

        return score

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays by name, to be saved."""
        return {
            **{name: getattr(self, name) for name in _ARRAYS},
            "nap.mean": self.nap.mean,
            "nap.whitening": self.nap.whitening,
            "neighbours": np.array([self.neighbours], dtype=np.int64),
            "penalty": np.array([self.penalty]),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Hyperplane:
        """What :meth:`arrays` gave.

        Raises
        ------
        KeyError, ValueError
            When an array is missing, or shapes disagree.
        """
        fields = {name: arrays[name] for name in _ARRAYS}
        nap = NAP(arrays["nap.mean"], arrays["nap.whitening"])
        m, width = fields["features"].shape if fields["features"].ndim == 2 else (-1, -1)
        k = int(arrays["neighbours"][0])
        shapes = {"log_distances": (m, 2), "squares": (m,), "middle": (width,)}
        shapes |= {"center": (4,), "scale": (4,), "weights": (4,), "floors": (3,)}
        agree = 1 <= k < m and all(fields[name].shape == shape for name, shape in shapes.items())
        if not agree or nap.whitening.ndim != 2 or nap.mean.shape != nap.whitening.shape[:1]:
            raise ValueError("the arrays of the hyperplane score disagree in their shapes")
        return cls(**fields, nap=nap, neighbours=k, penalty=float(arrays["penalty"][0]))


def fit_hyperplane(
    model: Autoencoder,
    x: Any,
    *,
    neighbours: int = NEIGHBOURS,
    reference: int = REFERENCE,
    penalty: float = PENALTY,
    ridge: float = RIDGE,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Hyperplane:
    """Learn what is usual among normal rows, normally those the model was trained on.

    The time grows with the square of the reference rows: 50,000 of an image's take 20 s of one core.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Taken as in eval mode; its own mode is left as it was.
    x : ndarray, memory map or Tensor [n, in_features], or an iterable of such chunks
        In the model's units; at least 4 distinct rows.
    neighbours : int, default 30
        Nearest reference rows that span a plane; fewer where there are not so many.
    reference : int, default 60,000
        Rows that are kept, drawn at random with a fixed seed: the same ones however ``x`` is cut into chunks.
    penalty : float, default 0.05
        On points of a plane far from its rows, in units of their mean squared distance from their mean.
    ridge : float, default 1.0
        NAP's, see :func:`rvae_fast.rapp.fit_nap`.
    device, precision
        Of the network, see :func:`rvae_fast.scoring.score_rows`; the planes are computed on the CPU, in fp32.

    Returns
    -------
    Hyperplane

    Raises
    ------
    TypeError, ValueError
        Naming the argument; also when the rows do not differ inside the network.
    """
    neighbours, reference = positive_int("neighbours", neighbours, 2), positive_int("reference", reference, 4)
    check_share("ridge", ridge)
    check_share("penalty", penalty)
    if penalty == 0.0:
        raise ValueError("penalty must be above 0: without one any point may lie in the plane, got 0.0")
    rows = distinct(sample_rows(x, reference))
    if len(rows) < 4:
        raise ValueError(f"x must have at least 4 distinct rows to compare with each other, got {len(rows)}")
    options: dict[str, Any] = {"device": device, "precision": precision}
    inside = Inside(model, options)
    with in_eval(model):
        at_once = GATHERED if inside.row_tile == 1 else TILE
        seen = map_rows(model, rows, inside, batch_size=at_once, row_tile=inside.row_tile, **options)
    features, differences = torch.from_numpy(seen[:, : inside.width]).float(), seen[:, inside.width :]
    # Nor are there distances to rows so far away that the square of one is beyond fp32.
    finite = np.isfinite(differences).all(axis=1) & torch.isfinite(features.square().sum(1)).numpy()
    if not finite.all():
        raise ValueError(
            f"{np.count_nonzero(~finite)} reference rows overflow the network: nothing can be compared with them"
        )
    moments = Moments()
    moments.update(differences.copy())
    nap = moments.whiten(ridge=ridge)
    k = min(neighbours, len(rows) - 2)
    planes = Planes.of(features, k, penalty)
    found = [planes(tile) for tile in features.split(GATHERED if planes.looks_at_rows_one_by_one() else TILE)]
    squared, apart, nearest = (torch.cat(tiles) for tiles in zip(*found, strict=True))
    naps = torch.from_numpy(((differences - nap.mean) @ nap.whitening) ** 2 @ np.ones(nap.rank))
    values = torch.stack([squared, apart, naps], 1)
    floors = values.mean(0) * values.new_tensor([FLOOR, math.sqrt(FLOOR), FLOOR])
    if not bool((floors > 0.0).all()):
        raise ValueError("the reference rows do not differ inside the network: there is nothing to compare")
    logs = torch.log(torch.maximum(values, floors))
    log_distances = logs[:, :2].contiguous()
    own = parts_of(logs, log_distances, nearest).numpy()
    center, scale = own.mean(axis=0), own.std(axis=0)
    if not (scale > ROUNDING).all():
        raise ValueError("the reference rows do not differ inside the network: no unit to score in")
    fitted = Hyperplane(
        features=planes.features.numpy(), squares=planes.squares.numpy(), middle=planes.middle.numpy(),
        log_distances=log_distances.numpy(), nap=nap, center=center, scale=scale, floors=floors.numpy(),
        weights=np.array(WEIGHTS), neighbours=k, penalty=float(penalty),
    )  # fmt: skip
    fitted.__dict__["planes"] = planes  # of the same arrays: the directions need not be found again
    return fitted


def hyperplane_scores(
    model: Autoencoder,
    hyperplane: Hyperplane,
    x: Any,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """Hyperplane scores of a table's rows, higher being more anomalous.

    Parameters
    ----------
    hyperplane : Hyperplane
        From :func:`fit_hyperplane`, of the same model.
    model, x, device, precision
        As for :func:`fit_hyperplane`; any number of rows.

    Returns
    -------
    ndarray [n] float64
        A normal row averages about 0; it may be negative. Infinite for a row on which the network overflows.

    Raises
    ------
    ValueError
        When ``hyperplane`` was fitted to another network.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE
    >>> from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
    >>> model = RVAE(16, latent_features=4, n_layers=7, init="default")
    >>> hyperplane_scores(model, fit_hyperplane(model, torch.rand(100, 16)), torch.rand(3, 16)).shape
    (3,)
    """
    parts = list(hyperplane_parts(model, hyperplane, x, device=device, precision=precision))
    return np.concatenate(parts) if parts else np.empty(0)


def hyperplane_parts(
    model: Autoencoder, hyperplane: Hyperplane, x: Any, *, own: bool = False, **options: Any
) -> Iterator[NDArray[np.float64]]:
    """:func:`hyperplane_scores` as a generator: one array of scores per chunk of ``x``.

    With ``own`` the rows are small deformations of reference rows (:mod:`rvae_fast.views`), and these do not count as
    their own neighbours.
    """
    inside = Inside(model, options)
    fitted, here = (hyperplane.features.shape[1], len(hyperplane.nap.mean)), (inside.width, inside.stop - inside.start)
    if fitted != here:
        raise ValueError(f"hyperplane was fitted to places of widths {fitted}; this model has {here} there")
    row_tile = max(inside.row_tile, 1 if hyperplane.planes.looks_at_rows_one_by_one() else TILE)
    return scored_parts(model, x, inside.on(hyperplane.scorer(own)), options, row_tile=row_tile)
