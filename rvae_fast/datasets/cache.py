"""The cache folder: where it is, and how an array gets into it whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from rvae_fast._paths import replaceable

ENVIRONMENT_VARIABLE = "RVAE_FAST_DATA"


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of the cached data sets (it may not exist yet).

    `cache_dir` if given; else the environment variable RVAE_FAST_DATA; else `rvae-fast` in XDG_CACHE_HOME,
    LOCALAPPDATA (Windows) or `~/.cache`.
    """
    if cache_dir is None:
        cache_dir = os.environ.get(ENVIRONMENT_VARIABLE)
    if not cache_dir:
        base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
        cache_dir = (Path(base) if base else Path.home() / ".cache") / "rvae-fast"
    return Path(cache_dir).expanduser().absolute()  # package clients run in another folder


@contextlib.contextmanager
def locked(folder: Path, name: str) -> Iterator[None]:
    """Hold the lock of one data set in the cache, so that two processes do not fetch it at once.

    The lock is the operating system's: a killed process leaves none behind.
    """
    from filelock import FileLock

    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(str(folder / f".{name}.lock")):
        yield


def remove_leftovers(folder: Path, name: str) -> None:
    """Remove what killed downloads of a data set have left in the cache.

    The caller holds its lock, so none is in use.
    """
    for stale in folder.glob(f".fetch-{name}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    for stale in folder.glob(f".{name}.npz.*.part"):
        stale.unlink(missing_ok=True)


@contextlib.contextmanager
def working_folder(folder: Path, name: str) -> Iterator[Path]:
    """Make a temporary folder inside the cache for a download, and remove it afterwards."""
    work = Path(tempfile.mkdtemp(prefix=f".fetch-{name}-", dir=folder))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path beside `path` to write to.

    It takes the place of `path` when the block ends well, and is removed when it does not.
    """
    path = replaceable(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        yield temporary
        with open(temporary, "rb") as written:
            os.fsync(written.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            temporary.unlink()
        raise


def store_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays to an uncompressed .npz, atomically."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Read every array of an .npz, running no code (pickles refused); ValueError if it is damaged."""
    with open(path, "rb") as file:
        is_zip = zipfile.is_zipfile(file)
    if not is_zip:
        raise ValueError(f"{path}: damaged, or not an .npz file")
    try:
        with np.load(path, allow_pickle=False) as bundle:
            return {key: bundle[key] for key in bundle.files}
    except (zipfile.BadZipFile, EOFError, KeyError, OSError, ValueError) as error:
        raise ValueError(f"{path}: damaged file ({type(error).__name__}: {error})") from error
