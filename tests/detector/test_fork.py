"""Children of ``os.fork``, as ``multiprocessing`` makes them on Linux: OpenMP's threads do not come along."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")

START = """
import os, signal, warnings
import numpy as np, torch
import rvae_fast, rvae_fast.scoring
from rvae_fast import AEDetector, EnsembleDetector, RVAEDetector, freeze

warnings.simplefilter("ignore")
torch.set_num_threads(2)
rng = np.random.default_rng(0)
X = (rng.normal(size=(1500, 3)) @ rng.normal(size=(3, 80)) + 0.1 * rng.normal(size=(1500, 80))).astype("f4")
def make(kind=RVAEDetector, **options):
    return kind(epochs=1, random_state=0, widths=[200], **options)
def in_a_child(work):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        os._exit(0 if work() else 1)
    status = os.waitpid(child, 0)[1]
    assert status == 0, status
"""


def run(program: str) -> None:
    # Threads that spin while they wait would make this a test of the scheduler on a busy machine.
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, "-c", START + program], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr


def test_a_child_scores_after_its_parent_did() -> None:
    run("""
made = [make(anomaly_score=score).fit(X) for score in ("elbo", "sap", "nap", "local", "hyperplane")]
before = [(one.score_samples(X), one.feature_errors(X), one.transform(X)) for one in made]

def work():
    for one, parts in zip(made, before):
        now = one.score_samples(X), one.feature_errors(X), one.transform(X)
        if not all(map(np.array_equal, now, parts)) or torch.get_num_threads() != 2:
            return False
    return True

in_a_child(work)
assert torch.get_num_threads() == 2
""")


def test_and_trains_and_freezes() -> None:
    run("""
detector = make().fit(X)

def work():
    ensemble = EnsembleDetector(make(AEDetector), members=2, random_state=0).fit(X)
    again = make().fit(X).fit_score(X[:1000])
    return np.isfinite(again.score_samples(X)).all() and np.isfinite(ensemble.score_samples(X)).all()

in_a_child(work)
model, x = rvae_fast.RVAE(300, 5, n_layers=5).eval(), torch.rand(3000, 300)
double = rvae_fast.RVAE(300, 5, n_layers=5).double().eval()
scores = rvae_fast.scoring.score_rows(double, x.numpy())
model(x)
in_a_child(lambda: freeze(model)(x[:5]).isfinite().all())
in_a_child(lambda: np.allclose(rvae_fast.scoring.score_rows(double, x.numpy()), scores))
""")


def test_a_child_of_a_parent_that_used_no_threads_trains_with_all() -> None:
    run("""
seen = []
def look(model, history):
    seen.append(torch.get_num_threads())

def work():
    from rvae_fast.training import TrainingConfig, train
    for _ in range(2):
        train(rvae_fast.AE(80, 3, n_layers=2), X, TrainingConfig(epochs=1), callbacks=[look])
    return seen == [2, 2]

in_a_child(work)
""")
