"""build_tools: what the build finds, what it says when a tool is missing, and what it leaves behind."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import backend
import native_build
import project_requirements
import pytest
import toolchain
import torch
from packaging.requirements import Requirement

ROOT = Path(native_build.ROOT)


def fake_torch(folder: Path, version: str = "2.11.0+cu130", cuda: str | None = "13.0", *, standard: int = 17) -> Path:
    """The files of a torch package that the build reads."""
    (folder / "include" / "ATen").mkdir(parents=True)
    (folder / "utils").mkdir()
    (folder / "version.py").write_text(
        f"from typing import Optional\n__version__ = '{version}'\ndebug = False\ncuda: Optional[str] = {cuda!r}\n"
    )
    (folder / "utils" / "cpp_extension.py").write_text(f"flags = ['-std=c++{standard}', '-fPIC']\n")
    return folder


def script(path: Path, body: str) -> Path:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def built(folder: Path) -> dict:
    return json.loads((folder / native_build.RECORD_NAME).read_text())


# ------------------------------------------------------------------------------------------------------------- finding


def test_the_installed_torch_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("RVAE_FAST_TORCH", raising=False)
    found = native_build.find_torch()
    assert found is not None
    assert found.path == Path(torch.__file__).parent
    assert found.version == torch.__version__
    assert found.cuda == torch.version.cuda
    assert found.cxx11_abi == int(torch.compiled_with_cxx11_abi())
    assert found.cxx_standard >= 17


def test_facts_of_a_cuda_build_are_read_from_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RVAE_FAST_TORCH", str(fake_torch(tmp_path / "torch", standard=20)))
    found = native_build.find_torch()
    assert (found.version, found.cuda, found.cxx_standard, found.cxx11_abi) == ("2.11.0+cu130", "13.0", 20, 1)
    config = tmp_path / "torch" / "share" / "cmake" / "Torch"
    config.mkdir(parents=True)
    (config / "TorchConfig.cmake").write_text('set(TORCH_CXX_FLAGS "-D_GLIBCXX_USE_CXX11_ABI=0")\n')
    assert native_build.find_torch().cxx11_abi == 0


def test_a_wrong_torch_folder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RVAE_FAST_TORCH", str(tmp_path))
    with pytest.raises(SystemExit, match="not a torch package"):
        native_build.find_torch()


@pytest.mark.parametrize("command", ["/bin/false", "/bin/true", "no-such-compiler"])
def test_only_a_command_that_compiles_is_a_compiler(command: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", command)
    assert native_build.find_compiler() is None


def test_a_compiler_too_old_for_torch_s_headers_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    body = 'case "$*" in *-std=c++20*) exit 1;; esac\nwhile [ "$1" != -o ]; do shift; done; : > "$2"'
    monkeypatch.setenv("CXX", str(script(tmp_path / "old-c++", body)))
    assert native_build.find_compiler(17) is not None
    assert native_build.find_compiler(20) is None


@pytest.mark.parametrize(
    ("cores", "memory", "jobs"), [(2, 64 << 30, 2), (64, 8 << 30, 4), (8, 1 << 30, 1), (1, 64 << 30, 1)]
)
def test_jobs_are_capped_by_memory(cores: int, memory: int, jobs: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MAX_JOBS", raising=False)
    monkeypatch.delenv("CMAKE_BUILD_PARALLEL_LEVEL", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    monkeypatch.setattr(native_build, "_available_memory", lambda: memory)
    assert native_build.parallel_jobs() == jobs
    monkeypatch.setenv("MAX_JOBS", "3")
    assert native_build.parallel_jobs() == 3


@pytest.mark.parametrize(
    ("torch_cuda", "nvcc", "source", "reason"),
    [
        (None, "13.0", True, "is a CPU build"),
        ("13.0", None, True, "nvcc was not found"),
        ("13.0", "13.0", False, "no CUDA source"),
        ("12.8", "13.0", True, "nvcc is of CUDA 13.0, torch of CUDA 12.8"),
        ("13.2", "13.0", True, ""),
    ],
)
def test_the_cuda_half_is_built_only_where_it_can_be(
    torch_cuda: str | None,
    nvcc: str | None,
    source: bool,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("RVAE_FAST_CUDA", raising=False)
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    if nvcc:
        script(tmp_path / "nvcc", f"echo 'Cuda compilation tools, release {nvcc}, V{nvcc}.88'")
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    if source:
        (tmp_path / "csrc" / "cuda" / "a.cu").touch()
    facts = toolchain.Torch(tmp_path, "2.13.0", torch_cuda, 17, 1)
    found, why = toolchain.find_cuda(facts, tmp_path)
    assert (found is None) == bool(reason)
    assert reason in why
    if reason:
        monkeypatch.setenv("RVAE_FAST_CUDA", "1")
        with pytest.raises(toolchain.BuildFailed, match="RVAE_FAST_CUDA=1"):
            toolchain.find_cuda(facts, tmp_path)


# ------------------------------------------------------------------------------------------------------------- outcomes


def test_without_a_compiler_a_plain_message_and_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("RVAE_FAST_NATIVE", "auto")
    module = tmp_path / "_C.so"
    module.write_bytes(b"of an earlier build")
    assert native_build.build(module, version="1") is False
    message = capfd.readouterr().err
    assert "not built; everything works, on the slower reference path" in message
    assert "no working C++ compiler was found (CXX=/bin/false)" in message
    assert built(tmp_path)["built"] is False
    assert "failed" not in built(tmp_path)
    assert "no working C++ compiler" in built(tmp_path)["reason"]
    assert not module.exists(), "a stale module beside a new record would be loaded"


def test_required_means_required(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "/bin/false")
    monkeypatch.setenv("RVAE_FAST_NATIVE", "1")
    with pytest.raises(SystemExit, match=r"RVAE_FAST_NATIVE=1, but.*no working C\+\+ compiler"):
        native_build.build(tmp_path / "_C.so", version="1")


def test_switched_off_builds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RVAE_FAST_NATIVE", "0")
    monkeypatch.setattr(native_build, "_run", lambda *a: pytest.fail("something was run"))
    assert native_build.build(tmp_path / "_C.so", version="1") is False
    assert "RVAE_FAST_NATIVE=0" in built(tmp_path)["reason"]


def test_without_torch_the_message_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RVAE_FAST_NATIVE", "auto")
    monkeypatch.setattr(native_build, "find_torch", lambda: None)
    assert native_build.build(tmp_path / "_C.so", version="1") is False
    assert "install torch" in built(tmp_path)["reason"]


@pytest.mark.skipif(native_build.find_compiler() is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_failed_build_is_loud(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd, mode: str):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("RVAE_FAST_NATIVE", mode)
    (tmp_path / "CMakeLists.txt").write_text('message(FATAL_ERROR "the third stair is missing")\n')
    target = tmp_path / "out" / "_C.so"
    options = {"version": "1", "root": tmp_path, "build_folder": tmp_path / "build"}
    if mode == "1":
        with pytest.raises(SystemExit, match="the third stair is missing"):
            native_build.build(target, **options)
        return
    assert native_build.build(target, **options) is False
    assert "FAILED TO BUILD" in capfd.readouterr().err
    assert built(target.parent)["failed"] is True
    assert "the third stair is missing" in built(target.parent)["reason"]


def test_an_unknown_mode_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RVAE_FAST_NATIVE", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0"):
        native_build.requested()


# ------------------------------------------------------------------------------------------------------- requirements


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_torch_is_a_build_requirement_only_where_the_target_has_none(hook: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["backend"])
    monkeypatch.setenv("RVAE_FAST_NATIVE", "auto")
    monkeypatch.setattr(backend.build_meta, hook, lambda settings: ["wheel"])
    monkeypatch.setattr(native_build, "find_compiler", lambda *a: "c++")
    assert getattr(backend, hook)() == ["wheel"]
    monkeypatch.setattr(native_build, "find_torch", lambda: None)
    assert getattr(backend, hook)() == ["wheel", backend.TORCH_REQUIREMENT]
    monkeypatch.setattr(native_build, "find_compiler", lambda *a: None)
    assert getattr(backend, hook)() == ["wheel"], "without a compiler nothing needs torch"
    monkeypatch.setenv("RVAE_FAST_NATIVE", "1")
    assert backend.TORCH_REQUIREMENT in getattr(backend, hook)()
    monkeypatch.setenv("RVAE_FAST_NATIVE", "0")
    assert getattr(backend, hook)() == ["wheel"]


def test_the_tested_torch_is_pinned_in_one_place_and_allowed_everywhere():
    config = project_requirements.tomllib.loads((ROOT / "pyproject.toml").read_text())
    lines = (ROOT / "requirements" / "torch.txt").read_text().splitlines()
    (pin,) = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (version,) = [spec.version for spec in pin.specifier if spec.operator == "=="]
    declared = {Requirement(line).name: Requirement(line) for line in project_requirements.requirements("core", config)}
    assert declared["torch"].specifier.contains(version)
    assert Requirement(backend.TORCH_REQUIREMENT) == declared["torch"]
    others = [ROOT / name for name in ("Makefile", ".ci/run", "README.md", "setup.py", "CMakeLists.txt")]
    assert not [path.name for path in others if f"torch=={version}" in path.read_text()]


def test_extras_resolve_to_packages_without_the_project_itself():
    config = project_requirements.tomllib.loads((ROOT / "pyproject.toml").read_text())
    for extra in config["project"]["optional-dependencies"]:
        names = {Requirement(line).name for line in project_requirements.requirements(extra, config)}
        assert "rvae-fast" not in names
        assert names
    assert {"matplotlib", "pytest"} <= {
        Requirement(line).name for line in project_requirements.requirements("test", config)
    }
    with pytest.raises(SystemExit, match="no extra 'tests'"):
        project_requirements.requirements("tests", config)
