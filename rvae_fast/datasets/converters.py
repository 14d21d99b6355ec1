"""From the members of a package, as bytes, to arrays: one function a data set."""

from __future__ import annotations

import numpy as np

from .formats import decode_arff, decode_idx, decode_rda
from .sources import Arrays

IDX_FILES = tuple(f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1"))
EMNIST_FILES = tuple(f"emnist-byclass-test-{kind}-ubyte" for kind in ("images-idx3", "labels-idx1"))
EMNIST_ALL_FILES = tuple(name.replace("-test-", "-train-") for name in EMNIST_FILES) + EMNIST_FILES


def _images(files: dict[str, bytes], names: tuple[str, ...], transpose: bool = False) -> Arrays:
    """Stack pairs of idx files (images, labels), train part first."""
    images = [decode_idx(files[name], name) for name in names[0::2]]
    labels = [decode_idx(files[name], name) for name in names[1::2]]
    for name, array in zip(names[0::2], images, strict=True):
        if array.ndim != 3:
            raise ValueError(f"{name}: expected images [n, height, width], got shape {array.shape}")
    stacked = np.concatenate(images)
    if transpose:  # EMNIST's idx files hold every image transposed
        stacked = stacked.transpose(0, 2, 1)
    return {"X": np.ascontiguousarray(stacked.reshape(len(stacked), -1)), "y": np.concatenate(labels).astype(np.uint8)}


def mnist_like(files: dict[str, bytes]) -> Arrays:
    """The four idx files of MNIST or Fashion-MNIST, in any folder and gzipped or not."""
    return _images({name.rsplit("/", 1)[-1].removesuffix(".gz"): data for name, data in files.items()}, IDX_FILES)


def emnist_test(files: dict[str, bytes]) -> Arrays:
    """The idx files of EMNIST byclass, test part only."""
    return _images(files, EMNIST_FILES, transpose=True)


def emnist_all(files: dict[str, bytes]) -> Arrays:
    """The idx files of EMNIST byclass, both parts."""
    return _images(files, EMNIST_ALL_FILES, transpose=True)


def shuttle(files: dict[str, bytes]) -> Arrays:
    """mlbench's Shuttle: every class but `Rad.Flow` is an anomaly."""
    frame = decode_rda(files["Shuttle.rda"], "Shuttle", "Shuttle.rda")
    classes = frame.iloc[:, -1].astype(str).to_numpy()
    kept = classes != "High"  # the usual anomaly version of Shuttle leaves this large class out
    X = frame.iloc[:, :-1].to_numpy(dtype=np.float64)[kept]
    return {"X": X, "y": (classes[kept] != "Rad.Flow").astype(np.uint8)}


def satellite(files: dict[str, bytes]) -> Arrays:
    """mlbench's Satellite: cotton crop, damp grey soil and vegetation stubble are the anomalies."""
    frame = decode_rda(files["Satellite.rda"], "Satellite", "Satellite.rda")
    classes = frame.iloc[:, -1].astype(str).to_numpy()
    anomalous = np.isin(classes, ["cotton crop", "damp grey soil", "vegetation stubble"])
    return {"X": frame.iloc[:, :-1].to_numpy(dtype=np.float64), "y": anomalous.astype(np.uint8)}


def outlier_arff(files: dict[str, bytes]) -> Arrays:
    """Columns id, outlier, features."""
    ((name, content),) = files.items()
    table = decode_arff(content, name)
    if table.shape[1] < 3 or not np.isin(table[:, 1], (0, 1)).all():
        raise ValueError(f"{name}: expected columns id, outlier (0 or 1), features")
    return {"X": np.ascontiguousarray(table[:, 2:]), "y": table[:, 1].astype(np.uint8)}
