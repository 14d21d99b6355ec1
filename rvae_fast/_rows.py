"""Rows of a tensor, array or memory-mapped file, gathered batch by batch onto the device."""

from __future__ import annotations

import hashlib
import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

#: Dtypes that torch gathers and converts on every device.
_DTYPES = {
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool,
}  # fmt: skip


class Rows:
    """A table ``[n_rows, n_features]`` that hands out batches on the device and in the dtype of the model.

    A NumPy array, memory-mapped or not, is wrapped and not copied, and a batch reads only its own rows, so the table
    may be larger than memory. On the CPU batches share one buffer: each is valid until the next. For CUDA, a table that
    fits in half of the free device memory is moved there once; a larger one is streamed through pinned memory.

    Parameters
    ----------
    data : Tensor or ndarray [n_rows, n_features]
        Of any float, integer or boolean dtype; converted to ``dtype``, values unchanged.
    name : str
        The argument's name, for errors.
    n_features : int
    device : torch.device
    dtype : torch.dtype
    max_rows : int
        The largest batch that will be asked for.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what came and what was expected.
    """

    def __init__(
        self, data: Any, name: str, n_features: int, *, device: torch.device, dtype: torch.dtype, max_rows: int
    ) -> None:
        if not isinstance(data, (Tensor, np.ndarray)):
            raise TypeError(f"{name} must be a torch.Tensor or numpy.ndarray, got {type(data).__name__}")
        if data.ndim != 2 or data.shape[1] != n_features:
            raise ValueError(f"{name} must have shape [n_rows, {n_features}], got {list(data.shape)}")
        self.name, self.device, self.dtype = name, device, dtype
        self.n_rows, self.n_features = int(data.shape[0]), n_features
        self._array: np.ndarray | None = None
        self._table: Tensor | None = None
        if isinstance(data, Tensor):
            if data.dtype not in _DTYPES or data.layout != torch.strided:
                raise TypeError(
                    f"{name} must be a dense table of real numbers, got a {data.layout} tensor of {data.dtype}"
                )
            self._table = data.detach()
        else:
            if data.dtype.kind not in "fiub":
                raise TypeError(f"{name} must be a table of real numbers, got an array of dtype {data.dtype}")
            self._table = _view(data)
            if self._table is None:
                self._array = data
        if device.type == "cuda" and self._table is not None and self._table.device != device:
            free = torch.cuda.mem_get_info(device)[0]
            if self._table.numel() * self._table.element_size() <= free // 2:
                self._table = self._table.to(device)
        source = self._table if self._table is not None else torch.empty(0, dtype=dtype, device="cpu")
        #: Where the index of :meth:`gather` is wanted.
        self.index_device = source.device
        self._turn = 0
        self._raw: list[Tensor] = []
        self._events: list[torch.cuda.Event] = []
        shape = (min(max_rows, max(self.n_rows, 1)), n_features)
        if self.index_device.type == "cpu" and self._table is not None:
            # Two pinned buffers: the CPU fills one while the copy of the other is under way.
            pinned = device.type == "cuda"
            options: dict[str, Any] = {"dtype": source.dtype, "device": "cpu", "pin_memory": pinned}
            self._raw = [torch.empty(shape, **options) for _ in range(2 if pinned else 1)]
            self._events = [torch.cuda.Event() for _ in self._raw] if pinned else []
        direct = self._raw and device.type == "cpu" and source.dtype == dtype
        self._out = self._raw[0] if direct else torch.empty(shape, dtype=dtype, device=device)

    def gather(self, index: Tensor) -> Tensor:
        """Rows ``index`` (int64 ``[n]``, on ``index_device``) as ``[n, n_features]``, valid until the next call."""
        n = len(index)
        out = self._out[:n]
        if self._table is None:
            assert self._array is not None
            rows = self._array[index.numpy()]
            return out.copy_(torch.from_numpy(rows.astype(_NUMPY.get(self.dtype, np.float32))))
        if not self._raw:
            rows = self._table.index_select(0, index)
            return rows if rows.device == self.device and rows.dtype == self.dtype else out.copy_(rows)
        raw = self._raw[self._turn][:n]
        if self._events:
            event = self._events[self._turn]
            event.synchronize()
            torch.index_select(self._table, 0, index, out=raw)
            out.copy_(raw, non_blocking=True)
            event.record(torch.cuda.current_stream(self.device))
            self._turn = 1 - self._turn
            return out
        torch.index_select(self._table, 0, index, out=raw)
        return raw if raw.data_ptr() == out.data_ptr() else out.copy_(raw)

    def fingerprint(self) -> str:
        """Shape, dtype and a hash of up to 256 rows spread over the table, the first and the last among them."""
        index = np.unique(np.linspace(0, self.n_rows - 1, num=min(self.n_rows, 256)).astype(np.int64))
        if self._table is None:
            assert self._array is not None
            dtype, rows = str(self._array.dtype), np.ascontiguousarray(self._array[index]).tobytes()
        else:
            picked = self._table.index_select(0, torch.from_numpy(index).to(self._table.device))
            dtype, rows = str(self._table.dtype), picked.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        return f"{self.n_rows}x{self.n_features} {dtype} {hashlib.sha256(rows).hexdigest()[:32]}"


_NUMPY = {torch.float64: np.float64}


def _view(array: np.ndarray) -> Tensor | None:
    """A tensor over the same memory, or None where torch has no such view (byte order, strides, dtype)."""
    if not array.dtype.isnative or any(s < 0 or s % array.itemsize for s in array.strides):
        return None
    try:
        with warnings.catch_warnings():
            # Read-only memory maps: torch warns that it would write through; nothing here writes.
            warnings.filterwarnings("ignore", message=".*not writable.*", category=UserWarning)
            tensor = torch.from_numpy(array)
    except TypeError:
        return None
    return tensor if tensor.dtype in _DTYPES else None


def batches(n_rows: int, batch_size: int) -> list[tuple[int, int]]:
    """``[start, stop)`` of every batch of ``n_rows`` rows.

    All have ``batch_size`` rows but the last, which has what is left. One row left alone joins the batch before it:
    BatchNorm cannot train on a single row, and dropping it would leave a row of some epochs unseen.
    """
    edges = [*range(0, n_rows, batch_size), n_rows]
    if n_rows % batch_size == 1 and n_rows > 1:
        del edges[-2]
    return list(pairwise(edges))


def groups(n_rows: int, batch_size: int, accumulate: int) -> list[list[tuple[int, int]]]:
    """:func:`batches` in groups of ``accumulate``, one group an optimiser step; the last may have fewer."""
    every = batches(n_rows, batch_size)
    return [every[i * accumulate : (i + 1) * accumulate] for i in range(math.ceil(len(every) / accumulate))]
