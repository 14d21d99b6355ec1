"""Build script: the metadata is in pyproject.toml; this adds the native module, which CMake builds
(build_tools/native_build.py)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_tools"))

import native_build  # noqa: E402


class CMakeExtension(Extension):
    """An extension whose sources only CMake knows."""

    def __init__(self, name: str) -> None:
        super().__init__(name, sources=[])


class CMakeBuild(build_ext):
    """`build_ext` by way of CMake; a missing tool leaves a record of the reason instead of a module."""

    def _files(self) -> list[tuple[Path, Path]]:
        """(as built, as in the source tree) of the module and of the record beside it."""
        pairs = []
        for ext in self.extensions:
            relative = Path(self.get_ext_filename(ext.name))
            for name in (relative, relative.with_name(native_build.RECORD_NAME)):
                pairs.append((Path(self.build_lib) / name, ROOT / name))
        return pairs

    def build_extension(self, ext: Extension) -> None:
        module = Path(self.build_lib).resolve() / self.get_ext_filename(ext.name)
        native_build.build(module, version=self.distribution.get_version(), root=ROOT)

    def copy_extensions_to_source(self) -> None:
        """Editable installs and ``build_ext --inplace``: module and record go beside the Python sources."""
        for built, inplace in self._files():
            if not built.is_file():
                inplace.unlink(missing_ok=True)
                continue
            # A running process keeps the file that it mapped: replace, never overwrite.
            temporary = inplace.with_name(inplace.name + ".new")
            self.copy_file(str(built), str(temporary), preserve_mode=True)
            os.replace(temporary, inplace)

    def get_output_mapping(self) -> dict[str, str]:
        """Built file -> file in the source tree, for editable installs; a module that was not built is not promised."""
        return {str(built): str(inplace) for built, inplace in self._files() if self.inplace and built.is_file()}

    def get_outputs(self) -> list[str]:
        """What was built: the record, and the module unless a tool was missing."""
        return [str(built) for built, _ in self._files() if built.is_file()]


# kernels/ lives beside rvae_fast/ in the repository and inside it once installed.
packages = find_packages(include=["rvae_fast", "rvae_fast.*"])
kernels = ["rvae_fast.kernels", *(f"rvae_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*packages, *kernels],
    package_dir={"rvae_fast.kernels": "kernels"},
    package_data={
        "rvae_fast": ["py.typed", "*.html", "*.j2", "*.css", "*.js", "*.json"],
        "rvae_fast.kernels": ["*.json"],
        "rvae_fast.kernels.hopper": ["*.cu", "*.cuh"],
        "": ["templates/*", "assets/*", "*.html", "*.j2", "*.css", "*.js"],
    },
    include_package_data=False,
    ext_modules=[CMakeExtension("rvae_fast._C")],
    cmdclass={"build_ext": CMakeBuild},
)
