"""Packages fetched by name through the ordinary clients: npm, apt-get, pip.

No address is named here: each client uses the registry, mirror, proxy and certificates that it is set up with.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

logger = logging.getLogger(__name__)

TIMEOUT_SECONDS = 900.0


class ClientError(RuntimeError):
    """A client is missing, failed, or left no file; the message is what it said."""


def fetch_package(client: str, package: str, version: str | None, folder: Path, pattern: str) -> Path:
    """Download one package archive into `folder`, without installing it or running its scripts.

    Parameters
    ----------
    client : {"npm", "apt", "pip"}
    package, version : str
        Name, and the exact version (None: the one that the client offers).
    folder : path
        An existing folder, the client's working directory.
    pattern : str
        Glob of the archive that is expected there.

    Returns
    -------
    Path
        The archive.

    Raises
    ------
    ClientError
        The client is not installed, failed or timed out, or no such file appeared.
    """
    command = client_command(client, package, version)
    logger.info("fetching %s: %s", package, " ".join(command))
    try:
        _run(command, folder)
    except ClientError as error:
        # A fresh container has no package lists; fetch a private copy rather than touch the system's.
        if client != "apt" or not any(
            text in str(error) for text in ("Unable to locate", "No packages found", "Can't find")
        ):
            raise
        private = _private_apt_options(folder)
        _run([command[0], *private, "-q", "update"], folder)
        _run([command[0], *private, *command[1:]], folder)
    archives = sorted(folder.glob(pattern))
    if not archives:
        raise ClientError(f"`{' '.join(command)}` ended well but left no {pattern}")
    return archives[-1]


def client_command(client: str, package: str, version: str | None) -> list[str]:
    """Return the command that downloads the package into the current folder.

    ClientError if its client is not installed.
    """
    if client == "npm":
        spec = package if version is None else f"{package}@{version}"
        return [_find("npm"), "pack", spec, "--ignore-scripts"]
    if client == "apt":
        spec = package if version is None else f"{package}={version}"
        return [_find("apt-get"), "download", spec]
    if client == "pip":
        spec = package if version is None else f"{package}=={version}"
        pip = [sys.executable, "-m", "pip"] if find_spec("pip") else [_find("pip")]
        return [*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", ".", spec]
    raise ValueError(f"client: expected 'npm', 'apt' or 'pip', got {client!r}")


def typed_command(client: str, package: str, version: str | None) -> str:
    """Return the same command as a person would type it, whether or not the client is installed here."""
    versioned = {"npm": "@", "apt": "=", "pip": "=="}[client]
    spec = package if version is None else f"{package}{versioned}{version}"
    verb = {"npm": "npm pack", "apt": "apt-get download", "pip": "pip download --no-deps --only-binary=:all:"}[client]
    return f"{verb} {spec}"


def _find(program: str) -> str:
    path = shutil.which(program)
    if path is None:
        raise ClientError(f"{program} is not installed")
    return path


def _private_apt_options(folder: Path) -> list[str]:
    for name in ("apt-lists/partial", "apt-cache/archives/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    return ["-o", f"Dir::State::Lists={folder / 'apt-lists'}", "-o", f"Dir::Cache={folder / 'apt-cache'}"]


def _run(command: Sequence[str], folder: Path) -> None:
    shown = " ".join([Path(command[0]).name, *command[1:]])
    environment = {**os.environ, "LC_ALL": "C", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClientError(f"`{shown}` did not finish in {TIMEOUT_SECONDS:.0f} s") from error
    except OSError as error:
        raise ClientError(f"`{shown}` could not be started ({error})") from error
    if done.returncode != 0:
        said = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        raise ClientError(
            f"`{shown}` failed (exit status {done.returncode}): {' | '.join(said[-4:]) or 'it said nothing'}"
        )
