"""Options of the four models that are wrong: an error that names them."""

from __future__ import annotations

import pytest

from rvae_fast.models import MODELS, RVAE, VAE


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"in_features": 0}, ValueError, "in_features must be at least 1"),
        ({"latent_features": -1}, ValueError, "latent_features must be at least 1"),
        ({"n_layers": 0}, ValueError, "n_layers must be at least 1"),
        ({"n_layers": "ten"}, TypeError, "n_layers must be an integer"),
        ({"widths": ()}, TypeError, "widths must be a non-empty sequence"),
        ({"widths": (8, 0)}, ValueError, r"widths\[1\] must be at least 1"),
        ({"widths": (8, 4), "blocks": (1,)}, ValueError, "blocks has 1 entries but widths 2"),
        ({"blocks": 2}, ValueError, "blocks needs widths"),
        ({"order": "both"}, ValueError, "order must be one of pre, post, got 'both'"),
        ({"likelihood": "poisson"}, ValueError, "likelihood must be one of"),
        ({"init": "magic"}, ValueError, "init must be one of"),
        ({"logvar_range": (3.0, -3.0)}, ValueError, "logvar_range must be two finite numbers"),
        ({"dropout": 1.5}, ValueError, "dropout must be in"),
        ({"dropout": "a"}, TypeError, "dropout must be a number"),
        ({"widths": 5}, TypeError, "widths must be a non-empty sequence of integers, got 5"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        RVAE(**{"in_features": 8, "latent_features": 2, "n_layers": 4, **arguments})


@pytest.mark.parametrize("arguments", [{"widths": (8,), "blocks": 1}, {"dropout": 0.1}])
def test_plain_models_refuse_what_only_units_have(arguments):
    with pytest.raises(ValueError, match="is for residual models"):
        VAE(8, 2, **arguments)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"eps": -1.0}, ValueError, "eps must be above 0, got -1.0"),
        ({"eps": "1"}, TypeError, "eps must be a number"),
        ({"momentum": 7}, ValueError, r"momentum must be None or in \[0, 1\], got 7"),
        ({"momentum": "0.1"}, TypeError, "momentum must be a number"),
        ({"logvar_range": 3}, TypeError, "logvar_range must be two finite numbers, the lower first, got 3"),
        ({"logvar_range": (1.0, 2.0, 3.0)}, TypeError, "logvar_range must be two finite numbers"),
        ({"logvar_range": (1.0, 1.0)}, ValueError, "logvar_range must be two finite numbers"),
    ],
)
def test_options_that_are_wrong(name: str, options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MODELS[name](8, 2, n_layers=3, **options)
