"""Facts about this installation: which backends are on, why the others are not, and what the machine offers.

`collect` gathers them as data (``rvae-fast doctor --json``), `render` prints them. Gathering never raises for a missing
part: a part that is missing is a fact.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from rvae_fast import _native
from rvae_fast._version import __version__

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "off", "problem", "info"]

# distribution -> what it is for
_PACKAGES = {
    "numpy": "arrays",
    "scikit-learn": "detectors, digits",
    "safetensors": "saved models",
    "rich": "progress, tables",
    "typer": "command line",
    "triton": "GPU kernels",
    "matplotlib": "report pictures",
    "jinja2": "report page",
    "pandas": "tables",
    "pyarrow": "Parquet, Arrow",
    "rdata": "Shuttle, Satellite",
}
_REQUIRED = frozenset({"numpy", "scikit-learn", "safetensors", "rich", "typer"})
_EXTRA = {
    "triton": "triton",
    "matplotlib": "report",
    "jinja2": "report",
    "pandas": "data",
    "pyarrow": "data",
    "rdata": "data",
}


@dataclass(frozen=True)
class Fact:
    """One line of the report.

    Parameters
    ----------
    section : str
        The heading it stands under.
    name : str
        What it is about.
    value : str
        What was found, in words.
    status : {"ok", "off", "problem", "info"}
        "ok": there and usable. "off": not there, and nothing is wrong. "problem": there and unusable. "info": neither.
    """

    section: str
    name: str
    value: str
    status: Status = "info"


@dataclass
class Diagnosis:
    """All facts, in the order in which they are shown."""

    facts: list[Fact] = field(default_factory=list)

    def add(self, section: str, name: str, value: object, status: Status = "info") -> None:
        """Append a fact."""
        self.facts.append(Fact(section, name, str(value), status))

    @property
    def problems(self) -> list[Fact]:
        """The facts that a user should do something about."""
        return [fact for fact in self.facts if fact.status == "problem"]

    def to_dict(self) -> dict[str, Any]:
        """Sections, each a mapping of name to value and status: plain JSON values."""
        sections: dict[str, Any] = {}
        for fact in self.facts:
            row = asdict(fact)
            sections.setdefault(row.pop("section"), {})[row.pop("name")] = row
        return sections


def _versions(report: Diagnosis) -> None:
    report.add("versions", "rvae-fast", __version__)
    report.add("versions", "python", f"{platform.python_version()} ({platform.python_implementation()})")
    report.add("versions", "platform", platform.platform())
    try:
        import torch
    except Exception as error:  # a broken torch raises OSError as well as ImportError
        report.add("versions", "torch", f"cannot be imported: {error}", "problem")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    if torch.version.hip:
        build = f"ROCm {torch.version.hip}"
    report.add("versions", "torch", f"{torch.__version__} ({build})", "ok")


def _backends(report: Diagnosis) -> None:
    from rvae_fast import _backend

    for name, reason in _backend.available_backends().items():
        broken = reason is not None and (_native.exists() if name == "native" else reason.startswith(_backend.BROKEN))
        report.add(
            "backends",
            name,
            "available" if reason is None else reason,
            "ok" if reason is None else "problem" if broken else "off",
        )
    chosen = os.environ.get(_backend.ENVIRONMENT_VARIABLE)
    report.add(
        "backends",
        "in force",
        f"{_backend.current_backend()}" + (f" (from {_backend.ENVIRONMENT_VARIABLE})" if chosen else ""),
    )


def _native_module(report: Diagnosis) -> None:
    info = _native.build_info()
    report.add("native module", "loaded", "yes" if info["loaded"] else "no", "ok" if info["loaded"] else "off")
    if not info["built"]:
        return
    report.add("native module", "built for", f"torch {info.get('torch')}, {info.get('python')}, {info.get('machine')}")
    report.add("native module", "compiler", f"{info.get('compiler')}: {info.get('flags')}")
    report.add("native module", "threads by", f"OpenMP: {info.get('openmp')}")
    report.add("native module", "compiled for", f"baseline {info.get('isa_compiled', '')}")
    if info["loaded"]:
        report.add("native module", "this CPU has", " ".join(info["isa_cpu"]) or "baseline only")
        _kernels(report, info)
    cuda = info.get("cuda")
    report.add(
        "native module",
        "CUDA half",
        f"CUDA {cuda}" if cuda else f"no: {info.get('cuda_reason')}",
        "ok" if cuda else "problem" if info.get("cuda_failed") else "off",
    )


def _kernels(report: Diagnosis, info: dict[str, Any]) -> None:
    """Which instruction set the CPU kernels use, after ``RVAE_FAST_CPU_ISA``, and whether products in bf16 run."""
    import torch

    capped = os.environ.get("RVAE_FAST_CPU_ISA")
    isa = torch.ops.rvae_fast.cpu_kernel_isa()
    report.add("native module", "CPU kernels use", isa + (f" (RVAE_FAST_CPU_ISA={capped})" if capped else ""), "ok")
    bf16 = torch.ops.rvae_fast.cpu_has_bf16_products()
    amx = "amx" in info["isa_cpu"] and "amx" in info.get("isa_compiled", "").split()
    yes = "yes, on AMX" if amx else "yes"
    report.add(
        "native module",
        "bf16 products",
        yes if bf16 else "no: they need AVX512_BF16 or AMX, and PyTorch's micro-kernels for it",
        "ok" if bf16 else "off",
    )


def _devices(report: Diagnosis) -> None:
    import torch

    report.add(
        "devices",
        "CPU",
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, ATen {torch.backends.cpu.get_cpu_capability()}",
    )
    if not torch.cuda.is_available():
        reason = "this torch is a CPU build" if torch.version.cuda is None else "torch finds no usable device or driver"
        report.add("devices", "CUDA", f"none: {reason}", "off")
    else:
        for index in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(index)
            text = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB, {p.multi_processor_count} SMs"
            report.add("devices", f"cuda:{index}", text, "ok")
    nvcc, compiler = shutil.which("nvcc"), shutil.which(os.environ.get("CXX", "c++"))
    report.add("devices", "nvcc", nvcc or "not on PATH (needed only to build the CUDA half)", "info" if nvcc else "off")
    report.add(
        "devices",
        "C++ compiler",
        compiler or "not on PATH (needed only to build the native module)",
        "info" if compiler else "off",
    )


def _packages(report: Diagnosis) -> None:
    for name, purpose in _PACKAGES.items():
        try:
            report.add("packages", name, f"{importlib.metadata.version(name)} ({purpose})", "ok")
        except importlib.metadata.PackageNotFoundError:
            if name in _REQUIRED:
                report.add("packages", name, f"missing, and required ({purpose}): pip install {name}", "problem")
            else:
                report.add(
                    "packages", name, f"not installed ({purpose}): pip install 'rvae-fast[{_EXTRA[name]}]'", "off"
                )


def _cache(report: Diagnosis) -> None:
    try:
        from rvae_fast.datasets import cache

        folder = cache.cache_folder()
    except (ImportError, AttributeError, OSError) as error:
        report.add("data", "cache folder", f"cannot be named: {error}", "problem")
        return
    state = "exists" if folder.is_dir() else "not made yet"
    report.add("data", "cache folder", f"{folder} ({state})")


def collect() -> Diagnosis:
    """Gather all facts (imports torch; loads the native module).

    Returns
    -------
    Diagnosis
    """
    report = Diagnosis()
    _versions(report)
    if report.problems:  # no torch: nothing below can be asked
        return report
    for part in (_backends, _native_module, _devices, _packages, _cache):
        part(report)
    return report


_MARK: dict[Status, tuple[str, str]] = {
    "ok": ("✓", "green"),
    "off": ("-", "dim"),
    "problem": ("✗", "bold red"),
    "info": (" ", ""),
}


def plain(report: Diagnosis) -> str:
    """The report as text: one fact a line under its section, with a mark for its status."""
    lines: list[str] = []
    width = max((len(fact.name) for fact in report.facts), default=0)
    section = None
    for fact in report.facts:
        if fact.section != section:
            section = fact.section
            lines.append(f"{chr(10) if lines else ''}{section}")
        first, *rest = fact.value.splitlines() or [""]
        lines.append(f" {_MARK[fact.status][0]} {fact.name:{width}}  {first}".rstrip())
        lines.extend(f"   {'':{width}}  {line}" for line in rest)
    return "\n".join(lines)


def render(report: Diagnosis, console: Console | None = None) -> None:
    """Print the report with rich: colours on a terminal, plain text elsewhere.

    Parameters
    ----------
    report : Diagnosis
        As from `collect`.
    console : rich.console.Console, optional
        Where to print; default standard output.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    section = None
    for fact in report.facts:
        if fact.section != section:
            if section is not None:
                table.add_row()
            section = fact.section
            table.add_row("", Text(section, style="bold"), "")
        mark, style = _MARK[fact.status]
        table.add_row(
            Text(mark, style=style), fact.name, Text(fact.value, style=style if fact.status == "problem" else "")
        )
    console.print(table)


if __name__ == "__main__":
    diagnosis = collect()
    print(plain(diagnosis))
    sys.exit(1 if diagnosis.problems else 0)
