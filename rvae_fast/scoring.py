"""Rows to anomaly scores, codes, reconstructions or errors, in chunks: no more than one chunk of a table is copied.

On the CPU the rows go through the model's frozen scorer (:mod:`rvae_fast.scorer`), which is made at the first call and
kept as long as the weights stay (:mod:`rvae_fast._frozen`, which also says which models have none and run themselves).

A row's result does not depend on the rows it came with. The scorer sees to that itself. In a model's own forward matrix
products pick another kernel, and with it another order of summation, for a handful of rows; so a batch is padded there
to a multiple of :data:`ROW_TILE` rows, after which a row alone and the same row among thousands meet the same kernel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rvae_fast._frozen import frozen
from rvae_fast._modes import in_eval
from rvae_fast._threads import alone_in_a_child
from rvae_fast._validation import check_choice
from rvae_fast.pathway import reconstruct
from rvae_fast.preprocessing import chunk_rows, chunks
from rvae_fast.scorer import Scorer

#: Batches that a model runs itself are padded to a multiple of so many rows (repeating the last one).
ROW_TILE = 32

#: Rows that a model runs at once.
BATCH_ROWS = 4096

PRECISIONS = ("auto", "fp32", "bf16")

#: What :func:`network_rows` can be asked for.
RESULTS = ("score", "latent", "reconstruction", "feature_error")


def score_rows(
    model: nn.Module,
    x: Any,
    *,
    batch_size: int = BATCH_ROWS,
    kld_weight: float = 0.0,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """Anomaly scores of a table's rows, higher being more anomalous.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE
        Scored as in eval mode; its own mode is left as it was.
    x : ndarray, memory map or Tensor [n, in_features], or an iterable of such chunks
        In the model's units (a detector scales; this does not).
    batch_size : int, default 4096
        Rows that go through the network at once, where the model runs itself.
    kld_weight : float, default 0.0
        1.0 adds a VAE's KL divergence to the reconstruction error.
    device : str or torch.device, optional
        Where to score; the model is moved there. By default where the model is.
    precision : {"auto", "fp32", "bf16"}, default "auto"
        Of the network's matrix products. ``"auto"`` is fp32: a small reconstruction error is the difference of two
        nearly equal numbers, of which bf16 keeps three digits.

    Returns
    -------
    ndarray [n] float64
        Infinite for a row on which the network overflows.

    Raises
    ------
    TypeError, ValueError
        Naming the argument: a chunk of the wrong shape or dtype, a batch_size below 1, an unknown precision.
    """
    parts = list(score_parts(model, x, batch_size, kld_weight, device, precision))
    return np.concatenate(parts) if parts else np.empty(0)


def score_parts(
    model: nn.Module,
    x: Any,
    batch_size: int = BATCH_ROWS,
    kld_weight: float = 0.0,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> Iterator[NDArray[np.float64]]:
    """:func:`score_rows` as a generator: one array of scores per chunk of ``x``."""
    for part in _parts(x):
        scores = network_rows(
            model, part, "score", kld_weight=kld_weight, batch_size=batch_size, device=device, precision=precision
        )
        # An overflow is inf, or inf - inf; both mean that the network has never seen anything like this row.
        scores[np.isnan(scores)] = np.inf
        yield scores


def network_rows(
    model: nn.Module,
    x: Any,
    result: str,
    *,
    kld_weight: float = 0.0,
    batch_size: int = BATCH_ROWS,
    device: str | torch.device | None = None,
    precision: str = "auto",
) -> NDArray[np.float64]:
    """What the network makes of each row of a table, through the frozen scorer where there is one.

    Parameters
    ----------
    model, kld_weight, batch_size, device, precision
        As :func:`score_rows`'s.
    x : ndarray, memory map or Tensor [n, in_features]
    result : {"score", "latent", "reconstruction", "feature_error"}

    Returns
    -------
    ndarray [n] (scores), [n, latent_features] (codes) or [n, in_features], float64
    """
    check_choice("result", result, RESULTS)
    at = _check(model, x, batch_size, device, precision)
    with alone_in_a_child():
        scorer = frozen(model, precision) if at.type == "cpu" else None
        if scorer is not None:
            return _by_scorer(scorer, x, result, kld_weight)

    def by_model(rows: Tensor) -> Tensor:
        net: Any = model
        if result == "score":
            return net.anomaly_score(rows, kld_weight=kld_weight)  # type: ignore[no-any-return]
        with in_eval(net):
            if result == "feature_error":
                return net.feature_errors(rows)  # type: ignore[no-any-return]
            if result == "reconstruction":
                return reconstruct(net, rows)
            code = net.encode(rows)
            return code[0] if isinstance(code, tuple) else code

    return map_rows(model, x, by_model, batch_size=batch_size, device=at, precision=precision)


def _by_scorer(scorer: Scorer, x: Any, result: str, kld_weight: float) -> NDArray[np.float64]:
    rows = _batch(x, torch.device("cpu"), torch.float32)
    if result == "score":
        out = scorer(rows, kld_weight)
    else:
        out = getattr(scorer.detailed(rows, **{result: True}), result)
    return out.double().numpy()


def _check(
    model: nn.Module, x: Any, batch_size: int, device: str | torch.device | None, precision: str
) -> torch.device:
    """Check the arguments and move the model to the device, which is returned."""
    if isinstance(batch_size, bool) or not isinstance(batch_size, (int, np.integer)) or batch_size < 1:
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    check_choice("precision", precision, PRECISIONS)
    own = next(model.parameters()).device
    at = own if device is None else torch.device(device)
    if at != own:
        model.to(at)
    if x.ndim != 2 or x.shape[1] != model.in_features:
        raise ValueError(f"x must have shape [n, {model.in_features}], got {list(x.shape)}")
    is_real = not x.is_complex() if isinstance(x, Tensor) else x.dtype.kind in "fiub"
    if not is_real:
        raise TypeError(f"x must be a table of real numbers, got dtype {x.dtype}")
    return at


def map_rows(
    model: nn.Module,
    x: Any,
    function: Callable[[Tensor], Tensor],
    *,
    batch_size: int = BATCH_ROWS,
    device: str | torch.device | None = None,
    precision: str = "auto",
    row_tile: int = ROW_TILE,
) -> NDArray[np.float64]:
    """Apply a function of rows ``[b, in_features] -> [b, ...]`` to a table in padded batches; no gradients.

    ``function`` sees fp32 batches on ``device``, a multiple of ``row_tile`` rows each; the padding's results are
    dropped. Returns a float64 array ``[n, ...]``.
    """
    at = _check(model, x, batch_size, device, precision)
    dtype = next(model.parameters()).dtype
    out: NDArray[np.float64] | None = None
    cast = torch.autocast(at.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    with alone_in_a_child(), torch.inference_mode(), cast:
        for start in range(0, x.shape[0], batch_size):
            rows = _batch(x[start : start + batch_size], at, dtype)
            n = rows.shape[0]
            short = -n % row_tile
            if short:
                rows = torch.cat([rows, rows[-1:].expand(short, -1)])
            result = function(rows)[:n].double().cpu().numpy()
            if out is None:
                out = np.empty((x.shape[0], *result.shape[1:]))
            out[start : start + n] = result
    return np.empty(0) if out is None else out


def _batch(rows: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    if isinstance(rows, Tensor):
        return rows.detach().to(device=device, dtype=dtype)
    wanted = np.float64 if dtype == torch.float64 else np.float32
    # Torch warns about read-only arrays and refuses negative strides; a plain array is taken as it is.
    as_is = rows.dtype == wanted and rows.flags.c_contiguous and rows.flags.writeable
    # A 16-bit network's dtype NumPy may not have.
    return torch.from_numpy(rows if as_is else np.array(rows, dtype=wanted, order="C")).to(device=device, dtype=dtype)


def _parts(x: Any) -> Iterator[Any]:
    """The chunks of an array, of a tensor, or of an iterable of them."""
    if isinstance(x, Tensor):
        yield from x.split(chunk_rows(x.shape[-1])) if x.ndim == 2 else [x]
    elif isinstance(x, np.ndarray):
        yield from chunks(x) if x.ndim == 2 else [x]
    elif isinstance(x, Iterable) and not isinstance(x, (str, bytes, dict)):
        for number, part in enumerate(x):
            if not isinstance(part, (Tensor, np.ndarray)):
                raise TypeError(f"chunk {number} of x must be an ndarray or a Tensor, got {type(part).__name__}")
            yield part
    else:
        raise TypeError(f"x must be an ndarray, a Tensor or an iterable of them, got {type(x).__name__}")
