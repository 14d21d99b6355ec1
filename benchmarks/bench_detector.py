"""Detectors, fit and score, against PyOD's AutoEncoder and VAE at the same widths, batch size and epochs.

20,000 rows of 40 columns that follow eight causes; hidden layers of 128 and 64, batch 256. PyOD's networks have the
same layers (its AutoEncoder's innermost layer is the code); dropout is off on both sides.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import pytest
import torch

from rvae_fast import AEDetector, RVAEDetector, VAEDetector

ROWS, COLUMNS, WIDTHS, CODE, BATCH = 20_000, 40, (128, 64), 10, 256


def table(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(0).normal(size=(8, COLUMNS))
    return np.tanh(rng.normal(size=(ROWS, 8)) @ mixing) + 0.1 * rng.normal(size=(ROWS, COLUMNS))


def pyod(name: str, epochs: int) -> Any:
    for package in ("pyod", "tqdm"):  # tqdm: its networks import it, its requirements do not name it
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'rvae-fast[bench]'")
    common: dict[str, Any] = {"epoch_num": epochs, "batch_size": BATCH, "dropout_rate": 0.0, "batch_norm": True}
    common |= {"random_state": 0, "verbose": 0, "device": "cpu"}
    if name == "AutoEncoder":
        from pyod.models.auto_encoder import AutoEncoder

        return AutoEncoder(hidden_neuron_list=[*WIDTHS, CODE], **common)
    from pyod.models.vae import VAE

    return VAE(encoder_neuron_list=list(WIDTHS), decoder_neuron_list=list(WIDTHS)[::-1], latent_dim=CODE, **common)


def timed(run: Callable[[], Any], times: int) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the seconds that a call takes."""
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75])
    return float(low), float(median), float(high)


@pytest.mark.parametrize("rival", ["AutoEncoder", "VAE"])
def test_detector(rival: str, record: Callable[..., Any], device: torch.device, full: bool) -> None:
    if device.type != "cpu":
        pytest.skip("this suite measures the CPU")
    epochs, X, new = (10 if full else 2), table(1), table(2)
    options: dict[str, Any] = {"epochs": epochs, "batch_size": BATCH, "random_state": 0, "latent_features": CODE}
    plain = AEDetector if rival == "AutoEncoder" else VAEDetector
    makers: dict[str, Callable[[], Any]] = {
        plain.__name__: lambda: plain(widths=WIDTHS, **options),
        f"{plain.__name__} fp32": lambda: plain(widths=WIDTHS, precision="fp32", **options),
        "RVAEDetector": lambda: RVAEDetector(widths=WIDTHS, blocks=(1, 1), **options),
        f"PyOD {rival}": lambda: pyod(rival, epochs),
    }
    fitted: dict[str, Any] = {}

    def fit(name: str) -> None:
        fitted[name] = makers[name]()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fitted[name].fit(X)

    def timings(run: Callable[[str], Any], times: int) -> list[harness.Timing]:
        found = {name: timed(lambda name=name: run(name), times) for name in makers}
        first = found[plain.__name__][1]
        return [harness.Timing(name, m, low, high, None, m / first) for name, (low, m, high) in found.items()]

    case = {"against": rival, "rows": f"{ROWS} x {COLUMNS}", "epochs": epochs, "batch": BATCH}
    record({"what": "fit", **case}, timings(fit, 3 if full else 1))
    record({"what": "score", **case}, timings(lambda name: fitted[name].decision_function(new), 7 if full else 3))
    record(
        {"what": "score 20 rows one by one", **case},
        timings(lambda name: [fitted[name].decision_function(new[i : i + 1]) for i in range(20)], 5 if full else 2),
    )
