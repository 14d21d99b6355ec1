"""The CUDA C++ layers' place in a stack: what is packed, launched and returned, with PyTorch in the kernels' place."""

from __future__ import annotations

import ctypes
import itertools
import re
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import leaky_relu

from rvae_fast.kernels import configurations, hopper, hopper_layer
from rvae_fast.kernels.hopper import build
from rvae_fast.kernels.residual_stack import StackOptions, choice, hopper_why_not, stack_forward
from rvae_fast.kernels.residual_stack_backward import stack_backward

BF16 = torch.bfloat16
ROWS, WIDTH, DEPTH, SLOPE = 150, 32, 4, 0.1


def activated(x: Tensor, norm: Tensor) -> Tensor:
    return (x.float() - norm[0]) * norm[3] + norm[4]


def tiles(y: Tensor) -> list[Tensor]:
    return list(y.float().split(hopper.BLOCK_M))


def forward(
    activation: str, slope: float, x: Tensor, packed: Tensor, bias: Tensor, norm: Tensor, residual: Tensor | None,
    y: Tensor, tile_mean: Tensor | None, tile_m2: Tensor | None,
) -> None:  # fmt: skip
    assert activation == "leaky_relu"
    h = leaky_relu(activated(x, norm), slope).to(BF16)
    product = h.float() @ packed.float().t() + bias.float()
    y.copy_(product if residual is None else product + residual.float())
    if tile_mean is not None and tile_m2 is not None:
        tile_mean.copy_(torch.stack([t.mean(0) for t in tiles(y)]))
        tile_m2.copy_(torch.stack([(t - t.mean(0)).square().sum(0) for t in tiles(y)]))


def pack(weights: Tensor, *, out: Tensor) -> Tensor:
    assert out.shape == (DEPTH, WIDTH * WIDTH)
    return out.copy_(weights.reshape(out.shape))


@pytest.mark.parametrize("batch_stats", [True, False])
def test_a_stack_is_that_of_plain_layers(batch_stats: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "launch_forward", forward)
    monkeypatch.setattr(hopper, "pack_weight", pack)
    monkeypatch.setattr(hopper_layer, "why_not", lambda *_: None)
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    x, grad = draw(ROWS, WIDTH).to(BF16), draw(ROWS, WIDTH).to(BF16)
    state = [[draw(WIDTH, WIDTH) / WIDTH**0.5 for _ in range(DEPTH)]]
    state += [[draw(WIDTH) for _ in range(DEPTH)] for _ in range(4)] + [[draw(WIDTH).square() + 0.5] * DEPTH]
    options = StackOptions(2, "pre", "leaky_relu", SLOPE, batch_stats, BF16)

    def run(strategy: str, dtype: torch.dtype = BF16) -> dict[str, Any]:
        rows, up, wanted = x.to(dtype), grad.to(dtype), options._replace(dtype=dtype)
        y, kept = stack_forward(rows, *state, 1e-5, wanted, strategy=strategy)
        grads = stack_backward(up, rows, state[0], kept, wanted, strategy=strategy)
        return {"y": y, **kept._asdict(), **{f"grad {k}": v for k, v in grads._asdict().items()}}

    ours, plain, exact = run("hopper"), run("plain"), run("plain", torch.float32)
    for name, expected in exact.items():
        # Root mean squares: at LeakyReLU's kink a rounding may change a single gradient tenfold.
        one, other = ((found[name].float() - expected).square().mean().sqrt() for found in (ours, plain))
        assert one <= 2 * other + 1e-3 * expected.square().mean().sqrt(), name


def test_what_is_not_covered_runs_otherwise() -> None:
    x = torch.zeros(300, 128, dtype=BF16)
    options = StackOptions(2, "pre", "relu", 0.0, True, BF16)
    assert hopper_why_not(options, x) == "devices other than Hopper's"
    assert choice(options, x, "hopper")[0] == configurations.default_strategy("half", 300, 128)


def test_the_arguments_are_those_of_the_kernel() -> None:
    text = (build.FOLDER / "layout.cuh").read_text()
    fields = re.findall(r"(\w+)(\*?) (\w+);", text[text.index("struct Arguments {") : text.index("struct Ring")])
    types = {"int": ctypes.c_int, "float": ctypes.c_float}
    expected = [(name, ctypes.c_void_p if pointer else types[kind]) for kind, pointer, name in fields]
    assert len(expected) == 11
    assert hopper._Arguments._fields_ == expected


@pytest.mark.parametrize("kind", ["aligned", "a view that begins anywhere", "bf16"])
def test_a_bias_comes_to_the_kernel_in_fp32_and_aligned(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []
    monkeypatch.setattr(hopper, "_launch", lambda *_, bias, **__: seen.append(bias))
    bias = (
        torch.randn(129)[1:] if kind.startswith("a view") else torch.randn(128, dtype=BF16 if kind == "bf16" else None)
    )
    x, norm = torch.zeros(3, 128, dtype=BF16), torch.ones(5, 128)
    hopper.launch_forward("relu", 0.0, x, torch.zeros(128, 128, dtype=BF16), bias, norm, None, x.clone(), None, None)
    assert seen[0].dtype == torch.float32
    assert seen[0].data_ptr() % 16 == 0
    assert torch.equal(seen[0], bias.float())
    assert (seen[0] is bias) == (kind == "aligned")


@pytest.mark.parametrize("dtype", [torch.float64, BF16])
def test_the_check_whatever_dtype_is_the_default(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def launched(
        *_: Any, x: Tensor, weight: Tensor, norm: Tensor, residual: Tensor, y: Tensor, **moments: Tensor
    ) -> None:
        forward("leaky_relu", 0.01, x, weight, torch.zeros(()), norm, residual, y, **moments)

    def run(activation: str, slope: float, *sizes: Any, bias: Tensor | None, **tensors: Tensor) -> None:
        launched(**tensors)

    monkeypatch.setattr(hopper, "_launch", run)
    monkeypatch.setattr(hopper, "pack_weight", lambda weight: weight)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        assert hopper_layer._largest_error(torch.device("cpu")) < 0.03
    finally:
        torch.set_default_dtype(before)


def test_the_check_whatever_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: torch.device) -> float:
        raise ValueError("no such shape")

    monkeypatch.setattr(hopper_layer, "_largest_error", fail)
    monkeypatch.setattr(torch.random, "fork_rng", lambda _: nullcontext())
    with pytest.warns(RuntimeWarning, match="does without its CUDA C\\+\\+ kernels.*no such shape"):
        assert "no such shape" in str(hopper_layer._self_check(torch.device("cuda", 0)))


@pytest.mark.parametrize(("inner", "width"), [*itertools.product(hopper.WIDTHS, repeat=2)])
def test_what_a_block_has_of_shared_memory_suffices(inner: int, width: int) -> None:
    for split in (1, 2, 4):
        if width // 128 % split == 0:
            assert hopper.shared_bytes(inner, width // split) <= 227 * 1024


def test_the_compiled_kernel_needs_no_folder(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(build, "_nvcc", lambda: "nvcc")
    monkeypatch.setattr(build, "_by_nvcc", lambda nvcc, source, defines: compiled.append(source.name) or b"binary")
    monkeypatch.delenv("RVAE_FAST_HOPPER_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert [build.compiled("pack.cu") for _ in range(2)] == [b"binary"] * 2
    assert compiled == ["pack.cu"]
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert build.compiled("pack.cu") == b"binary"
    monkeypatch.delenv("XDG_CACHE_HOME")

    def nobody(self: Any) -> Any:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(type(tmp_path), "expanduser", nobody)
    assert build.compiled("pack.cu") == b"binary"
    assert len(compiled) == 3


def test_the_check_runs_once_and_not_within_a_capture(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[torch.device] = []
    capturing = [True]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    monkeypatch.setattr(hopper_layer, "_self_check", lambda device: ran.append(device))
    monkeypatch.setattr(hopper_layer, "_checked", {})
    device = torch.device("cuda", 0)

    def reason() -> str | None:
        return hopper_layer.why_not(device, "pre", BF16, BF16, 128, True)

    assert "capture" in str(reason())
    capturing[0] = False
    assert reason() is None
    capturing[0] = True
    assert reason() is None
    assert ran == [device]
