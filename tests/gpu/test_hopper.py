"""The CUDA C++ layer for Hopper by itself, against fp64: odd shapes, every activation, clusters of one and two."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rvae_fast._activations import activate

#: Turns a deadlock into an error.
CHECKED = ("-DHOPPER_CHECK",)
BF16_UNIT, FP32_UNIT = 2.0**-8, 2e-5
#: Rows, features summed over, features of the result, activation: one row, less than a tile, a tile and some, tiles
#: whose columns several blocks share, more tiles than the chip has multiprocessors, every width.
CASES = (
    (128, 128, 128, "identity"), (1, 128, 128, "relu"), (37, 256, 256, "leaky_relu"), (999, 128, 128, "silu"),
    (999, 512, 512, "leaky_relu"), (4096, 256, 256, "silu"), (4096, 512, 512, "relu"), (4096, 384, 384, "gelu"),
    (40001, 512, 512, "elu"), (40000, 128, 128, "tanh"), (40001, 256, 256, "leaky_relu"), (300, 256, 512, "relu"),
    (8100, 512, 512, "leaky_relu"), (9001, 256, 512, "relu"), (300, 128, 384, "relu"), (300, 384, 128, "relu"),
    (300, 384, 512, "relu"),
)  # fmt: skip


@pytest.fixture
def hopper_gpu(cuda: torch.device) -> torch.device:
    if torch.cuda.get_device_capability(cuda)[0] != 9:
        pytest.skip("needs a Hopper GPU")
    return cuda


def position_to_column(position: Tensor) -> Tensor:
    """Column of the result at a position of a packed block, see ``layer.cu``."""
    return (position & ~31) + 8 * ((position >> 1) & 3) + 2 * ((position >> 3) & 3) + (position & 1)


def packed_reference(weight: Tensor) -> Tensor:
    """``pack_weight`` by indexing, for ``weight[columns, sum]``."""
    columns, total = weight.shape
    row, piece = torch.arange(128), torch.arange(8)
    blocks = []
    for panel in range(columns // 128):
        for kc in range(total // 64):
            block = weight[panel * 128 :][position_to_column(row)][:, kc * 64 : kc * 64 + 64].reshape(128, 8, 8)
            swizzled = torch.empty_like(block)
            swizzled[row[:, None], piece[None, :] ^ (row[:, None] & 7)] = block
            blocks.append(swizzled.flatten())
    return torch.cat(blocks)


def within(name: str, got: Tensor, exact: Tensor, size: Tensor | float, unit: float) -> None:
    """No further from ``exact`` than ``unit`` of the value and half of it of the sum's terms."""
    allowed = (exact.abs() + 0.5 * size) * unit + 1e-6
    wrong = ~((got.double() - exact).abs() <= allowed)  # of a NaN, too
    where = wrong.nonzero()[:4].tolist()
    assert not wrong.any(), f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong, first at {where}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_packing(dtype: torch.dtype, hopper_gpu: torch.device) -> None:
    from rvae_fast.kernels import hopper

    weights = torch.randn(2, 256, 128, dtype=dtype, device=hopper_gpu)
    expected = [packed_reference(w.bfloat16().cpu()) for w in weights]
    assert torch.equal(hopper.pack_weight(weights).cpu(), torch.stack(expected))


@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_layer(case: tuple[int, int, int, str], cluster: int, hopper_gpu: torch.device) -> None:
    from rvae_fast.kernels import hopper

    rows, inner, width, activation = case
    g = torch.Generator(hopper_gpu).manual_seed(rows + inner)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=hopper_gpu, generator=g)

    x, weight = draw(rows, inner).bfloat16(), (draw(width, inner) / inner**0.5).bfloat16()
    bias = None if activation == "gelu" else draw(width)
    residual = None if activation == "silu" else draw(rows, width).bfloat16()
    norm = draw(5, inner)
    norm[3] = norm[3] * 0.3 + 1

    def run() -> tuple[Tensor, Tensor, Tensor]:
        y, moments = hopper.hopper_forward(
            x, weight, bias, norm=norm, activation=activation, residual=residual, cluster=cluster, extra=CHECKED
        )
        assert moments is not None
        return y, moments[0], moments[1]

    y, tile_mean, tile_m2 = run()
    normalised = (x.float() - norm[0]) * norm[3] + norm[4]
    h = activate(normalised, activation, 0.01).bfloat16().double()
    exact, size = h @ weight.double().t(), h.abs() @ weight.double().abs().t()
    for added in (bias, residual):
        exact = exact if added is None else exact + added.double()
    within("y", y, exact, size, BF16_UNIT)
    tiles = y.double().split(hopper.BLOCK_M)
    within("mean", tile_mean, torch.stack([t.mean(0) for t in tiles]), 1.0, FP32_UNIT)
    within("m2", tile_m2, torch.stack([(t - t.mean(0)).square().sum(0) for t in tiles]), 1.0, FP32_UNIT)
    for ours, again in zip((y, tile_mean, tile_m2), run(), strict=True):
        assert torch.equal(ours, again)


def test_nvrtc_compiles_it(hopper_gpu: torch.device) -> None:
    """Where there is no nvcc the binary comes from the compiler library that PyTorch brings along."""
    from rvae_fast.kernels import hopper
    from rvae_fast.kernels.hopper import build

    binary = build.compiled("layer.cu", hopper.defines("relu", 256, 256, 2), compiler="nvrtc")
    assert binary[:4] == b"\x7fELF"
