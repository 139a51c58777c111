"""Geometry of a sample: grow the box, draw the hole, choose the crop. Pure functions that read no pixels.

Boxes are in pixels of the source image, right and bottom exclusive. Every random number comes from the
`numpy.random.Generator` that is passed in, in the order of the original code, so its recorded draws can be replayed.

Lengths that the recipe states in pixels (±5 px jitter, 10 px exemplar padding) suit photographs of Open Images' size,
which are resized to 512 px. On a smaller image they would be large beside the object. Callers therefore multiply them
by `pixel_scale`.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from ldm.images import Box

GROWTH = 0.4  # share of the free space on a side that the hole may take
ZOOM = 0.6  # share of the free space around the hole that the crop may cut off
JITTER = 5  # pixels, of an arbitrary shape's outline
REFERENCE_SIDE = 512  # short side from which on lengths in pixels are taken as they are
_CURVE_T = np.arange(1, 20)[:, None] * 0.05  # the original stops at 0.90, which leaves every curve's end open


def pixel_scale(size: tuple[int, int]) -> float:
    """Return the factor for lengths in pixels on an image of `size` (width, height): min(1, short side / 512)."""
    return min(1.0, min(size) / REFERENCE_SIDE)


def clip_box(x_min: float, y_min: float, x_max: float, y_max: float, size: tuple[int, int]) -> Box:
    """Truncate a box to whole pixels inside the image, at least 1 px wide and high.

    Args:
        x_min, y_min, x_max, y_max: corners in pixels, possibly fractional or outside the image.
        size: (width, height) of the image.
    """
    width, height = size
    left = min(max(int(x_min), 0), width - 1)
    top = min(max(int(y_min), 0), height - 1)
    right = min(max(int(x_max), left + 1), width)
    bottom = min(max(int(y_max), top + 1), height)
    return Box(left, top, right, bottom)


def grow_box(box: Box, within: Box, rng: np.random.Generator) -> Box:
    """Move every side outwards by a uniform whole number of pixels, at most 40 % of the free space there.

    Four draws: left, top, right, bottom.
    """
    return Box(
        box.left - _up_to(GROWTH * (box.left - within.left), rng),
        box.top - _up_to(GROWTH * (box.top - within.top), rng),
        box.right + _up_to(GROWTH * (within.right - box.right), rng),
        box.bottom + _up_to(GROWTH * (within.bottom - box.bottom), rng),
    )


def rectangle_hole(size: tuple[int, int], grown: Box) -> Image.Image:
    """Draw the grown box as hole mask (mode L, white = hole)."""
    hole = Image.new("L", size, 0)
    hole.paste(255, grown)
    return hole


def polygon_hole(size: tuple[int, int], polygon: np.ndarray) -> Image.Image:
    """Draw a closed polygon, (n, 2) of x, y, as hole mask (mode L, white = hole)."""
    hole = Image.new("L", size, 0)
    ImageDraw.Draw(hole).polygon([(float(x), float(y)) for x, y in polygon], fill=255)
    return hole


def outline_curves(box: Box, grown: Box) -> np.ndarray:
    """Return points on the four quadratic Bezier curves of an arbitrary shape, before jitter.

    A curve joins two neighbouring corners of the box. Its control point lies above the middle of that side, on the edge
    of the grown box; the curve reaches half of the way to it: B(t) = (1 - t)^2 P0 + 2 t (1 - t) P1 + t^2 P2.

    Returns:
        (4, 19, 2) float64 x, y at t = 0.05 … 0.95: top, right, bottom, left; clockwise from the top left corner.
    """
    corners = _corners(box)
    middle = (corners + np.roll(corners, -1, axis=0)) / 2
    control = middle.copy()
    control[[0, 2], 1] = grown.top, grown.bottom
    control[[1, 3], 0] = grown.right, grown.left
    t = _CURVE_T
    start, end = corners[:, None], np.roll(corners, -1, axis=0)[:, None]
    return (1 - t) ** 2 * start + 2 * t * (1 - t) * control[:, None] + t**2 * end


def arbitrary_polygon(box: Box, grown: Box, rng: np.random.Generator, jitter: int = JITTER) -> np.ndarray:
    """Draw the outline of an arbitrary hole: the jittered curves between the corners of the box.

    The original's jitter cuts into the object, and makes the outline cross itself where points are close. Here a
    jittered point never gets inside the box, and the points of a side keep their order along it. Each side is then a
    graph over its edge of the box; the polygon is therefore simple and contains the box.

    Args:
        jitter: largest shift of a point per axis, whole pixels.

    Returns:
        (80, 2) float64 x, y, clockwise from the top left corner of the box.
    """
    curves = outline_curves(box, grown)
    curves += rng.integers(-jitter, jitter, size=curves.shape, endpoint=True)
    top, right, bottom, left = curves
    top[:, 1] = np.minimum(top[:, 1], box.top)
    right[:, 0] = np.maximum(right[:, 0], box.right)
    bottom[:, 1] = np.maximum(bottom[:, 1], box.bottom)
    left[:, 0] = np.minimum(left[:, 0], box.left)
    top[:, 0] = np.sort(top[:, 0].clip(box.left, box.right))
    bottom[:, 0] = np.sort(bottom[:, 0].clip(box.left, box.right))[::-1]
    right[:, 1] = np.sort(right[:, 1].clip(box.top, box.bottom))
    left[:, 1] = np.sort(left[:, 1].clip(box.top, box.bottom))[::-1]
    return np.concatenate([_corners(box)[:, None], curves], axis=1).reshape(-1, 2)


def irregular_hole(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a large hole anywhere (mode L, white = hole): thick polylines with probability 0.5, else rectangles.

    Lengths are relative to the short side: up to five polylines of up to five segments, each 4 % to 80 % long and 2 %
    to 40 % wide; or up to four rectangles with sides of 12 % to 60 %.

    Source: Suvorov et al. 2022 (LaMa), section 2.3; the shares are those of its masks for 256 px, in any direction.
    """
    side, hole = min(size), Image.new("L", size)
    draw = ImageDraw.Draw(hole)
    if rng.random() < 0.5:
        for _ in range(rng.integers(1, 4, endpoint=True)):
            extent = side * rng.uniform(0.12, 0.6, size=2)
            corner = rng.uniform(0, np.array(size) - extent)
            draw.rectangle((*corner, *(corner + extent)), fill=255)
        return hole
    for _ in range(rng.integers(1, 5, endpoint=True)):
        start = rng.uniform((0, 0), size)
        for _ in range(rng.integers(1, 5, endpoint=True)):
            angle, length = rng.uniform(0, 2 * np.pi), side * rng.uniform(0.04, 0.8)
            width = max(1, round(side * rng.uniform(0.02, 0.4)))
            end = (start + length * np.array([np.cos(angle), np.sin(angle)])).clip(0, size)
            draw.line((*start, *end), fill=255, width=width)
            for point in (start, end):
                draw.circle(tuple(point), width / 2, fill=255)
            start = end
    return hole


def crop_window(size: tuple[int, int], grown: Box, rng: np.random.Generator) -> Box:
    """Draw a square window that holds the grown box, at a random place and zoom.

    A square image is used whole (as in the recipe). Otherwise the window starts as a square of the short side, anywhere
    along the long side where it holds the grown box, and then loses up to 60 % of the smallest free space around the
    box on all sides. If the grown box is longer than the short side, no such square exists, and the original squashes
    the image (also if the box touches an end of the long side). Here the window is as long as the image, zoomed by the
    same rule, and extends evenly beyond both edges of the short side: the caller pads.

    Two draws (place, zoom); none for a square image, one (zoom) for an overhanging window.

    Args:
        size: (width, height) of the image.
        grown: box inside the image.

    Returns:
        A square that contains `grown`; inside the image unless `grown` is longer than the image's short side.
    """
    width, height = size
    if width == height:
        return Box(0, 0, width, height)
    if width < height:
        return crop_window((height, width), grown.transposed(), rng).transposed()
    first, last = max(0, grown.right - height), min(width - height, grown.left)
    if first > last:
        margin = _up_to(ZOOM * min(grown.left, width - grown.right), rng)
        side = width - 2 * margin
        top = (height - side) // 2
        return Box(margin, top, margin + side, top + side)
    left = int(rng.integers(first, last, endpoint=True))
    free = min(grown.left - left, grown.top, left + height - grown.right, height - grown.bottom)
    margin = _up_to(ZOOM * free, rng)
    return Box(left + margin, margin, left + height - margin, height - margin)


def crop_around_box(
    size: tuple[int, int], box: Box, margins: tuple[float, float], min_side: int, rng: np.random.Generator
) -> Box:
    """Draw a square window around the box with some margin, as editing crops around a hole.

    Its side is the longer side of the box plus a margin on both sides, which is a fraction of it; at least `min_side`,
    so that no image is enlarged, and at most the short side of the image. Longer boxes are left to `crop_window`.

    Three draws: margin (log-uniform), left, top.

    Args:
        size: (width, height) of the image.
        box: inside the image.
        margins: smallest and largest margin, 0 < low <= high.
        min_side: pixels.

    Returns:
        A square that contains `box`; inside the image unless `box` is longer than the image's short side.
    """
    longest = max(box.right - box.left, box.bottom - box.top)
    if longest > min(size):
        return crop_window(size, box, rng)
    margin = float(np.exp(rng.uniform(*np.log(margins))))
    side = min(max(round(longest * (1 + 2 * margin)), min_side), min(size))
    left, top = (
        int(rng.integers(max(0, stop - side), min(start, length - side), endpoint=True))
        for start, stop, length in zip(box[:2], box[2:], size, strict=True)
    )
    return Box(left, top, left + side, top + side)


def _up_to(limit: float, rng: np.random.Generator) -> int:
    return int(rng.integers(0, int(limit), endpoint=True))


def _corners(box: Box) -> np.ndarray:
    """(4, 2) float64 corners, clockwise from the top left."""
    left, top, right, bottom = box
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
