"""The passes over whole tensors with several steps a tile and several tiles, against fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rvae_fast import reference
from rvae_fast.kernels import batch_norm, norm_activation, passes, reconstruction_kld
from rvae_fast.kernels.passes import Walk

# (rows, features): one, a row less than a step, ragged ends of steps, tiles and strips, whole tiles
SHAPES = [(1, 1), (3, 16), (37, 33), (64, 40), (129, 17)]
# one step a tile, several, stages, strips of columns
WALKS = [Walk(4, 4, 64), Walk(32, 4, 64), Walk(16, 2, 16, 4, 3), Walk(64, 1, 32, 4, 4)]


def make(rows: int, features: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(rows * 31 + features)
    t = {name: torch.randn(rows, features, generator=g) for name in ("x", "grad", "skip")}
    t["norm"] = torch.rand(5, features, generator=g) + 0.5
    return t


def close(ours: Tensor, exact: Tensor, bound: float = 2e-6) -> None:
    assert ours.shape == exact.shape
    assert float((ours.double() - exact).abs().max()) <= bound * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
@pytest.mark.parametrize("config", WALKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_activation(shape: tuple[int, int], config: Walk, skip: bool) -> None:
    t = make(*shape)
    wide = {name: v.double() for name, v in t.items()}
    extra = t["skip"] if skip else None
    mean, rstd, _, scale, shift = wide["norm"]
    centred = wide["x"] - mean
    a = centred * scale + shift + (wide["skip"] if skip else 0)
    act: dict[str, Any] = {"activation": "leaky_relu", "negative_slope": 0.2}
    h = norm_activation.norm_activation(t["x"], t["norm"], skip=extra, config=config, **act)
    close(h, torch.where(a > 0, a, 0.2 * a))
    d, sums = norm_activation.norm_activation_backward(t["grad"], t["x"], t["norm"], skip=extra, config=config, **act)
    exact = torch.where(a > 0, wide["grad"], 0.2 * wide["grad"])
    close(d, exact)
    assert sums.shape == (2, -(-shape[0] // config.tile_rows), shape[1])
    close(sums.sum(1), torch.stack([exact.sum(0), (exact * centred * rstd).sum(0)]), 1e-5)
    if not skip:
        again = torch.empty_like(h)
        only_sums = norm_activation.activation_sums(t["grad"], t["x"], t["norm"], h=again, config=config, **act)
        assert torch.equal(only_sums, sums)
        assert torch.equal(again, h)
    grad_x = norm_activation.norm_backward(t["grad"], t["x"], t["norm"][:4], skip_grad=extra, config=config)
    mean, scale, b, c = wide["norm"][:4]
    close(grad_x, scale * wide["grad"] - b - (wide["x"] - mean) * c + (wide["skip"] if skip else 0))


@pytest.mark.parametrize("activation", ["leaky_relu", "gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_norm_backward_works_d_out_again(activation: str, dtype: torch.dtype) -> None:
    t = make(37, 33)
    grad, x, skip, norm = t["grad"].to(dtype), t["x"], t["skip"], t["norm"]
    norm_grad = torch.stack([norm[0], norm[3], norm[1], norm[2]])  # mean and scale are the norm's
    d, _ = norm_activation.norm_activation_backward(grad, x, norm, activation=activation)
    expected = norm_activation.norm_backward(d, x, norm_grad, skip_grad=skip)
    found = norm_activation.norm_backward(grad, x, norm_grad, skip_grad=skip, norm=norm, activation=activation)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("residual", [False, True], ids=["x", "residual"])
@pytest.mark.parametrize("config", WALKS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_moments_far_from_zero(shape: tuple[int, int], config: Walk, residual: bool) -> None:
    t = make(*shape)
    x = t["x"] + 1e4  # a deviation of 1 has about three digits left in each value, and must keep them
    y = torch.empty_like(x) if residual else None
    mean, m2, rows = batch_norm.column_moments(x, t["skip"] if residual else None, y, config=config)
    assert rows == config.tile_rows
    source = x if y is None else y
    if y is not None:
        torch.testing.assert_close(y, x + t["skip"], rtol=0, atol=0)
    for i, tile in enumerate(source.double().split(rows)):
        close(mean[i], tile.mean(0), 1e-6)
        close(m2[i], tile.var(0, correction=0) * len(tile), 1e-5)
    if shape[0] > 1:
        norm = batch_norm.merge_moments(mean, m2, rows, shape[0], None, None, 1e-5)
        close(norm[2], source.double().var(0), 1e-3)  # tiles of one row: means as rounded


def test_a_first_row_that_lies_far_away() -> None:
    """Sums are taken from a group's first row: it may be the only one that is large."""
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(1))
    x[0] += 1000.0
    _, m2, _ = batch_norm.column_moments(x, config=Walk(64, 1, 16))  # one group of 64: six bits may go
    close(m2[0], x.double().var(0, correction=0) * 64, 3e-5)


def test_a_nan_stays_in_its_column() -> None:
    x = torch.randn(40, 5, generator=torch.Generator().manual_seed(2))
    x[17, 2] = float("nan")
    for config in WALKS:
        mean, m2, rows = batch_norm.column_moments(x, config=config)
        norm = batch_norm.merge_moments(mean, m2, rows, 40, None, None, 1e-5)
        assert norm[:3].isnan().all(0).tolist() == [False, False, True, False, False]
        assert not norm[:, [0, 1, 3, 4]].isnan().any()


@pytest.mark.parametrize("tiles", [1, 300, 513, 1100])
def test_merges_of_many_tiles(tiles: int) -> None:
    g = torch.Generator().manual_seed(tiles)
    x = torch.randn(tiles * 2, 3, generator=g) + 50
    norm = batch_norm.merge_moments(*batch_norm.column_moments(x, config=Walk(2, 1, 16)), len(x), None, None, 0.0)
    close(norm[0], x.double().mean(0))
    close(norm[2], x.double().var(0), 1e-5)
    sums = torch.randn(2, tiles, 3, generator=g)
    grad_weight, grad_bias, *_ = batch_norm.merge_gradients(sums, norm, len(x), True)
    close(grad_bias, sums[0].double().sum(0), 1e-5)
    close(grad_weight, sums[1].double().sum(0), 1e-5)


@pytest.mark.parametrize("name", passes.PASSES)
def test_the_chosen_tiles_cover_a_row_and_grow_with_the_rows(name: str) -> None:
    for features in (1, 20, 128, 512, 700, 4096):
        for rows in (1, 1024, 65536, 1_000_000):
            for size in (2, 4):
                config = passes.walk(name, rows, features, size)
                assert config.tile_rows % config.block_m == 0
                tiles, strips = config.grid(rows, features)
                assert tiles * config.tile_rows >= rows
                assert strips * config.block_n >= features
                assert tiles == 1 or config.tile_rows == config.block_m or tiles * strips >= passes.PROGRAMS // 2


@pytest.mark.parametrize("likelihood", reference.LIKELIHOODS)
@pytest.mark.parametrize(
    "config", [Walk(8, 2, 64, 4, 3), Walk(4, 4, 64), Walk(2, 2, 16), Walk(2, 1, 32, 4, 3)], ids=str
)
def test_loss_with_several_steps(config: Walk, likelihood: str) -> None:
    g = torch.Generator().manual_seed(7)
    x, x_hat, weight = torch.rand(37, 40, generator=g), torch.randn(37, 40, generator=g), torch.rand(40, generator=g)
    mu, logvar = torch.randn(2, 37, 5, generator=g)
    inputs = (x, x_hat, mu, logvar, weight)
    grads = torch.randn(2, 37, generator=g)
    wide = tuple(t.double() for t in inputs)
    needs = [True] * 4 + [False]
    backward = reconstruction_kld.backward(*grads, *inputs, likelihood, "mean", needs, config)
    exact = reference.reconstruction_kld_backward(*grads.double(), *wide, likelihood, "mean", needs)
    for ours, expected in zip(backward, exact, strict=True):
        close(ours, expected)
    if config.block_n < 40:  # a row in several steps: as many rows a program as a step has
        config = config._replace(tile_rows=config.block_m)
    found = reconstruction_kld.forward(*inputs, likelihood, "mean", config)
    for ours, expected in zip(found, reference.reconstruction_kld(*wide, likelihood, "mean"), strict=True):
        close(ours, expected)


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("features", [20, 784, 785, 3000])
def test_a_rows_error_does_not_depend_on_how_many_come_with_it(features: int, direction: str) -> None:
    few, many = (reconstruction_kld.loss_walk(rows, features, direction) for rows in (1, 1_000_000))
    assert few[1:4] == many[1:4]
    assert many.tile_rows == many.block_m or features <= many.block_n
