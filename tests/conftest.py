"""What every test shares: seeds, a cap on threads, skips that say their reason, data that may be cached."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

# Before torch is imported: its pool of threads is sized once. Two are enough for what tests do, and keep sums
# repeatable.
os.environ.setdefault("OMP_NUM_THREADS", str(min(2, os.cpu_count() or 1)))
# Threads that spin while they wait would take the cores from the processes that test beside this one.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Pictures are drawn to files, never to a screen.
os.environ.setdefault("MPLBACKEND", "Agg")

import numpy as np
import pytest
import torch

SEED = 20260
NETWORK_VARIABLE = "RVAE_FAST_TEST_NETWORK"


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_report_header(config: pytest.Config) -> list[str]:
    from rvae_fast import _native

    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return [
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, CUDA device: {cuda}",
        f"rvae_fast native module: {_native.why_not() or 'loaded'}",
    ]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; torch finds none")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whatever ran before it."""
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002 - the legacy state is what scikit-learn's random_state=None draws from
    torch.manual_seed(SEED)


@pytest.fixture
def network() -> None:
    """Ask for the network: the test is skipped unless RVAE_FAST_TEST_NETWORK=1."""
    if os.environ.get(NETWORK_VARIABLE) != "1":
        pytest.skip(f"uses the network; set {NETWORK_VARIABLE}=1 to run it")


@pytest.fixture
def cached_dataset() -> Callable[..., Any]:
    """`rvae_fast.datasets.load` without downloads; a data set that is not in the cache skips the test, with the
    reason."""
    from rvae_fast import datasets

    def load(name: str, **options: Any) -> Any:
        try:
            return datasets.load(name, download=False, **options)
        except datasets.DatasetUnavailableError as error:
            return pytest.skip(f"data set {name!r} is not cached ({error}); `make data` fetches it")

    return load


@pytest.fixture
def native() -> Any:
    """The native module; the test is skipped, with the loader's reason, where there is none."""
    from rvae_fast import _native

    reason = _native.why_not()
    if reason is not None:
        pytest.skip(f"no native module: {reason}")
    return _native.require()
