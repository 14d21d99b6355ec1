"""Published figures that the experiments are set beside: the article's, RaPP's and the later article's."""

from __future__ import annotations

DIGITS = tuple("0123456789")

#: AUROC by novel digit, MNIST, 200 epochs: the article's table.
NOVELTY: dict[str, dict[str, float]] = {
    series: dict(zip(DIGITS, values, strict=True))
    for series, values in {
        "RVAE pre": (0.990, 0.408, 0.990, 0.969, 0.944, 0.968, 0.962, 0.909, 0.974, 0.848),
        "RVAE post": (0.987, 0.396, 0.991, 0.970, 0.935, 0.969, 0.943, 0.910, 0.972, 0.833),
        "VAE": (0.980, 0.380, 0.990, 0.967, 0.929, 0.960, 0.956, 0.900, 0.973, 0.810),
    }.items()
}

_DEPTHS = (2, 4, 6, 8, 10, 12, 14, 16)

#: Train loss (a mean over pixels) by depth, EMNIST byclass.
DEGRADATION: dict[str, dict[int, float]] = {
    "AE": dict(zip(_DEPTHS, (0.0137, 0.0099, 0.0086, 0.0080, 0.0080, 0.0077, 0.0100, 0.0120), strict=True)),
    "RAE pre": dict(zip(_DEPTHS, (0.0120, 0.0098, 0.0092, 0.0090, 0.0088, 0.0083, 0.0080, 0.0080), strict=True)),
}

#: AUROC by depth, EMNIST byclass: chance, since 'O' and 'o' are normal classes.
DEGRADATION_AUROC: dict[str, dict[int, float]] = {
    "AE": dict(zip(_DEPTHS, (0.438, 0.497, 0.515, 0.520, 0.519, 0.510, 0.487, 0.464), strict=True)),
    "RAE pre": dict(zip(_DEPTHS, (0.436, 0.470, 0.447, 0.487, 0.498, 0.491, 0.550, 0.428), strict=True)),
}

#: 80 layers, MNIST, mean of novel digits 0 and 1 (the later article): train loss, AUROC.
DEEP: dict[str, dict[str, float]] = {
    "RVAE pre": {"train_loss": 30.65, "auroc": 0.7267},
    "VAE": {"train_loss": 48.80, "auroc": 0.6027},
}

#: RaPP's mean AUROC over classes: (data, setting) -> model -> reconstruction, SAP, NAP.
RAPP: dict[tuple[str, str], dict[str, tuple[float, float, float]]] = {
    ("mnist", "multimodal"): {"AE": (0.825, 0.881, 0.899), "VAE": (0.864, 0.907, 0.927)},
    ("fashion_mnist", "multimodal"): {"AE": (0.712, 0.725, 0.734), "VAE": (0.710, 0.671, 0.737)},
    ("mnist", "unimodal"): {"AE": (0.972, 0.980, 0.979), "VAE": (0.957, 0.954, 0.976)},
    ("fashion_mnist", "unimodal"): {"AE": (0.924, 0.928, 0.933), "VAE": (0.905, 0.863, 0.934)},
}
