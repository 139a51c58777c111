"""Self-supervised samples: a box of a photograph is the hole, its augmented content the exemplar.

Differences from the original, each on purpose: one decode per sample; no image is squashed (a square that holds the
grown box is cropped, and where none exists the image is padded with mid-grey that counts as kept: the hole must not
reach into it, and grey, unlike reflected or stretched borders, tells nothing of the object); shrinking is antialiased,
as in editing; items depend on (seed, epoch, index) alone; unreadable files are skipped, logged and counted. EXIF
orientation is ignored: Open Images' boxes refer to the pixels as stored, and of the other formats' images only those
are indexed that it leaves alone.

Dimension key: S side of the image, E side of the exemplar, pixels.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from ldm import images
from ldm.data import masks
from ldm.data.box_index import BoxIndex, Entry
from ldm.data.captions import Captions
from ldm.images import Box, pad_box

EXEMPLAR_PADDING = 10  # pixels around the box, see masks.pixel_scale
MAX_ATTEMPTS = 20  # unreadable images in a row
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged files

Sample = dict[str, Any]  # tensors, and the caption
logger = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A dataset that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class SampleRecipe:
    """How an image with boxes becomes a training sample.

    Called with an entry, a function that opens one of its files, and a generator, it gives a dict of float32 tensors:
    `image` (3, S, S) in [-1, 1]; `keep_mask` (1, S, S) in [0, 1], 0 in the hole, with soft edges; `masked_image` =
    image * keep_mask; `exemplar` (3, E, E), CLIP-normalised; and with captions a text, `caption`.

    Attributes:
        image_size: S.
        exemplar_size: E.
        p_arbitrary_mask: share of arbitrary shapes among the holes, in [0, 1]; the rest are rectangles.
        p_object_mask: share of holes with the object's own shape, where it is known, before those.
        augment_exemplar: whether the exemplar is augmented or only squashed. Everything else is drawn the same.
        augmentation_strength: multiplies the angles and lengths of the augmentation.
        grey_background: show the exemplar over mid-grey, where its shape is known.
        crop_margin_range: crop as editing does, with smallest and largest margin; see `masks.crop_around_box`. None
            crops as the paper does.
        hard_edges: whether a pixel is in the hole or not, nothing in between.
        captions: what to say about an image, by entry and number of the box that is the hole.
    """

    image_size: int
    exemplar_size: int
    p_arbitrary_mask: float = 0.5
    p_object_mask: float = 0.0
    augment_exemplar: bool = True
    augmentation_strength: float = 1.0
    grey_background: bool = False
    crop_margin_range: tuple[float, float] | None = None
    hard_edges: bool = False
    captions: Captions | None = None

    def __call__(self, entry: Entry, open_file: Callable[[str], BinaryIO], rng: np.random.Generator) -> Sample:
        with open_file(entry.name) as stream, Image.open(stream) as file:  # reads the header only
            size = file.size
            if size != entry.size:
                raise ValueError(f"is {size[0]} x {size[1]}, indexed as {entry.size[0]} x {entry.size[1]}")
            scale = masks.pixel_scale(size)
            chosen = int(rng.integers(len(entry.boxes)))
            box = entry.boxes[chosen]
            drawn = images.draw_augmentation(rng, self.exemplar_size, self.augmentation_strength)
            augmentation = drawn if self.augment_exemplar else images.ExemplarAugmentation()
            # The paper draws the hole in the photograph and the crop around it; editing crops first.
            margins = self.crop_margin_range
            window = margins and masks.crop_around_box(size, box, margins, self.image_size, rng)
            grown = masks.grow_box(box, (window or Box(0, 0, *size)).clipped(*size), rng)
            wants_shape = self.p_object_mask > 0 or self.grey_background
            shape = _shape(entry, chosen, open_file) if wants_shape else None
            hole = self._hole(size, box, grown, shape, round(masks.JITTER * scale), rng)
            window = window or masks.crop_window(size, grown, rng)
            padded = pad_box(box, size, round(EXEMPLAR_PADDING * scale))
            decoded, reduction = self._decode(file, window, padded)

        if reduction > 1:
            hole, window = hole.reduce(reduction), _reduced(window, decoded.size, reduction)
        square = crop(decoded, hole, window, self.image_size)
        image, keep_mask = images.levels_to_tensor(square[:3]), 1 - square[3:].float() / 255
        if self.hard_edges:
            keep_mask = (keep_mask > 0.5).float()
        left, top, right, bottom = (round(edge / reduction) for edge in padded)
        exemplar = decoded.crop((left, top, right, bottom))
        if self.grey_background and shape is not None:
            seen = shape.crop(padded).resize(exemplar.size, Image.Resampling.BILINEAR)
            exemplar = Image.composite(exemplar, Image.new("RGB", exemplar.size, images.MID_GREY), seen)
        pixels = images.augment_exemplar(np.asarray(exemplar), self.exemplar_size, augmentation)
        sample = {
            "image": image,
            "masked_image": image * keep_mask,
            "keep_mask": keep_mask,
            "exemplar": images.clip_normalise(pixels),
        }
        return sample | {"caption": self.captions(entry, chosen)} if self.captions else sample

    def _hole(
        self,
        size: tuple[int, int],
        box: Box,
        grown: Box,
        shape: Image.Image | None,
        jitter: int,
        rng: np.random.Generator,
    ) -> Image.Image:
        """The hole mask (mode L, white = hole), of one of three kinds."""
        u = rng.random()
        if shape is not None:
            if u < self.p_object_mask:
                import cv2  # part of the training extra

                # wider by the jitter: a photograph's edges are soft, and what is left of them would tell the object
                side = 2 * jitter + 1
                return Image.fromarray(cv2.dilate(np.asarray(shape), np.ones((side, side), np.uint8)))
            u = (u - self.p_object_mask) / (1 - self.p_object_mask)
        if u < self.p_arbitrary_mask:
            return masks.polygon_hole(size, masks.arbitrary_polygon(box, grown, rng, jitter))
        return masks.rectangle_hole(size, grown)

    def _decode(self, file: Image.Image, window: Box, padded: Box) -> tuple[Image.Image, int]:
        """The photograph in RGB, at 1/2, 1/4 or 1/8 of its size when neither the image nor the exemplar needs more."""
        reduction = 1
        for candidate in (2, 4, 8):
            enough = min(padded.right - padded.left, padded.bottom - padded.top) >= candidate * self.exemplar_size
            if enough and window.right - window.left >= candidate * self.image_size:
                reduction = candidate
        width = file.width
        if reduction > 1 and window.inside(*file.size):
            file.draft("RGB", (width // reduction, file.height // reduction))
        decoded = file.convert("RGB")
        return decoded, round(width / decoded.width)


def _shape(entry: Entry, chosen: int, open_file: Callable[[str], BinaryIO]) -> Image.Image | None:
    """What a box holds in white (mode L, of the image's size), where the annotations know it."""
    if outlines := entry.shapes[chosen]:
        shape = Image.new("L", entry.size)
        draw = ImageDraw.Draw(shape)
        for outline in outlines:
            draw.polygon([(float(x), float(y)) for x, y in outline], fill=255)
        return shape
    if not entry.mask:
        return None
    with open_file(entry.mask) as stream, Image.open(stream) as file:
        white = file.convert("L").point([0] * 128 + [255] * 128)
    if white.size != entry.size:
        raise ValueError(f"its mask {entry.mask} is {white.width} x {white.height}, expected the image's size")
    return ImageChops.multiply(white, masks.rectangle_hole(entry.size, entry.boxes[chosen]))


class BoxDataset(Dataset[Sample]):
    """Samples from images and an index of their boxes.

    Args:
        index: which images, which boxes.
        images: folder that the index's names are relative to.
        recipe: what becomes of an image.
        seed: with the epoch and the index it decides everything that is random.
        max_samples: use only the first that many images.
    """

    def __init__(
        self,
        index: BoxIndex,
        images: str | Path,
        recipe: SampleRecipe,
        *,
        seed: int = 0,
        max_samples: int | None = None,
    ) -> None:
        self.index, self.images, self.recipe, self.seed = index, Path(images), recipe, seed
        self.length = len(index) if max_samples is None else min(len(index), max_samples)
        self.num_skipped = 0  # in this process

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """The sample of an (epoch, index) pair; an index alone means epoch 0."""
        epoch, i = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch, i])
        for _ in range(MAX_ATTEMPTS):
            entry = self.index[i]
            try:
                return self.recipe(entry, self._open, rng)
            except UNREADABLE as error:
                self.num_skipped += 1
                path = self.images / entry.name
                logger.warning("%s: skipped (%s); %d skipped so far in this process", path, error, self.num_skipped)
            i = int(rng.integers(len(self)))
        raise DatasetError(
            f"{self.images}: {MAX_ATTEMPTS} samples in a row cannot be read; see the log for their files"
        )

    def _open(self, name: str) -> BinaryIO:
        return open(self.images / name, "rb")


def sample_key(draw: Sequence[int]) -> Tensor:
    """A scalar int64, the seed of a sample's own random draws in training, from what decides the sample."""
    key = np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.tensor(int(key))


def crop(image: Image.Image, hole: Image.Image, window: Box, size: int) -> Tensor:
    """The square `window` of a photograph and of its hole, resized (bilinear, antialiased when shrinking).

    Args:
        image: mode RGB.
        hole: mode L, of the same size.
        window: pixels; what lies outside the image becomes mid-grey that is kept.
        size: S.

    Returns:
        (4, S, S) uint8: RGB and the hole.
    """
    if window.inside(*image.size):
        square = image.crop(window)
    else:
        square = Image.new("RGB", (window.right - window.left, window.bottom - window.top), images.MID_GREY)
        square.paste(image, (-window.left, -window.top))
    square.putalpha(hole.crop(window))
    levels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    # on bytes, Pillow's arithmetic at several times its speed
    return F.interpolate(levels[None], size=(size, size), mode="bilinear", antialias=True)[0]


def _reduced(window: Box, size: tuple[int, int], reduction: int) -> Box:
    """The nearest square within a picture of `size` that was decoded at 1/reduction of its own."""
    side = min(round((window.right - window.left) / reduction), *size)
    left, top = (
        min(round(edge / reduction), free - side) for edge, free in zip((window.left, window.top), size, strict=True)
    )
    return Box(left, top, left + side, top + side)
