"""Networks that somebody rebuilt: frozen where the kernels run them, left to themselves elsewhere, never wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import rvae_fast
from rvae_fast import AE, RAE, RVAE, VAE, freeze
from rvae_fast._activations import Activation
from rvae_fast._frozen import frozen
from rvae_fast._taps import ends, taps
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.local import fit_local, local_scores
from rvae_fast.models import Autoencoder
from rvae_fast.nn import PlainStack, ResidualStack, Transition
from rvae_fast.pathway import PATHWAYS, hidden
from rvae_fast.rapp import sap_scores
from rvae_fast.scoring import score_rows

needs_native = pytest.mark.skipif(
    rvae_fast.available_backends()["native"] is not None, reason="no native module: nothing is frozen"
)


def residual(kind: type[Autoencoder] = RAE, **options: Any) -> Any:
    return kind(12, 3, widths=[12, 8], blocks=1, init="default", **options)


def plain(*encoder: nn.Module) -> Any:
    model: Any = AE(12, 3, widths=[8])
    if encoder:
        model.encoder = PlainStack(*encoder)
    return model


def changed(model: Any, change: Callable[[Any], object]) -> Any:
    change(model)
    return model


class Doubled(nn.Sequential):
    def forward(self, input: Any) -> Any:
        return 2.0 * super().forward(input)


#: Orders, widths and kinds of modules that the program's folding and the places' counting do not hold for.
REBUILT: dict[str, Callable[[], Any]] = {
    "norm behind units": lambda: changed(residual(), lambda m: m.encoder.insert(1, nn.BatchNorm1d(12))),
    "norm first": lambda: changed(residual(), lambda m: m.encoder.insert(0, nn.BatchNorm1d(12))),
    "norm behind a transition": lambda: changed(residual(), lambda m: m.decoder.insert(1, nn.BatchNorm1d(8))),
    "activation behind units": lambda: changed(residual(order="post"), lambda m: m.encoder.insert(1, Activation())),
    "units at the code": lambda: changed(residual(), lambda m: m.encoder.append(ResidualStack(3, 1))),
    "units behind a mean": lambda: changed(residual(RVAE), lambda m: m.decoder.insert(0, ResidualStack(3, 1))),
    "activation at the code": lambda: changed(plain(), lambda m: m.encoder.append(Activation())),
    "norm at the code": lambda: changed(residual(), lambda m: m.encoder.append(nn.BatchNorm1d(3))),
    "two norms": lambda: plain(
        nn.Linear(12, 8), nn.BatchNorm1d(8), Activation(), nn.BatchNorm1d(8), nn.Linear(8, 3)
    ),
    "norm behind activation": lambda: plain(nn.Linear(12, 8), Activation(), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "no norm": lambda: plain(nn.Linear(12, 8), Activation(), nn.Linear(8, 3)),
    "no activation": lambda: plain(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)),
    "units in a plain model": lambda: plain(ResidualStack(12, 1), Transition(12, 3)),
    "another container": lambda: changed(plain(), lambda m: setattr(m, "encoder", Doubled(*m.encoder))),
}  # fmt: skip

#: As the models build them, or with more of the same.
KNOWN: dict[str, Callable[[], Any]] = {
    "AE": lambda: AE(12, 3, n_layers=4),
    "VAE": lambda: VAE(12, 3, widths=[8, 30], activation="tanh"),
    "one layer": lambda: AE(12, 3, n_layers=1),
    "RAE": lambda: residual(),
    "RVAE": lambda: RVAE(12, 3, n_layers=10),
    "post": lambda: residual(order="post", layers=3, dropout=0.2),
    "projected": lambda: RVAE(12, 3, widths=[16, 9], blocks=[0, 2]),
    "transitions alone": lambda: RAE(12, 3, n_layers=1),
    "more units": lambda: changed(residual(), lambda m: m.encoder.insert(1, ResidualStack(12, 2))),
    "more transitions": lambda: changed(residual(), lambda m: m.encoder.insert(1, nn.Linear(12, 12))),
    "another norm's eps in a unit": lambda: changed(
        residual(), lambda m: setattr(m.encoder[0][0].norms[1], "eps", 1.0)
    ),
    "more of a plain one": lambda: plain(*AE(12, 3, widths=[8, 9, 4]).encoder),
}


def used(model: Any) -> Any:
    """With statistics and weights that are nobody's defaults."""
    torch.manual_seed(0)
    model.train()
    for _ in range(5):
        model(2.0 * torch.randn(64, 12) + 1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def by_model(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with rvae_fast.backend("reference"):
        return function(*args, **options)


@needs_native
@pytest.mark.parametrize("name", [*REBUILT, *KNOWN])
def test_scores_are_the_models_in_whatever_order_its_modules_stand(name: str) -> None:
    model, rows = used((REBUILT | KNOWN)[name]()), torch.randn(50, 12)
    assert freeze(model).backend == ("native" if name in KNOWN else "reference")
    assert (frozen(model, "fp32") is None) == (name in REBUILT)
    right = by_model(score_rows, model, rows)
    np.testing.assert_allclose(score_rows(model, rows), right, rtol=1e-4)
    np.testing.assert_allclose(freeze(model)(rows), right, rtol=1e-4)
    for pathway in PATHWAYS:
        right = by_model(sap_scores, model, rows, pathway=pathway)
        np.testing.assert_allclose(sap_scores(model, rows, pathway=pathway), right, rtol=1e-4)


@pytest.mark.parametrize("name", [*REBUILT, *KNOWN])
def test_places_are_counted_as_rows_meet_them(name: str) -> None:
    """The local and the hyperplane score cut columns out of the differences by these counts."""
    model, rows = used((REBUILT | KNOWN)[name]()), torch.randn(50, 12)
    with torch.no_grad():
        for pathway in ("stages", "units", "branches"):
            widths = [place.shape[1] for place in hidden(model, rows, pathway)]
            found = taps(model, pathway)
            assert found[:, 2].tolist() == widths
            assert found[:, 1].tolist() == [sum(widths[:i]) for i in range(len(widths))]
        for number, (_, width) in ends(model).items():
            assert model.encoder[:number](rows).shape[1] == width
    for fit, scores in ((fit_local, local_scores), (fit_hyperplane, hyperplane_scores)):
        fitted: Any = fit(model, rows.numpy())
        assert np.isfinite(scores(model, fitted, rows.numpy())).all()


@needs_native
def test_widths_that_do_not_fit_are_the_models_error() -> None:
    model = residual()
    model.encoder[1] = Transition(12, 9)
    assert frozen(model, "fp32") is None
    with pytest.raises(ValueError, match="input must have shape"):
        score_rows(model, torch.randn(4, 12))


@needs_native
@pytest.mark.parametrize("where", ["", "encoder", "encoder.1", "decoder.1.0", "decoder.1.0.linears.0"])
def test_a_replaced_forward_is_not_frozen_over(where: str) -> None:
    model = residual()
    module = model.get_submodule(where)
    own = module.forward
    module.forward = lambda *args: own(*args)
    assert freeze(model).backend == "reference"
    del module.forward
    model.loss_terms = lambda x: (x, x)
    assert freeze(model).backend == "reference"
    del model.loss_terms
    assert freeze(model).backend == "native"


@needs_native
def test_a_likelihood_that_there_is_not_is_the_models_error() -> None:
    model = residual()
    score_rows(model, torch.randn(4, 12))
    model.likelihood = "poisson"
    with pytest.raises(ValueError, match="poisson"):
        score_rows(model, torch.randn(4, 12))
