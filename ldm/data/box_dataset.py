"""Self-supervised samples: a box of a photograph becomes the hole, and its augmented content the exemplar.

Deliberate differences from the original:

- The photograph is decoded once per sample.
- No image is squashed. A square that holds the grown box is cropped; where none exists the image is padded with
  mid-grey that counts as kept. The hole must not reach into the padding, and grey, unlike reflected or stretched
  borders, tells nothing about the object.
- Shrinking is antialiased, as in editing.
- Items depend on (seed, epoch, index) alone.
- Unreadable files are skipped, logged and counted.

EXIF orientation is ignored: `ldm.data.annotations` leaves out the images for which it matters.

Dimension key: S side of the image, E side of the exemplar, pixels.
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageDraw
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data import masks
from ldm.data.box_index import BoxIndex, Entry
from ldm.files import UserError
from ldm.images import MID_GREY, UNREADABLE, Box, clip_normalise, levels_to_tensor, pad_box

if TYPE_CHECKING:
    import albumentations as A

EXEMPLAR_PADDING = 10  # pixels around the box, see masks.pixel_scale
MAX_ATTEMPTS = 20  # unreadable images in a row

Captions = Callable[[Entry, int], str]  # caption of an image whose box of that number is the hole
Sample = dict[str, Any]  # tensors, and the caption
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SampleRecipe:
    """How an image with boxes becomes a training sample.

    Attributes:
        image_size: S.
        exemplar_size: E.
        p_arbitrary_mask: probability of an arbitrary shape as hole; the rest are rectangles.
        p_object_mask: probability of the object's own shape as hole, where it is known; comes before the other two.
        augment_exemplar: whether the exemplar is augmented or only squashed. All other draws stay the same.
        augmentation_strength: multiplies angles and lengths of the paper's augmentation.
        augmentation: serialised albumentations pipeline instead of the paper's; see `augmentation.build_pipeline`.
        grey_background: show the exemplar over mid-grey, where its shape is known.
        crop_margin_range: crop as editing does, with smallest and largest margin; see `masks.crop_around_box`. None
            crops as the paper does.
        hard_edges: whether the mask is binary instead of antialiased.
        captions: gives the caption of an image.
    """

    image_size: int
    exemplar_size: int
    p_arbitrary_mask: float = 0.5
    p_object_mask: float = 0.0
    augment_exemplar: bool = True
    augmentation_strength: float = 1.0
    augmentation: Mapping[str, Any] | None = None
    grey_background: bool = False
    crop_margin_range: tuple[float, float] | None = None
    hard_edges: bool = False
    captions: Captions | None = None

    def __call__(self, entry: Entry, open_file: Callable[[str], BinaryIO], rng: np.random.Generator) -> Sample:
        """Make a sample.

        Args:
            entry: the image and its boxes.
            open_file: opens a file of the dataset by its name.
            rng: source of all draws, in the order of the original.

        Returns:
            `image` (3, S, S) in [-1, 1]; `keep_mask` (1, S, S) in [0, 1], 0 in the hole; `masked_image` = image *
            keep_mask; `exemplar` (3, E, E), CLIP-normalised; all float32. With captions a text, `caption`.
        """
        with open_file(entry.name) as stream, Image.open(stream) as file:  # reads the header only
            size = file.size
            if size != entry.size:
                raise ValueError(f"is {size[0]} x {size[1]}, indexed as {entry.size[0]} x {entry.size[1]}")
            scale = masks.pixel_scale(size)
            chosen = int(rng.integers(len(entry.boxes)))
            box = entry.boxes[chosen]
            augment = self._draw_augmentation(rng)
            # The paper draws the hole in the photograph and the crop around it; editing crops first.
            margins = self.crop_margin_range
            window = margins and masks.crop_around_box(size, box, margins, self.image_size, rng)
            grown = masks.grow_box(box, (window or Box(0, 0, *size)).clipped(*size), rng)
            wants_shape = self.p_object_mask > 0 or self.grey_background
            shape = object_shape(entry, chosen, open_file) if wants_shape else None
            hole = self._draw_hole(size, box, grown, shape, round(masks.JITTER * scale), rng)
            window = window or masks.crop_window(size, grown, rng)
            padded = pad_box(box, size, round(EXEMPLAR_PADDING * scale))
            decoded, reduction = self._decode(file, window, padded)

        if reduction > 1:
            hole, window = hole.reduce(reduction), reduced_window(window, decoded.size, reduction)
        square = crop(decoded, hole, window, self.image_size)
        image, keep_mask = levels_to_tensor(square[:3]), 1 - square[3:].float() / 255
        if self.hard_edges:
            keep_mask = (keep_mask > 0.5).float()
        left, top, right, bottom = (round(edge / reduction) for edge in padded)
        exemplar = decoded.crop((left, top, right, bottom))
        if self.grey_background and shape is not None:
            alpha = shape.crop(padded).resize(exemplar.size, Image.Resampling.BILINEAR)
            exemplar = Image.composite(exemplar, Image.new("RGB", exemplar.size, MID_GREY), alpha)
        sample = {
            "image": image,
            "masked_image": image * keep_mask,
            "keep_mask": keep_mask,
            "exemplar": clip_normalise(augment(np.asarray(exemplar))),
        }
        return sample | {"caption": self.captions(entry, chosen)} if self.captions else sample

    @cached_property
    def pipeline(self) -> A.Compose:
        """What squashes and augments exemplars; built once per process.

        Raises:
            ConfigError: `augmentation` is not a pipeline that can be used.
        """
        from ldm.data.augmentation import build_pipeline

        return build_pipeline(self.exemplar_size, self.augmentation if self.augment_exemplar else None)

    def _draw_augmentation(self, rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
        """Draw the augmentation of an exemplar, which is applied after the photograph has been decoded."""
        from ldm.data.augmentation import PaperParams, augment, draw_paper_params

        params = draw_paper_params(rng, self.exemplar_size, self.augmentation_strength)
        seed = int(rng.integers(2**63)) if self.augmentation is not None else None
        if not self.augment_exemplar:
            params = PaperParams()
        return lambda pixels: augment(self.pipeline, pixels, params, seed=seed)

    def _draw_hole(
        self,
        size: tuple[int, int],
        box: Box,
        grown: Box,
        shape: Image.Image | None,
        jitter: int,
        rng: np.random.Generator,
    ) -> Image.Image:
        """Draw the hole mask (mode L, white = hole), of one of three kinds."""
        u = rng.random()
        if shape is not None:
            if u < self.p_object_mask:
                import cv2  # part of the training extra

                # Wider by the jitter: edges of photographs are soft, and what is left of them would show the object.
                side = 2 * jitter + 1
                return Image.fromarray(cv2.dilate(np.asarray(shape), np.ones((side, side), np.uint8)))
            u = (u - self.p_object_mask) / (1 - self.p_object_mask)
        if u < self.p_arbitrary_mask:
            return masks.polygon_hole(size, masks.arbitrary_polygon(box, grown, rng, jitter))
        return masks.rectangle_hole(size, grown)

    def _decode(self, file: Image.Image, window: Box, padded: Box) -> tuple[Image.Image, int]:
        """Decode the photograph at 1, 1/2, 1/4 or 1/8 of its size: the least that image and exemplar need.

        Returns:
            The RGB image, and the reduction 1, 2, 4 or 8.
        """
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


def object_shape(entry: Entry, chosen: int, open_file: Callable[[str], BinaryIO]) -> Image.Image | None:
    """Return the object of a box in white (mode L, size of the image), or None if the annotations lack its shape."""
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


def crop(image: Image.Image, hole: Image.Image, window: Box, size: int) -> Tensor:
    """Crop the square `window` of a photograph and its hole, and resize (bilinear, antialiased when shrinking).

    Args:
        image: mode RGB.
        hole: mode L, of the same size.
        window: pixels; outside the image lies mid-grey that is kept.
        size: S.

    Returns:
        (4, S, S) uint8: RGB and the hole.
    """
    if window.inside(*image.size):
        square = image.crop(window)
    else:
        square = Image.new("RGB", (window.right - window.left, window.bottom - window.top), MID_GREY)
        square.paste(image, (-window.left, -window.top))
    square.putalpha(hole.crop(window))
    levels = torch.from_numpy(np.array(square)).permute(2, 0, 1)
    # on bytes: the arithmetic of Pillow at several times its speed
    return F.interpolate(levels[None], size=(size, size), mode="bilinear", antialias=True)[0]


def reduced_window(window: Box, size: tuple[int, int], reduction: int) -> Box:
    """Return the square nearest to `window` within an image of `size` that was decoded at 1/reduction."""
    side = min(round((window.right - window.left) / reduction), *size)
    left, top = (
        min(round(edge / reduction), free - side) for edge, free in zip((window.left, window.top), size, strict=True)
    )
    return Box(left, top, left + side, top + side)


class BoxDataset(Dataset[Sample]):
    """Samples from image files and an index of their boxes.

    Args:
        index: images and boxes.
        folder: folder that the names in the index are relative to.
        recipe: makes a sample of an image.
        seed: decides, with the epoch and the index, all draws.
        max_samples: use only the first that many images.
    """

    def __init__(
        self,
        index: BoxIndex,
        folder: str | Path,
        recipe: SampleRecipe,
        *,
        seed: int = 0,
        max_samples: int | None = None,
    ) -> None:
        self.index, self.folder, self.recipe, self.seed = index, Path(folder), recipe, seed
        self.length = len(index) if max_samples is None else min(len(index), max_samples)
        self.num_skipped = 0  # in this process

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int | tuple[int, int]) -> Sample:
        """Return the sample of an (epoch, index) pair; an index alone means epoch 0."""
        epoch, i = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch, i])
        for _ in range(MAX_ATTEMPTS):
            entry = self.index[i]
            try:
                return self.recipe(entry, lambda name: open(self.folder / name, "rb"), rng)
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


# ---- captions ----


def open_captions(source: str, index: BoxIndex, count: int) -> Captions:
    """Open the captions of the first `count` images of an index.

    Args:
        source: `classes`, or a CSV file with the columns file_name, relative to the folder of images, and caption.
        index: the images.
        count: number of images used.

    Raises:
        UserError: the index has no classes; the file is missing or damaged, or lacks images.
    """
    if source == "classes":
        if not index.has_labels:
            raise UserError(
                f"{index.path}: got an index without classes, expected them for data.captions: classes; with Open "
                "Images put class-descriptions-boxable.csv beside the CSVs of boxes and run scripts/read_bbox.py, with "
                "COCO and VOC run scripts/inspect_dataset.py --rebuild; other formats need a CSV file of captions"
            )
        return lambda entry, chosen: entry.labels[chosen].lower()
    captions = read_captions(Path(source))
    names = (index[i].name for i in range(count))
    if missing := [name for name in names if name not in captions]:
        raise UserError(
            f"{source}: lacks {len(missing):,} of {count:,} images, {missing[0]} first; name each as it is below "
            f"{index.metadata['images']}, with an empty caption where there is nothing to say"
        )
    return lambda entry, _: captions[entry.name]


def read_captions(path: Path) -> dict[str, str]:
    """Read the captions by file name from a CSV file with a header.

    Raises:
        UserError: the file is missing or is no such table.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or ()
            if not {"file_name", "caption"} <= set(columns):
                raise UserError(f"{path}: got the columns {', '.join(columns)}, expected file_name and caption")
            return {row["file_name"]: row["caption"] or "" for row in reader}
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: not a readable CSV ({error}); see data.captions") from None
