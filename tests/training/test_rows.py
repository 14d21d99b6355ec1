from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rvae_fast._rows import Rows, batches, groups
from rvae_fast.training import TrainingConfig, train

CPU = torch.device("cpu")


def rows(data: Any, **options: Any) -> Rows:
    return Rows(data, "data", 6, **{"device": CPU, "dtype": torch.float32, "max_rows": 16, **options})


@pytest.mark.parametrize("n", [2, 3, 8, 9, 15, 16, 17, 24, 25])
def test_batches_cover_and_none_has_one_row(n: int) -> None:
    spans = batches(n, 8)
    assert [row for start, stop in spans for row in range(start, stop)] == list(range(n))
    sizes = [stop - start for start, stop in spans]
    assert min(sizes) >= 2
    assert max(sizes) <= 9
    assert all(size == 8 for size in sizes[:-1])


def test_groups() -> None:
    assert groups(65, 8, 3) == [
        [(0, 8), (8, 16), (16, 24)], [(24, 32), (32, 40), (40, 48)], [(48, 56), (56, 65)],
    ]  # fmt: skip


INDEX = torch.tensor([19, 0, 7, 7])


@pytest.mark.parametrize(
    "dtype", ["float16", "float32", "float64", "uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "bool"]
)
@pytest.mark.parametrize("wrap", ["array", "tensor"])
def test_every_dtype(dtype: str, wrap: str) -> None:
    array = np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 100, size=(20, 6)).astype(dtype)
    data = torch.from_numpy(array.copy()) if wrap == "tensor" else array
    if wrap == "tensor" and dtype in ("uint16", "uint32"):
        with pytest.raises(TypeError, match=rf"^data must be .*torch\.{dtype}"):
            rows(data)
        return
    got = rows(data).gather(INDEX)
    assert got.dtype == torch.float32
    np.testing.assert_array_equal(got.numpy(), array[INDEX].astype(np.float32))


def test_bfloat16_and_model_dtype() -> None:
    data = torch.randn(20, 6).bfloat16()
    assert torch.equal(rows(data, dtype=torch.float64).gather(INDEX), data[INDEX].double())


@pytest.mark.parametrize("layout", ["fortran", "reversed", "columns", "big-endian", "read-only", "longdouble"])
def test_every_layout(layout: str) -> None:
    plain = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    array = {
        "fortran": np.asfortranarray(plain),
        "reversed": plain[::-1],
        "columns": np.repeat(plain, 2, axis=1)[:, ::2],
        "big-endian": plain.astype(">f4"),
        "read-only": plain.copy(),
        "longdouble": plain.astype(np.longdouble),
    }[layout]
    array.flags.writeable = layout != "read-only"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = rows(array)
        np.testing.assert_array_equal(got.gather(INDEX).numpy(), np.asarray(array, dtype=np.float32)[INDEX])
    assert len(got.fingerprint()) > 32


def test_fingerprint_tells_data_apart() -> None:
    data = torch.randn(1000, 6)
    other = data.clone()
    other[-1, -1] += 1
    prints = {rows(d).fingerprint() for d in (data, other, data[:999], data.double(), data.bfloat16())}
    assert len(prints) == 5
    assert rows(data.clone()).fingerprint() == rows(data.numpy()).fingerprint()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_memory_map_is_not_loaded(tmp_path: Path) -> None:
    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) * 1024

    # 3 GiB, a hole in the file: as good as one that does not fit, and no disk is used.
    data = np.memmap(tmp_path / "table", dtype=np.float64, mode="w+", shape=(2**26, 6))
    data[2**26 - 1] = 5.0
    before = anonymous()
    source = rows(data)
    for seed in range(50):
        source.gather(torch.randint(0, 2**26, (16,), generator=torch.Generator().manual_seed(seed)))
    assert source.gather(torch.tensor([2**26 - 1])).sum() == 30.0
    assert len(source.fingerprint()) > 32
    assert anonymous() - before < 64 * 2**20


def test_training_from_a_memory_map_is_training_from_memory(model, table, same, tmp_path: Path) -> None:
    data = table(70).numpy()
    data.tofile(tmp_path / "table.f32")
    config = TrainingConfig(epochs=2, batch_size=16, seed=3, precision="fp32", validation_fraction=0.2)
    trained = []
    for source in (
        torch.from_numpy(data),
        np.memmap(tmp_path / "table.f32", dtype=np.float32, mode="r", shape=(70, 6)),
        data.astype(">f4"),
        torch.from_numpy(data).t().contiguous().t(),
    ):
        trained.append(model())
        train(trained[-1], source, config)
    for other in trained[1:]:
        same(trained[0], other)


def test_a_batch_of_more_rows_than_memory_holds_is_all_rows(model, table, same) -> None:
    trained = [model(), model()]
    for one, size in zip(trained, (70, 2**50), strict=True):
        train(one, table(70), TrainingConfig(epochs=2, batch_size=size, seed=3, precision="fp32"))
    same(*trained)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        ([[1.0] * 6] * 4, TypeError, r"^data must be a torch.Tensor or numpy.ndarray, got list"),
        (np.zeros((4, 5)), ValueError, r"^data must have shape \[n_rows, 6\], got \[4, 5\]"),
        (torch.zeros(6), ValueError, r"^data must have shape \[n_rows, 6\], got \[6\]"),
        (np.zeros((4, 6), dtype=object), TypeError, r"^data must be a table of real numbers, .*object"),
        (np.zeros((4, 6), dtype=complex), TypeError, r"^data must be a table of real numbers, .*complex"),
        (np.full((4, 6), "x"), TypeError, r"^data must be a table of real numbers"),
        (torch.zeros(4, 6, dtype=torch.complex64), TypeError, r"^data must be a dense table"),
        (torch.zeros(4, 6).to_sparse(), TypeError, r"^data must be a dense table"),
        (np.zeros((0, 6)), ValueError, r"^data must have at least 2 rows to train on .*, got 0"),
        (np.zeros((1, 6)), ValueError, r"^data must have at least 2 rows to train on .*, got 1"),
    ],
)
def test_bad_data(model, data: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        train(model(), data, TrainingConfig(epochs=1))
