"""The loader of the native module: what cannot be used is refused, with built-for beside you-have, never in silence."""

from __future__ import annotations

import json
import sys
import sysconfig
import warnings
from pathlib import Path
from typing import Any

import native_build
import pytest

from rvae_fast import _native, _sources

MODULE = "_C" + sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder in the place of the package's: what the loader finds is what a test puts there."""
    monkeypatch.setenv("RVAE_FAST_NATIVE_DIR", str(tmp_path))
    # A state of its own, so that the process's real module stays as it is.
    monkeypatch.setattr(_native, "_state", _native._state.__wrapped__)
    return tmp_path


def record(folder: Path, **changes: Any) -> None:
    facts = {"built": True, "cuda": "", **_native.running_facts(), **changes}
    (folder / _native._RECORD).write_text(json.dumps(facts))


def test_a_source_tree_without_a_build_is_no_cause_for_a_warning(folder: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.is_available()
        assert not _native.exists()
        assert "was not built" in _native.why_not()


def test_a_missing_compiler_is_told_without_a_warning(folder: Path):
    record(folder, built=False, reason="no working C++ compiler was found")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "no working C++ compiler was found" in _native.why_not()
    with pytest.raises(RuntimeError, match=r"no native module here.*no working C\+\+ compiler"):
        _native.require()


def test_a_failed_compilation_warns(folder: Path):
    record(folder, built=False, failed=True, reason="its compilation failed: error: expected ';'")
    with pytest.warns(RuntimeWarning, match="reference path.*expected ';'"):
        assert not _native.is_available()
    assert _native.exists()


@pytest.mark.parametrize(
    ("built_for", "named"),
    [
        ({"torch": "2.9.0+cpu"}, "torch"),
        ({"torch": "2.13.0.dev20260101"}, "torch"),
        ({"python": "CPython 3.8.1"}, "python"),
        ({"machine": "Linux riscv64"}, "machine"),
        ({"cuda": "11.1", "torch_cuda": "11.1"}, "torch_cuda"),
        ({"cxx11_abi": 7}, "cxx11_abi"),
    ],
)
def test_a_module_built_for_something_else_is_refused_before_it_is_loaded(
    folder: Path, built_for: dict[str, Any], named: str
):
    (folder / MODULE).write_bytes(b"loading this would fail with another message")
    record(folder, **built_for)
    with pytest.warns(RuntimeWarning, match="reference path"):
        reason = _native.why_not()
    assert f"built for another {named};" in reason
    lines = reason.splitlines()
    assert any("built for" in line and "you have" in line for line in lines)
    (row,) = [line for line in lines if line.endswith("<- differs")]
    assert row.split()[0] == named
    assert str(built_for[named]) in row
    assert str(_native.running_facts()[named]) in row
    with pytest.warns(RuntimeWarning), pytest.raises(RuntimeError, match="built for another"):
        _native.require()


@pytest.mark.parametrize("same", [{"torch_cuda": "11.1"}, {"python": None}])
def test_what_does_not_matter_is_not_refused(folder: Path, same: dict[str, Any]):
    """A module without CUDA runs with any CUDA's torch, one of another patch release of Python too."""
    have = _native.running_facts()
    if "python" in same:
        same = {"python": have["python"].rsplit(".", 1)[0] + ".99"}
    record(folder, **same)
    assert _native._mismatch(_native.build_record(), have) == []


def test_another_local_build_of_the_same_torch_release_is_not_refused(folder: Path):
    have = _native.running_facts()
    record(folder, torch=have["torch"].split("+")[0] + "+cu999")
    assert _native._mismatch(_native.build_record(), have) == []


def test_a_module_of_other_sources_is_refused_before_it_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch):
    """As after a `git pull`: its ops may take other arguments than Python passes."""
    tree = folder / "tree"
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "cpu" / "op.cpp").write_text("int f();")
    assert _sources.digest(tree) is None, "an installed package has no sources beside it"
    (tree / "CMakeLists.txt").touch()
    now = _sources.digest(tree)
    assert now == _sources.digest(tree)
    (folder / MODULE).write_bytes(b"not an ELF file")
    record(folder, sources="another")
    with pytest.warns(RuntimeWarning, match="exists and does not load"):  # a folder of its own: an experiment
        _native.why_not()
    package = tree / "rvae_fast"
    package.mkdir()
    monkeypatch.delenv("RVAE_FAST_NATIVE_DIR")
    monkeypatch.setattr(_native, "_PACKAGE", package)
    (package / MODULE).write_bytes(b"not an ELF file")
    record(package, sources="another")
    with pytest.warns(RuntimeWarning, match="built from other sources than this tree has in csrc/: reinstall"):
        assert not _native.is_available()
    record(package, sources=now)
    with pytest.warns(RuntimeWarning, match="exists and does not load"):
        _native.why_not()
    (tree / "csrc" / "cpu" / "op.cpp").write_text("int f(int);")
    with pytest.warns(RuntimeWarning, match="built from other sources"):
        _native.why_not()


def test_the_build_here_recorded_its_sources():
    if not _native.build_record().get("built"):
        pytest.skip("no native module was built here")
    assert _native.build_record()["sources"] == native_build._digest(native_build.ROOT)


def test_a_broken_module_warns_and_shows_both_sides(folder: Path):
    (folder / MODULE).write_bytes(b"not an ELF file")
    record(folder)
    with pytest.warns(RuntimeWarning, match="exists and does not load"):
        reason = _native.why_not()
    assert "built for" in reason
    assert "you have" in reason


def test_a_module_without_a_record_is_not_trusted(folder: Path):
    (folder / MODULE).write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="no record"):
        assert "you have" in _native.why_not()


def test_a_damaged_record_is_as_none(folder: Path):
    (folder / MODULE).write_bytes(b"")
    (folder / _native._RECORD).write_text("{")
    with pytest.warns(RuntimeWarning, match="no record"):
        _native.why_not()


def test_a_module_of_another_interpreter_is_named(folder: Path):
    (folder / "_C.cpython-38-x86_64-linux-gnu.so").write_bytes(b"")
    with pytest.warns(RuntimeWarning, match="cpython-38"):
        assert "another interpreter" in _native.why_not()


def test_an_installation_into_another_interpreter_leaves_this_one_s_record(folder: Path):
    """One source tree, installed into two Pythons: neither may make the other's module unusable."""
    assert sys.implementation.cache_tag in _native._RECORD
    assert native_build.RECORD_NAME == _native._RECORD
    record(folder)
    other = _native._RECORD.replace(sys.implementation.cache_tag, "cpython-38")
    (folder / other).write_text(json.dumps({"built": True, "cuda": "", "python": "CPython 3.8.1"}))
    assert _native._mismatch(_native.build_record(), _native.running_facts()) == []


def test_the_warning_comes_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import functools

    monkeypatch.setenv("RVAE_FAST_NATIVE_DIR", str(tmp_path))
    monkeypatch.setattr(_native, "_state", functools.cache(_native._state.__wrapped__))
    record(tmp_path, built=False, failed=True, reason="x")
    with pytest.warns(RuntimeWarning, match="reference path"):
        _native.is_available()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not _native.is_available()
        assert _native.why_not() is not None


def test_the_real_module_states_what_it_was_built_for(native: Any):
    info = _native.build_info()
    have = _native.running_facts()
    assert info["loaded"]
    assert info["why_not"] is None
    assert info["torch"].split("+")[0] == have["torch"].split("+")[0]
    assert info["cxx11_abi"] == have["cxx11_abi"]
    assert info["compiler"]
    assert "-O3" in info["flags"] or info["sanitize"]
    assert native.build_info()["torch"] == _native.build_record()["torch"]


def test_the_real_module_uses_torch_s_own_threads(native: Any):
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert native.num_threads() == 1
        torch.set_num_threads(2)
        assert native.num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_native, "_state", _native._state.__wrapped__)
    monkeypatch.setenv("RVAE_FAST_CPU_ISA", "avx10")
    with pytest.raises(ValueError, match=r"RVAE_FAST_CPU_ISA must be one of portable, avx2, .* got 'avx10'"):
        _native.is_available()
