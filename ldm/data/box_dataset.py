"""Self-supervised samples: a box of a photograph becomes the hole, and its augmented content the exemplar.

docs/data.md lists the differences from the original. Dimension key: S side of the image, E of the exemplar, in pixels.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops
from torch import Tensor
from torch.utils.data import Dataset

from ldm import images
from ldm.config import DataConfig
from ldm.data import masks
from ldm.data.box_index import BoxIndex, Entry, turned_size
from ldm.files import UserError, read_table
from ldm.images import UNREADABLE, Box

if TYPE_CHECKING:
    import albumentations as A

EXEMPLAR_PADDING = 10  # pixels around the box, see masks.pixel_scale
MAX_ATTEMPTS = 20  # unreadable images in a row

Captions = Callable[[Entry, int], str]  # caption of an image whose box of that number is the hole
OpenFile = Callable[[str], BinaryIO]  # opens a file of the dataset by its name
Sample = dict[str, Any]  # tensors, and the caption
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRecipe:
    """How an image with boxes becomes a training sample."""

    image_size: int  # S
    exemplar_size: int  # E
    data: DataConfig = field(default_factory=DataConfig)  # probabilities of holes, augmentation, crop
    hard_edges: bool = False  # the mask is binary instead of antialiased
    captions: Captions | None = None

    def __call__(self, entry: Entry, open_file: OpenFile, rng: np.random.Generator) -> Sample:
        """Make a sample; `rng` is the source of all draws, in the order of the original.

        Returns:
            `image` (3, S, S) in [-1, 1]; `keep_mask` (1, S, S) in [0, 1], 0 in the hole; `masked_image` = image *
            keep_mask; `exemplar` (3, E, E), CLIP-normalised; all float32. With captions a text, `caption`.
        """
        from ldm.data.augmentation import PaperParams, augment, draw_paper_params

        # Opening reads the header only.
        with open_file(entry.name) as stream, Image.open(stream, formats=images.FORMATS) as file:
            size, data = turned_size(file.size, entry.orientation), self.data
            if size != entry.size:
                raise ValueError(f"is {size[0]} x {size[1]}, indexed as {entry.size[0]} x {entry.size[1]}")
            chosen = int(rng.integers(len(entry.boxes)))
            box = entry.boxes[chosen]
            params = draw_paper_params(rng, self.exemplar_size, data.augmentation_strength)
            seed = int(rng.integers(2**63)) if data.augmentation is not None else None
            # The paper draws the hole in the photograph and the crop around it; editing crops first.
            margins = data.crop_margin_range
            window = masks.crop_around_box(size, box, margins, self.image_size, rng) if margins else None
            grown = masks.grow_box(box, (window or Box(0, 0, *size)).clipped(*size), rng)
            wants_shape = data.p_object_mask > 0 or data.grey_background or data.p_new_background > 0
            shape = object_shape(entry, chosen, open_file) if wants_shape else None
            hole = self._draw_hole(size, box, grown, shape, rng)
            window = window or masks.crop_window(size, grown, rng)
            padded = images.pad_box(box, size, round(EXEMPLAR_PADDING * masks.pixel_scale(size)))
            decoded, reduction = self._decode(file, window, padded, entry.orientation)

        if reduction > 1:
            hole, window = hole.reduce(reduction), reduced_window(window, decoded.size, reduction)
        square = crop(decoded, hole, window, self.image_size)
        image, keep_mask = images.levels_to_tensor(square[:3]), 1 - square[3:].float() / 255
        if self.hard_edges:
            keep_mask = (keep_mask > 0.5).float()
        exemplar = decoded.crop(Box(*(round(edge / reduction) for edge in padded)))
        if shape is not None and (background := self._draw_background(exemplar.size, rng)):
            alpha = shape.crop(padded).resize(exemplar.size, Image.Resampling.BILINEAR)
            exemplar = Image.composite(exemplar, background, alpha)
        params = params if data.augment_exemplar else PaperParams()  # all other draws stay the same
        exemplar = images.normalise(augment(self.pipeline, np.asarray(exemplar), params, seed=seed))
        sample = {"image": image, "masked_image": image * keep_mask, "keep_mask": keep_mask, "exemplar": exemplar}
        return sample | {"caption": self.captions(entry, chosen)} if self.captions else sample

    @cached_property
    def pipeline(self) -> A.Compose:
        """The pipeline that squashes and augments exemplars; raises ConfigError if `data.augmentation` is none."""
        from ldm.data.augmentation import build_pipeline

        return build_pipeline(self.exemplar_size, self.data.augmentation if self.data.augment_exemplar else None)

    def _draw_hole(
        self, size: tuple[int, int], box: Box, grown: Box, shape: Image.Image | None, rng: np.random.Generator
    ) -> Image.Image:
        """Draw the hole mask (mode L, white = hole), of one of three kinds."""
        u, p_object, jitter = rng.random(), self.data.p_object_mask, round(masks.JITTER * masks.pixel_scale(size))
        if shape is not None:
            if u < p_object:
                # Wider by the jitter: edges of photographs are soft, and what is left of them would show the object.
                side = 2 * jitter + 1
                return Image.fromarray(cv2.dilate(np.asarray(shape), np.ones((side, side), np.uint8)))
            u = (u - p_object) / (1 - p_object)
        if u < self.data.p_arbitrary_mask:
            return masks.polygon_hole(size, masks.arbitrary_polygon(box, grown, rng, jitter))
        return masks.rectangle_hole(size, grown)

    def _draw_background(self, size: tuple[int, int], rng: np.random.Generator) -> Image.Image | None:
        """Draw what replaces an exemplar's background, if anything: mid-grey, else one colour or a blend of four.

        In a photograph the exemplar's surroundings are those of the hole. Who edits brings an exemplar with others.
        """
        if self.data.grey_background:
            return Image.new("RGB", size, images.MID_GREY)
        if self.data.p_new_background == 0 or rng.random() >= self.data.p_new_background:
            return None
        side = int(rng.integers(1, 3))
        corners = Image.fromarray(rng.integers(256, size=(side, side, 3), dtype=np.uint8))
        return corners.resize(size, Image.Resampling.BILINEAR)

    def _decode(self, file: Image.Image, window: Box, padded: Box, orientation: int = 1) -> tuple[Image.Image, int]:
        """Decode the photograph as RGB, upright, reduced by 1, 2, 4 or 8: as far as image and exemplar allow."""
        shortest, width = min(padded.right - padded.left, padded.bottom - padded.top), file.width
        spare = min(shortest // self.exemplar_size, (window.right - window.left) // self.image_size)
        if spare >= 2 and window.clipped(*turned_size(file.size, orientation)) == window:
            reduction = 8 if spare >= 8 else 4 if spare >= 4 else 2
            if orientation != 1:  # an incomplete block at the end would be the first one after turning
                reduction = math.gcd(reduction, *file.size)
            file.draft("RGB", (width // reduction, file.height // reduction))  # only JPEG can do it
        decoded = images.flatten(file, images.MID_GREY) if file.mode[0] in "IF" else file.convert("RGB")
        reduction = round(width / decoded.width)
        return decoded.transpose(images.TURNS[orientation]) if orientation != 1 else decoded, reduction


def object_shape(entry: Entry, chosen: int, open_file: OpenFile) -> Image.Image | None:
    """Return the object of a box in white (mode L, size of the image), or None if the annotations lack its shape."""
    if entry.shapes[chosen]:
        return masks.polygon_hole(entry.size, *entry.shapes[chosen])
    if not entry.mask:
        return None
    with open_file(entry.mask) as stream:
        white = images.load_mask(stream).point([0] * 128 + [255] * 128)
    if white.size != entry.size:
        raise ValueError(f"its mask {entry.mask} is {white.width} x {white.height}, expected the image's size")
    return ImageChops.multiply(white, masks.rectangle_hole(entry.size, entry.boxes[chosen]))


def crop(image: Image.Image, hole: Image.Image, window: Box, size: int) -> Tensor:
    """Crop a photograph (RGB) and its hole (L) to the square `window`; resize (bilinear, antialiased when shrinking).

    Returns:
        (4, size, size) uint8: RGB and the hole. Outside the image lies mid-grey that is kept.
    """
    square = image.crop(window)
    if window.clipped(*image.size) != window:
        square.paste(images.MID_GREY, (0, 0, *square.size))
        square.paste(image, (-window.left, -window.top))
    square.putalpha(hole.crop(window))
    levels = torch.from_numpy(np.array(square)).permute(2, 0, 1)[None]
    # on bytes: the arithmetic of Pillow at several times its speed
    return F.interpolate(levels, size=(size, size), mode="bilinear", antialias=True)[0]


def reduced_window(window: Box, size: tuple[int, int], reduction: int) -> Box:
    """Return the square nearest to `window` within an image of `size` that was decoded at 1/reduction."""
    side = min(round((window.right - window.left) / reduction), *size)
    left, top = (min(round(window[axis] / reduction), size[axis] - side) for axis in (0, 1))
    return Box(left, top, left + side, top + side)


class BoxDataset(Dataset[Sample]):
    """Samples from image files and an index of their boxes, by (epoch, index), with their `key`.

    Seed, epoch and index decide all draws. `max_samples` limits the dataset to the first images.
    """

    def __init__(self, index: BoxIndex, recipe: SampleRecipe, *, seed: int = 0, max_samples: int | None = None) -> None:
        self.index, self.folder, self.recipe, self.seed = index, Path(index.metadata["images"]), recipe, seed
        self.length = min(len(index), max_samples or len(index))
        self.num_skipped = 0  # in this process

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: tuple[int, int]) -> Sample:
        epoch, i = item
        rng, key = np.random.default_rng([self.seed, epoch, i]), sample_key([self.seed, epoch, i])
        for _ in range(MAX_ATTEMPTS):
            entry = self.index[i]
            try:
                return self.recipe(entry, lambda name: open(self.folder / name, "rb"), rng) | {"key": key}
            except UNREADABLE as error:
                self.num_skipped += 1
                path = self.folder / entry.name
                logger.warning("%s: skipped (%s); %d skipped so far in this process", path, error, self.num_skipped)
            i = int(rng.integers(len(self)))
        raise UserError(f"{self.folder}: {MAX_ATTEMPTS} samples in a row cannot be read; see the log for their files")


def sample_key(draw: Sequence[int]) -> Tensor:
    """Return a scalar int64, the seed of a sample's own draws in training, from the numbers that decide the sample."""
    key = np.random.SeedSequence(draw).generate_state(1, np.uint64)[0] >> np.uint64(1)
    return torch.tensor(int(key))


def open_captions(source: str, index: BoxIndex, count: int) -> Captions:
    """Open the captions of the first `count` images of an index: their classes if `source` is `classes`, else of a CSV.

    Its columns are file_name, relative to the folder of images, and caption. UserError if there are no classes, or the
    file is damaged or lacks images.
    """
    if source == "classes":
        if not index.has_labels:
            raise UserError(f"{index.path}: has no classes, which data.captions: classes needs; see docs/data.md")
        return lambda entry, chosen: entry.labels[chosen].lower()
    rows = [row for _, row in read_table(source)]
    if not any(row.keys() >= {"file_name", "caption"} for row in rows):
        raise UserError(f"{source}: not a table with the columns file_name, caption; see docs/text.md")
    captions = {row["file_name"]: str(row.get("caption", "")) for row in rows if "file_name" in row}
    if missing := [name for name in (index[i].name for i in range(count)) if name not in captions]:
        raise UserError(
            f"{source}: lacks {len(missing):,} of {count:,} images, {missing[0]} first; captions may be empty"
        )
    return lambda entry, _: captions[entry.name]
