"""Self-supervised samples: a box of a photograph is the hole, its augmented content the exemplar.

Differences from the original, each on purpose: one decode per sample; `root` is honoured; no image is squashed (a
square that holds the grown box is cropped, and where none exists the image is padded with mid-grey that counts as
kept: the hole must not reach into it, and grey, unlike reflected or stretched borders, tells nothing of the object);
shrinking is antialiased, as in editing; items depend on (seed, epoch, index) alone; unreadable files are skipped,
logged and counted. EXIF orientation is ignored, as in `read_bbox`: boxes refer to the pixels as stored.

Dimension key: S side of the image, E side of the exemplar, pixels.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm.data import masks, transforms
from ldm.data.masks import Box
from ldm.data.read_bbox import find_images

EXEMPLAR_PADDING = 10  # pixels around the box, see masks.pixel_scale
MAX_ATTEMPTS = 20  # unreadable images in a row

logger = logging.getLogger(__name__)


class DatasetError(ValueError):
    """A dataset folder that cannot be used; the message names it and the remedy."""


class OpenImagesDataset(Dataset[dict[str, Tensor]]):
    """Samples from ROOT/images/{train,validation,test}/**/ID.jpg (or images/train_0 …) and ROOT/bbox/SPLIT/ID.txt.

    An item is a dict of float32 tensors: `image` (3, S, S) in [-1, 1]; `keep_mask` (1, S, S) in [0, 1], 0 in the
    hole, with soft edges; `masked_image` = image * keep_mask; `exemplar` (3, E, E), CLIP-normalised.

    Args:
        root: folder with `images` and `bbox`.
        split: train, validation or test.
        image_size: S.
        exemplar_size: E.
        arbitrary_mask_percent: share of arbitrary shapes among the holes, in [0, 1]; the rest are rectangles.
        augment_exemplar: whether the exemplar is augmented or only squashed. Everything else is drawn the same.
        seed: with the epoch and the index it decides everything that is random.
        max_samples: use only the first that many images, in order of their ids.
        context_margins: crop as editing does, with smallest and largest margin; see `masks.context_window`. None
            crops as the paper does.

    Raises:
        DatasetError: there are no text files, or none has its image.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        image_size: int,
        exemplar_size: int,
        arbitrary_mask_percent: float = 0.5,
        augment_exemplar: bool = True,
        seed: int = 0,
        max_samples: int | None = None,
        context_margins: tuple[float, float] | None = None,
    ) -> None:
        self.boxes = Path(root) / "bbox" / split
        self.image_size, self.exemplar_size = image_size, exemplar_size
        self.arbitrary_mask_percent = arbitrary_mask_percent
        self.augment_exemplar = augment_exemplar
        self.context_margins = context_margins
        self.seed = seed
        self.num_skipped = 0  # in this process
        if not self.boxes.is_dir():
            raise DatasetError(f"{self.boxes}: no such folder; run python scripts/read_bbox.py --root {root}")
        ids = sorted(entry.name[:-4] for entry in os.scandir(self.boxes) if entry.name.endswith(".txt"))
        folders = find_images(Path(root) / "images", split)
        present = [id_ for id_ in ids if id_ in folders]
        if not present:
            raise DatasetError(f"{self.boxes}: {len(ids)} text files, none with an image in {root}/images/{split}")
        if len(present) < len(ids):
            logger.warning("%s: %d of %d have no image: left out", self.boxes, len(ids) - len(present), len(ids))
        # One array instead of a list of strings: forked workers do not copy it by counting references.
        self.paths = np.array([f"{folders[id_]}/{id_}.jpg" for id_ in present[:max_samples]])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: int | tuple[int, int]) -> dict[str, Tensor]:
        """The sample of an (epoch, index) pair; an index alone means epoch 0."""
        epoch, index = item if isinstance(item, tuple) else (0, item)
        rng = np.random.default_rng([self.seed, epoch, index])
        for _ in range(MAX_ATTEMPTS):
            path = str(self.paths[index])
            try:
                return self._sample(path, rng)
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # Pillow's, all of them
                self.num_skipped += 1
                logger.warning("%s: skipped (%s); %d skipped so far in this process", path, error, self.num_skipped)
            index = int(rng.integers(len(self)))
        raise DatasetError(f"{self.boxes}: {MAX_ATTEMPTS} samples in a row cannot be read; see the log for their files")

    def _sample(self, path: str, rng: np.random.Generator) -> dict[str, Tensor]:
        with Image.open(path) as file:  # reads the header only
            size = file.size
            scale = masks.pixel_scale(size)
            box = self._choose_box(path, size, rng)
            drawn = transforms.draw_augmentation(rng, self.exemplar_size)
            augmentation = drawn if self.augment_exemplar else transforms.ExemplarAugmentation()
            # The paper draws the hole in the photograph and the crop around it; editing crops first.
            margins = self.context_margins
            window = margins and masks.context_window(size, box, margins, self.image_size, rng)
            grown = masks.grow_box(box, (window or Box(0, 0, *size)).clipped(*size), rng)
            if rng.random() < self.arbitrary_mask_percent:
                jitter = round(masks.JITTER * scale)
                hole = masks.polygon_hole(size, masks.arbitrary_polygon(box, grown, rng, jitter))
            else:
                hole = masks.rectangle_hole(size, grown)
            window = window or masks.crop_window(size, grown, rng)
            padded = masks.pad_box(box, size, round(EXEMPLAR_PADDING * scale))
            decoded, reduction = self._decode(file, window, padded)

        image = transforms.pil_to_tensor(crop(decoded, window, self.image_size, transforms.MID_GREY, reduction))
        keep_mask = transforms.soft_mask_to_tensor(crop(hole, window, self.image_size, 0))
        left, top, right, bottom = (round(edge / reduction) for edge in padded)
        exemplar = np.asarray(decoded.crop((left, top, right, bottom)))
        exemplar = transforms.augment_exemplar(exemplar, self.exemplar_size, augmentation)
        return {
            "image": image,
            "masked_image": image * keep_mask,
            "keep_mask": keep_mask,
            "exemplar": transforms.clip_normalise(exemplar),
        }

    def _choose_box(self, path: str, size: tuple[int, int], rng: np.random.Generator) -> Box:
        text = (self.boxes / (Path(path).stem + ".txt")).read_text(encoding="ascii").splitlines()
        x_min, y_min, x_max, y_max = map(float, text[int(rng.integers(len(text)))].split())
        return masks.clip_box(x_min, y_min, x_max, y_max, size)

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


def crop(
    image: Image.Image, window: Box, size: int, fill: int | tuple[int, int, int], reduction: int = 1
) -> Image.Image:
    """The square `window` of an image, resized to `size` (bilinear, antialiased when shrinking).

    Args:
        image: the source, possibly decoded at 1/reduction of its size.
        window: in pixels of the full-size source. What lies outside it becomes `fill`.
    """
    resample = Image.Resampling.BILINEAR
    if window.inside(image.width * reduction, image.height * reduction):
        left, top, right, bottom = (edge / reduction for edge in window)
        return image.resize((size, size), resample, box=(left, top, right, bottom))
    canvas = Image.new(image.mode, (window.right - window.left, window.bottom - window.top), fill)
    canvas.paste(image, (-window.left, -window.top))
    return canvas.resize((size, size), resample)
