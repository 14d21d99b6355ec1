"""``planes``: rows to their nearest among reference rows, and to the planes through these, in one native pass.

==========  =============================  =====================================================================
tensor      shape                          what it is
==========  =============================  =====================================================================
h           [n, width] fp32                the rows to look at
rows        [m, width] fp32                the reference, about its middle
middle      [width] fp32                   what was taken off them
axes        [D / 32, width, 32] fp32       ``D`` orthonormal directions, 32 side by side; None where ``D`` is the width
                                           and the directions are the columns
panels      [ceil(m / 32), D + 2, 32]      of 32 reference rows side by side: -2 times what they are along the
            fp32                           directions, their squared lengths, -2 times their lengths outside
squared     [n] fp64                       squared distance from the plane
mean        [n] fp64                       mean distance to the nearest ten
nearest     [n, neighbours] int64          the nearest, none of which is the row itself; of a row that is not finite
                                           zeros, and its distances are NaN
own         bool                           whether the rows are made of reference rows: the nearest is then the row
                                           itself, however far
==========  =============================  =====================================================================

The kernel is ``csrc/cpu/planes.cpp``; :class:`rvae_fast._planes.Planes` has the same in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rvae_fast import _backend, _native
from rvae_fast.ops.residual_stack_op import library

library.define(
    "planes(Tensor h, Tensor rows, Tensor middle, Tensor? axes, Tensor panels, int directions, float longest, "
    "int neighbours, float penalty, bool own=False) -> (Tensor squared, Tensor mean, Tensor nearest)"
)

_HAS_KERNEL: bool = _native.is_available() and torch._C._dispatch_has_kernel_for_dispatch_key(
    "rvae_fast::planes", "CPU"
)


@torch.library.register_fake("rvae_fast::planes", lib=library)
def _fake(
    h: Tensor,
    rows: Tensor,
    middle: Tensor,
    axes: Tensor | None,
    panels: Tensor,
    directions: int,
    longest: float,
    neighbours: int,
    penalty: float,
    own: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    n = h.shape[0]
    double = h.new_empty(n, dtype=torch.float64)
    return double, torch.empty_like(double), h.new_empty((n, neighbours), dtype=torch.int64)


def covered() -> bool:
    """Whether there is a kernel, and the backend in force lets it run."""
    return _HAS_KERNEL and _backend.current_backend() in ("auto", "native")


#: Reference rows that stand side by side.
PANEL = 32


class PackedPlanes:
    """Reference rows as the kernel reads them.

    Parameters
    ----------
    rows : Tensor [m, width] fp32
        About their middle.
    squares : Tensor [m] fp32
        Sums of their squares.
    middle : Tensor [width] fp32
    axes : Tensor [width, D] fp32 or None
        Orthonormal directions, the more of the variance in them the better; None for the columns themselves.
    neighbours : int
    penalty : float
    """

    def __init__(
        self, rows: Tensor, squares: Tensor, middle: Tensor, axes: Tensor | None, neighbours: int, penalty: float
    ) -> None:
        self.rows, self.middle, self.neighbours, self.penalty = rows.contiguous(), middle, neighbours, penalty
        along = self.rows if axes is None else self.rows @ axes
        self.directions, self.longest = along.shape[1], float(squares.amax())
        outside = torch.zeros_like(squares)
        if axes is not None:
            # At least what it is, for all that rounding takes: the bounds hold for any greater length.
            rest = squares.double() * (1.0 + 1e-6) - along.double().square().sum(1)
            outside = rest.clamp(min=0.0).sqrt().to(squares.dtype)
        columns = torch.cat([-2.0 * along, squares[:, None], -2.0 * outside[:, None]], 1)
        self.panels = _panels(columns)
        self.axes = None if axes is None else _panels(axes.T)

    def __call__(self, h: Tensor, own: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """``squared``, ``mean`` and ``nearest`` of rows ``[n, width]`` fp32."""
        return torch.ops.rvae_fast.planes(  # type: ignore[no-any-return]
            h.contiguous(), self.rows, self.middle, self.axes, self.panels, self.directions, self.longest,
            self.neighbours, self.penalty, own,
        )  # fmt: skip


def _panels(rows: Tensor) -> Tensor:
    """Rows ``[m, d]`` as ``[ceil(m / 32), d, 32]``; what is beyond the last is zero."""
    short = -len(rows) % PANEL
    whole = torch.nn.functional.pad(rows, (0, 0, 0, short))
    return whole.reshape(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()
