"""Build of the native module `rvae_fast._C`: find what is needed, run CMake, record the outcome.

`setup.py` calls `build`. Whatever happens, a small JSON record (`_C_build.INTERPRETER.json`) is left where the module
goes: what it was built for, or why it was not built. The loader (`rvae_fast/_native.py`) reads it, so that the reason
survives an installer that hides the output of builds.

Environment variables:

``RVAE_FAST_NATIVE``
    ``auto`` (default): build where the tools for it exist, else say so and go on with the reference path. A failed
    compilation is reported loudly, here and at the first use. ``1``: anything but a working module is an error. ``0``:
    do not build.
``RVAE_FAST_TORCH``
    The torch package directory to compile against, if not that of the running interpreter.
``RVAE_FAST_CUDA``
    ``auto`` (default), ``1`` (require) or ``0``: the CUDA half, built where nvcc's major version is torch's.
``RVAE_FAST_CUDA_ARCHITECTURES``, ``RVAE_FAST_SANITIZE``, ``MAX_JOBS``
    CMake's list of GPU architectures; ``address,undefined`` for an instrumented module; the number of parallel
    compilations.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain import (
    BuildFailed,
    Torch,
    Unavailable,
    find_compiler,
    find_cuda,
    find_torch,
    pybind11_include,
    python_package_tool,
)

#: The loader looks for it by the same name. One for each interpreter: a source tree can be installed into several.
RECORD_NAME = f"_C_build.{sys.implementation.cache_tag}.json"
ROOT = Path(__file__).resolve().parent.parent


def requested() -> str:
    """The value of RVAE_FAST_NATIVE: "auto", "0" or "1"."""
    value = os.environ.get("RVAE_FAST_NATIVE", "auto").strip().lower() or "auto"
    if value not in ("auto", "0", "1"):
        raise SystemExit(f"RVAE_FAST_NATIVE is {value!r}; expected auto, 0 (do not build) or 1 (require)")
    return value


# --------------------------------------------------------------------------------------------------------------- limits


def _available_memory() -> int:
    """Bytes of memory that compilations may take: what is free, or what a container's limit leaves."""
    free = 4 << 30
    with contextlib.suppress(OSError, AttributeError):
        meminfo = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        if meminfo:
            free = int(meminfo.group(1)) << 10
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
    return free


def parallel_jobs() -> int:
    """Compilations at once: MAX_JOBS or CMAKE_BUILD_PARALLEL_LEVEL if set, else the cores, at 2 GiB of free memory
    each."""
    for variable in ("MAX_JOBS", "CMAKE_BUILD_PARALLEL_LEVEL"):
        value = os.environ.get(variable, "")
        if value.isdigit() and int(value) > 0:
            return int(value)
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        cores = os.cpu_count() or 1
    return max(1, min(cores, _available_memory() // (2 << 30)))


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time in a build folder that outlives the build."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as handle:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------------------------------------------------------- build


@dataclass(frozen=True)
class Plan:
    """Everything a build needs, found; `cuda_reason` says why `nvcc` is None."""

    torch: Torch
    compiler: str
    cmake: str
    ninja: str
    pybind11_include: Path
    nvcc: str | None
    cuda_reason: str


def plan(root: Path = ROOT) -> Plan:
    """Find the tools, or raise `Unavailable` with a message for a user."""
    torch = find_torch()
    if torch is None:
        raise Unavailable(
            "PyTorch (with its headers) is not installed in this environment: install torch, then rvae-fast again"
        )
    compiler = find_compiler(torch.cxx_standard)
    if compiler is None:
        named = f"CXX={os.environ['CXX']}" if os.environ.get("CXX") else "c++, g++, clang++"
        raise Unavailable(
            f"no working C++ compiler was found ({named}) that knows C++{torch.cxx_standard}, which the headers of "
            f"torch {torch.version} need: install one (Debian, Ubuntu: apt install g++)"
        )
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise Unavailable(
            f"Python's own headers are missing ({header.name}): install them (Debian, Ubuntu: apt install python3-dev)"
        )
    cmake, ninja = python_package_tool("cmake"), python_package_tool("ninja")
    missing = [name for name, path in (("cmake", cmake), ("ninja", ninja)) if path is None]
    if cmake is None or ninja is None:
        raise Unavailable(f"{' and '.join(missing)} not found: pip install {' '.join(missing)}")
    nvcc, cuda_reason = find_cuda(torch, root)
    return Plan(torch, compiler, cmake, ninja, pybind11_include(torch), nvcc, cuda_reason)


def _run(command: list[str], environment: dict[str, str]) -> None:
    print("+", " ".join(command), flush=True)
    run = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    print(run.stdout, flush=True)
    if run.returncode != 0:
        raise BuildFailed(f"`{Path(command[0]).name}` failed with status {run.returncode}\n{run.stdout[-6000:]}")


def _compile(found: Plan, build_folder: Path, module: Path, root: Path) -> dict[str, Any]:
    """Configure, compile, put the module at `module`; return the facts that CMake wrote down."""
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "CMAKE_MAKE_PROGRAM": found.ninja,
        "Python_EXECUTABLE": sys.executable,
        "RVAE_TORCH_DIR": str(found.torch.path),
        "RVAE_TORCH_VERSION": found.torch.version,
        "RVAE_TORCH_CUDA": found.torch.cuda or "",
        "RVAE_CXX_STANDARD": str(found.torch.cxx_standard),
        "RVAE_CXX11_ABI": str(found.torch.cxx11_abi),
        "RVAE_PYBIND11_INCLUDE": str(found.pybind11_include),
        "RVAE_MODULE_SUFFIX": module.name[module.name.index(".") :],
        "RVAE_SANITIZE": os.environ.get("RVAE_FAST_SANITIZE", ""),
        "RVAE_CUDA": "ON" if found.nvcc else "OFF",
    }
    if found.nvcc:
        options["CMAKE_CUDA_COMPILER"] = found.nvcc
        if os.environ.get("RVAE_FAST_CUDA_ARCHITECTURES"):
            options["RVAE_CUDA_ARCHITECTURES"] = os.environ["RVAE_FAST_CUDA_ARCHITECTURES"]
    configure = [found.cmake, "-S", str(root), "-B", str(build_folder), "-G", "Ninja"]
    configure += [f"-D{name}={value}" for name, value in options.items()]
    environment = {**os.environ, "CXX": found.compiler}
    with _locked(build_folder):
        # CMake refuses to change a compiler or generator program in place; object files stay, so this costs little.
        key = json.dumps([found.compiler, found.cmake, found.ninja, found.nvcc, sys.executable, str(root)])
        stamp = build_folder / ".key"
        if not stamp.is_file() or stamp.read_text() != key:
            (build_folder / "CMakeCache.txt").unlink(missing_ok=True)
            shutil.rmtree(build_folder / "CMakeFiles" / "rules", ignore_errors=True)
        _run(configure, environment)
        stamp.write_text(key)
        _run([found.cmake, "--build", str(build_folder), "--parallel", str(parallel_jobs())], environment)
        module.parent.mkdir(parents=True, exist_ok=True)
        temporary = module.with_name(module.name + ".new")
        shutil.copy2(build_folder / module.name, temporary)
        os.replace(temporary, module)  # a process that has the old module mapped keeps the old file
        return json.loads((build_folder / "build_facts.json").read_text())


def _digest(root: Path) -> str | None:
    """Of the sources that are compiled, for the loader to compare. The package cannot be imported yet."""
    digest: str | None = runpy.run_path(str(ROOT / "rvae_fast" / "_sources.py"))["digest"](root)
    return digest


def _banner(title: str, body: str) -> None:
    line = "=" * 100
    indented = textwrap.indent(body, "  ")
    print(f"\n{line}\nrvae-fast: {title}\n{indented}\n{line}\n", file=sys.stderr, flush=True)


def build(module: Path, *, version: str, root: Path = ROOT, build_folder: Path | None = None) -> bool:
    """Build the native module as `module` and write the record beside it; return whether there is a module.

    Parameters
    ----------
    module : Path
        Where the extension goes, with the interpreter's suffix (``.../rvae_fast/_C.cpython-311-x86_64-linux-gnu.so``).
    version : str
        The version of rvae-fast, for the record.
    root : Path
        The source tree (holds CMakeLists.txt).
    build_folder : Path, optional
        Kept between builds so that the second is quick. Default: ``build/native-<interpreter>`` in the source tree.

    Raises
    ------
    SystemExit
        If ``RVAE_FAST_NATIVE=1`` and the module cannot be built.
    """
    mode = requested()
    record: dict[str, Any] = {
        "rvae_fast": version,
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
        "built": False,
    }
    try:
        if mode == "0":
            raise Unavailable("switched off by RVAE_FAST_NATIVE=0")
        found = plan(root)
        record.update(
            torch=found.torch.version,
            torch_cuda=found.torch.cuda,
            cxx11_abi=found.torch.cxx11_abi,
            compiler=found.compiler,
            sources=_digest(root),
        )
        sanitized = "-sanitize" if os.environ.get("RVAE_FAST_SANITIZE") else ""
        folder = (
            build_folder or root / "build" / f"native-{sys.implementation.cache_tag}-{platform.machine()}{sanitized}"
        )
        try:
            facts = _compile(found, folder, module, root)
        except BuildFailed as problem:
            if found.nvcc is None or mode == "1" or os.environ.get("RVAE_FAST_CUDA", "").strip() == "1":
                raise
            # nvcc refuses host compilers newer than itself, toolkits come in parts...: that must not cost the CPU half.
            _banner(
                "THE CUDA HALF FAILED TO BUILD; going on with the CPU half (RVAE_FAST_CUDA=0 skips it).", str(problem)
            )
            found = replace(found, nvcc=None, cuda_reason=f"its compilation failed: {problem}")
            facts = _compile(found, folder, module, root)
            record["cuda_failed"] = True
        record.update(facts, built=True, cuda_reason=found.cuda_reason or None)
    except Unavailable as problem:
        record["reason"] = str(problem)
        if mode == "1":
            raise SystemExit(
                f"rvae-fast: RVAE_FAST_NATIVE=1, but the native module cannot be built: {problem}"
            ) from None
        _banner("the native module is not built; everything works, on the slower reference path.", f"Reason: {problem}")
    except (BuildFailed, OSError) as problem:
        record["reason"] = f"its compilation failed: {problem}"
        record["failed"] = True
        if mode == "1":
            raise SystemExit(f"rvae-fast: the native module failed to build: {problem}") from None
        _banner(
            "THE NATIVE MODULE FAILED TO BUILD; everything works, on the slower reference path.",
            f"{problem}\nThe first import will repeat this as a warning. Install with RVAE_FAST_NATIVE=0 to do "
            "without it,\nor with RVAE_FAST_NATIVE=1 to make this an error.",
        )
    if not record["built"]:
        module.unlink(missing_ok=True)  # never leave the module of an earlier build beside the record of this one
    module.parent.mkdir(parents=True, exist_ok=True)
    (module.parent / RECORD_NAME).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    return bool(record["built"])
