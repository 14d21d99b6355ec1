"""The local score: a reconstruction error beside those of rows with a similar code, and NAP inside the deeper units.

Some rows are easy: a written 1 has few strokes, and even a network that never saw one reconstructs it with less error
than it leaves on a normal 8. So the error is compared, as the local outlier factor compares densities (Breunig et al.,
SIGMOD 2000), with what is usual nearby::

    local(x) = log e(x) - mean of log e over the k reference rows whose codes are nearest to x's

and to it is added RaPP's NAP (:mod:`rvae_fast.rapp`) at the last residual unit of every stage but the first: the
distance between what the unit adds to its input for ``x`` and what it adds for the reconstruction::

    score(x) = z(local(x)) + sum over those units of z(log NAP(x))

where ``z`` subtracts the mean and divides by the standard deviation over the reference rows: a random sample of the
rows given to :func:`fit_local`. Nothing else is learnt, and no anomaly is needed for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rvae_fast._architecture import positive_int
from rvae_fast._modes import in_eval
from rvae_fast._taps import taps
from rvae_fast._whitening import NAP, Moments, check_share
from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualStack
from rvae_fast.pathway import hidden, reconstruct
from rvae_fast.rapp import TILE, pathway_scorer, scored_parts
from rvae_fast.scoring import _parts, map_rows

#: Rows whose codes and errors are kept to compare with; more of them changed nothing on MNIST.
REFERENCE = 4096

#: Nearest codes whose errors are averaged.
NEIGHBOURS = 30

#: Added to the variances of NAP, in units of their mean: a unit's branch has many directions of next to no variance.
RIDGE = 1.0

#: A value below this share of its mean over the reference rows counts as that: a logarithm needs a floor.
FLOOR = 1e-12

#: A part of the score whose logarithms spread less than this over the reference rows differs by fp32's rounding alone.
ROUNDING = 1e-6


@dataclass(frozen=True)
class Local:
    """What the local score keeps of its reference rows.

    Attributes
    ----------
    codes : ndarray [m, latent_features] float64
    log_errors : ndarray [m] float64
        Logarithms of the reconstruction errors.
    naps : tuple of NAP
        One a place; see :func:`places`.
    center, scale : ndarray [1 + places] float64
        Mean and standard deviation over the reference rows of each part of the score.
    floors : ndarray [1 + places] float64
        What the error and each NAP count as at least.
    neighbours : int
    """

    codes: NDArray[np.float64]
    log_errors: NDArray[np.float64]
    naps: tuple[NAP, ...]
    center: NDArray[np.float64]
    scale: NDArray[np.float64]
    floors: NDArray[np.float64]
    neighbours: int

    def scorer(self) -> Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]:
        """Scores ``[n]`` fp64 of errors ``[n]``, codes and differences at the places, as a function on the CPU."""
        naps = [nap.scorer(torch.device("cpu")) for nap in self.naps]
        codes, log_errors = torch.from_numpy(self.codes), torch.from_numpy(self.log_errors)
        center, scale, floors = (torch.from_numpy(a) for a in (self.center, self.scale, self.floors))

        def score(errors: Tensor, code: Tensor, differences: Sequence[Tensor]) -> Tensor:
            errors, code, *there = (t.double().cpu() for t in (errors, code, *differences))
            values = torch.stack([errors, *(nap(d) for nap, d in zip(naps, there, strict=True))], 1)
            logs = torch.log(torch.maximum(values, floors))
            nearest = _squared_distances(code, codes).topk(self.neighbours, largest=False).indices
            logs[:, 0] -= log_errors[nearest].mean(1)
            return ((logs - center) / scale).sum(1)

        return score

    def arrays(self) -> dict[str, NDArray[Any]]:
        """All of it as arrays by name, to be saved."""
        own = {name: getattr(self, name) for name in ("codes", "log_errors", "center", "scale", "floors")}
        own["neighbours"] = np.array([self.neighbours], dtype=np.int64)
        for i, nap in enumerate(self.naps):
            own |= {f"nap{i}.mean": nap.mean, f"nap{i}.whitening": nap.whitening}
        return own

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[Any]]) -> Local:
        """What :meth:`arrays` gave.

        Raises
        ------
        KeyError, ValueError
            When an array is missing, or shapes disagree.
        """
        count = len(arrays["center"])
        naps = tuple(NAP(arrays[f"nap{i}.mean"], arrays[f"nap{i}.whitening"]) for i in range(count - 1))
        fields = {name: arrays[name] for name in ("codes", "log_errors", "center", "scale", "floors")}
        m, k = len(fields["codes"]), int(arrays["neighbours"][0])
        agree = fields["codes"].ndim == 2 and fields["log_errors"].shape == (m,) and 1 <= k <= m
        agree = agree and all(fields[name].shape == (count,) for name in ("center", "scale", "floors"))
        if not agree or any(nap.whitening.ndim != 2 or nap.mean.shape != nap.whitening.shape[:1] for nap in naps):
            raise ValueError("the arrays of the local score disagree in their shapes")
        return cls(naps=naps, neighbours=k, **fields)


def places(model: Autoencoder) -> list[int]:
    """Which places of the pathway ``"branches"`` count: the last residual unit of every stage but the first.

    Of a network with a single stage its last unit; of a plain network, whose layers take the units' place, the outputs
    of the last two hidden layers (of the only one, if it has no more; of one without any, the code).
    """
    if not model.is_residual:
        count = len(taps(model, "branches"))
        return list(range(max(0, count - 3), max(1, count - 1)))
    found: list[int] = []
    at = 0
    for module in model.encoder:
        if isinstance(module, ResidualStack):
            at += len(module)
            found.append(at - 1)
        else:
            at += 1
    return found[1:] or found


def fit_local(
    model: Autoencoder,
    x: Any,
    *,
    neighbours: int = NEIGHBOURS,
    reference: int = REFERENCE,
    ridge: float = RIDGE,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Local:
    """Learn what is usual among normal rows, normally those the model was trained on.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Taken as in eval mode; its own mode is left as it was.
    x : ndarray, memory map or Tensor [n, in_features], or an iterable of such chunks
        In the model's units; at least 3 rows.
    neighbours : int, default 30
        Nearest reference rows whose log errors are averaged; fewer where there are not so many.
    reference : int, default 4096
        Rows that are kept, drawn at random with a fixed seed: the same ones however ``x`` is cut into chunks.
    ridge : float, default 1.0
        NAP's, see :func:`rvae_fast.rapp.fit_nap`.
    device, precision
        See :func:`rvae_fast.scoring.score_rows`.

    Returns
    -------
    Local

    Raises
    ------
    TypeError, ValueError
        Naming the argument; also when the rows do not differ in their errors or inside the network.
    """
    neighbours, reference = positive_int("neighbours", neighbours), positive_int("reference", reference, 3)
    check_share("ridge", ridge)
    rows = sample_rows(x, reference)
    if len(rows) < 3:
        raise ValueError(f"x must have at least 3 rows to compare with each other, got {len(rows)}")
    options: dict[str, Any] = {"device": device, "precision": precision}
    columns = columns_of(model, places(model))
    with in_eval(model):
        seen = map_rows(
            model, rows, observer(model, columns, places(model), options), batch_size=TILE, row_tile=TILE, **options
        )
    if not np.isfinite(seen).all():
        raise ValueError(
            f"{np.count_nonzero(~np.isfinite(seen).all(axis=1))} reference rows overflow the network: nothing can be "
            "compared with them"
        )
    errors, codes, differences = _split(seen, model.latent_features, _widths(columns))
    naps = []
    values = [errors]
    for d in differences:
        moments = Moments()
        moments.update(d.copy())
        naps.append(moments.whiten(ridge=ridge))
        values.append(((d - naps[-1].mean) @ naps[-1].whitening) ** 2 @ np.ones(naps[-1].rank))
    floors = np.array([FLOOR * float(v.mean()) for v in values])
    if floors[0] <= 0.0:
        raise ValueError("the reference rows are reconstructed without any error: there is nothing to compare")
    logs = np.stack([np.log(np.maximum(v, floor)) for v, floor in zip(values, floors, strict=True)], axis=1)
    log_errors, k = logs[:, 0].copy(), min(neighbours, len(rows) - 1)
    distance = _squared_distances(torch.from_numpy(codes), torch.from_numpy(codes))
    distance.fill_diagonal_(torch.inf)  # a row is no neighbour of its own
    logs[:, 0] -= log_errors[distance.topk(k, largest=False).indices.numpy()].mean(axis=1)
    center, scale = logs.mean(axis=0), logs.std(axis=0)
    if not (scale > ROUNDING).all():
        raise ValueError("the reference rows do not differ in their errors or inside the network: no unit to score in")
    return Local(codes, log_errors, tuple(naps), center, scale, floors, k)


def local_scores(
    model: Autoencoder,
    local: Local,
    x: Any,
    *,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """Local scores of a table's rows, higher being more anomalous.

    Parameters
    ----------
    local : Local
        From :func:`fit_local`, of the same model.
    model, x, device, precision
        As for :func:`fit_local`; any number of rows.

    Returns
    -------
    ndarray [n] float64
        A normal row averages about 0; it may be negative. Infinite for a row on which the network overflows. A
        reference row counts among its own neighbours.

    Raises
    ------
    ValueError
        When ``local`` was fitted to another network.

    Examples
    --------
    >>> import torch
    >>> from rvae_fast import RVAE
    >>> from rvae_fast.local import fit_local, local_scores
    >>> model = RVAE(16, latent_features=4, n_layers=7, init="default")
    >>> local_scores(model, fit_local(model, torch.rand(100, 16)), torch.rand(3, 16)).shape
    (3,)
    """
    parts = list(local_parts(model, local, x, device=device, precision=precision))
    return np.concatenate(parts) if parts else np.empty(0)


def local_parts(model: Autoencoder, local: Local, x: Any, **options: Any) -> Iterator[NDArray[np.float64]]:
    """:func:`local_scores` as a generator: one array of scores per chunk of ``x``."""
    columns = columns_of(model, places(model))
    widths = _widths(columns)
    fitted = (local.codes.shape[1], *(len(nap.mean) for nap in local.naps))
    if fitted != (model.latent_features, *widths):
        own = (model.latent_features, *widths)
        raise ValueError(f"local was fitted to a code and places of widths {fitted}; this model has {own}")
    observe, compare = observer(model, columns, places(model), options), local.scorer()

    def score(rows: Tensor) -> Tensor:
        return compare(*_split(observe(rows), model.latent_features, widths))

    return scored_parts(model, x, score, options)


# --- private ---


def sample_rows(x: Any, size: int) -> NDArray[Any]:
    """At most ``size`` rows of ``x``, each as likely as any other, in their order; ``x`` streams through."""
    rng = np.random.default_rng(0)
    rows: NDArray[Any] | None = None
    keys: NDArray[np.float64] = np.zeros(0)
    for part in _parts(x):
        drawn = rng.random(part.shape[0])
        keep = np.ones(len(drawn), dtype=bool)
        if len(keys) == size:
            keep = drawn < keys.max()  # the others could not stay: they need not be copied
        chosen = _as_array(part[torch.from_numpy(keep)]) if isinstance(part, Tensor) else part[keep]
        rows = np.array(chosen) if rows is None else np.concatenate([rows, chosen])
        keys = np.concatenate([keys, drawn[keep]])
        if len(keys) > size:
            smallest = np.sort(np.argpartition(keys, size)[:size])
            rows, keys = rows[smallest], keys[smallest]
    return np.empty((0, 0)) if rows is None else rows


def _as_array(rows: Tensor) -> NDArray[Any]:
    rows = rows.detach().cpu()
    return (rows.float() if rows.dtype == torch.bfloat16 else rows).numpy()  # NumPy has no bf16


def columns_of(model: Autoencoder, wanted: Sequence[int]) -> list[tuple[int, int]]:
    """Of the ``wanted`` places, first and last column among the differences of all places."""
    every = [(column, column + width) for _, column, width, _ in taps(model, "branches").tolist()]
    return [every[i] for i in wanted]


def _widths(columns: Sequence[tuple[int, int]]) -> list[int]:
    return [stop - start for start, stop in columns]


def observer(
    model: Autoencoder, columns: Sequence[tuple[int, int]], wanted: Sequence[int], options: dict[str, Any]
) -> Callable[[Tensor], Tensor]:
    """Rows to their error, code and differences at the ``wanted`` places, side by side; ``columns`` are theirs."""
    scorer = pathway_scorer(model, "branches", options)

    def observe(rows: Tensor) -> Tensor:
        if scorer is not None:
            found = scorer.pathway(rows, "branches", include_input=False, latent=True, differences=True)
            assert found.latent is not None
            assert found.differences is not None
            there = [found.differences[:, start:stop] for start, stop in columns]
            return torch.cat([found.error[:, None], found.latent, *there], 1)
        error, x_hat, encoded = model.anomaly_score(rows), reconstruct(model, rows), model.encode(rows)
        code = encoded[0] if isinstance(encoded, tuple) else encoded
        n = rows.shape[0]
        both = torch.cat([rows, x_hat.to(rows.dtype)])
        differences = [p[n:] - p[:n] for i, p in enumerate(hidden(model, both, "branches")) if i in wanted]
        return torch.cat([part.to(rows.dtype) for part in (error[:, None], code, *differences)], 1)

    return observe


def _split(seen: Any, latent: int, widths: list[int]) -> tuple[Any, Any, list[Any]]:
    """Errors ``[n]``, codes and differences of an array or tensor that :func:`observer` made."""
    ends = np.cumsum([1 + latent, *widths]).tolist()
    return seen[:, 0], seen[:, 1 : 1 + latent], [seen[:, a:b] for a, b in pairwise(ends)]


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``[n, m]`` in fp64, about the centre of ``b``: a code far from the origin costs no digits."""
    middle = b.mean(0)
    a, b = a - middle, b - middle
    return a.square().sum(1, keepdim=True) - 2.0 * (a @ b.T) + b.square().sum(1)
