"""Members of package archives, and archives that are not whole."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rvae_fast.datasets import archives
from rvae_fast.datasets.archives import read_members

MEMBERS = {
    "usr/share/toy/one.bin": b"\x01" * 999,
    "usr/share/toy/two.bin": b"two",
    "usr/share/toy/clone.bin": b"no",
}
WANTED = ("toy/one.bin", "two.bin")
KINDS = [("toy.tgz", "tar"), ("toy.whl", "zip"), ("toy.deb", "deb")]


@pytest.fixture(params=[False, True], ids=["python", "dpkg-deb"])
def with_dpkg(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways into a Debian package."""
    if not request.param:
        monkeypatch.setattr(archives.shutil, "which", lambda _: None)
    elif shutil.which("dpkg-deb") is None:
        pytest.skip("dpkg-deb is not installed")
    return bool(request.param)


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.usefixtures("with_dpkg")
def test_wanted_members_are_read(tmp_path: Path, packers, name: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    path.write_bytes(packers[kind](MEMBERS))
    found = read_members(path, WANTED)
    assert found == {"toy/one.bin": b"\x01" * 999, "two.bin": b"two"}
    assert sorted(tmp_path.iterdir()) == [path]  # nothing is unpacked


@pytest.mark.usefixtures("with_dpkg")
def test_deb_compressed_with_gzip(tmp_path: Path, packers) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "toy.deb"
    path.write_bytes(packers["deb"](MEMBERS, "gz"))
    assert read_members(path, WANTED)["two.bin"] == b"two"


@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.usefixtures("with_dpkg")
def test_missing_member_is_named(tmp_path: Path, packers, name: str, kind: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    path.write_bytes(packers[kind](MEMBERS))
    # "lone.bin" ends a path, but not at a folder's boundary
    with pytest.raises(ValueError, match=rf"{name}: no lone.bin, four.bin in it"):
        read_members(path, ("two.bin", "lone.bin", "four.bin"))


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.6, 0.95])
@pytest.mark.parametrize(("name", "kind"), KINDS)
@pytest.mark.usefixtures("with_dpkg")
def test_truncated_archive_is_an_error(tmp_path: Path, packers, name: str, kind: str, share: float) -> None:  # type: ignore[no-untyped-def]
    import random

    members = {"a/one.bin": random.Random(0).randbytes(4000), "a/two.bin": random.Random(1).randbytes(4000)}
    content = packers[kind](members)
    path = tmp_path / name
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"toy\.\w+: "):
        read_members(path, ("one.bin", "two.bin"))


def test_zstd_package_without_dpkg_says_what_to_install(
    tmp_path: Path,
    packers,  # type: ignore[no-untyped-def]
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(archives.shutil, "which", lambda _: None)
    path = tmp_path / "toy.deb"
    path.write_bytes(packers["deb"](MEMBERS).replace(b"data.tar.xz ", b"data.tar.zst"))
    with pytest.raises(ValueError, match="zstd; install dpkg"):
        read_members(path, WANTED)


def test_absent_archive_is_not_called_damaged(tmp_path: Path) -> None:
    for name, _ in KINDS[:2]:
        with pytest.raises(FileNotFoundError):
            read_members(tmp_path / name, WANTED)
