"""Hole masks from files, boxes, polygons or transparency; dilated, reshaped, split into connected components.

A hole mask is an image of mode L of the scene's size: 255 where the scene is painted, 0 elsewhere.
"""

import warnings
from collections.abc import Sequence
from functools import reduce
from itertools import pairwise

import numpy as np
from PIL import Image, ImageChops

from ldm.data.masks import JITTER, arbitrary_polygon, clip_box, pixel_scale, polygon_hole, rectangle_hole
from ldm.files import UserError
from ldm.images import Box, Picture, mask_levels, pad_box, read_picture, same_aspect

MAX_COMPONENTS = 64  # each is an edit of its own
WIDENING = 0.2  # how far an arbitrary shape may reach beyond its box, as a share of the box's longer side
DARK = 32  # grey level up to which the frame of a mask counts as black
MAX_LABEL = 32  # levels of a mask that are all so low are probably numbers of classes
TO_BINARY = [0] * 128 + [255] * 128  # grey levels of a mask file => hole mask


def make_hole(
    scene: Image.Image,
    *,
    mask: Picture | None = None,
    boxes: Sequence[Sequence[float]] = (),
    polygons: Sequence[Sequence[float]] = (),
) -> Image.Image:
    """Make the hole mask of an upright scene, RGB or RGBA: its transparent part if nothing else is given.

    For the mask see `as_hole` and `fit_mask`; of boxes and polygons, see `box_hole` and `draw_polygon`, the hole is the
    union. UserError if it is empty, the mask does not fit, or a mask is given beside boxes or polygons.
    """
    size = scene.size
    parts = [*(box_hole(size, box) for box in boxes), *(draw_polygon(size, polygon) for polygon in polygons)]
    if mask is not None and parts:
        raise UserError("got a mask and boxes or polygons, expected one of them")
    if mask is not None:
        parts = [fit_mask(as_hole(mask), size, "scene")]
    hole = reduce(ImageChops.lighter, parts or [transparent_part(scene)])
    if hole.getbbox() is None:
        raise UserError(f"no mask, outline or transparent part in the scene; give a mask of its size {size}")
    return hole


def as_hole(mask: Picture) -> Image.Image:
    """Return a mask as mode L: 255 where its level is 128 or more, else 0. What is transparent is 0.

    Raises UserError if it is all 0; or if its frame is mostly opaque and not black while other parts are transparent:
    then the hole was erased from it, and its opaque part would be painted.
    """
    return read_picture(mask, _hole, "the mask")


def _hole(image: Image.Image) -> Image.Image:
    grey, alpha = mask_levels(image), "its shape is in the alpha channel; save it as white (255) on opaque black"
    lightest, hint = int(np.asarray(grey).max()), "paint what is to be replaced white (255)"
    if 0 < lightest <= MAX_LABEL:
        hint = "its levels look like labels; multiply 0 and 1 by 255"
    if image.mode == "P":
        hint = "its colours are a palette's, as of labels; make the label to be replaced white (255)"
    if image.has_transparency_data:
        levels = np.asarray(image.convert("RGBA"))
        frame = np.concatenate([levels[0], levels[-1], levels[:, 0], levels[:, -1]])
        is_light = (frame[:, -1] >= 128) & (frame[:, :-1].max(1) > DARK)
        if levels[..., -1].min() < 128 and is_light.mean() > 0.5:
            raise UserError(f"erased from an opaque image, {alpha}")
        hint = alpha if levels[..., -1].min() < 255 else hint
    if lightest < 128:
        raise UserError(f"empty, got no grey level above {lightest}; {hint}")
    return grey.point(TO_BINARY)


def fit_mask(mask: Image.Image, size: tuple[int, int], what: str) -> Image.Image:
    """Resize a mask (nearest), with a warning, to the (W, H) of its image, called `what` in messages.

    UserError if the aspects differ by more than a pixel of rounding.
    """
    if mask.size == size:
        return mask
    sizes = f"the mask is {mask.width} x {mask.height}, the {what} {size[0]} x {size[1]}"
    if same_aspect(mask.size, size):
        warnings.warn(f"the mask has size {mask.size}, the {what} {size}; the mask is resized", stacklevel=3)
        return mask.resize(size, Image.Resampling.NEAREST)
    if same_aspect((mask.height, mask.width), size):
        raise UserError(f"{sizes}; it seems to ignore the photo's EXIF rotation: turn it as viewers turn the photo")
    raise UserError(f"{sizes}; give one of its size")


def box_hole(size: tuple[int, int], box: Sequence[float]) -> Image.Image:
    """Draw a rectangle: left, top, right, bottom in pixels, right and bottom exclusive; cut off at the borders."""
    is_inside = len(box) == 4 and all(max(box[i], 0) < min(box[i + 2], size[i]) for i in (0, 1))
    is_fraction = any(0 < edge < 1 for edge in box) and max(box) <= 1  # of the scene's sides: would be one pixel
    if not (is_inside and np.isfinite(box).all()) or is_fraction:
        got, expected = ",".join(f"{edge:g}" for edge in box), "four in pixels: left,top,right,bottom"
        raise UserError(f"box: got {got}, expected {expected}, with left < right, top < bottom, within {size}")
    return rectangle_hole(size, clip_box(*box, size=size))


def draw_polygon(size: tuple[int, int], polygon: Sequence[float]) -> Image.Image:
    """Draw the inside of a polygon: x0, y0, x1, y1, x2, y2 … in pixels."""
    if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
        raise UserError(f"polygon: got {len(polygon)} numbers, expected pairs, three or more: x0,y0 x1,y1 x2,y2 …")
    hole = polygon_hole(size, np.asarray(polygon, dtype=np.float64).reshape(-1, 2))
    if hole.getbbox() is None:
        raise UserError(f"polygon: none of it lies in the scene of {size[0]}x{size[1]} pixels")
    return hole


def transparent_part(scene: Image.Image) -> Image.Image:
    """Return 255 where an RGB or RGBA image is not fully opaque, mode L."""
    return scene.convert("RGBA").getchannel("A").point([255] * 255 + [0])


def dilate(hole: Image.Image, pixels: int) -> Image.Image:
    """Add everything within `pixels` of the hole (chessboard distance)."""
    if pixels == 0:
        return hole
    return Image.fromarray(np.uint8(255) * (distance_transform(ImageChops.invert(hole)) <= pixels))


def hole_box(hole: Image.Image) -> Box:
    """Return the bounding box of a hole that is not empty."""
    bounds = hole.getbbox()
    assert bounds is not None
    return Box(*bounds)


def distance_transform(hole: Image.Image) -> np.ndarray:
    """Measure how deep in the hole each pixel lies (chessboard distance), (H, W) int32: 0 outside, 1 at its edge.

    The image border does not count as background; without any background all is 2^30.
    Source: Borgefors 1986 (distances passed on from pixel to pixel, forward and backward).
    """
    # SciPy has it, too, but its import takes a tenth of the time of an edit by the bundled model.
    far, column = np.int32(2**30), np.arange(hole.width, dtype=np.int32)
    depth = np.pad(far * (np.asarray(hole) > 0), 1, constant_values=far)
    for rows in (depth, depth[::-1, ::-1]):
        for above, row in pairwise(rows[:-1]):
            near = np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:]) + 1
            row[1:-1] = np.minimum.accumulate(np.minimum(row[1:-1], near) - column) + column
    return depth[1:-1, 1:-1]


def apply_shape(hole: Image.Image, shape: str, seed: int = 0) -> Image.Image:
    """Return each component as it is (given), as its bounding box, or as an arbitrary shape as drawn in training.

    Source of arbitrary: Yang et al. 2023, section 3.2 (mask shape augmentation).
    """
    if shape == "given":
        return hole
    boxes = [hole_box(component) for component in connected_components(hole)]
    if shape == "box":
        return reduce(ImageChops.lighter, (rectangle_hole(hole.size, box) for box in boxes))
    rng, jitter = np.random.default_rng(seed % 2**64), round(JITTER * pixel_scale(hole.size))  # seeds as torch's
    grown = [pad_box(box, hole.size, max(1, round(WIDENING * max(box.size)))) for box in boxes]
    pairs = zip(boxes, grown, strict=True)
    return polygon_hole(hole.size, *(arbitrary_polygon(box, wide, rng, jitter) for box, wide in pairs))


def connected_components(hole: Image.Image) -> list[Image.Image]:
    """Split a hole into its 8-connected components, ordered by their uppermost, leftmost pixel."""
    from scipy.ndimage import label

    labels, count = label(np.asarray(hole) > 0, structure=np.ones((3, 3)))  # pyright: ignore[reportGeneralTypeIssues]
    if count > MAX_COMPONENTS:
        raise UserError(f"the hole has {count} separate parts, expected {MAX_COMPONENTS} or fewer; remove specks")
    return [Image.fromarray(np.uint8(255) * (labels == number)) for number in range(1, count + 1)]
