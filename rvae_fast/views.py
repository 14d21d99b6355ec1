"""Views of an image: small deformations that leave it what it shows, so that the least anomalous one counts.

A digit that was written a little higher, thinner or more slanted than those of the training rows is no other digit,
but to a network of linear layers it is another vector. A row is scored as it came and slightly deformed, and its score
is the lowest of these: an anomaly is what no small deformation makes normal. That the nearest of a set of deformations
decides is the tangent distance's idea (Simard, LeCun and Denker, "Efficient pattern recognition using a new
transformation distance", NIPS 1992), here with a few deformations in place of their tangents. Averaging over views,
which is usual where a network classifies (test-time augmentation), is worse than none for the reconstruction error
(``docs/results/README.md``): an anomaly has to be far from normal in every view, a normal row near in one.

It is for rows whose columns are pixels, and for images like handwriting: where size and place tell apart what is shown,
as in Fashion-MNIST, it is no gain. What a row is in the table stays as it is; the scores take as many times
longer as there are views.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import grid_sample

#: What the deformations are grouped by.
KINDS = ("shift", "rotation", "zoom", "shear")


@dataclass(frozen=True)
class ImageViews:
    """Small deformations of flattened images.

    Parameters
    ----------
    shape : tuple of int
        ``(height, width)`` or ``(channels, height, width)``, rows being flattened in that order.
    shift : float, default 1.0
        Pixels that the image is moved up, down, left and right.
    rotation : float, default 7.0
        Degrees that it is turned either way.
    zoom : float, default 0.07
        Share by which it is made larger, and smaller.
    shear : float, default 0.12
        Pixels per pixel of height that it is slanted either way.

    Each may be 0 for none. The pixels between pixels are interpolated linearly; beyond the border is the border's own
    value.

    Raises
    ------
    TypeError, ValueError
        Naming the parameter, what came and what was expected.

    Examples
    --------
    >>> from rvae_fast.views import ImageViews
    >>> views = ImageViews((28, 28))
    >>> len(views)
    11
    >>> views.names[:3]
    ('as it is', 'shift +y', 'shift -y')
    >>> views(torch.rand(5, 784), 1).shape
    torch.Size([5, 784])
    """

    shape: tuple[int, ...]
    shift: float = 1.0
    rotation: float = 7.0
    zoom: float = 0.07
    shear: float = 0.12

    def __post_init__(self) -> None:
        shape = self.shape
        whole = isinstance(shape, (tuple, list)) and all(
            isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n > 0 for n in shape
        )
        if not whole or len(shape) not in (2, 3):
            raise ValueError(
                f"shape must be (height, width) or (channels, height, width), whole numbers above 0, got {shape!r}"
            )
        object.__setattr__(self, "shape", tuple(int(n) for n in shape))
        for name, most in (("shift", min(self.shape[-2:])), ("rotation", 180.0), ("zoom", 0.9), ("shear", 2.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
                raise TypeError(f"{name} must be a number, got {value!r}")
            if not 0.0 <= value <= most:
                raise ValueError(f"{name} must be from 0 to {most:g}, got {value!r}")
            object.__setattr__(self, name, float(value))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def features(self) -> int:
        """Columns of a row."""
        return math.prod(self.shape)

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Of the views, in order; the first is the row as it is."""
        return ("as it is", *(name for name, _ in self._maps))

    @functools.cached_property
    def _maps(self) -> list[tuple[str, NDArray[np.float64]]]:
        """For every other view, from a pixel's ``(y, x, 1)`` about the middle to where its value comes from."""
        found: list[tuple[str, Any]] = []
        if self.shift:
            for name, sign in (("+", 1.0), ("-", -1.0)):
                found.append((f"shift {name}y", [[1.0, 0.0, -sign * self.shift], [0.0, 1.0, 0.0]]))
            for name, sign in (("+", 1.0), ("-", -1.0)):
                found.append((f"shift {name}x", [[1.0, 0.0, 0.0], [0.0, 1.0, -sign * self.shift]]))
        for name, sign in (("+", 1.0), ("-", -1.0)):
            if self.rotation:
                c, s = math.cos(math.radians(self.rotation)), sign * math.sin(math.radians(self.rotation))
                found.append((f"rotation {name}", [[c, -s, 0.0], [s, c, 0.0]]))
        for name, sign in (("+", 1.0), ("-", -1.0)):
            if self.zoom:
                by = 1.0 / (1.0 + sign * self.zoom)
                found.append((f"zoom {name}", [[by, 0.0, 0.0], [0.0, by, 0.0]]))
        for name, sign in (("+", 1.0), ("-", -1.0)):
            if self.shear:
                found.append((f"shear {name}", [[1.0, 0.0, 0.0], [sign * self.shear, 1.0, 0.0]]))
        return [(name, np.array(map_)) for name, map_ in found]

    @functools.cached_property
    def _grids(self) -> list[Tensor]:
        """Where every pixel's value comes from, as ``grid_sample`` takes it ``[1, height, width, 2]``."""
        height, width = self.shape[-2:]
        y, x = np.meshgrid(np.arange(height) - (height - 1) / 2, np.arange(width) - (width - 1) / 2, indexing="ij")
        places = np.stack([y, x, np.ones_like(y)], -1)
        grids = []
        for _, map_ in self._maps:
            from_y, from_x = np.moveaxis(places @ map_.T, -1, 0)
            # In units of half the image: -1 and 1 are its outer edges.
            grids.append(torch.from_numpy(np.stack([2 * from_x / width, 2 * from_y / height], -1)[None]).float())
        return grids

    def __call__(self, rows: Tensor, view: int) -> Tensor:
        """Rows ``[n, features]`` in one of the views, by its number; a row's does not depend on the others.

        Raises
        ------
        ValueError
            For rows of another width.
        """
        if rows.ndim != 2 or rows.shape[1] != self.features:
            raise ValueError(f"rows must be [n, {self.features}] for images of {self.shape}, got {tuple(rows.shape)}")
        if view == 0:
            return rows
        height, width = self.shape[-2:]
        grid = self._grids[view - 1].to(rows.device, rows.dtype)
        # All images and channels as channels of one: the weights of a pixel are found once.
        images = rows.reshape(1, -1, height, width)
        seen = grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)
        return seen.reshape(rows.shape)

    def describe(self) -> dict[str, Any]:
        """The parameters, to be saved."""
        return {**asdict(self), "shape": list(self.shape)}


def as_views(views: Any, features: int) -> ImageViews | None:
    """What a detector's ``views`` stands for.

    Parameters
    ----------
    views : None, str, mapping or ImageViews
        ``"image"``: the defaults for a square image of one channel; ``"28x28"``, ``"3x32x32"``: those for images of
        this shape; a mapping: the arguments of :class:`ImageViews`, of which ``shape`` may be left out for a square
        image of one channel.
    features : int
        Columns of a row.

    Raises
    ------
    TypeError, ValueError
        Naming ``views``, what came and what was expected.
    """
    if views is None:
        return None
    if isinstance(views, ImageViews):
        given = views.describe()
    elif isinstance(views, str):
        if views != "image" and not re.fullmatch(r"\d{1,9}(x\d{1,9}){1,2}", views):
            raise ValueError(f"views must be 'image' or a shape such as '28x28' or '3x32x32', got {views!r}")
        given = {} if views == "image" else {"shape": tuple(int(n) for n in views.split("x"))}
    elif isinstance(views, Mapping):
        given = dict(views)
    else:
        raise TypeError(
            f"views must be None, 'image', a shape, ImageViews or a mapping of its parameters, got {views!r}"
        )
    known = [field.name for field in fields(ImageViews)]
    if unknown := [str(name) for name in given if name not in known]:
        raise ValueError(f"views has no parameter {', '.join(unknown)}: they are {', '.join(known)}")
    if "shape" not in given:
        side = math.isqrt(features)
        if side * side != features:
            raise ValueError(
                f"views needs a shape, such as {{'shape': (height, width)}}: {features} columns are no square image"
            )
        given["shape"] = (side, side)
    try:
        made = ImageViews(**given)
    except (TypeError, ValueError) as error:
        raise type(error)(f"views: {error}") from None
    if made.features != features:
        raise ValueError(
            f"views has the shape {made.shape}, {made.features} values, where the rows have {features} columns"
        )
    return made


def lowest(
    score: Callable[[Iterator[NDArray[np.float32]]], Iterator[NDArray[np.float64]]], parts: Any, views: ImageViews
) -> Iterator[NDArray[np.float64]]:
    """The lowest score of every row over its views.

    Parameters
    ----------
    score : callable
        From an iterable of chunks ``[n, features]`` to their scores ``[n]``, chunk by chunk.
    parts : iterable of ndarray [n, features]
    views : ImageViews

    Yields
    ------
    ndarray [n] float64
        Of each chunk. A view that the network overflows on does not count, unless all do.
    """
    found = score(view for part in parts for view in seen(part, views))
    while True:
        best = next(found, None)
        if best is None:
            return
        for _ in range(len(views) - 1):
            best = np.minimum(best, next(found))
        yield best


def seen(part: NDArray[Any], views: ImageViews) -> Iterator[NDArray[np.float32]]:
    """A chunk of rows in every view."""
    rows = torch.from_numpy(np.require(part, np.float32, ["C", "W"]))  # torch warns of arrays that are read-only
    for view in range(len(views)):
        yield views(rows, view).numpy()
