"""Which parameters a command starts from, by the data it is given."""

from __future__ import annotations

from typing import Any

__all__ = ["starting_parameters"]

# The image preset is made for MNIST. The 8 x 8 digits have a tenth of its squared error an image, against which a KL
# divergence of full weight would win: the code would collapse to the prior, every image be reconstructed as the mean.
_DIGITS = {"latent_features": 10, "n_layers": 6, "epochs": 100, "batch_size": 64, "kld_weight": 0.1}


def starting_parameters(name: str, *, is_image: bool) -> dict[str, Any]:
    """Return a detector's parameters for the built-in data set ``name``, or for a file (any other name)."""
    from rvae_fast.presets import preset

    parameters = preset("image" if is_image else "table")
    return parameters | _DIGITS if name == "digits" and is_image else parameters
