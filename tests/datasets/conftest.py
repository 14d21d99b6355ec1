"""Small data sets, package archives and fake package clients, all made here: no test of this folder needs a network."""

from __future__ import annotations

import gzip
import io
import os
import stat
import tarfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from rvae_fast.datasets import loading
from rvae_fast.datasets.catalogue import Entry
from rvae_fast.datasets.contents import Expected
from rvae_fast.datasets.converters import IDX_FILES, mnist_like
from rvae_fast.datasets.formats import encode_idx
from rvae_fast.datasets.sources import Files, Package


def pack_tar(members: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """Return a tar archive."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def pack_zip(members: dict[str, bytes]) -> bytes:
    """Return a zip archive, as a wheel is."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, content in members.items():
            bundle.writestr(name, content)
    return buffer.getvalue()


def pack_deb(members: dict[str, bytes], compression: str = "xz") -> bytes:
    """Return a Debian package: an `ar` archive of debian-binary, control.tar and data.tar."""
    control = pack_tar({"./control": b"Package: toy\nVersion: 1\nArchitecture: all\nMaintainer: x\nDescription: x\n"})
    data = pack_tar({f"./{name}": content for name, content in members.items()}, f"w:{compression}")
    out = b"!<arch>\n"
    for name, content in (
        ("debian-binary", b"2.0\n"),
        ("control.tar.gz", control),
        (f"data.tar.{compression}", data),
    ):
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}".encode() + b"`\n"
        out += content + b"\n" * (len(content) % 2)
    return out


@dataclass
class Toy:
    """A data set in the shape of MNIST, 12 + 5 images of 4 x 3 pixels."""

    images: np.ndarray
    labels: np.ndarray
    entry: Entry
    members: dict[str, bytes] = field(default_factory=dict)

    @property
    def X(self) -> np.ndarray:
        """The rows that `load` must return."""
        return self.images.reshape(len(self.images), -1)

    def archive(self) -> bytes:
        """The npm tarball."""
        return pack_tar({f"package/data/{name}": content for name, content in self.members.items()})


def expected(X: np.ndarray, y: np.ndarray) -> Expected:
    """What `contents` must find in these arrays."""
    sums = X.sum(axis=0, dtype=np.float64)
    counts = tuple(np.bincount(y).tolist())
    return Expected(X.shape, counts, float(sums.sum()), float((sums * np.arange(X.shape[1])).sum()))


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A data set "toy" that the catalogue knows, carried by the npm package toy-data."""
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (17, 4, 3), dtype=np.uint8)
    labels = np.concatenate([np.arange(12) % 3, np.arange(5) % 3]).astype(np.uint8)
    X = images.reshape(17, -1)
    entry = Entry(
        name="toy",
        description="images for tests",
        licence="none",
        alternatives=((expected(X[:12], labels[:12]), expected(X[12:], labels[12:])),),
        sources=(
            Package(
                "npm",
                "toy-data",
                "1.0.0",
                "toy-data-*.tgz",
                tuple(f"data/{name}" for name in IDX_FILES),
                mnist_like,
            ),
            Files(("toy", "Toy/raw"), IDX_FILES, mnist_like),
        ),
        class_names=("a", "b", "c"),
        image_shape=(4, 3),
        value_range=(0.0, 255.0),
    )
    arrays = (images[:12], labels[:12], images[12:], labels[12:])
    members = {name: encode_idx(array) for name, array in zip(IDX_FILES, arrays, strict=True)}
    monkeypatch.setitem(loading.CATALOGUE, "toy", entry)
    return Toy(images, labels, entry, members)


class FakeClients:
    """Executables on an otherwise empty PATH that stand for npm, apt-get and dpkg-deb."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log = folder / "calls.log"
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}/bin{os.pathsep}/usr/bin")
        self._hide(monkeypatch)

    def _hide(self, monkeypatch: pytest.MonkeyPatch) -> None:
        # The real clients may be in /usr/bin: let `which` find only what a test has installed.
        from rvae_fast.datasets import archives, clients

        class Shutil:
            @staticmethod
            def which(program: str) -> str | None:
                path = self.folder / program
                return str(path) if path.exists() else None

        monkeypatch.setattr(clients, "shutil", Shutil)
        monkeypatch.setattr(archives, "shutil", Shutil)

    def install(self, program: str, body: str) -> Path:
        """Add a shell script that first notes its call."""
        path = self.folder / program
        path.write_text(f'#!/bin/sh\necho "{program} $*" >> "{self.log}"\n{body}\n')
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def serve(self, program: str, file_name: str, content: bytes) -> Path:
        """Add a client that leaves one file in the current folder, whatever it is asked for."""
        payload = self.folder / f"payload-{program}"
        payload.write_bytes(content)
        return self.install(program, f'cp "{payload}" "./{file_name}"')

    @property
    def calls(self) -> list[str]:
        """The calls so far."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeClients:
    """No package client is installed but those that the test adds."""
    if os.name == "nt":
        pytest.skip("the fake clients are shell scripts")
    return FakeClients(tmp_path / "bin", monkeypatch)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """An empty cache folder that does not exist yet."""
    return tmp_path / "cache"


@pytest.fixture
def packers() -> dict[str, object]:
    """The functions that make archives."""
    return {"tar": pack_tar, "zip": pack_zip, "deb": pack_deb, "gzip": gzip.compress}
