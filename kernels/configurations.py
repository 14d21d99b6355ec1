"""Which tiles a layer kernel runs with, and whether a layer runs fused or by the library's product.

The candidates are a short list for each kernel, arithmetic and family of chips, largest tile first; every one of them
compiles without spilled registers and within its chip's shared memory (``tests/kernels/test_resources.py`` holds it to
that). Among them a table decides where it has the shape (``tile_table.py``), else :func:`heuristic`, which takes the
first that fills the machine: tiles, and with them the order of every sum, then depend on the shape and the chip alone.

What the choices rest on, measured on an H200 (``docs/notes/performance.md`` has the figures):

* A prologue between load and product keeps Triton's products from the tensor cores' rate: at 65536 rows of 512 a fused
  forward takes 201 us with the best of 78 tiles, cuBLAS's product with the passes beside it 122 or, with a residual,
  152; a fused input gradient 374 against 181. So where rows and columns fill the chip, layers run by cuBLAS ("plain").
* A small layer's time is that of its launches: fused, it has one each way, and cuBLAS needs two to four. ``FUSED_ROWS``
  and ``FUSED_WIDTH`` bound where.
* Among the fused kernels' tiles 4 warps beat 8, and steps of 32 those of 64, wherever registers are short.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import tile_table
from .launch import place
from .tile_table import Chip, Choice

#: Rows and width, at most, of a layer that runs fused on tensor cores; others run by the library's product. See above.
FUSED_ROWS, FUSED_WIDTH = 8192, 128
#: Widest layer that runs fused without tensor cores, where the product takes most of the time much earlier.
FUSED_WIDTH_IEEE = 128
#: Multiprocessors assumed where there is no device to ask (the interpreter).
DEFAULT_MULTIPROCESSORS = 132


#: Row tiles, and columns, at most, of statistics that their consumer merges; by arithmetic: every program then reads up
#: to 32 x 128 x 8 bytes more a step, of which 64 programs make 2 MB from the second-level cache, well below a
#: microsecond.
DEFERRED_TILES, DEFERRED_WIDTH = 32, 256
#: The same for fp32 products, whose operands leave fewer registers.
DEFERRED_TILES_FP32 = 16
#: Bytes of gradients kept at most for the gradients of several layers' weights in one launch (two such groups are alive
#: while one follows the other), and rows at most.
GROUPED_BYTES, GROUPED_ROWS = 64 << 20, 8192


class TileConfig(NamedTuple):
    """Tile of the product: ``block_m`` x ``block_n`` results in steps of ``block_k`` along the sum."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    splits: int = 1
    group_m: int = 8

    @property
    def options(self) -> dict[str, int]:
        """What a launch is told besides the tile."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


def _tiles(*configs: tuple[int, int, int, int, int]) -> tuple[TileConfig, ...]:
    return tuple(TileConfig(*config) for config in configs)


# By kernel, arithmetic ("half" is bf16 and fp16) and family of chips; None: every family without its own list.
_CANDIDATES: dict[tuple[str, str, int | None], tuple[TileConfig, ...]] = {
    ("forward", "half", None): _tiles((64, 128, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 64, 4, 4)),
    ("forward", "half", 100): _tiles((64, 128, 32, 4, 4), (64, 64, 32, 4, 4), (64, 32, 64, 8, 4)),
    ("forward", "half", 80): _tiles((64, 128, 32, 8, 3), (64, 64, 32, 8, 3)),
    ("forward", "tf32", None): _tiles((64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
    ("forward", "ieee", None): _tiles((64, 64, 16, 8, 2), (64, 32, 16, 8, 3)),
    ("backward", "half", None): _tiles((64, 64, 32, 4, 4), (64, 32, 32, 4, 4)),
    ("backward", "half", 80): _tiles((64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
    ("backward", "tf32", None): _tiles((64, 128, 32, 8, 3), (64, 64, 32, 4, 3), (64, 32, 32, 4, 3)),
    ("backward", "ieee", None): _tiles((64, 64, 16, 8, 2), (64, 32, 16, 4, 2)),
    ("weight", "half", None): _tiles((128, 64, 64, 4, 3), (64, 64, 64, 4, 4)),
    ("weight", "half", 80): _tiles((64, 128, 64, 8, 3), (64, 64, 64, 4, 3)),
    ("weight", "tf32", None): _tiles((64, 128, 32, 8, 3), (64, 64, 32, 4, 3)),
    ("weight", "ieee", None): _tiles((64, 64, 16, 4, 2)),
}
#: Tile of a layer that merges the statistics it needs and whose sum has one step, in which all of its loads are under
#: way together; by family of chips, for half precision.
MERGING = dict.fromkeys((90, 100), TileConfig(32, 64, 128, 4, 2))
KERNELS = ("forward", "backward", "weight")
ARITHMETICS = ("half", "tf32", "ieee")

# Operand tiles of the prologue at most: x and skip; g, y and the skip's gradient; grad_y.
_PROLOGUE_TILES = {"forward": 2, "backward": 3, "weight": 1}


def family(capability: int) -> int:
    """The family of compute capability ``capability`` (90 is sm_90) whose lists a chip takes: 80, 90 or 100.

    Consumer chips (sm_86, sm_89, sm_120) have sm_80's instructions, and its lists as far as their shared memory goes.
    """
    return {9: 90, 10: 100}.get(capability // 10, 80)


def shared_memory_bound(kernel: str, arithmetic: str, config: TileConfig) -> int:
    """Bytes of shared memory that ``config`` takes at most: the tiles of every stage, and some for reductions.

    Rows may be fp32 whatever the product is in; a weight has the product's dtype.
    """
    other = 2 if arithmetic == "half" and kernel != "weight" else 4
    bytes_a_step = _PROLOGUE_TILES[kernel] * config.block_m * 4 + config.block_n * other
    # Statistics that a layer merges itself; what the other kernels' operands leave is enough for them.
    merge = DEFERRED_TILES * config.block_k * 4 if kernel == "forward" and arithmetic == "half" else 0
    return config.num_stages * config.block_k * bytes_a_step + merge + 2048


def candidates(
    kernel: str, arithmetic: str, capability: int, shared_memory: int | None = None
) -> tuple[TileConfig, ...]:
    """The configurations that can be chosen for a kernel on a chip with ``shared_memory`` bytes a block."""
    configs = _CANDIDATES.get((kernel, arithmetic, family(capability))) or _CANDIDATES[kernel, arithmetic, None]
    if shared_memory is None:
        return configs
    fitting = tuple(c for c in configs if shared_memory_bound(kernel, arithmetic, c) <= shared_memory)
    return fitting or configs[-1:]


def heuristic(kernel: str, configs: tuple[TileConfig, ...], multiprocessors: int, m: int, n: int, k: int) -> TileConfig:
    """The largest tile that is no wider than the result and gives every multiprocessor one, else the smallest.

    The weight gradient, whose result is small, splits the sum until the machine is full, down to two steps a split.
    """
    chosen = configs[-1]
    for config in configs:
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        fits = config.block_n <= max(n, configs[-1].block_n) and (kernel != "weight" or config.block_m <= m)
        if kernel == "weight":
            tiles *= k // (4 * config.block_k)  # splits of four steps and more
        if fits and tiles >= multiprocessors:
            chosen = config
            break
    if kernel == "weight":
        tiles = -(-m // chosen.block_m) * -(-n // chosen.block_n)
        steps = -(-k // chosen.block_k)
        chosen = chosen._replace(splits=max(1, min(multiprocessors // tiles, steps // 2)))
    return chosen


def device_facts(device: torch.device) -> tuple[int, int, int]:
    """Compute capability (90 for sm_90), shared memory a block in bytes and multiprocessors of a CUDA device."""
    return tile_table.chip_of(device)[1:]


def arithmetic_of(dtype: torch.dtype) -> str:
    """``"half"`` for bf16 and fp16, else what torch allows fp32 products on GPUs: ``"tf32"`` or ``"ieee"``."""
    if dtype != torch.float32:
        return "half"
    matmul = torch.backends.cuda.matmul
    precision = getattr(matmul, "fp32_precision", None)
    if precision is None:  # before PyTorch 2.9
        return "tf32" if matmul.allow_tf32 else "ieee"
    if precision == "none":
        precision = getattr(torch.backends, "fp32_precision", "ieee")
    return "tf32" if precision == "tf32" else "ieee"


def input_precision(dtype: torch.dtype) -> str:
    """``tl.dot``'s ``input_precision`` for operands of ``dtype``."""
    return "tf32" if arithmetic_of(dtype) == "tf32" else "ieee"


#: Stands for the chip where kernels are interpreted.
NO_CHIP = Chip("interpreter", 90, 227 * 1024, DEFAULT_MULTIPROCESSORS)


def as_config(choice: Choice | None, among: tuple[TileConfig, ...]) -> TileConfig | None:
    """A table's choice as a configuration, if it is one of these but for its splits; else None."""
    if not isinstance(choice, list) or len(choice) != len(TileConfig._fields) or choice[5] < 1:
        return None
    config = TileConfig(*choice)
    return config if config._replace(splits=1) in among else None


def choose(kernel: str, arithmetic: str, device: torch.device, m: int, n: int, k: int) -> TileConfig:
    """Tiles for a product of ``[m, k]`` and ``[k, n]``, by what the mode in force asks (see ``tile_table.py``)."""
    return _choose(kernel, arithmetic, device, m, n, k, tile_table.state())


@functools.lru_cache(maxsize=4096)
def _choose(
    kernel: str, arithmetic: str, device: torch.device, m: int, n: int, k: int, state: tuple[str, int]
) -> TileConfig:
    chip = tile_table.chip_of(device) if device.type == "cuda" else NO_CHIP
    among = candidates(kernel, arithmetic, chip.capability, chip.shared_memory)
    mode = state[0]
    if device.type == "cuda" and mode != "deterministic":
        wanted = tile_table.key(kernel, arithmetic, m, n, k)
        found = as_config(tile_table.lookup(chip, wanted), among)
        if found is None and mode == "tune":
            from . import tuning

            found = _attempted(tuning.tune, kernel, arithmetic, device, m, n, k)
        if found is not None:
            return found
    return heuristic(kernel, among, chip.multiprocessors, m, n, k)


def _attempted(measure: Callable[..., Any], *what: Any) -> Any:
    """What is measured; None, with a warning, where that fails (it takes memory): who asked goes on without."""
    try:
        return measure(*what)
    except Exception as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        shape = " ".join(map(str, what))
        warnings.warn(f"rvae_fast could not measure tiles ({shape}): {reason}", RuntimeWarning, stacklevel=2)
        return None


def _merging(arithmetic: str, device: torch.device, rows: int, k: int) -> TileConfig | None:
    """:data:`MERGING`'s tile, where the sum is that short and the next layer can merge as well."""
    chip = tile_table.chip_of(device) if device.type == "cuda" else NO_CHIP
    tile = MERGING.get(family(chip.capability)) if arithmetic == "half" else None
    fits = tile is not None and k <= tile.block_k and rows <= tile.block_m * DEFERRED_TILES
    return tile if fits else None


def forward_config(x: Tensor, weight: Tensor, rows: int, merges: bool = False) -> TileConfig:
    """Tiles of ``layer_forward`` for ``weight[out, in]``; ``merges``: it merges statistics itself."""
    (out, inner), device, arithmetic = weight.shape, place(x), arithmetic_of(weight.dtype)
    tile = _merging(arithmetic, device, rows, inner) if merges else None
    return tile or choose("forward", arithmetic, device, rows, out, inner)


def backward_config(g: Tensor, weight: Tensor, rows: int, merges: bool = False) -> TileConfig:
    """Tiles of ``layer_backward`` for ``weight[out, in]``."""
    (out, inner), device, arithmetic = weight.shape, place(g), arithmetic_of(weight.dtype)
    tile = _merging(arithmetic, device, rows, out) if merges else None
    return tile or choose("backward", arithmetic, device, rows, inner, out)


def weight_config(grad_y: Tensor, x: Tensor, dtype: torch.dtype, layers: int = 1) -> TileConfig:
    """Tiles and splits of ``weight_gradient``, for products in ``dtype``; several layers need fewer splits."""
    device, rows = place(x), x.shape[0]
    config = choose("weight", arithmetic_of(dtype), device, grad_y.shape[1], x.shape[1], rows)
    if layers == 1:
        return config
    chip = tile_table.chip_of(device) if device.type == "cuda" else NO_CHIP
    tiles = -(-grad_y.shape[1] // config.block_m) * -(-x.shape[1] // config.block_n) * layers
    steps = -(-rows // config.block_k)
    return config._replace(splits=max(1, min(2 * chip.multiprocessors // tiles, steps // 2)))


def deferred_tiles(strategy: str, arithmetic: str, width: int) -> int:
    """Of how many row tiles at most a layer merges the statistics of its input, or of its gradient, by itself."""
    if strategy != "fused" or width > DEFERRED_WIDTH:
        return 0
    return DEFERRED_TILES if arithmetic == "half" else min(DEFERRED_TILES, DEFERRED_TILES_FP32)


def grouped_units(strategy: str, rows: int, width: int, unit_bytes: int) -> int:
    """Of how many units the gradients of the weights share launches, when one unit's gradients take ``unit_bytes``."""
    if strategy != "fused" or rows > GROUPED_ROWS or width > DEFERRED_WIDTH:
        return 1
    return max(1, GROUPED_BYTES // unit_bytes)


def policy(dtype: torch.dtype) -> tuple[Any, ...]:
    """What choices depend on besides shape, dtype and device."""
    return (arithmetic_of(dtype), *tile_table.state())


STRATEGIES = ("fused", "two-pass", "plain", "hopper")


def strategy(dtype: torch.dtype, rows: int, width: int, device: torch.device | None = None, kind: str = "layer") -> str:
    """One of :data:`STRATEGIES`, for the layers of a stack of this width with products in ``dtype``.

    ``kind`` is ``"layer"``, with statistics of the batch, or ``"eval"``, with running ones. By a table where one has
    the shape on this device, else by :func:`default_strategy`.
    """
    return _strategy(kind, arithmetic_of(dtype), rows, width, device, tile_table.state())


@functools.lru_cache(maxsize=4096)
def _strategy(
    kind: str, arithmetic: str, rows: int, width: int, device: torch.device | None, state: tuple[str, int]
) -> str:
    mode = state[0]
    if device is not None and device.type == "cuda" and mode != "deterministic":
        found = tile_table.lookup(tile_table.chip_of(device), tile_table.key(kind, arithmetic, rows, width))
        if found is None and mode == "tune":
            from . import tuning

            found = _attempted(tuning.tune_strategy, kind, arithmetic, device, rows, width)
        if found in STRATEGIES:
            return str(found)
    return default_strategy(arithmetic, rows, width)


def default_strategy(arithmetic: str, rows: int, width: int) -> str:
    """The strategy of a shape that no table has."""
    if arithmetic == "ieee":
        return "fused" if width <= FUSED_WIDTH_IEEE else "plain"
    return "fused" if width <= FUSED_WIDTH and rows <= FUSED_ROWS else "plain"
