"""Deep residual (variational) autoencoders for anomaly detection, with fused kernels.

The public names below are resolved on first use (PEP 562), so that ``import rvae_fast`` costs next to nothing: PyTorch,
scikit-learn and the rest are imported by the first name that needs them.

>>> from rvae_fast import RVAEDetector
>>> detector = RVAEDetector(epochs=20).fit(X_train)          # doctest: +SKIP
>>> scores = -detector.score_samples(X_test)                 # doctest: +SKIP

``rvae-fast doctor`` on the command line says which of the fast paths this installation has, and why not the others.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from rvae_fast._version import __version__

if TYPE_CHECKING:
    from rvae_fast import datasets as datasets
    from rvae_fast._backend import available_backends as available_backends
    from rvae_fast._backend import backend as backend
    from rvae_fast._backend import current_backend as current_backend
    from rvae_fast.detector import AEDetector as AEDetector
    from rvae_fast.detector import RAEDetector as RAEDetector
    from rvae_fast.detector import RVAEDetector as RVAEDetector
    from rvae_fast.detector import VAEDetector as VAEDetector
    from rvae_fast.ensemble import EnsembleDetector as EnsembleDetector
    from rvae_fast.models import AE as AE
    from rvae_fast.models import RAE as RAE
    from rvae_fast.models import RVAE as RVAE
    from rvae_fast.models import VAE as VAE
    from rvae_fast.nn import ResidualBlock as ResidualBlock
    from rvae_fast.nn import ResidualStack as ResidualStack
    from rvae_fast.nn import Transition as Transition
    from rvae_fast.ops.reconstruction_kld import reconstruction_kld as reconstruction_kld
    from rvae_fast.presets import preset as preset
    from rvae_fast.report import write_report as write_report
    from rvae_fast.scorer import Scorer as Scorer
    from rvae_fast.scorer import freeze as freeze
    from rvae_fast.scoring import score_rows as score_rows
    from rvae_fast.serialization import load as load
    from rvae_fast.serialization import save as save
    from rvae_fast.training import History as History
    from rvae_fast.training import NonFiniteError as NonFiniteError
    from rvae_fast.training import TrainingConfig as TrainingConfig
    from rvae_fast.training import train as train

# public name -> the module that defines it
_PUBLIC = {
    "AE": "models",
    "RAE": "models",
    "VAE": "models",
    "RVAE": "models",
    "AEDetector": "detector",
    "RAEDetector": "detector",
    "VAEDetector": "detector",
    "RVAEDetector": "detector",
    "EnsembleDetector": "ensemble",
    "ResidualBlock": "nn",
    "ResidualStack": "nn",
    "Transition": "nn",
    "reconstruction_kld": "ops.reconstruction_kld",
    "TrainingConfig": "training",
    "History": "training",
    "NonFiniteError": "training",
    "train": "training",
    "score_rows": "scoring",
    "freeze": "scorer",
    "Scorer": "scorer",
    "save": "serialization",
    "load": "serialization",
    "preset": "presets",
    "write_report": "report",
    "backend": "_backend",
    "current_backend": "_backend",
    "available_backends": "_backend",
}
# submodules that are reached as attributes without an import of their own
_SUBMODULES = frozenset({"datasets", "models", "nn", "ops", "report", "scoring", "serialization", "training"})

__all__ = ["__version__", "datasets", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
        globals()[name] = value  # the next access does not come here
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
