"""Compile the .cu files beside this one for sm_90a, load them and launch them, through the driver's C interface.

Binaries are kept in a folder (``RVAE_FAST_HOPPER_CACHE``, by default the user's cache) under a hash of sources and
options. They come from nvcc where there is one, otherwise from NVRTC, the compiler library that PyTorch brings along.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
NVCC_OPTIONS = ("-std=c++17", "-gencode=arch=compute_90a,code=sm_90a", "-cubin")
NVRTC_OPTIONS = ("--std=c++17", "--gpu-architecture=sm_90a")
MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT


def cache_folder() -> Path:
    """RVAE_FAST_HOPPER_CACHE, else ``rvae_fast/hopper`` in the user's cache folder; RuntimeError without a home."""
    chosen = os.environ.get("RVAE_FAST_HOPPER_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "rvae_fast" / "hopper"


def headers() -> list[Path]:
    """What the .cu files include."""
    return sorted(FOLDER.glob("*.cuh"))


def _nvcc() -> str | None:
    found = shutil.which("nvcc")
    if found is None:
        home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
        found = str(home / "bin" / "nvcc") if (home / "bin" / "nvcc").exists() else None
    return found


def _by_nvcc(nvcc: str, source: Path, defines: Sequence[str]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.cubin")
        result = subprocess.run(
            [nvcc, *NVCC_OPTIONS, *defines, "-o", str(out), str(source)], capture_output=True, text=True, check=False
        )
        if result.returncode:
            raise RuntimeError(f"nvcc: {result.stdout}{result.stderr}")
        return out.read_bytes()


def _nvrtc() -> ctypes.CDLL:
    major = (torch.version.cuda or "13").split(".")[0]
    names = [f"libnvrtc.so.{major}", "libnvrtc.so"]
    places = [Path(torch.__file__).resolve().parent.parent, *map(Path, sys.path)]
    for pattern in (f"nvidia/cu{major}/lib/libnvrtc.so.*", "nvidia/cuda_nvrtc/lib/libnvrtc.so.*"):
        names += [str(found) for place in places for found in place.glob(pattern)]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise RuntimeError("neither nvcc nor libnvrtc was found")


def _by_nvrtc(source: Path, defines: Sequence[str]) -> bytes:
    lib, program = _nvrtc(), ctypes.c_void_p()
    options = [o.encode() for o in (*NVRTC_OPTIONS, *defines)]
    texts, names = [h.read_bytes() for h in headers()], [h.name.encode() for h in headers()]
    of = ctypes.c_char_p * len(texts)
    lib.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), source.name.encode(), len(texts), of(*texts), of(*names)
    )
    status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    if status:
        lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        lib.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"nvrtc: {log.value.decode(errors='replace')}")
    lib.nvrtcGetCUBINSize(program, ctypes.byref(size))
    binary = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetCUBIN(program, binary)
    lib.nvrtcDestroyProgram(ctypes.byref(program))
    return binary.raw


def compiled(file: str, defines: Sequence[str] = (), *, compiler: str | None = None) -> bytes:
    """The binary of ``file`` with ``-D`` options, from the cache or by ``compiler`` ("nvcc", "nvrtc" or either)."""
    source = FOLDER / file
    options = (*NVCC_OPTIONS, *sorted(defines), compiler or "")
    sources = b"".join(one.read_bytes() for one in (source, *headers()))
    key = hashlib.sha256(sources + "\n".join(options).encode()).hexdigest()[:24]
    kept = None
    with contextlib.suppress(OSError, RuntimeError):  # no such file, or no folder to be read, or no home to have one in
        kept = cache_folder() / f"{source.stem}-{key}.cubin"
        return kept.read_bytes()
    nvcc = _nvcc() if compiler != "nvrtc" else None
    try:
        binary = _by_nvrtc(source, defines) if nvcc is None else _by_nvcc(nvcc, source, defines)
    except RuntimeError:  # an nvcc that does not know this chip, say
        if nvcc is None or compiler == "nvcc":
            raise
        binary = _by_nvrtc(source, defines)
    if kept is None:
        return binary
    with contextlib.suppress(OSError):  # a folder that cannot be written to costs another compilation at the next start
        kept.parent.mkdir(parents=True, exist_ok=True)
        fresh = kept.with_suffix(f".{os.getpid()}-{threading.get_ident()}")
        fresh.write_bytes(binary)
        fresh.replace(kept)
    return binary


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(f"{what}: CUDA error {status}: {(text.value or b'').decode()}")


def _enter_context(device: int) -> None:
    """Make the device's primary context, which PyTorch has made, this thread's."""
    context = ctypes.c_void_p()
    _check(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    _check(_driver().cuCtxSetCurrent(context), "cuCtxSetCurrent")


class Kernel:
    """A kernel loaded on the current device, whose context PyTorch has made, called with a grid, a block and values."""

    def __init__(self, binary: bytes, name: str, shared: int) -> None:
        driver, module, function = _driver(), ctypes.c_void_p(), ctypes.c_void_p()
        _check(driver.cuModuleLoadData(ctypes.byref(module), binary), "cuModuleLoadData")
        _check(driver.cuModuleGetFunction(ctypes.byref(function), module, name.encode()), "cuModuleGetFunction")
        if shared:
            _check(driver.cuFuncSetAttribute(function, MAX_DYNAMIC_SHARED, shared), "cuFuncSetAttribute")
        self._function, self._shared = function, shared

    def __call__(self, grid: tuple[int, int], threads: int, *arguments: Any) -> None:
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)

        def launch() -> int:
            return _driver().cuLaunchKernel(
                self._function, grid[0], grid[1], 1, threads, 1, 1, self._shared, stream, pointers, None
            )

        status = launch()
        if status == INVALID_CONTEXT:  # a thread of autograd's that has not asked the runtime for anything yet
            _enter_context(torch.cuda.current_device())
            status = launch()
        _check(status, "cuLaunchKernel")


@functools.cache
def kernel(file: str, name: str, defines: tuple[str, ...], shared: int, device: int) -> Kernel:
    """The kernel ``name`` of ``file``, on CUDA device ``device``, which is the current one."""
    return Kernel(compiled(file, defines), name, shared)
