from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rvae_fast.training import TrainingConfig


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("epochs", 0, ValueError),
        ("epochs", 1.5, TypeError),
        ("epochs", True, TypeError),
        ("batch_size", 1, ValueError),
        ("batch_size", "256", TypeError),
        ("optimizer", "sgd", ValueError),
        ("learning_rate", 0.0, ValueError),
        ("learning_rate", math.nan, ValueError),
        ("learning_rate", math.inf, ValueError),
        ("learning_rate", "1e-3", TypeError),
        ("learning_rate", np.array([1e-3, 1e-3]), TypeError),
        ("weight_decay", -1e-3, ValueError),
        ("betas", (0.9,), ValueError),
        ("betas", (0.9, 1.0), ValueError),
        ("betas", 0.9, ValueError),
        ("eps", 0.0, ValueError),
        ("warmup_epochs", -1.0, ValueError),
        ("warmup_epochs", "automatic", TypeError),
        ("schedule", "cyclic", ValueError),
        ("final_learning_rate", 1.0, ValueError),
        ("max_grad_norm", 0.0, ValueError),
        ("max_grad_norm", "off", TypeError),
        ("kld_weight", -1.0, ValueError),
        ("kld_warmup_epochs", math.nan, ValueError),
        ("accumulate", 0, ValueError),
        ("validation_fraction", 1.0, ValueError),
        ("validation_fraction", -0.1, ValueError),
        ("patience", 0, ValueError),
        ("min_delta", -1.0, ValueError),
        ("restore_best", 1, TypeError),
        ("precision", "fp16", ValueError),
        ("seed", -1, ValueError),
        ("seed", 2**63, ValueError),
        ("seed", 0.5, TypeError),
        ("progress", "yes", TypeError),
        ("checkpoint", 3, TypeError),
        ("checkpoint", "", TypeError),
        ("checkpoint_every", 0, ValueError),
        ("checkpoint_unit", "minutes", ValueError),
        ("sync_every", 0, ValueError),
        ("cuda_graph", "always", ValueError),
    ],
)
def test_refuses_naming_the_field(field: str, value: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match=rf"^{field} must be .*got"):
        TrainingConfig(**{field: value})


def test_every_field_is_checked() -> None:
    """A new field without a case above would go unvalidated."""
    tested = {case[0] for case in test_refuses_naming_the_field.pytestmark[0].args[1]}  # type: ignore[attr-defined]
    assert set(TrainingConfig.__dataclass_fields__) - tested == {"device"}  # needs the machine: see test_precision.py


def test_clips_by_default() -> None:
    assert TrainingConfig().max_grad_norm is not None


def test_round_trip_through_json() -> None:
    config = TrainingConfig(
        epochs=np.int64(3), learning_rate=np.float32(0.5), betas=[0.5, 0.9], checkpoint=Path("a") / "b", seed=2**63 - 1
    )
    assert type(config.epochs) is int
    assert type(config.learning_rate) is float
    assert config.betas == (0.5, 0.9)
    assert config.checkpoint == str(Path("a") / "b")
    assert TrainingConfig(**json.loads(json.dumps(config.to_dict()))) == config
