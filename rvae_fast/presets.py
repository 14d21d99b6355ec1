"""Parameters that suit a kind of data, by name: a starting point to pass to a detector, chosen by experiment."""

from __future__ import annotations

from typing import Any

#: What each preset is for, by name.
PRESETS: dict[str, str] = {
    "table": "rows of a table: the detectors' own defaults",
    "image": "flattened grey-scale images with values in [0, 1], MNIST's size or thereabouts",
}

_IMAGE: dict[str, Any] = {
    # Pixels share one scale already. Scaling each alone would blow up the few that are nearly always black.
    "scaler": None,
    "latent_features": 20,
    "n_layers": 10,
    "epochs": 200,
}


def preset(name: str) -> dict[str, Any]:
    """Keyword arguments for a detector, by the kind of data.

    Parameters
    ----------
    name : {"table", "image"}
        ``"image"`` is the article's network and its 200 epochs (10 layers a side, bottleneck 20, batches of 256);
        the measurements behind the choice are in ``docs/notes/defaults.md``.

    Returns
    -------
    dict
        A new one, to be changed at will.

    Examples
    --------
    >>> from rvae_fast import RVAEDetector, preset
    >>> RVAEDetector(**preset("image")).epochs
    200
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    return dict(_IMAGE) if name == "image" else {}
