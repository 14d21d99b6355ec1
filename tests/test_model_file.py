"""What a file keeps of a network that was changed after it was made, and which changes it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from rvae_fast.detector import DETECTORS
from rvae_fast.ensemble import EnsembleDetector
from rvae_fast.models import MODELS
from rvae_fast.serialization import load, save
from tests.helpers.files import rewrite

SMALL: dict[str, Any] = {"epochs": 2, "widths": (16,), "random_state": 0}


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(80, 5))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "saved.safetensors"


def net(name: str = "RVAE") -> Any:
    return MODELS[name](6, 2, widths=(9, 5)).eval()


def test_a_likelihood_set_since_is_saved(path: Path) -> None:
    model, x = net(), torch.rand(40, 6)
    model.likelihood = "absolute"
    save(model, path)
    assert load(path).config()["likelihood"] == "absolute"
    assert torch.equal(load(path).anomaly_score(x), model.anomaly_score(x))
    model.likelihood = "poisson"
    with pytest.raises(ValueError, match="likelihood must be one of squared, absolute, bernoulli, got 'poisson'"):
        save(model, path)
    assert load(path).likelihood == "absolute"


@pytest.mark.parametrize("name", MODELS)
def test_frozen_parameters_stay_frozen(name: str, table: np.ndarray, path: Path) -> None:
    def taking(model: Any) -> list[bool]:
        return [parameter.requires_grad for parameter in model.parameters()]

    model = net(name)
    model.encoder.requires_grad_(False)
    save(model, path)
    assert taking(load(path)) == taking(model)
    detector = DETECTORS[f"{name}Detector"](**SMALL).fit(table)
    detector.model_.decoder.requires_grad_(False)
    save(detector, path)
    assert taking(load(path).model_) == taking(detector.model_)
    rewrite(path, lambda document, tensors: document.pop("frozen"))  # as versions before wrote it
    assert all(taking(load(path).model_))


def put(path: str, module: Any) -> Any:
    def change(model: Any) -> None:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, module)

    return change


def option(path: str, name: str, value: Any) -> Any:
    return lambda model: setattr(model.get_submodule(path), name, value)


CHANGES: dict[str, tuple[str, Any, str]] = {
    "norm's eps": ("AE", option("encoder.1", "eps", 1.0), r"encoder\.1\.eps is 1\.0, not 1e-05"),
    "norm's momentum": ("VAE", option("encoder.1", "momentum", None), r"encoder\.1\.momentum is None, not 0\.1"),
    "activation": ("AE", option("decoder.2", "activation", "tanh"), r"decoder\.2\.activation is 'tanh', not 'leaky"),
    "slope": ("RAE", option("encoder.1.0", "negative_slope", 0.5), r"encoder\.1\.0\.negative_slope is 0\.5"),
    "order": ("RVAE", option("encoder.1.0", "order", "post"), r"encoder\.1\.0\.order is 'post', not 'pre'"),
    "dropout": ("RVAE", option("encoder.1.0", "dropout", 0.5), r"encoder\.1\.0\.dropout is 0\.5, not 0\.0"),
    "unit's norm's eps": ("RAE", option("encoder.1.0.norms.1", "eps", 1.0), r"encoder\.1\.0\.norms\.1\.eps is 1\.0"),
    "another module": ("AE", put("encoder.2", nn.Tanh()), r"encoder\.2 is a Tanh, not a Activation"),
    "one more": ("VAE", lambda m: m.encoder.append(nn.Tanh()), r"encoder\.7 is a Tanh too many"),
    "one between": ("RAE", lambda m: m.encoder.insert(1, nn.BatchNorm1d(9)), r"encoder\.1 is a BatchNorm1d, not"),
    "one less": ("RVAE", lambda m: m.decoder.pop(3), r"decoder\.3 is a Transition, .*; and \d more"),
    "another container": ("AE", lambda m: put("encoder", nn.Sequential(*m.encoder))(m), "encoder is a Seq"),
    "another width": ("RAE", put("encoder.0", nn.Linear(6, 8)), r"encoder\.0\.out_features is 8, not 9"),
    "no bias": ("RAE", put("encoder.0", nn.Linear(6, 9, bias=False)), r"encoder\.0\.bias is missing"),
    "another weight": ("RAE", put("encoder.0.weight", nn.Parameter(torch.ones(8, 6))), r"weight has shape \[8, 6\]"),
    "forward": ("RAE", put("encoder.0.forward", lambda x: x), r"encoder\.0\.forward was replaced"),
    "method": ("RAE", option("", "anomaly_score", lambda x: x), "anomaly_score was replaced"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_load_could_not_make_again_is_refused_before_anything_is_written(change: str, path: Path) -> None:
    name, apply, message = CHANGES[change]
    model = net(name)
    save(model, path)
    before = path.read_bytes()
    apply(model)
    with pytest.raises(ValueError, match=rf"constructor's arguments; of this {name} .*{message}"):
        save(model, path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_so_it_is_in_detectors_and_ensembles(table: np.ndarray, path: Path) -> None:
    detector = DETECTORS["AEDetector"](**SMALL).fit(table)
    ensemble = EnsembleDetector(DETECTORS["AEDetector"](**SMALL), members=2).fit(table)
    for obj, member in ((detector, detector), (ensemble, ensemble.estimators_[1])):
        member.model_.likelihood = "absolute"
        obj.save(path)
        np.testing.assert_array_equal(load(path).score_samples(table), obj.score_samples(table))
        before = path.read_bytes()
        member.model_.encoder.append(nn.Tanh())
        with pytest.raises(ValueError, match=r"of this AE encoder\.4 is a Tanh too many"):
            obj.save(path)
        assert path.read_bytes() == before


def test_a_plain_linear_serves_as_a_transition(path: Path) -> None:
    model, x = net(), torch.rand(40, 6)
    model.encoder[0] = nn.Linear(6, 9)
    save(model, path)
    assert torch.equal(load(path).anomaly_score(x), model.anomaly_score(x))
