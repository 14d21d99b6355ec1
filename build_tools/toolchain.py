"""What a build of the native module needs of the machine, found without importing torch: torch itself, compilers, CUDA.

The environment variables that steer it are listed in native_build.py.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path


class Unavailable(Exception):
    """A tool that the build needs is not on this machine; the message says which and how to get it."""


class BuildFailed(Exception):
    """The tools are there and the build went wrong; the message carries the end of their output."""


# ---------------------------------------------------------------------------------------------------------------- torch


@dataclass(frozen=True)
class Torch:
    """Facts about an installed torch, read from its files: importing it would cost seconds, and fails in a build
    sandbox."""

    path: Path
    version: str
    cuda: str | None
    cxx_standard: int
    cxx11_abi: int


def _torch_directory() -> Path | None:
    named = os.environ.get("RVAE_FAST_TORCH")
    if named:
        path = Path(named).expanduser().resolve()
        if not (path / "version.py").is_file():
            raise SystemExit(
                f"RVAE_FAST_TORCH is {named!r}, which is not a torch package directory (no version.py there)"
            )
        return path
    # The environment that is being installed into: the running interpreter without the build sandbox's PYTHONPATH. A
    # child process resolves .pth files, system site-packages and the user site as a user's own session would.
    probe = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    with tempfile.TemporaryDirectory() as empty:
        found = subprocess.run(
            [sys.executable, "-E", "-c", probe], cwd=empty, capture_output=True, text=True, check=False
        )
    origin = found.stdout.strip()
    if not origin:  # the sandbox itself (torch as a build requirement), or an environment without site-packages
        spec = importlib.util.find_spec("torch")
        origin = (
            spec.origin
            if spec and spec.origin
            else str(Path(sysconfig.get_paths()["purelib"]) / "torch" / "__init__.py")
        )
    path = Path(origin).parent
    return path if (path / "version.py").is_file() and (path / "include" / "ATen").is_dir() else None


def find_torch() -> Torch | None:
    """The torch to compile against, or None if the environment has none (or one without headers)."""
    path = _torch_directory()
    if path is None:
        return None
    facts = (path / "version.py").read_text()
    version = re.search(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", facts, re.M)
    if version is None:
        return None
    cuda = re.search(r"^cuda\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", facts, re.M)
    # What torch compiles its own extensions with is what its headers are tested with.
    extension = path / "utils" / "cpp_extension.py"
    standards = re.findall(r"-std=c\+\+(\d\d)\b", extension.read_text()) if extension.is_file() else []
    config = path / "share" / "cmake" / "Torch" / "TorchConfig.cmake"
    abi = re.search(r"_GLIBCXX_USE_CXX11_ABI=([01])", config.read_text()) if config.is_file() else None
    return Torch(
        path=path,
        version=version.group(1),
        cuda=cuda.group(1) if cuda else None,
        cxx_standard=max((int(s) for s in standards), default=17),
        cxx11_abi=int(abi.group(1)) if abi else 1,
    )


# ------------------------------------------------------------------------------------------------------------ compilers


def find_compiler(standard: int = 17) -> str | None:
    """The C++ compiler command ($CXX, else c++, g++, clang++) if it compiles and links a C++`standard` program."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for candidate in candidates:
        command = candidate.split()
        if not command or shutil.which(command[0]) is None:
            continue
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cpp")
            source.write_text(
                "#include <string>\n#include <vector>\nint main() { return (int)std::vector<std::string>().size(); }\n"
            )
            run = subprocess.run(
                [*command, f"-std=c++{standard}", str(source), "-o", str(source.with_suffix(""))],
                capture_output=True,
                check=False,
            )
            # /bin/false and friends "exist"; only an executable that came out is a compiler.
            if run.returncode == 0 and source.with_suffix("").is_file():
                return candidate
    return None


def python_package_tool(name: str) -> str | None:
    """`cmake` or `ninja` from the environment's scripts folder or its Python package, else from PATH.

    The PyPI packages put a working binary inside the package; under build isolation the script in the sandbox's bin
    folder is a Python shim, which breaks once the sandbox is gone, and CMake caches its path. The real binary is
    preferred."""
    package = {"cmake": ("cmake", "CMAKE_BIN_DIR"), "ninja": ("ninja", "BIN_DIR")}[name]
    with contextlib.suppress(Exception):
        module = importlib.import_module(package[0])
        binary = Path(getattr(module, package[1])) / name
        if binary.is_file():
            return str(binary)
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.is_file() else shutil.which(name)


def pybind11_include(torch: Torch) -> Path:
    """pybind11's headers: the package's if installed, else the copy that torch carries."""
    with contextlib.suppress(ImportError):
        import pybind11

        return Path(pybind11.get_include())
    if (torch.path / "include" / "pybind11" / "pybind11.h").is_file():
        return torch.path / "include"
    raise Unavailable("pybind11's headers were not found: pip install pybind11")


def nvcc_version(nvcc: str) -> str | None:
    out = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    release = re.search(r"release (\d+\.\d+)", out)
    return release.group(1) if release else None


def find_cuda(torch: Torch, root: Path) -> tuple[str | None, str]:
    """(path of nvcc, "") if the CUDA half can be built, else (None, the reason)."""
    wanted = os.environ.get("RVAE_FAST_CUDA", "auto").strip().lower() or "auto"
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"RVAE_FAST_CUDA is {wanted!r}; expected auto, 0 (do not build) or 1 (require)")
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None and os.environ.get("CUDA_HOME"):
        nvcc = shutil.which(str(Path(os.environ["CUDA_HOME"], "bin", "nvcc")))
    reason = ""
    if wanted == "0":
        return None, "switched off by RVAE_FAST_CUDA=0"
    if torch.cuda is None:
        reason = f"torch {torch.version} is a CPU build"
    elif nvcc is None:
        reason = "nvcc was not found on PATH or in CUDA_HOME"
    elif not any((root / "csrc" / "cuda").glob("*.cu")):
        reason = "there is no CUDA source in this version"
    else:
        version = nvcc_version(nvcc)
        if version is None or version.split(".")[0] != torch.cuda.split(".")[0]:
            reason = f"nvcc is of CUDA {version}, torch of CUDA {torch.cuda}: the major versions must agree"
    if reason and wanted == "1":
        raise BuildFailed(f"RVAE_FAST_CUDA=1, but {reason}")
    return (None, reason) if reason else (nvcc, "")
