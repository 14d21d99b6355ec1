"""Loading of the native module `rvae_fast._C`, which may be absent, broken or built for another torch.

The build leaves a record (`_C_build.INTERPRETER.json`) beside the module: what it was built for, or why it was not
built. It is compared with the running torch *before* the module is loaded, because a module of another torch can crash
on loading, or worse, later. Nothing is hidden: `why_not` says in words why there is no native module, a module that
exists and cannot be used gives one warning, and `require` raises an error with built-for beside you-have.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from rvae_fast._sources import digest

_PACKAGE = Path(__file__).resolve().parent
#: One for each interpreter, as modules are: an editable install may serve several.
_RECORD = f"_C_build.{sys.implementation.cache_tag}.json"
_REBUILD = (
    "reinstall rvae-fast in this environment to rebuild it (pip install --force-reinstall --no-deps, or `make native` "
    "in a clone)"
)


_ISA_VARIABLE = "RVAE_FAST_CPU_ISA"
_ISAS = ("portable", "avx2", "avx512", "avx512bf16", "amx")


def _check_isa_cap() -> None:
    """RVAE_FAST_CPU_ISA, read by csrc/cpu/cpu_features.cpp, forbids the instruction sets above the one it names."""
    named = os.environ.get(_ISA_VARIABLE)
    if named and named not in _ISAS:
        raise ValueError(f"{_ISA_VARIABLE} must be one of {', '.join(_ISAS)}; got {named!r}")


def _folder() -> Path:
    """Where module and record are: the package, or RVAE_FAST_NATIVE_DIR (an instrumented or experimental build)."""
    named = os.environ.get("RVAE_FAST_NATIVE_DIR")
    return Path(named) if named else _PACKAGE


def _module_file() -> Path | None:
    """The extension for this interpreter, if there is one."""
    from importlib.machinery import EXTENSION_SUFFIXES

    for suffix in EXTENSION_SUFFIXES:
        candidate = _folder() / f"_C{suffix}"
        if candidate.is_file():
            return candidate
    return None


def _foreign_modules() -> list[str]:
    """Extensions of other interpreters: an editable install used from two Pythons has them."""
    return sorted(path.name for path in _folder().glob("_C.*") if path.suffix in (".so", ".pyd", ".dylib"))


def build_record() -> dict[str, Any]:
    """What the build wrote down (empty if there is no readable record)."""
    try:
        record = json.loads((_folder() / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def running_facts() -> dict[str, Any]:
    """The same facts about the running process: torch, its CUDA, the interpreter, the machine."""
    import torch

    return {
        "torch": str(torch.__version__),
        "torch_cuda": torch.version.cuda,
        "cxx11_abi": int(torch.compiled_with_cxx11_abi()),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "machine": f"{platform.system()} {platform.machine()}",
    }


def _release(version: object) -> str:
    return str(version).split("+")[0]


def _mismatch(built: dict[str, Any], have: dict[str, Any]) -> list[str]:
    """The facts that make the module unusable here. torch's C++ interface is stable within one release only."""
    wrong = []
    if _release(built.get("torch")) != _release(have["torch"]):
        wrong.append("torch")
    if built.get("cuda") and built.get("torch_cuda") != have["torch_cuda"]:
        wrong.append("torch_cuda")  # a CPU-only module does not care which CUDA its torch has
    if built.get("cxx11_abi", have["cxx11_abi"]) != have["cxx11_abi"]:
        wrong.append("cxx11_abi")
    if str(built.get("python", "")).split(".")[:2] != str(have["python"]).split(".")[:2]:
        wrong.append("python")
    if built.get("machine") != have["machine"]:
        wrong.append("machine")
    return wrong


def _comparison(built: dict[str, Any], have: dict[str, Any], wrong: list[str]) -> str:
    """Built-for beside you-have, one fact a line, the ones that differ marked."""
    lines = [f"  {'':12}{'built for':28}you have"]
    for name in have:
        mark = "   <- differs" if name in wrong else ""
        lines.append(f"  {name:12}{built.get(name, 'unknown')!s:28}{have[name]!s}{mark}")
    return "\n".join(lines)


def _load() -> tuple[ModuleType | None, str | None, bool]:
    """(module, reason it is not there, whether the user must be warned)."""
    path, built = _module_file(), build_record()
    if path is None:
        if built.get("failed"):
            return None, f"the native module was not built: {built.get('reason', 'unknown error')}", True
        if built.get("reason"):
            return None, f"the native module was not built: {built['reason']}", False
        others = _foreign_modules()
        if others:
            return (
                None,
                f"the native module is built for another interpreter only ({', '.join(others)}): {_REBUILD}",
                True,
            )
        return None, "the native module was not built (this is a source tree that was never installed)", False
    have = running_facts()
    if not built.get("built"):
        detail = _comparison(built, have, [])
        return (
            None,
            f"{path.name} has no record ({_RECORD}) of its build, so it is not loaded: {_REBUILD}\n{detail}",
            True,
        )
    wrong = _mismatch(built, have)
    if wrong:
        detail = _comparison(built, have, wrong)
        return None, f"the native module was built for another {' and '.join(wrong)}; {_REBUILD}\n{detail}", True
    # An experimental build, in a folder of its own, may well have others.
    made_of, sources = built.get("sources"), digest(_PACKAGE.parent) if _folder() == _PACKAGE else None
    if made_of and sources and made_of != sources:
        return None, f"the native module was built from other sources than this tree has in csrc/: {_REBUILD}", True
    try:
        import torch  # noqa: F401 - brings the libraries that the module links against into the process

        spec = importlib.util.spec_from_file_location("rvae_fast._C", path)
        if spec is None or spec.loader is None:
            raise ImportError(f"{path.name} is not an extension module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except Exception as error:  # ImportError for a missing symbol; a broken file may raise anything
        detail = _comparison(built, have, [])
        return None, f"the native module exists and does not load: {error}\n{detail}\n{_REBUILD}", True
    sys.modules["rvae_fast._C"] = module
    return module, None, False


@functools.cache
def _state() -> tuple[ModuleType | None, str | None]:
    _check_isa_cap()
    module, reason, loud = _load()
    if loud:
        warnings.warn(f"rvae_fast runs on the slower reference path: {reason}", RuntimeWarning, stacklevel=3)
    return module, reason


def exists() -> bool:
    """Whether there is a native module for this interpreter on disk, or a record of a failed build: usable or not."""
    return _module_file() is not None or bool(build_record().get("failed"))


def is_available() -> bool:
    """Whether the native module is loaded (the first call loads it, and torch)."""
    return _state()[0] is not None


def why_not() -> str | None:
    """The reason there is no native module, in words for a user; None if there is one."""
    return _state()[1]


def require() -> ModuleType:
    """The native module.

    Raises
    ------
    RuntimeError
        If it is absent or unusable, with the reason: for a module of another torch, built-for beside you-have.
    """
    module, reason = _state()
    if module is None:
        raise RuntimeError(f"rvae_fast has no native module here: {reason}")
    return module


def build_info() -> dict[str, Any]:
    """Facts about the native module: the build's record, and, if it is loaded, what the module says of itself.

    Returns
    -------
    dict
        ``built`` (bool), ``loaded`` (bool), ``why_not`` (str or None), and of a built module ``torch``, ``torch_cuda``,
        ``cuda``, ``compiler``, ``flags``, ``cxx11_abi``, ``openmp``, ``isa_compiled``, ``isa_cpu``...
    """
    module, reason = _state()
    info: dict[str, Any] = {"built": False, **build_record()}
    if module is not None:
        info.update(module.build_info())
    info.update(loaded=module is not None, why_not=reason)
    return info
