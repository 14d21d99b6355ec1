"""What the hyperplane score (:mod:`rvae_fast.hyperplane`) looks at inside a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rvae_fast._taps import ends
from rvae_fast.local import columns_of, observer, places
from rvae_fast.models import Autoencoder
from rvae_fast.nn import ResidualStack
from rvae_fast.rapp import TILE, pathway_scorer


def depth(model: Autoencoder) -> int:
    """How many modules of ``model.encoder`` a row passes on its way to the place that counts.

    Of a residual network the end of the second stage's units, before its transition; of a plain one the activation of
    the second hidden layer. A network with no second stage or layer before the code is followed to the end of its
    first; one without any hidden layer has its input there.
    """
    modules = list(model.encoder)
    if not model.is_residual:
        next_layers = [i for i, module in enumerate(modules) if isinstance(module, torch.nn.Linear)][1:]
        return next_layers[min(1, len(next_layers) - 1)] if next_layers else 0
    stages = [i + 1 for i, module in enumerate(modules) if isinstance(module, ResidualStack)]
    return stages[min(1, len(stages) - 1)] if stages else max(0, len(modules) - 1)


def last_unit(model: Autoencoder) -> int:
    """Which place of the pathway ``"branches"`` is the last residual unit's; of a network without units, the code's."""
    found = places(model)
    return found[-1] if found else len(model.encoder) - 1


class Inside:
    """Rows to their features, and to their differences at the last unit.

    Parameters
    ----------
    model : AE, RAE, VAE or RVAE in eval mode
    options : dict
        ``device`` and ``precision`` of the network.
    """

    def __init__(self, model: Autoencoder, options: dict[str, Any]) -> None:
        self._model, self._depth = model, depth(model)
        wanted = [last_unit(model)]
        columns = columns_of(model, wanted)
        #: Where they are among the branches'.
        self.start, self.stop = columns[0]
        self._scorer = pathway_scorer(model, "branches", options)
        self._look = None if self._scorer is not None else observer(model, columns, wanted, options)
        #: Rows that the network must be given at a time, so that what it makes of one does not depend on how many came.
        self.row_tile = TILE if self._scorer is None else 1
        #: Columns of the features.
        self.width = ends(model)[self._depth][1] if self._depth else model.in_features

    def __call__(self, rows: Tensor) -> Tensor:
        """``[n, width + differences]``, side by side."""
        if self._scorer is not None:
            found = self._scorer.pathway(rows, "branches", include_input=False, differences=True, inside=self._depth)
            assert found.differences is not None
            features = rows if found.inside is None else found.inside
            return torch.cat([features.to(found.differences.dtype), found.differences[:, self.start : self.stop]], 1)
        assert self._look is not None
        difference = self._look(rows)[:, 1 + self._model.latent_features :]
        features = self._model.encoder[: self._depth](rows)
        return torch.cat([features.to(difference.dtype), difference], 1)

    def on(self, score: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """``score(features, differences)`` as a function of rows."""

        def of_rows(rows: Tensor) -> Tensor:
            seen = self(rows)
            return score(seen[:, : self.width], seen[:, self.width :])

        return of_rows
