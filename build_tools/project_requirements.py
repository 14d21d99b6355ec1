"""Print requirements that pyproject.toml declares, one a line: `python build_tools/project_requirements.py build test`.

`build` means the build system's requirements, `core` the project's dependencies, any other name an extra. For the
Makefile, which installs them without building the project again for each extra.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:  # pip, which every venv has, carries the backport
    from pip._vendor import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent


def requirements(group: str, config: dict[str, Any]) -> list[str]:
    """The requirements of `build`, `core` or an extra, with the project's references to its own extras resolved."""
    project = config["project"]
    if group == "build":
        return list(config["build-system"]["requires"])
    if group == "core":
        return list(project["dependencies"])
    extras = project["optional-dependencies"]
    if group not in extras:
        raise SystemExit(f"no extra {group!r}; there are build, core, {', '.join(extras)}")
    found: list[str] = []
    for requirement in extras[group]:
        own = re.fullmatch(re.escape(project["name"]) + r"\[([^\]]*)\]", requirement)
        names = [name.strip() for name in own.group(1).split(",")] if own else []
        found += [line for name in names for line in requirements(name, config)] if own else [requirement]
    return found


if __name__ == "__main__":
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    print("\n".join(dict.fromkeys(line for name in sys.argv[1:] for line in requirements(name, pyproject))))
