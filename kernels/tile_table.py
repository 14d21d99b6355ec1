"""Tables of tile configurations: the one shipped for a chip, and what was measured on this machine.

A table is a JSON file: ``{"format": 1, "chip": ..., "triton": ..., "entries": {key: entry}}``, an entry
``{"choice": ..., "measured": true or false}``.
A key names a kernel, an arithmetic and a bucket of shapes (:func:`key`); a choice is a tile configuration or, for the
key of a layer, a strategy. What was measured here goes before what was measured for the shipped table, and both go
before the heuristic of ``configurations.py``; entries that nobody has measured are the heuristic's own, written down.
In mode ``"deterministic"``, and under ``torch.use_deterministic_algorithms``, the heuristic decides alone, so that
tiles, and with them the order of every sum, depend on the shape and the chip.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

FORMAT = 1
MODES = ("table", "tune", "deterministic")
MODE_VARIABLE = "RVAE_FAST_TILES"
FOLDER_VARIABLE = "RVAE_FAST_TUNING"
#: The shipped tables, by what the chip's name contains: the two have the same multiprocessors.
_SHIPPED = {"H100": "tiles_hopper.json", "H200": "tiles_hopper.json"}

Choice = list[int] | str


class Chip(NamedTuple):
    """What configurations depend on: name, compute capability (90 is sm_90), shared memory a block, multiprocessors."""

    name: str
    capability: int
    shared_memory: int
    multiprocessors: int


@functools.lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip of a CUDA device."""
    facts = torch.cuda.get_device_properties(device)
    shared = getattr(facts, "shared_memory_per_block_optin", 99 * 1024)
    return Chip(facts.name, facts.major * 10 + facts.minor, shared, facts.multi_processor_count)


# --- modes ---

_mode: str | None = None
_generation = 0


def mode() -> str:
    """The mode in force: ``"table"`` (look up, never measure), ``"tune"`` (measure what no table has measured) or
    ``"deterministic"``."""
    if torch.are_deterministic_algorithms_enabled():
        return "deterministic"
    chosen = _mode or os.environ.get(MODE_VARIABLE) or "table"
    if chosen not in MODES:
        raise ValueError(f"{MODE_VARIABLE} must be one of {', '.join(MODES)}; got {chosen!r}")
    return chosen


@contextlib.contextmanager
def tiles(mode: str) -> Iterator[None]:
    """Choose tiles by a mode inside the block, for the whole process."""
    global _mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}; got {mode!r}")
    outer, _mode = _mode, mode
    try:
        yield
    finally:
        _mode = outer


def state() -> tuple[str, int]:
    """What answers depend on: the mode, and how often the tables were read anew.

    Nothing can be measured while a CUDA graph is captured: what is asked there is answered as in mode "table", and
    asked again after it.
    """
    now = mode()
    if now == "tune" and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        now = "table"
    return now, _generation


# --- keys ---


def bucket(size: int) -> int:
    """The power of two that a size is looked up as: the next one up, at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def key(kernel: str, arithmetic: str, *sizes: int) -> str:
    """A table's key: kernel (or ``"layer"``), arithmetic and the bucket of each size."""
    return " ".join([kernel, arithmetic, *(str(bucket(size)) for size in sizes)])


# --- tables ---


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The entries of a table; ValueError if it is not one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entries = table["entries"]
        sound = table["format"] == FORMAT and all(
            isinstance(e["choice"], str) or all(type(v) is int for v in e["choice"]) for e in entries.values()
        )
    except (UnicodeDecodeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: damaged ({type(error).__name__}: {error})") from error
    if not sound:
        raise ValueError(f"{path}: not a table of format {FORMAT}")
    return entries


def write(path: Path, chip: str, triton: str, entries: dict[str, dict[str, Any]]) -> None:
    """Write a table whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"format": FORMAT, "chip": chip, "triton": triton, "entries": dict(sorted(entries.items()))}
    lines = json.dumps(table, indent=1).replace("\n    ", " ")
    lines = re.sub(r"\[\s+([^\]]*?)\s+\]", lambda m: "[" + " ".join(m[1].split()) + "]", lines)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(lines + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def folder() -> Path | None:
    """Where measurements are kept: RVAE_FAST_TUNING, else ``rvae-fast/tuning`` in the user's cache folder, if any."""
    if chosen := os.environ.get(FOLDER_VARIABLE):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("LOCALAPPDATA") if os.name == "nt" else None)
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rvae-fast" / "tuning"
    except RuntimeError:  # a user without a home, as in some containers
        return None


def _triton_version() -> str:
    import triton

    return triton.__version__


def measured_path(chip: Chip) -> Path | None:
    """The file of measurements, one a chip and release of Triton; None where there is no folder for it."""
    kept = folder()
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{chip.name} sm{chip.capability} triton {_triton_version()}").strip("-")
    return None if kept is None else kept / f"{name.lower()}.json"


@functools.lru_cache(maxsize=16)
def _measured(path: Path | None) -> dict[str, dict[str, Any]]:
    if path is None:
        return {}
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        warnings.warn(f"rvae_fast ignores its measured tiles: {error}", RuntimeWarning, stacklevel=2)
        return {}


@functools.lru_cache(maxsize=16)
def _shipped(name: str) -> dict[str, dict[str, Any]]:
    return next((read(Path(__file__).parent / file) for part, file in _SHIPPED.items() if part in name), {})


def lookup(chip: Chip, wanted: str) -> Choice | None:
    """The measured choice that a table has for a key on a chip, or None."""
    for entries in (_measured(measured_path(chip)), _shipped(chip.name)):
        entry = entries.get(wanted)
        if entry is not None and entry.get("measured") is True:
            return entry["choice"]
    return None


def remember(chip: Chip, found: dict[str, Choice]) -> None:
    """Add measured choices to the file of this machine, together with what other processes have written meanwhile.

    A folder that cannot be written to costs a warning: the choices then hold for this process.
    """
    from filelock import FileLock

    path = measured_path(chip)
    new = {name: {"choice": choice, "measured": True} for name, choice in found.items()}
    try:
        if path is None:
            raise FileNotFoundError(f"there is no home folder; {FOLDER_VARIABLE} may name another one")
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(str(path.with_suffix(".lock"))):
            _measured.cache_clear()
            entries = {**_measured(path), **new}
            write(path, chip.name, _triton_version(), entries)
        _measured.cache_clear()
    except OSError as error:
        warnings.warn(f"rvae_fast cannot keep its measured tiles: {error}", RuntimeWarning, stacklevel=2)
        _measured(path).update(new)


def forget() -> None:
    """Read the tables again at the next question."""
    global _generation
    _generation += 1
    _measured.cache_clear()
    _shipped.cache_clear()
