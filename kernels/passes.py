"""How the passes that move whole ``[rows, features]`` tensors walk over them: tiles, steps, programs.

A program has ``tile_rows`` rows and ``block_n`` columns, and takes them ``block_m`` rows at a time. What decides:

* A multiprocessor must have 32 to 40 KB of loads under way to keep HBM3e busy: every thread loads one to four times 16
  bytes of each tensor a step, and with ``stages`` > 1 the compiler keeps that many steps less one on their way to
  shared memory by asynchronous copies.
* ``block_n`` covers a row or, of wide ones, half a KB and more, so that a step reads contiguous memory.
* Passes with column sums keep them in the registers of the thread that has the column, over all steps: the sum across
  threads, which goes through shared memory, comes once a tile, and there are few tiles to merge.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

#: Programs that a pass should have at least before its tiles grow: a few for each multiprocessor of a large chip.
PROGRAMS = 512


class Walk(NamedTuple):
    """Rows of a tile, rows and columns of a step, warps, stages (1: plain loads)."""

    tile_rows: int
    block_m: int
    block_n: int
    num_warps: int = 4
    stages: int = 1

    def grid(self, rows: int, features: int) -> tuple[int, int]:
        """Tiles of rows, strips of columns."""
        return -(-rows // self.tile_rows), -(-features // self.block_n)

    @property
    def constants(self) -> dict[str, int]:
        """The kernel's compile-time arguments."""
        return {
            "TILE_ROWS": self.tile_rows, "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "STAGES": self.stages
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told besides."""
        return {"num_warps": self.num_warps}


class _Step(NamedTuple):
    """Elements of a step that a thread has (of 2 bytes; of wider ones half), its columns at most, warps, stages, and
    steps of a tile at most."""

    elements: int
    columns: int
    num_warps: int
    stages: int
    steps: int


# The best, or within 3 % of it, at 65536 rows of 512 and 1024 and 8192 of 2048 on an H200, of up to 16 each.
_SHAPES = {
    "norm_activation": _Step(16, 512, 4, 1, 1),
    "norm_activation_backward": _Step(8, 512, 4, 4, 64),
    "norm_backward": _Step(16, 512, 4, 3, 8),
    "column_moments": _Step(16, 512, 4, 3, 32),
    "moments + residual": _Step(16, 512, 4, 3, 32),
}
PASSES = tuple(_SHAPES)
#: Passes whose programs gain by several steps only where a step is whole rows of so many columns: they sum nothing up.
_WITHOUT_SUMS, _LONG_ROWS = ("norm_activation", "norm_backward"), 512


def widest(*tensors: Tensor | None) -> int:
    """Bytes of an element of the widest of these."""
    return max(t.element_size() for t in tensors if t is not None)


@functools.lru_cache(maxsize=4096)
def walk(name: str, rows: int, features: int, element_size: int = 2) -> Walk:
    """How the pass ``name`` goes over ``[rows, features]``."""
    step = _SHAPES[name]
    elements = step.elements if element_size <= 2 else step.elements // 2
    block_n = min(max(1 << (features - 1).bit_length(), 16), step.columns)
    block_m = max(1, elements * 32 * step.num_warps // block_n)
    strips = -(-features // block_n)
    steps, most = 1, step.steps if name not in _WITHOUT_SUMS or block_n >= _LONG_ROWS else 1
    while 2 * steps <= most and -(-rows // (2 * steps * block_m)) * strips >= PROGRAMS:
        steps *= 2
    return Walk(steps * block_m, block_m, block_n, step.num_warps, step.stages if steps > 1 else 1)
