"""Geometry of a sample: grow the box, draw the hole, choose the crop. Pure functions that read no pixels.

Sizes are (width, height) in pixels. Random numbers are drawn in the order of the original code.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from ldm.images import Box

GROWTH = 0.4  # share of the free space on a side that the hole may take
ZOOM = 0.6  # share of the free space around the hole that the crop may cut off
JITTER = 5  # pixels, of an arbitrary shape's outline


def pixel_scale(size: tuple[int, int]) -> float:
    """Return the factor for the recipe's lengths in pixels, too long on small images: min(1, short side / 512)."""
    return min(1.0, min(size) / 512)


def clip_box(x_min: float, y_min: float, x_max: float, y_max: float, size: tuple[int, int]) -> Box:
    """Truncate corners, possibly outside the image, to whole pixels inside it: a box at least 1 px wide and high."""
    left, top = (min(max(int(edge), 0), side - 1) for edge, side in zip((x_min, y_min), size, strict=True))
    right, bottom = min(max(int(x_max), left + 1), size[0]), min(max(int(y_max), top + 1), size[1])
    return Box(left, top, right, bottom)


def grow_box(box: Box, within: Box, rng: np.random.Generator) -> Box:
    """Move every side outwards by a uniform whole number of pixels, at most 40 % of the free space there."""
    free = (abs(edge - limit) for edge, limit in zip(box, within, strict=True))
    left, top, right, bottom = (_up_to(GROWTH * pixels, rng) for pixels in free)
    return Box(box.left - left, box.top - top, box.right + right, box.bottom + bottom)


def rectangle_hole(size: tuple[int, int], grown: Box) -> Image.Image:
    """Draw the grown box as hole mask (mode L, white = hole)."""
    hole = Image.new("L", size)
    hole.paste(255, grown)
    return hole


def polygon_hole(size: tuple[int, int], *polygons: np.ndarray) -> Image.Image:
    """Draw closed polygons, each (n, 2) of x, y, as hole mask (mode L, white = hole)."""
    hole = Image.new("L", size)
    for polygon in polygons:
        ImageDraw.Draw(hole).polygon([(float(x), float(y)) for x, y in polygon], fill=255)
    return hole


def outline_curves(box: Box, grown: Box) -> np.ndarray:
    """Return points on the four quadratic Bezier curves of an arbitrary shape, before jitter.

    A curve joins two neighbouring corners of the box; its control point lies above the middle of that side, on the edge
    of the grown box. Shape (4, 20, 2), x and y at t = 0 … 0.95: top, right, bottom, left; clockwise from the top left.
    """
    left, top, right, bottom = box
    start = np.array([(left, top), (right, top), (right, bottom), (left, bottom)], dtype=np.float64)
    end = np.roll(start, -1, axis=0)
    control = (start + end) / 2
    control[[0, 2], 1] = grown.top, grown.bottom
    control[[1, 3], 0] = grown.right, grown.left
    t = np.arange(20)[:, None] * 0.05  # the original stops at 0.90, which leaves every curve's end open
    # B(t) = (1 - t)^2 P0 + 2 t (1 - t) P1 + t^2 P2
    return (1 - t) ** 2 * start[:, None] + 2 * t * (1 - t) * control[:, None] + t**2 * end[:, None]


def arbitrary_polygon(box: Box, grown: Box, rng: np.random.Generator, jitter: int = JITTER) -> np.ndarray:
    """Draw the outline of an arbitrary hole, (80, 2) x and y: the jittered curves between the corners of the box.

    The original's jitter cuts into the object, and makes the outline cross itself. Here a point never gets inside the
    box, and the points of a side keep their order along it.
    """
    curves = outline_curves(box, grown)
    curves[:, 1:] += rng.integers(-jitter, jitter, size=(4, 19, 2), endpoint=True)  # corners of the box stay
    left, top, right, bottom = box
    low = np.array([(left, -np.inf), (right, top), (left, bottom), (-np.inf, top)])
    high = np.array([(right, top), (np.inf, bottom), (right, np.inf), (left, bottom)])
    curves = curves.clip(low[:, None], high[:, None])
    for side, axis, step in ((0, 0, 1), (1, 1, 1), (2, 0, -1), (3, 1, -1)):  # clockwise
        curves[side, ::step, axis].sort()
    return curves.reshape(-1, 2)


def irregular_hole(size: tuple[int, int], rng: np.random.Generator) -> Image.Image:
    """Draw a large hole anywhere (mode L, white = hole): thick polylines with probability 0.5, else rectangles.

    Source: Suvorov et al. 2022 (LaMa), section 2.3; lengths are those of its masks for 256 px, in any direction.
    """
    side, hole = min(size), Image.new("L", size)  # lengths are relative to the short side
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
    """Draw a square window that holds the grown box, at a random place and zoom. A square image is used whole.

    The window starts as a square of the short side, anywhere along the long side where it holds the grown box, and then
    loses up to 60 % of the smallest free space around the box on all sides. If the grown box is longer than the short
    side, the original squashes the image. Here the window is as long as the image, zoomed by the same rule, and extends
    evenly beyond both edges of the short side: the caller pads.
    """
    width, height = size
    if width == height:
        return Box(0, 0, width, height)
    if width < height:
        turned = Box(grown.top, grown.left, grown.bottom, grown.right)
        top, left, bottom, right = crop_window((height, width), turned, rng)
        return Box(left, top, right, bottom)
    first, last = max(0, grown.right - height), min(width - height, grown.left)
    if first > last:
        margin = _up_to(ZOOM * min(grown.left, width - grown.right), rng)
        side = width - 2 * margin
        top = (height - side) // 2
        return Box(margin, top, width - margin, top + side)
    left = int(rng.integers(first, last, endpoint=True))
    free = min(grown.left - left, grown.top, left + height - grown.right, height - grown.bottom)
    margin = _up_to(ZOOM * free, rng)
    return Box(left + margin, margin, left + height - margin, height - margin)


def crop_around_box(
    size: tuple[int, int], box: Box, margins: Sequence[float], min_side: int, rng: np.random.Generator
) -> Box:
    """Draw a square window around the box with some margin, as editing crops around a hole.

    Its side is the longer side of the box plus a margin on both sides, a log-uniform fraction of it between `margins`;
    at least `min_side`, so that no image is enlarged. Boxes longer than the short side are left to `crop_window`.
    """
    longest = max(box.size)
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
