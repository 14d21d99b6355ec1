"""Scores over views of an image in one pass, against the library's own scores of each view."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import rvae_fast
from rvae_fast import AE, RVAE
from rvae_fast.experiments.scores import all_scores, check_score, unit
from rvae_fast.experiments.view_scores import NORMAL_ROWS, chosen, parse
from rvae_fast.experiments.views import SCORES
from rvae_fast.hyperplane import fit_hyperplane, hyperplane_scores
from rvae_fast.rapp import sap_scores
from rvae_fast.scoring import score_rows
from rvae_fast.views import ImageViews

rng = np.random.default_rng(0)
TRAIN, VALIDATION, TEST = (rng.uniform(size=(n, 36)).astype(np.float32) for n in (300, NORMAL_ROWS + 8, 20))
VIEWS = ImageViews((6, 6))


@pytest.mark.parametrize(
    ("kind", "options"), [(RVAE, {"n_layers": 7}), (RVAE, {"widths": (20, 9), "order": "post"}), (AE, {"n_layers": 3})]
)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_every_score_is_the_lowest_of_its_views(kind: Any, options: dict[str, Any], backend: str) -> None:
    torch.manual_seed(0)
    model = kind(36, latent_features=4, init="default", **options).eval()
    with rvae_fast.backend(backend):
        found = all_scores(model, SCORES, TRAIN, VALIDATION, TEST, 0)
        plane = fit_hyperplane(model, np.concatenate([TRAIN, VALIDATION]))
        of: dict[str, Any] = {
            "reconstruction": lambda rows: score_rows(model, rows),
            "sap": lambda rows: sap_scores(model, rows),
            "hyperplane": lambda rows: hyperplane_scores(model, plane, rows),
        }
        assert found.keys() == set(SCORES)
        for score, function in of.items():
            for place, whole in enumerate((VALIDATION, TEST)):
                rows = torch.from_numpy(whole)
                by_view = np.stack([function(VIEWS(rows, i).numpy()) for i in range(len(VIEWS))])
                np.testing.assert_allclose(found[score][place], by_view[0], rtol=1e-6, atol=1e-9)
                for kind_of_view in ("views", "shift", "rotation", "zoom", "shear"):
                    wanted = by_view[chosen(VIEWS, kind_of_view)].min(0)[:NORMAL_ROWS]
                    got = found[f"{score}@{kind_of_view}"][place]
                    np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9, err_msg=f"{score}@{kind_of_view}")


def test_which_views_are_of_a_kind() -> None:
    assert chosen(VIEWS, "views") == list(range(11))
    assert chosen(VIEWS, "shift") == [0, 1, 2, 3, 4]
    assert chosen(VIEWS, "shear") == [0, 9, 10]


def test_names() -> None:
    assert parse("hyperplane") is None
    assert parse("sap@zoom") == ("sap", "zoom")
    for name in SCORES:
        check_score(name)
    for name in ("nap@views", "sap@flip", "sap@"):
        with pytest.raises(ValueError, match="unknown score"):
            check_score(name)


def test_units_of_an_ensemble() -> None:
    assert unit("hyperplane@views", np.array([2.0, 4.0])) == 1.0
    assert unit("sap@views", np.array([2.0, 4.0])) == 3.0
