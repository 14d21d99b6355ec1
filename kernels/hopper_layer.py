"""One layer forward by the CUDA C++ kernel for Hopper: prologue, product and epilogue in one pass.

======================  ==================  =========  ============================================================
tensor                  shape               dtype      stored or recomputed
======================  ==================  =========  ============================================================
weight                  [out, in]           bf16       packed by :func:`pack`
all others              as in ``layer_forward.py``, bf16 where these may be fp32
======================  ==================  =========  ============================================================

It takes and returns what :func:`.layer_forward.layer_forward` does in order "pre"; the way back is that of plain
layers, of which the kernel's is slower (``docs/notes/performance.md``). See ``hopper/layer.cu`` for how it works.
:func:`why_not` says what is not covered.
"""

from __future__ import annotations

import functools
import warnings

import torch
from torch import Tensor

from . import hopper
from .batch_norm import Moments
from .launch import call


def why_not(
    device: torch.device, order: str, dtype: torch.dtype, stream: torch.dtype, width: int, aligned: bool
) -> str | None:
    """Why the kernels do not cover a stack, or None if they do.

    Parameters
    ----------
    device : torch.device
    order : str
    dtype, stream : torch.dtype
        Of the products, and of what the units pass on.
    width : int
    aligned : bool
        Whether all tensors begin at multiples of 16 bytes.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return "devices other than Hopper's"
    if order != "pre":
        return f"order {order!r}"
    if dtype != torch.bfloat16 or stream != torch.bfloat16:
        return f"products in {dtype} on rows of {stream}"
    if width not in hopper.WIDTHS or not aligned:
        return f"rows of {width} features" if aligned else "rows that do not begin at multiples of 16 bytes"
    if device not in _checked:
        if torch.cuda.is_current_stream_capturing():
            return "a capture before the first run, whose check cannot be captured"
        _checked[device] = _self_check(device)
    return _checked[device]


#: What the check has found, by device.
_checked: dict[torch.device, str | None] = {}


def _self_check(device: torch.device) -> str | None:
    """Whether the kernels, compiled here and now, give what PyTorch gives: what they do not is not used."""
    try:
        with torch.random.fork_rng([device]), torch.no_grad(), torch.autocast("cuda", enabled=False):
            wrong = _largest_error(device)
    except Exception as error:  # whatever it is: the caller's own forward goes on without these kernels
        reason = f"they cannot be compiled or run: {error}"
    else:
        if wrong < 0.03:
            return None
        reason = f"their results are off by {wrong:.2g} of the largest value"
    warnings.warn(f"rvae_fast does without its CUDA C++ kernels on {device}: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def _largest_error(device: torch.device) -> float:
    """The largest error of a layer's results, of the largest value: bf16's rounding is 0.004."""
    rows, width = 300, 256

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    x, skip, weight = draw(rows, width), draw(rows, width), draw(width, width) / width**0.5
    norm = torch.rand(5, width, device=device, dtype=torch.float32) + 0.5
    y, moments = hopper.hopper_forward(x, weight, norm=norm, activation="leaky_relu", residual=skip)
    h = torch.nn.functional.leaky_relu((x.float() - norm[0]) * norm[3] + norm[4], 0.01).bfloat16()
    assert moments is not None
    tile_mean, tile_m2, tile_rows = moments
    first = y[:tile_rows].float()
    pairs = [(y, h.float() @ weight.float().t() + skip.float()), (tile_mean[0], first.mean(0))]
    pairs += [(tile_m2[0], (first - first.mean(0)).square().sum(0))]
    # A NaN is an error, too.
    return max(float(((o.float() - e).abs().max() / e.abs().max()).nan_to_num(nan=1e9)) for o, e in pairs)


def pack(out: Tensor, weights: Tensor) -> None:
    """Weights ``[layers, out, in]`` in bf16 as the kernels read them."""
    hopper.pack_weight(weights, out=out.view(out.shape[0], -1))


def hopper_layer_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Tensor,
    activation: str = "identity",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    moments: bool = True,
    out: Tensor | None = None,
) -> tuple[Tensor, Moments | None]:
    """As :func:`.layer_forward.layer_forward`, with a packed ``weight``."""
    rows, width = x.shape[0], weight.shape[0]
    y = weight.new_empty((rows, width)) if out is None else out
    tile_mean = x.new_empty((hopper.tiles_of(rows), width), dtype=torch.float32) if moments else None
    tile_m2 = None if tile_mean is None else torch.empty_like(tile_mean)
    run = functools.partial(hopper.launch_forward, activation, negative_slope)
    call(run, x, weight, bias, norm, residual, y, tile_mean, tile_m2)
    return y, None if tile_mean is None or tile_m2 is None else (tile_mean, tile_m2, hopper.BLOCK_M)
