"""Holes to edit, however they are given: boxes, polygons, transparent parts, masks; grown, reshaped, taken apart.

A hole is an image of mode L of the scene's size, 255 where the scene is painted and 0 elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.data.masks import JITTER, arbitrary_polygon, clip_box, pixel_scale, polygon_hole, rectangle_hole
from ldm.files import UserError
from ldm.images import Box, pad_box

SHAPES = ("given", "box", "arbitrary")
MOST_PARTS = 64  # each is an edit of its own
WIDENING = 0.2  # of the hole's longer side, how far an arbitrary shape may reach beyond its box


def box_hole(size: tuple[int, int], box: Sequence[float]) -> Image.Image:
    """A rectangle: left, top, right, bottom in pixels, right and bottom exclusive; cut off at the borders.

    Raises:
        UserError: it is empty, or outside of a scene of `size` (W, H).
    """
    if len(box) != 4:
        raise UserError(f"box: got {len(box)} numbers, expected four: left,top,right,bottom")
    x0, y0, x1, y1 = box
    is_inside = x0 < x1 and y0 < y1 and x1 > 0 and y1 > 0 and x0 < size[0] and y0 < size[1]
    if not (is_inside and np.isfinite(box).all()):
        raise UserError(
            f"box: got {x0:g},{y0:g},{x1:g},{y1:g} in a scene of {size[0]}x{size[1]}, expected left,top,right,bottom "
            "in pixels with left < right and top < bottom, inside the scene"
        )
    return rectangle_hole(size, clip_box(x0, y0, x1, y1, size))


def drawn_hole(size: tuple[int, int], polygon: Sequence[float]) -> Image.Image:
    """The inside of a polygon, x0, y0, x1, y1, x2, y2 … in pixels.

    Raises:
        UserError: it has fewer than three corners or half a one, or no pixel of a scene of `size` (W, H).
    """
    if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise UserError(f"polygon: got {len(polygon)} numbers, expected pairs, three or more: x0,y0 x1,y1 x2,y2 …")
    hole = polygon_hole(size, np.asarray(polygon, dtype=np.float64).reshape(-1, 2))
    if hole.getbbox() is None:
        raise UserError(f"polygon: none of it lies in the scene of {size[0]}x{size[1]} pixels")
    return hole


def grown(hole: Image.Image, pixels: int) -> Image.Image:
    """The hole and everything within so many pixels of it (chessboard distance)."""
    bounds = hole.getbbox()
    if pixels == 0 or bounds is None:
        return hole
    box = pad_box(Box(*bounds), hole.size, pixels)
    x = torch.from_numpy(np.array(hole.crop(box)))[None, None].float()
    k = 2 * pixels + 1
    x = F.max_pool2d(F.max_pool2d(x, (1, k), 1, (0, pixels)), (k, 1), 1, (pixels, 0))
    result = hole.copy()
    result.paste(Image.fromarray(x[0, 0].byte().numpy()), box[:2])
    return result


def depth(hole: Image.Image) -> np.ndarray:
    """How deep in the hole a pixel lies: 1 next to what is kept (chessboard distance), 0 outside.

    Returns:
        (H, W) int32. What lies beyond the borders is no edge: a hole that reaches them is as deep there as beside them.

    Source: Rosenfeld & Pfaltz 1966 (two passes, here a row at a time).
    """
    inside = np.asarray(hole) > 0
    height, width = inside.shape
    column = np.arange(width, dtype=np.int32)
    found = np.full((height + 2, width + 2), 2**30, np.int32)  # with a rim that is no edge
    found[1:-1, 1:-1][~inside] = 0
    for rows in (range(1, height + 1), range(height, 0, -1)):
        for y in rows:
            before = found[y - rows.step]
            row = found[y, 1:-1]
            np.minimum(row, np.minimum(np.minimum(before[:-2], before[2:]), before[1:-1]) + 1, out=row)
            row[:] = np.minimum.accumulate(row - column) + column  # from the left
            row[:] = np.minimum.accumulate((row + column)[::-1])[::-1] - column  # from the right
    return found[1:-1, 1:-1]


def reshaped(hole: Image.Image, shape: str, seed: int = 0) -> Image.Image:
    """Each part of a hole as it is (given), as its box, or as one of the arbitrary shapes around it of training.

    Source of arbitrary: Yang et al. 2023, section 3.2 (mask shape augmentation).
    """
    if shape not in SHAPES:
        raise UserError(f"shape: got {shape!r}, expected one of {', '.join(SHAPES)}")
    if shape == "given":
        return hole
    rng, result = np.random.default_rng(seed), Image.new("L", hole.size)
    for part in parts(hole):
        box = Box(*(part.getbbox() or ()))
        if shape == "arbitrary":
            wider = pad_box(box, hole.size, max(1, round(WIDENING * max(box.right - box.left, box.bottom - box.top))))
            part = polygon_hole(hole.size, arbitrary_polygon(box, wider, rng, round(JITTER * pixel_scale(hole.size))))
        else:
            part = rectangle_hole(hole.size, box)
        result.paste(255, mask=part)
    return result


def parts(hole: Image.Image) -> list[Image.Image]:
    """The connected parts of a hole (also over corners), from top to bottom by their uppermost, leftmost pixel.

    Raises:
        UserError: there are more than MOST_PARTS.
    """
    pixels = np.asarray(hole) > 0
    edges = np.diff(np.pad(pixels, [(0, 0), (1, 1)]).astype(np.int8), axis=1)
    rows, starts = np.nonzero(edges == 1)
    stops = np.nonzero(edges == -1)[1]  # exclusive; runs of a row in the same order
    first = np.searchsorted(rows, np.arange(len(pixels) + 1))  # of each row's runs
    label = list(range(len(rows)))

    def root(run: int) -> int:
        while label[run] != run:
            label[run] = label[label[run]]
            run = label[run]
        return run

    for row in range(1, len(pixels)):
        above, here = first[row - 1], first[row]
        while above < first[row] and here < first[row + 1]:
            if starts[above] <= stops[here] and starts[here] <= stops[above]:
                a, b = root(above), root(here)
                label[max(a, b)] = min(a, b)
            if stops[above] < stops[here]:
                above += 1
            else:
                here += 1
    roots = np.array([root(run) for run in range(len(rows))], dtype=np.int64)
    found = np.unique(roots)
    if len(found) > MOST_PARTS:
        raise UserError(
            f"the hole has {len(found)} separate parts, expected at most {MOST_PARTS}; clean the mask of specks"
        )
    result = []
    for number in found:
        part = np.zeros(pixels.shape, np.uint8)
        for run in np.flatnonzero(roots == number):
            part[rows[run], starts[run] : stops[run]] = 255
        result.append(Image.fromarray(part))
    return result
