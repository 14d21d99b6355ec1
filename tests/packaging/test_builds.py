"""Real builds: a CUDA torch without nvcc, the CUDA half with it, and what source and binary distributions carry."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import native_build
import pytest
import toolchain
import torch

ROOT = Path(native_build.ROOT)
MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")
TORCH = Path(torch.__file__).parent
PACKAGE_DATA = (".html", ".css", ".j2", ".js")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (ROOT / "CMakeLists.txt").is_file(), reason="needs a source tree"),
]
needs_compiler = pytest.mark.skipif(native_build.find_compiler(20) is None, reason="needs a C++20 compiler")


@pytest.fixture
def small_root(tmp_path: Path) -> Path:
    """The source tree with bindings and CPU detection only: all of the build's logic, little to compile."""
    root = tmp_path / "tree"
    (root / "csrc" / "cpu").mkdir(parents=True)
    for name in ("CMakeLists.txt", "csrc/bindings.cpp", "csrc/build_facts.h.in"):
        shutil.copy2(ROOT / name, root / name)
    for path in (ROOT / "csrc" / "cpu").glob("cpu_features.*"):
        shutil.copy2(path, root / "csrc" / "cpu")
    return root


@pytest.fixture
def cuda_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The installed torch with the face of a CUDA 13 build, whose CMake config stops where there is no toolkit."""
    fake = tmp_path / "torch"
    config = fake / "share" / "cmake" / "Torch"
    config.mkdir(parents=True)
    (config / "TorchConfig.cmake").write_text('message(FATAL_ERROR "Your installed Caffe2 version uses CUDA but...")\n')
    facts = f"__version__ = '{torch.__version__.split('+')[0]}+cu130'\ncuda = '13.0'\n"
    (fake / "version.py").write_text(facts)
    for name in ("include", "utils"):
        (fake / name).symlink_to(TORCH / name)
    (fake / "lib").mkdir()
    for library in (TORCH / "lib").iterdir():
        (fake / "lib" / library.name).symlink_to(library)
    monkeypatch.setenv("RVAE_FAST_TORCH", str(fake))
    return fake


def build(root: Path, out: Path) -> tuple[bool, dict]:
    done = native_build.build(out / MODULE, version="0", root=root, build_folder=root / "build")
    return done, json.loads((out / native_build.RECORD_NAME).read_text())


@needs_compiler
def test_a_cuda_torch_without_nvcc_gets_the_cpu_half(
    small_root: Path, cuda_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RVAE_FAST_NATIVE", "1")
    monkeypatch.setenv("CUDACXX", "no-nvcc-here")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    done, facts = build(small_root, tmp_path / "out")
    assert done
    assert facts["torch"].endswith("+cu130")
    assert facts["torch_cuda"] == "13.0"
    assert facts["cuda"] == ""
    assert "nvcc was not found" in facts["cuda_reason"]
    # The release is the running torch's, so the loader takes it: it is the very same C++ interface.
    environment = {
        **os.environ,
        "RVAE_FAST_NATIVE_DIR": str(tmp_path / "out"),
        "PYTHONWARNINGS": "error::RuntimeWarning",
    }
    code = "from rvae_fast import _native as n; m = n.require(); print(m.build_info()['torch'], m.num_threads())"
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith(facts["torch"])


@needs_compiler
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_cuda_half_is_compiled_for_every_architecture_and_its_failure_spares_the_cpu_half(
    small_root: Path, cuda_torch: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    nvcc = shutil.which("nvcc")
    version = toolchain.nvcc_version(nvcc)
    facts = (cuda_torch / "version.py").read_text().replace("'13.0'", f"'{version}'")
    (cuda_torch / "version.py").write_text(facts)
    for name in ("c10_cuda", "torch_cuda"):  # a CPU build of torch has none: empty ones serve a launcher
        library = cuda_torch / "lib" / f"lib{name}.so"
        if not library.exists():
            compiler = native_build.find_compiler()
            subprocess.run([compiler, "-shared", "-x", "c++", os.devnull, "-o", str(library)], check=True)
    source = small_root / "csrc" / "cuda" / "probe.cu"
    source.parent.mkdir()
    source.write_text(
        "__global__ void probe(float* x) { x[threadIdx.x] += 1.f; }\n"
        'extern "C" void launch_probe(float* x, cudaStream_t s) { probe<<<1, 32, 0, s>>>(x); }\n'
    )
    monkeypatch.setenv("RVAE_FAST_NATIVE", "auto")
    monkeypatch.setenv("RVAE_FAST_CUDA", "auto")
    done, facts = build(small_root, tmp_path / "out")
    assert done
    assert facts["cuda"].startswith(version)
    assert facts["cuda_reason"] is None
    objdump = shutil.which("cuobjdump")
    if objdump:
        out = subprocess.run([objdump, "-lelf", str(tmp_path / "out" / MODULE)], capture_output=True, text=True).stdout
        assert all(f"sm_{arch}." in out for arch in ("80", "90a", "100a"))

    source.write_text("#error the toolkit is broken\n")
    done, facts = build(small_root, tmp_path / "out")
    assert done, "the CPU half does not depend on the CUDA half"
    assert facts["cuda"] == ""
    assert facts["cuda_failed"] is True
    assert "the toolkit is broken" in facts["cuda_reason"]
    assert "CUDA HALF FAILED" in capfd.readouterr().err


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist of the tree, and a wheel built from the unpacked sdist (without the native module, built above)."""
    out = tmp_path_factory.mktemp("dist")
    tree = out / "tree"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", "*.so", "runs", ".*_cache"
    )
    shutil.copytree(ROOT, tree, ignore=ignore)
    environment = {**os.environ, "RVAE_FAST_NATIVE": "0"}
    code = "import sys, backend; print(getattr(backend, sys.argv[1])(sys.argv[2]))"

    def run(hook: str, source: Path) -> Path:
        environment["PYTHONPATH"] = str(source / "build_tools")
        command = [sys.executable, "-c", code, hook, str(out)]
        done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return out / done.stdout.splitlines()[-1]

    sdist = run("build_sdist", tree)
    with tarfile.open(sdist) as archive:
        archive.extractall(out / "unpacked", filter="data")
    (unpacked,) = (out / "unpacked").iterdir()
    return sdist, run("build_wheel", unpacked)


def tracked(folder: str, *suffixes: str) -> set[str]:
    return {
        str(p.relative_to(ROOT))
        for p in (ROOT / folder).rglob("*")
        if p.suffix in suffixes and "__pycache__" not in p.parts
    }


def test_the_sdist_holds_everything_that_a_build_and_the_tests_need(distributions: tuple[Path, Path]):
    with tarfile.open(distributions[0]) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    wanted = {"LICENSE", "CMakeLists.txt", "setup.py", "pyproject.toml", "Makefile", "requirements/torch.txt"}
    wanted |= tracked("csrc", ".cpp", ".h", ".in", ".cu", ".cuh") | tracked("build_tools", ".py")
    wanted |= (
        tracked("rvae_fast", ".py", *PACKAGE_DATA) | tracked("kernels", ".py", ".json", ".cu") | tracked("tests", ".py")
    )
    assert wanted - names == set()
    assert [name for name in names if "_C_build" in name or name.endswith((".so", ".pyc"))] == []


def test_the_wheel_installs_elsewhere_and_works(distributions: tuple[Path, Path], tmp_path: Path):
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path)
    python = {name.replace("kernels/", "rvae_fast/kernels/", 1) for name in tracked("kernels", ".py", ".json", ".cu")}
    assert (tracked("rvae_fast", ".py", *PACKAGE_DATA) | python) - names == set()
    assert "rvae_fast/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert not any(name.startswith(("tests/", "csrc/", "build_tools/", "kernels/")) for name in names)
    code = (
        "import rvae_fast, torch, pathlib, sys; from rvae_fast import _native\n"
        "assert pathlib.Path(rvae_fast.__file__).is_relative_to(sys.argv[1]), rvae_fast.__file__\n"
        "assert 'RVAE_FAST_NATIVE=0' in _native.why_not()\n"
        "x = torch.rand(4, 6); print(rvae_fast.RVAE(6, 2, n_layers=3).loss(x).item())\n"
        "import rvae_fast.kernels; print(rvae_fast.kernels.__file__)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    environment.pop("RVAE_FAST_NATIVE_DIR", None)
    command = [sys.executable, "-c", code, str(tmp_path)]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert str(tmp_path) in run.stdout
