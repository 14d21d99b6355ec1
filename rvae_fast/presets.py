"""Parameters that suit a kind of data, by name: a starting point to pass to a detector, chosen by experiment."""

from __future__ import annotations

import copy
from typing import Any

#: What each preset is for, by name.
PRESETS: dict[str, str] = {
    "table": "rows of a table: the detectors' own defaults",
    "image": "flattened grey-scale images with values in [0, 1], MNIST's size or thereabouts",
    "image-hyperplane": "the same, by a short training and the hyperplane score, which keeps training rows",
    "image-views": "the same, each image scored by the least anomalous of eleven views, ten of them deformed",
    "image-two-rates": "two networks of image-hyperplane, one trained at half the learning rate: an EnsembleDetector",
}

#: Those of an :class:`~rvae_fast.EnsembleDetector`: the preset of its estimator, and what is each member's own.
ENSEMBLES: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "image-two-rates": ("image-hyperplane", [{}, {"learning_rate": 1e-3}]),
}

_IMAGE: dict[str, Any] = {
    # Pixels share one scale already. Scaling each alone would blow up the few that are nearly always black.
    "scaler": None,
    "latent_features": 20,
    "n_layers": 10,
    "epochs": 200,
}

#: What ``rvae-fast reproduce rapp`` trains RVAE by.
_IMAGE_HYPERPLANE: dict[str, Any] = {
    **_IMAGE,
    "epochs": 12,
    "learning_rate": 2e-3,
    "anomaly_score": "hyperplane",
}

_IMAGE_VIEWS: dict[str, Any] = {**_IMAGE_HYPERPLANE, "views": "image"}


def preset(name: str) -> dict[str, Any]:
    """Keyword arguments for a detector, by the kind of data.

    Parameters
    ----------
    name : {"table", "image", "image-hyperplane", "image-views", "image-two-rates"}
        ``"image"`` is the article's network and its 200 epochs (10 layers a side, bottleneck 20, batches of 256);
        the measurements behind the choice are in ``docs/notes/defaults.md``. ``"image-hyperplane"`` is that network
        after 12 epochs, scored by :mod:`rvae_fast.hyperplane`: mean AUROC .936 over MNIST's ten digits, where the
        error has .847, for a saved detector five times as large and .3 ms of a core a row. That is of 38,000 rows to
        learn from and to compare with; with 12,000 more to compare with it has .939, and two of these networks, one
        trained at half the learning rate, .944 (``docs/results/README.md``). The two, for twice the time and the file,
        are ``"image-two-rates"``, for an :class:`~rvae_fast.EnsembleDetector`; by the 38,000 alone it was not measured.
        Images like Fashion-MNIST's want twice its learning rate: .753 with ``learning_rate=4e-3``, .743 without.

        ``"image-views"`` scores the least anomalous of eleven views of an image (:mod:`rvae_fast.views`), which takes
        eleven times as long: .952 in place of .939 on MNIST, five seeds; on Fashion-MNIST it is no gain. It is for
        square images of one channel; others need their own ``views``.

    Returns
    -------
    dict
        A new one, to be changed at will.

    Examples
    --------
    >>> from rvae_fast import EnsembleDetector, RVAEDetector, preset
    >>> RVAEDetector(**preset("image")).epochs
    200
    >>> EnsembleDetector(**preset("image-two-rates")).members
    [{}, {'learning_rate': 0.001}]
    """
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    if name in ENSEMBLES:
        from rvae_fast.detector import RVAEDetector

        base, members = ENSEMBLES[name]
        return {"estimator": RVAEDetector(**preset(base)), "members": copy.deepcopy(members)}
    return dict({"image": _IMAGE, "image-hyperplane": _IMAGE_HYPERPLANE, "image-views": _IMAGE_VIEWS}.get(name, {}))
