"""Views of images against scipy's interpolation and numpy's slices; parameters; the lowest score over views."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage

from rvae_fast.views import KINDS, ImageViews, as_views, lowest, seen


@pytest.mark.parametrize("shape", [(28, 28), (9, 14), (3, 12, 7), (1, 1), (1, 6)])
def test_every_view_is_what_scipy_makes_of_the_image(shape: tuple[int, ...]) -> None:
    views = ImageViews(shape, shift=0.7, rotation=20.0, zoom=0.3, shear=0.4)
    rows = torch.rand(6, views.features, generator=torch.Generator().manual_seed(0))
    images = rows.reshape(-1, *shape[-2:]).double().numpy()
    middle = (np.array(shape[-2:]) - 1) / 2
    assert len(views) == len(views.names) == 1 + len(views._maps)
    for number, (name, into) in enumerate(views._maps, start=1):
        matrix, offset = into[:, :2], into[:, 2] + middle - into[:, :2] @ middle
        wanted = [ndimage.affine_transform(image, matrix, offset, order=1, mode="nearest") for image in images]
        got = views(rows, number).reshape(images.shape).double().numpy()
        # fp32 places of pixels: near the middle between two, what is interpolated moves by their rounding.
        np.testing.assert_allclose(got, wanted, atol=2e-5, err_msg=name)


def test_shifts_rotations_and_zooms_go_where_they_say() -> None:
    views = ImageViews((8, 8), shift=2, rotation=90, zoom=0.5, shear=0)
    rows = torch.rand(3, 64)
    image = rows.reshape(3, 8, 8)
    by_name = {name: views(rows, i).reshape(3, 8, 8) for i, name in enumerate(views.names)}
    assert views(rows, 0) is rows
    close: Any = lambda a, b: torch.testing.assert_close(a, b, atol=1e-5, rtol=0)  # noqa: E731
    close(by_name["shift +y"][:, 2:], image[:, :-2])  # down
    close(by_name["shift +y"][:, 0], image[:, 0])  # beyond the border is the border
    close(by_name["shift -x"][:, :, :-2], image[:, :, 2:])  # to the left
    turned = {tuple(np.round(by_name[f"rotation {sign}"].flatten().numpy(), 4)) for sign in "+-"}
    assert turned == {tuple(np.round(torch.rot90(image, k, (1, 2)).flatten().numpy(), 4)) for k in (1, 3)}
    dot = torch.zeros(1, 64)
    dot[0, 27] = 1.0  # row 3, column 3: up and left of the middle by a half
    larger, smaller = (views(dot, views.names.index(f"zoom {sign}")).sum() for sign in "+-")
    assert larger == pytest.approx(1.5**2, rel=0.2)
    assert smaller < 1.0


def test_a_row_does_not_depend_on_the_others() -> None:
    views = ImageViews((2, 10, 10))
    rows = torch.rand(7, 200)
    for i in range(len(views)):
        whole = views(rows, i)
        assert torch.equal(whole[2:3], views(rows[2:3], i))
        assert whole.dtype == rows.dtype
        assert 0.0 <= whole.min() <= whole.max() <= 1.0 + 1e-6


def test_kinds_can_be_left_out() -> None:
    assert [name.split()[0] for name in ImageViews((4, 4)).names[1:]] == [
        *("shift",) * 4, *("rotation",) * 2, *("zoom",) * 2, *("shear",) * 2
    ]  # fmt: skip
    for kind in KINDS:
        names = ImageViews((4, 4), **{kind: 0.0}).names  # type: ignore[arg-type]
        assert kind not in " ".join(names)
        assert len(names) == 11 - (4 if kind == "shift" else 2)
    none = ImageViews((4, 4), 0, 0, 0, 0)
    assert none.names == ("as it is",)


@pytest.mark.parametrize(
    ("parameters", "error", "named"),
    [
        ({"shape": (28,)}, ValueError, "shape must be"),
        ({"shape": (28, 0)}, ValueError, "shape must be"),
        ({"shape": (28, True)}, ValueError, "shape must be"),
        ({"shape": 784}, ValueError, "shape must be"),
        ({"shape": (4, 4), "shift": "1"}, TypeError, "shift must be a number, got '1'"),
        ({"shape": (4, 4), "shift": 5}, ValueError, "shift must be from 0 to 4, got 5"),
        ({"shape": (4, 4), "rotation": -1}, ValueError, "rotation must be from 0 to 180"),
        ({"shape": (4, 4), "zoom": 1.0}, ValueError, "zoom must be from 0 to 0.9"),
        ({"shape": (4, 4), "shear": float("nan")}, ValueError, "shear must be from 0 to 2"),
        ({"shape": (4, 4), "shear": True}, TypeError, "shear must be a number"),
    ],
)
def test_bad_parameters_are_named(parameters: dict[str, Any], error: type[Exception], named: str) -> None:
    with pytest.raises(error, match=named):
        ImageViews(**parameters)


def test_rows_of_another_width() -> None:
    with pytest.raises(ValueError, match=r"rows must be \[n, 16\] for images of \(4, 4\), got \(3, 15\)"):
        ImageViews((4, 4))(torch.zeros(3, 15), 1)


def test_what_a_detector_may_be_given() -> None:
    assert as_views(None, 10) is None
    square = as_views("image", 784)
    assert square == ImageViews((28, 28)) == as_views("28x28", 784) == as_views({}, 784)
    assert as_views("3x8x4", 96) == ImageViews((3, 8, 4))
    given = ImageViews((8, 4), shift=2.0)
    assert as_views(given, 32) == given == as_views(given.describe(), 32)
    assert as_views({"shape": [8, 4], "shift": 2}, 32) == given
    for views, error, named in (
        ("images", ValueError, "views must be 'image' or a shape such as"),
        ("28x", ValueError, "views must be 'image' or a shape such as"),
        (True, TypeError, "views must be None, 'image', a shape"),
        ("image", ValueError, "30 columns are no square image"),
        ("5x5", ValueError, r"views has the shape \(5, 5\), 25 values, where the rows have 30 columns"),
        ({"turn": 3}, ValueError, "views has no parameter turn"),
        ({"shape": (5, 6), "shift": -1}, ValueError, "views: shift must be"),
    ):
        with pytest.raises(error, match=named):
            as_views(views, 30)


def test_the_lowest_of_every_row_chunk_by_chunk() -> None:
    views = ImageViews((5, 5), rotation=10)
    rows = np.random.default_rng(0).random((11, 25), dtype=np.float32)
    rows.setflags(write=False)
    weights = np.random.default_rng(1).normal(size=25)
    by_view = np.stack([view @ weights for view in seen(rows, views)])
    assert len(by_view) == len(views)
    found = list(lowest(lambda parts: (part @ weights for part in parts), np.split(rows, [4, 9]), views))
    assert [len(part) for part in found] == [4, 5, 2]
    np.testing.assert_allclose(np.concatenate(found), by_view.min(0), rtol=1e-6)
    assert list(lowest(lambda parts: (part @ weights for part in parts), [], views)) == []
