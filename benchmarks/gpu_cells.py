"""The cells of the GPU benchmark: what is measured, by which variants, in which order, and the work each cannot avoid.

A *cell* is a workload at a size; a *variant* is an implementation of it; a *job* is one of each. Jobs are ordered so
that whenever the time runs out, what was measured is what mattered most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import gpu_floor
import torch
from gpu_floor import Work

from rvae_fast import RVAE

LATENT = 20
#: A stage as two CUDA graphs behind autograd (``torch.cuda.make_graphed_callables``), for the host's share alone.
CALLABLE = "rvae_fast callable"
OURS = ("rvae_fast", "rvae_fast graph", CALLABLE)
EAGER = ("eager", "eager graph")
COMPILED = ("compile", "compile reduce-overhead", "compile max-autotune")
VARIANTS = (*OURS[:2], *EAGER, *COMPILED)
#: Seconds that a job of a variant may take, most of it compiling: what has been compiled ahead takes far less.
LIMITS = {"compile": 110.0, "compile reduce-overhead": 110.0, "compile max-autotune": 180.0}
DEFAULT_LIMIT = 60.0


@dataclass(frozen=True)
class Cell:
    """A workload at a size.

    ``blocks`` are residual blocks of two layers; of a network half of them are in the encoder, half in the decoder.
    """

    workload: str
    width: int
    batch: int
    blocks: int = 0
    dtype: str = "bf16"

    @property
    def name(self) -> str:
        depth = f", {self.blocks} blocks" if self.blocks else ""
        return f"{self.workload}, W = {self.width}, B = {self.batch}{depth}, {self.dtype}"

    @property
    def features(self) -> int:
        """Columns of the table: few for a narrow network, an image's for a wide one."""
        return 40 if self.width <= 128 else 784


@dataclass(frozen=True)
class Job:
    """A variant of a cell to be timed or, in processes of their own that time nothing, its kernels to be counted."""

    cell: Cell
    variant: str
    counts: bool = False

    @property
    def limit(self) -> float:
        return LIMITS.get(self.variant, DEFAULT_LIMIT)


ROOFS = Cell("roofs", 8192, 1 << 29)
KEY = (
    Cell("train", 512, 65536, 50),
    Cell("train", 128, 1024, 50),
    Cell("stage forward", 512, 65536, 50),
    Cell("loss forward", 784, 65536),
    Cell("loss forward+backward", 784, 65536),
    Cell("train", 2048, 8192, 10),
    Cell("score", 512, 65536, 50),
    Cell("last layer with error", 2048, 65536),
    Cell("host overhead", 128, 32, 50),
)
GRID = tuple(
    Cell("train", width, batch, blocks)
    for blocks in (50, 10, 100)
    for width in (512, 128, 1024, 2048)
    for batch in (8192, 1024, 65536)
)


def jobs() -> list[Job]:
    """Every job, in order: the roofs; the key cells by us and eagerly, the host's share first, of the deep ones with
    the rivals that they are held against; the other key cells' rivals; the grid; then the counts."""
    ours = ("rvae_fast", "eager", "rvae_fast graph")
    order = [Job(ROOFS, "rvae_fast")]
    order += [Job(cell, variant) for cell in (KEY[8], *KEY[:3], KEY[5]) for variant in ours]
    order += [Job(KEY[1], "eager graph"), Job(KEY[1], "compile reduce-overhead")]
    order += [Job(KEY[i], "compile") for i in (0, 5, 2)]
    order += [Job(KEY[i], variant) for i in (3, 4, 6, 7) for variant in ours]
    order += [Job(KEY[8], CALLABLE)]
    order += [Job(KEY[i], "compile") for i in (3, 4, 7)]
    order += [Job(KEY[i], "compile reduce-overhead") for i in (5, 0, 2)]
    order += [Job(KEY[i], "compile max-autotune") for i in (5, 1, 0)]
    order += [Job(cell, "compile") for cell in KEY]
    order += [Job(cell, variant) for cell in KEY for variant in ("compile reduce-overhead", "eager graph")]
    order += [Job(cell, "compile max-autotune") for cell in KEY]
    order += [Job(replace(cell, dtype="fp32"), v) for cell in KEY[3:5] for v in ("rvae_fast", "eager", "compile")]
    grid = [cell for cell in GRID if cell not in KEY]
    order += [Job(cell, variant) for cell in grid for variant in ("rvae_fast", "rvae_fast graph", "eager")]
    order += [Job(cell, v) for cell in grid for v in COMPILED]
    order += [Job(cell, v, counts=True) for cell in KEY for v in ("rvae_fast", "eager", "compile")]
    return [job for job in dict.fromkeys(order) if job.cell.workload != "host overhead" or "graph" not in job.variant]


def compilations() -> list[int]:
    """Numbers of the jobs that are worth compiling ahead, longest wait first: deep networks' rivals.

    Not max-autotune, which chooses by timing: beside other work it would choose badly.
    """
    among = ("compile", "compile reduce-overhead")
    found = (n for n, j in enumerate(jobs()) if j.variant in among and j.cell in KEY and j.cell.blocks and not j.counts)
    return list(found)[:10]


def shrink(cell: Cell) -> Cell:
    """The same cell for a dry run."""
    size = 64 if cell.workload == "roofs" else 12
    return replace(cell, width=size if cell.width > 128 else 8, batch=min(cell.batch, 24), blocks=min(cell.blocks, 2))


# --- a cell's work ---


def model(cell: Cell, device: torch.device) -> RVAE:
    """The network of a cell, its norms and weights as training leaves them."""
    torch.manual_seed(0)
    net = RVAE(cell.features, LATENT, widths=[cell.width], blocks=[cell.blocks // 2], init="default")
    return net.to(device)


def passes(cell: Cell) -> list[Work]:
    """The work of a cell that no implementation avoids."""
    size = 2 if cell.dtype == "bf16" else 4
    width, rows = cell.width, cell.batch
    if cell.workload == "host overhead":
        return []
    if cell.workload.startswith("loss"):
        return gpu_floor.loss(rows, width, LATENT, size, backward="backward" in cell.workload)
    if cell.workload == "last layer with error":
        inner = width // 4
        return [Work(2.0 * rows * inner * width, size * (rows * inner + inner * width) + 4.0 * rows * width)]
    block = [(width, width)] * 2
    if cell.workload == "stage forward":
        work = [w for shape in block * cell.blocks for w in gpu_floor.linear(rows, *shape, size, training=False)]
        return [*work, *(Work(0.0, float(size * rows * width)) for _ in range(cell.blocks))]
    half = block * (cell.blocks // 2)
    shapes = [(cell.features, width), *half, (width, 2 * LATENT), (LATENT, width), *half, (width, cell.features)]
    units = [width] * (cell.blocks // 2 * 2)
    return gpu_floor.network(shapes, units, rows, cell.features, size, training=cell.workload == "train")
