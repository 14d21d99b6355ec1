"""The package's face: every promised name is there, and importing it loads nothing that it does not need."""

from __future__ import annotations

import ast
import importlib.metadata
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

import rvae_fast

HEAVY = ("sklearn", "triton", "matplotlib", "pandas", "pyarrow", "rich", "typer", "jinja2", "rdata")


STEPS = {
    "nothing": "pass",
    "rvae_fast": "import rvae_fast",
    "torch": "import torch, torch.library",
    "core": "rvae_fast.RVAE(4), rvae_fast.reconstruction_kld, rvae_fast.TrainingConfig(), rvae_fast.train",
    "scikit-learn": "import sklearn.base, sklearn.utils, sklearn.utils.validation",
    "detector": "rvae_fast.RVAEDetector(), rvae_fast.save, rvae_fast.load",
}


@pytest.fixture(scope="module")
def added() -> dict[str, set[str]]:
    """For each of STEPS, taken in order in one fresh interpreter, the top-level packages that it imported."""
    code = "import sys, json\nseen = set()\n"
    for name, statement in STEPS.items():
        code += f"{statement}\nnow = {{m.split('.')[0] for m in sys.modules}}\n"
        code += f"print(json.dumps([{name!r}, sorted(now - seen)])); seen = now\n"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name: set(packages) for name, packages in map(json.loads, run.stdout.splitlines())}


def test_importing_the_package_does_not_even_import_torch(added: dict[str, set[str]]):
    assert "rvae_fast" in added["rvae_fast"]
    assert added["rvae_fast"].isdisjoint({"torch", "numpy", *HEAVY})


def test_models_and_training_load_no_optional_package(added: dict[str, set[str]]):
    assert sorted(added["core"] & set(HEAVY)) == []


def test_a_detector_loads_nothing_heavy_beyond_scikit_learn(added: dict[str, set[str]]):
    assert "sklearn" in added["scikit-learn"]  # which itself imports pandas where that is installed
    assert sorted(added["detector"] & set(HEAVY)) == []


@pytest.mark.parametrize("name", sorted(rvae_fast.__all__))
def test_every_public_name_resolves_and_is_documented(name: str):
    value = getattr(rvae_fast, name)
    assert name in dir(rvae_fast)
    if callable(value):
        assert inspect.getdoc(value), f"rvae_fast.{name} has no docstring"
        assert value.__module__.startswith("rvae_fast")


def test_type_checkers_see_the_same_names_as_users():
    tree = ast.parse(Path(rvae_fast.__file__).read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING")
    seen = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    lazily = {name: f"rvae_fast.{module}" for name, module in rvae_fast._PUBLIC.items()}
    assert {name: module for name, module in seen.items() if name != "datasets"} == lazily
    assert set(rvae_fast.__all__) == {"__version__", *seen}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"rvae_fast.*no attribute 'RVEA'"):
        _ = rvae_fast.RVEA


def test_version_is_the_distribution_s():
    assert importlib.metadata.version("rvae-fast") == rvae_fast.__version__
