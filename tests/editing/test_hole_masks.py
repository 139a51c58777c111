"""Holes: what is drawn is painted, growing reaches as far as said, parts are taken apart and miss nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFilter

from ldm.editing.hole_masks import (
    MAX_COMPONENTS,
    apply_shape,
    as_hole,
    box_hole,
    connected_components,
    dilate,
    distance_transform,
    draw_polygon,
    make_hole,
)
from ldm.files import UserError

SIZE = (40, 30)


def pixels(hole: Image.Image) -> np.ndarray:
    values = np.asarray(hole)
    assert set(np.unique(values)) <= {0, 255}
    return values > 0


@st.composite
def blotches(draw: st.DrawFn) -> Image.Image:
    """A few rectangles that may overlap, touch or lie apart."""
    hole = np.zeros((draw(st.integers(1, 30)), draw(st.integers(1, 40))), np.uint8)
    for _ in range(draw(st.integers(1, 6))):
        top, left = draw(st.integers(0, hole.shape[0] - 1)), draw(st.integers(0, hole.shape[1] - 1))
        hole[top : top + draw(st.integers(1, 9)), left : left + draw(st.integers(1, 9))] = 255
    return Image.fromarray(hole)


def flooded(hole: np.ndarray) -> list[np.ndarray]:
    """Connected parts by growing from a pixel, eight neighbours."""
    rest, found = hole.copy(), []
    while rest.any():
        part = np.zeros_like(rest)
        part[tuple(np.argwhere(rest)[0])] = True
        while True:
            padded = np.pad(part, 1)
            wider = np.zeros_like(part)
            for dy in range(3):
                for dx in range(3):
                    wider |= padded[dy : dy + part.shape[0], dx : dx + part.shape[1]]
            wider &= hole
            if (wider == part).all():
                break
            part = wider
        found.append(part)
        rest &= ~part
    return found


@settings(max_examples=80, deadline=None)
@given(blotches())
def test_parts_are_the_connected_ones_in_reading_order(hole: Image.Image) -> None:
    expected = flooded(pixels(hole))
    found = [pixels(part) for part in connected_components(hole)]
    assert len(found) == len(expected)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))


@settings(max_examples=40, deadline=None)
@given(blotches(), st.integers(0, 6))
def test_growing_reaches_so_many_pixels(hole: Image.Image, reach: int) -> None:
    before, after = pixels(hole), pixels(dilate(hole, reach))
    ys, xs = np.nonzero(before)
    y, x = np.mgrid[: before.shape[0], : before.shape[1]]
    distance = np.min(np.maximum(np.abs(y[..., None] - ys), np.abs(x[..., None] - xs)), axis=-1)
    assert (after == (distance <= reach)).all()


@settings(max_examples=40, deadline=None)
@given(blotches())
def test_depth_is_how_often_a_hole_can_be_shrunk(hole: Image.Image) -> None:
    times, shrunk = np.zeros(pixels(hole).shape, int), hole
    for _ in range(max(hole.size)):
        times += pixels(shrunk)
        shrunk = shrunk.filter(ImageFilter.MinFilter(3))
    assert (np.minimum(distance_transform(hole), max(hole.size)) == times).all()


@settings(max_examples=40, deadline=None)
@given(blotches(), st.integers(0, 5))
def test_other_shapes_cover_the_hole(hole: Image.Image, seed: int) -> None:
    given_pixels = pixels(hole)
    assert apply_shape(hole, "given") is hole
    boxes, arbitrary = pixels(apply_shape(hole, "box")), pixels(apply_shape(hole, "arbitrary", seed))
    assert boxes[given_pixels].all() and arbitrary[boxes].all()
    assert (arbitrary == pixels(apply_shape(hole, "arbitrary", seed))).all()
    for part in connected_components(hole):
        x0, y0, x1, y1 = part.getbbox() or ()
        assert boxes[y0:y1, x0:x1].all()


def test_boxes_and_outlines() -> None:
    assert pixels(box_hole(SIZE, (4, 5, 10, 9))).sum() == 6 * 4
    assert pixels(box_hole(SIZE, (-4, 25, 10, 90))).sum() == 10 * 5  # what lies within the scene
    triangle = pixels(draw_polygon(SIZE, [5, 5, 25, 5, 5, 25]))
    assert triangle[6, 6] and not triangle[24, 24] and 180 < triangle.sum() < 240  # half of 20 x 20 and its outline


@pytest.mark.parametrize(
    "box", [(10, 5, 4, 9), (5, 5, 5, 9), (50, 5, 60, 9), (-9, 5, -2, 9), (4, 5, float("inf"), 9), (0.2, 0.3, 0.5, 1)]
)
def test_boxes_that_are_none(box: tuple[int, int, int, int]) -> None:
    with pytest.raises(UserError, match=r"^box: got"):
        box_hole(SIZE, box)


def test_holes_that_are_none() -> None:
    with pytest.raises(UserError, match=r"^polygon: got 4"):
        draw_polygon(SIZE, [0, 0, 5, 5])
    with pytest.raises(UserError, match=r"^polygon: .* 40x30"):
        draw_polygon(SIZE, [100, 100, 120, 100, 110, 120])
    specks = np.zeros((40, 40), np.uint8)
    specks[::3, ::3] = 255
    with pytest.raises(UserError, match=str(MAX_COMPONENTS)):
        connected_components(Image.fromarray(specks))


def test_holes_of_a_scene() -> None:
    """From a mask, boxes and outlines together, or the transparent part; never from nothing."""
    scene = Image.new("RGBA", SIZE, (9, 9, 9, 255))
    with pytest.raises(UserError, match="transparent"):
        make_hole(scene)
    scene.putpixel((3, 4), (9, 9, 9, 254))
    assert make_hole(scene).getbbox() == (3, 4, 4, 5)
    drawn = pixels(make_hole(scene, boxes=[(0, 0, 2, 2)], polygons=[(10, 10, 20, 10, 10, 20)]))
    assert drawn[:2, :2].all() and drawn[12, 12] and not drawn[4, 3]
    levels = Image.new("L", SIZE, 127)
    levels.putpixel((5, 6), 128)
    assert make_hole(scene, mask=levels).getbbox() == (5, 6, 6, 7)
    with pytest.raises(UserError, match="127"):
        as_hole(Image.new("L", SIZE, 127))
    with pytest.raises(UserError, match="mask"):
        make_hole(scene, mask=levels, boxes=[(0, 0, 2, 2)])


def drawn(mode: str, ground: Any, shape: Any, palette: Sequence[int] = ()) -> Image.Image:
    """A square of 24 pixels on a ground of 64."""
    mask = Image.new(mode, (64, 64), ground)
    ImageDraw.Draw(mask).rectangle((20, 20, 43, 43), fill=shape)
    if palette:
        mask.putpalette([*palette, *[0] * (768 - len(palette))])
    return mask


UNDERSTOOD = {
    "grey": drawn("L", 0, 255),
    "0 and 1": drawn("L", 0, 1),
    "0 and 1, colour": drawn("RGB", (0, 0, 0), (1, 1, 1)),
    "32 bits, 0 and 255": drawn("I", 0, 255),
    "32 bits, 0 and 1": drawn("I", 0, 1),
    "32 bits, 0 and 65535": drawn("I", 0, 65535),
    "16 bits": Image.fromarray(np.asarray(drawn("L", 0, 255)).astype(np.uint16) * 257),
    "16 bits, 0 and 255": Image.fromarray(np.asarray(drawn("L", 0, 255)).astype(np.uint16)),
    "16 bits, 0 and 1": Image.fromarray(np.asarray(drawn("L", 0, 1)).astype(np.uint16)),
    "one bit": drawn("1", 0, 1),
    "black and white palette": drawn("P", 0, 1, [0, 0, 0, 255, 255, 255]),
    "palette of 0 and 1": drawn("P", 0, 1, [0, 0, 0, 1, 1, 1]),
    "strokes on a clear layer": drawn("RGBA", (0, 0, 0, 0), (255,) * 4),
    "strokes on a clear white layer": drawn("RGBA", (255, 255, 255, 0), (255,) * 4),
    "strokes, grey with alpha": drawn("LA", (255, 0), (255, 255)),
    "strokes, grey multiplied by alpha": drawn("LA", (255, 0), (255, 255)).convert("La"),
    "strokes that are half clear": drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 140)),
    "white on opaque black with alpha": drawn("RGBA", (0, 0, 0, 255), (255,) * 4),
}


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_masks_that_are_understood(kind: str, tmp_path: Path) -> None:
    assert as_hole(UNDERSTOOD[kind]).getbbox() == (20, 20, 44, 44)
    if UNDERSTOOD[kind].mode != "La":
        path = tmp_path / ("mask.tif" if UNDERSTOOD[kind].mode == "I" else "mask.png")
        UNDERSTOOD[kind].save(path)
        assert as_hole(path).getbbox() == (20, 20, 44, 44)


@pytest.mark.parametrize(
    ("mask", "hint"),
    [
        (drawn("RGBA", (0, 0, 0, 255), (0, 0, 0, 0)), "alpha channel"),  # erased
        (drawn("RGBA", (255,) * 4, (255, 255, 255, 0)), "alpha channel"),
        (drawn("RGBA", (255,) * 4, (0, 0, 0, 0)), "alpha channel"),
        (drawn("RGBA", (90, 140, 70, 255), (90, 140, 70, 0)), "alpha channel"),  # from a photo
        (drawn("LA", (255, 255), (255, 0)), "alpha channel"),
        (drawn("LA", (255, 255), (255, 0)).convert("La"), "alpha channel"),
        (drawn("RGBA", (0, 0, 0, 0), (0, 0, 0, 255)), "alpha channel"),  # strokes
        (drawn("RGBA", (0, 0, 0, 0), (255, 0, 0, 255)), "alpha channel"),
        (drawn("RGBA", (0, 0, 0, 0), (255, 255, 255, 120)), "alpha channel"),
        (drawn("P", 0, 1, [0, 0, 0, 128, 0, 0]), "palette"),  # Pascal VOC's first class
        (drawn("L", 0, 5), "label"),
        (drawn("L", 1, 1), "255"),
        (drawn("RGB", (0, 0, 0), (255, 0, 0)), "grey level above 76"),
        (drawn("L", 0, 127), "grey level above 127"),
        (drawn("L", 0, 0), "empty"),
        (drawn("1", 0, 0), "empty"),
    ],
)
def test_masks_that_are_not_understood_get_a_hint(mask: Image.Image, hint: str) -> None:
    with pytest.raises(UserError, match=hint) as caught:
        as_hole(mask)
    assert str(caught.value).startswith("the mask: ")
