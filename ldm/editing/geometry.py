"""Geometry of an edit: the square that the model sees, and putting the painted square back into the scene.

Dimension key: B images · C channels · S the model's image side, pixels · H, W image size, pixels.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ldm.editing.hole_masks import distance_transform, hole_box
from ldm.files import UserError
from ldm.images import Box, pad_box, pil_to_tensor, same_aspect, tensor_to_pil

MAX_ENLARGEMENT = 4  # a scene pixel covers at most this many model pixels per side
MAX_SIDE = 2**16  # of the square around a hole, pixels; time grows with it
MAX_PADDED = 2**14  # side up to which a square is made whole, strip by strip: time grows with its area
STRIP = 2**22  # pixels of a square that are in memory at a time
FEATHER_SHARE = 1 / 50  # default feather, as a share of the hole's longer side
# Largest correction of `match_boundary_colors` in [-1, 1]. Decoders err by less; a larger difference means that the
# painted object reaches over the hole's edge.
MAX_CORRECTION = 0.2


def fit_window(
    hole: Box, size: tuple[int, int], *, crop_margin: float = 0.5, min_side: int = 1, whole_image: bool = False
) -> Box:
    """Choose the square that shows the hole, a box in a scene of `size` (W, H), with its surroundings.

    Its side is the hole's longer side plus `crop_margin` of it on both sides, at least `min_side`. If that is more than
    the scene's short side, the margin shrinks to fit, down to half; beyond that the square reaches over the border. It
    is at most as large as the scene's long side, which `whole_image` takes at once. It is centred on the hole, and
    moved inside the scene where it fits. UserError if it is more than MAX_SIDE pixels wide.
    """
    side = max(size)
    if not whole_image:
        longest = max(hole.size)
        wanted = max(round(longest * (1 + 2 * crop_margin)), min_side)
        side = min(wanted, max(min(size), round(longest * (1 + crop_margin))), side)
    if side > MAX_SIDE:
        raise UserError(f"the square around the hole is {side} pixels wide, expected {MAX_SIDE} or less; shorten it")
    left, top = (
        min(max((start + stop - side) // 2, 0), length - side) if side <= length else -((side - length) // 2)
        for start, stop, length in zip(hole[:2], hole[2:], size, strict=True)
    )
    return Box(left, top, left + side, top + side)


def cut(image: Image.Image, window: Box, size: int, resample: Image.Resampling, mode: str = "RGB") -> Image.Image:
    """Crop an image to a square and resize it to (size, size); beyond the borders it is continued by reflection.

    Equal to resizing the whole square, of which a strip is in memory at a time: Pillow resamples along rows first.
    """
    box, side, wide = window.clipped(*image.size), window.size[0], []
    if box.size[0] < side > MAX_PADDED:  # first along the short axis, along which it is continued
        turn, (left, top) = Image.Transpose.TRANSPOSE, np.subtract(window[:2], box[:2])
        turned = Box(top, left, top + side, left + side)
        return cut(image.crop(box).transpose(turn), turned, size, resample, mode).transpose(turn)
    columns, rows = (
        np.pad(np.arange(box.size[axis]), np.abs(np.subtract(box, window))[axis::2], mode="reflect") for axis in (0, 1)
    )
    thickness = max(1, STRIP // side)
    for top in range(box.top, box.bottom, thickness):
        strip = image.crop((box.left, top, box.right, min(top + thickness, box.bottom)))
        if strip.width < side:
            strip = Image.fromarray(np.asarray(strip)[:, columns])
        wide.append(strip.convert(mode).resize((size, strip.height), resample))
    return Image.fromarray(np.concatenate(wide)[rows]).resize((size, size), resample)


def enlarge(square: Image.Image, window: Box, box: Box) -> Image.Image:
    """Resize an image (S, S) to the window's size and return its part in `box`, RGB, in strips as `cut`."""
    side, thickness = window.size[0], max(1, STRIP // window.size[0])
    if side > MAX_PADDED:  # up to rounding
        left, top, right, bottom = (np.subtract(box, window[:2] * 2) * square.width / side).tolist()
        return square.resize(box.size, Image.Resampling.BICUBIC, (left, top, right, bottom))
    wide, result = square.resize((side, square.height), Image.Resampling.BICUBIC), Image.new("RGB", box.size)
    for left in range(box.left, box.right, thickness):
        strip = wide.crop((left - window.left, 0, min(left + thickness, box.right) - window.left, wide.height))
        strip = strip.resize((strip.width, side), Image.Resampling.BICUBIC)
        result.paste(strip.crop((0, box.top - window.top, strip.width, box.bottom - window.top)), (left - box.left, 0))
    return result


@dataclass(frozen=True)
class FittedScene:
    """A scene, and the square of it in the model's size."""

    scene: Image.Image  # the whole scene, RGB
    hole: Image.Image  # its hole mask, mode L, 0 or 255
    window: Box  # the square's place in the scene; it may reach beyond the borders
    image: Tensor  # (1, 3, S, S) in [-1, 1], the square's pixels
    keep_mask: Tensor  # (1, 1, S, S), 0 in the hole, 1 elsewhere

    def same_square(self, image: Image.Image) -> Tensor:
        """Cut the same square from a control image of the scene, RGB: (1, 3, S, S) in [0, 1]."""
        if not same_aspect(image.size, self.scene.size):
            raise UserError(f"the control image has size {image.size}, expected the scene's: {self.scene.size}")
        bicubic = Image.Resampling.BICUBIC
        square = cut(image.resize(self.scene.size, bicubic), self.window, self.image.shape[-1], bicubic)
        return (pil_to_tensor(square)[None] + 1) / 2

    def put_back(
        self, painted: Tensor, *, feather: int | None = 0, match_colors: bool = True, paste_back: bool = True
    ) -> Image.Image:
        """Paste the painted square, (3, S, S) in [-1, 1], into the scene.

        The hole's edge fades over `feather` pixels, None for a fiftieth of the hole's longer side. `match_colors`
        applies `match_boundary_colors` first. Without `paste_back` the whole square is pasted as it is.
        """
        if match_colors and paste_back:
            painted = match_boundary_colors(painted[None], self.image, self.keep_mask)[0]
        box, result = self.window.clipped(*self.scene.size), self.scene.copy()
        inside = enlarge(tensor_to_pil(painted), self.window, box)
        # Blending is exact at both ends: weight 255 takes the painted pixel, 0 leaves the scene's.
        result.paste(inside, box[:2], self._weights(feather).crop(box) if paste_back else None)
        return result

    def _weights(self, feather: int | None) -> Image.Image:
        """Return weights of the painted pixels, mode L: 0 outside the hole, rising over feather + 1 pixels to 255."""
        if feather is None:
            feather = round(max(hole_box(self.hole).size) * FEATHER_SHARE)
        if feather == 0:
            return self.hole
        share = np.minimum(self._depth, feather + 1, dtype=np.float32) / (feather + 1)
        weights = Image.new("L", self.hole.size)
        weights.paste(Image.fromarray(np.rint(255 * share).astype(np.uint8)), with_rim(self.hole))
        return weights

    @cached_property
    def _depth(self) -> np.ndarray:
        return distance_transform(self.hole.crop(with_rim(self.hole)))


def fit_scene(scene: Image.Image, hole: Image.Image, image_size: int, **options: Any) -> FittedScene:
    """Crop the hole and its surroundings square and resize them to the model's size.

    At the model's size a pixel is part of the hole if any scene pixel in it is, so that the model never keeps pixels
    that are to be replaced. The hole is not empty; `options` are crop_margin and whole_image of `fit_window`.
    """
    window = fit_window(hole_box(hole), scene.size, min_side=-(-image_size // MAX_ENLARGEMENT), **options)
    square = cut(scene, window, image_size, Image.Resampling.BICUBIC)
    # Beyond the border the hole is reflected with the scene, which hides the mirror image of its content, too.
    share = np.asarray(cut(hole, window, image_size, Image.Resampling.BOX, "F"))
    keep_mask = torch.from_numpy(share <= 0).float()[None, None]
    return FittedScene(scene, hole, window, pil_to_tensor(square)[None], keep_mask)


def with_rim(hole: Image.Image) -> Box:
    """Return the bounding box of a hole and of the pixels right beside it."""
    return pad_box(hole_box(hole), hole.size, 1)


def match_boundary_colors(painted: Tensor, image: Tensor, keep_mask: Tensor) -> Tensor:
    """Correct a painted region by the decoder's colour error along its edge, continued smoothly into it.

    Decoding changes colours a little, differently from place to place, so that a pasted region shows its outline.
    Just outside the hole's edge both the scene and the decoder's rendering of it are known, and so is the error there.

    Args:
        painted: (B, 3, H, W), the decoded image; returned unchanged if the hole has no surroundings.
        image, keep_mask: (B, 3, H, W), of which those in the hole are not used; (B, 1, H, W), 0 in the hole, else 1.

    Source: Pérez et al. 2003, Eq. 5 to 7 (the correction is a membrane over the hole, here interpolated from coarse to
        fine as in Gortler et al. 1996, section 3.4, instead of solved for).
    """
    kept = (keep_mask > 0.5).to(painted.dtype)
    ring = F.max_pool2d(1 - kept, 3, stride=1, padding=1) * kept  # kept pixels that touch the hole
    error = (image - painted).clamp(-MAX_CORRECTION, MAX_CORRECTION)
    return painted + pull_push_fill(error * ring, ring)


def pull_push_fill(values: Tensor, known: Tensor) -> Tensor:
    """Continue values (B, C, H, W) smoothly from where `known`, (B, 1, H, W), is 1 to where it is 0.

    Source: Gortler et al. 1996, section 3.4 (pull: average to half the size; push: fill the gaps from there).
    """
    if min(values.shape[2:]) == 1:
        mean = (values * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
        return mean.expand_as(values)
    share = F.avg_pool2d(known, 2, ceil_mode=True)
    half = F.avg_pool2d(values * known, 2, ceil_mode=True) / share.clamp(min=1e-6)
    coarse = pull_push_fill(half, (share > 0).to(values.dtype))
    up = F.interpolate(coarse, size=values.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known > 0, values, up)
