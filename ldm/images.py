"""Images to tensors and back, reading image files, and the exemplar's augmentation.

Shared by training, editing and evaluation: each conversion is defined once, here.
Dimension key: H, W pixels · E side of the exemplar.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ldm.files import UserError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MID_GREY = (128, 128, 128)  # 0 in the model's range, as the inside of a hole


class Box(NamedTuple):
    """Pixel box: left and top inclusive, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    def inside(self, width: int, height: int) -> bool:
        """Whether no part lies outside an image of that size."""
        return self.left >= 0 and self.top >= 0 and self.right <= width and self.bottom <= height

    def contains(self, other: Box) -> bool:
        return (
            self.left <= other.left
            and self.top <= other.top
            and self.right >= other.right
            and self.bottom >= other.bottom
        )

    def clipped(self, width: int, height: int) -> Box:
        """What of it lies inside an image of that size."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))

    def transposed(self) -> Box:
        return Box(self.top, self.left, self.bottom, self.right)


def pad_box(box: Box, size: tuple[int, int], padding: int) -> Box:
    """`box` with up to `padding` pixels more on each side, as far as the image reaches."""
    width, height = size
    return Box(
        max(box.left - padding, 0),
        max(box.top - padding, 0),
        min(box.right + padding, width),
        min(box.bottom + padding, height),
    )


# ---- files ----


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as people see it.

    EXIF orientation is applied; palette, grey, CMYK and 16-bit images are converted; transparent parts are laid over
    mid-grey, which is what the model sees where it knows nothing. Of an animation the first frame is taken.

    Returns:
        RGB image, fully loaded.

    Raises:
        UserError: the file is missing, damaged, not an image, or beyond Pillow's limit of 179 million pixels.
    """
    return _read(Path(path), lambda image: flatten(image, MID_GREY))


def find_images(folder: str | Path) -> list[Path]:
    """The image files in a folder and its subfolders, told by their extension, sorted by path.

    Raises:
        UserError: there is no such folder, or it holds none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give one with pictures")
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
    if not found:
        raise UserError(f"{folder}: no pictures there ({', '.join(IMAGE_SUFFIXES)}); check the path")
    return found


def load_mask(path: str | Path) -> Image.Image:
    """Read a hole mask: white = paint here. Transparent parts count as black (keep).

    Returns:
        Mode L image, fully loaded.

    Raises:
        UserError: as for `open_image`.
    """
    return _read(Path(path), lambda image: flatten(image, (0, 0, 0)).convert("L"))


def open_upright(path: str | Path) -> Image.Image:
    """Read an image file as `open_image` does, but with its transparency, where it has some: RGB or RGBA.

    Raises:
        UserError: as for `open_image`.
    """
    return _read(Path(path), _rgb_or_rgba)


def open_rgba(path: str | Path) -> Image.Image:
    """Read an image file with its transparency, mode RGBA; what is transparent keeps its colour.

    Raises:
        UserError: as for `open_image`.
    """
    return _read(Path(path), to_rgba)


def to_rgba(image: Image.Image) -> Image.Image:
    """The same of an image."""
    return _rgb_or_rgba(image).convert("RGBA")


def upright(image: Image.Image) -> Image.Image:
    """An image as `open_upright` reads it from a file; itself, if it is that already."""
    return _rgb_or_rgba(ImageOps.exif_transpose(image) if ExifTags.Base.Orientation in image.getexif() else image)


def _rgb_or_rgba(image: Image.Image) -> Image.Image:
    if not image.has_transparency_data:
        return flatten(image, MID_GREY)
    result = image.convert("RGBA")
    result.info = _profile(image)
    return result


def _read(path: Path, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # a warning from 89 million pixels on
            with Image.open(path) as image:
                ImageOps.exif_transpose(image, in_place=True)
                return convert(image)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; give the path of an image file") from None
    except UnidentifiedImageError:
        raise UserError(f"{path}: not an image file that can be read; save it as PNG or JPEG") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6
        raise UserError(f"{path}: has more than {limit:.0f} million pixels; reduce its size first") from None
    except Exception as error:  # of damaged files; Pillow's decoders and its reading of EXIF raise nearly anything
        reason = str(error) or type(error).__name__
        raise UserError(f"{path}: damaged or unsupported image ({reason}); re-save it as PNG or JPEG") from None


def flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Any mode to RGB, transparent parts over `background`; of the metadata a colour profile stays that is for RGB.

    An image to which nothing is to be done is returned itself.
    """
    if image.mode == "RGB" and image.info == _profile(image):
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        result = Image.fromarray(((grey + 128) // 257).astype(np.uint8)).convert("RGB")
    elif image.has_transparency_data:
        canvas = Image.new("RGBA", image.size, (*background, 255))
        result = Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")
    else:
        result = image.convert("RGB")
    result.info = _profile(image)
    return result


def _profile(image: Image.Image) -> dict[str | tuple[int, int], Any]:
    """The metadata that go on being true of the image in RGB."""
    is_rgb = image.mode in ("RGB", "RGBA", "P", "PA") and "icc_profile" in image.info
    return {"icc_profile": image.info["icc_profile"]} if is_rgb else {}


# ---- tensors ----


def pil_to_tensor(image: Image.Image) -> Tensor:
    """RGB image => (3, H, W) float32 in [-1, 1]."""
    return levels_to_tensor(_levels(image))


def levels_to_tensor(levels: Tensor) -> Tensor:
    """(3, H, W) uint8 => float32 in [-1, 1], contiguous."""
    return _unit(levels).mul_(2).sub_(1)


def tensor_to_pil(x: Tensor) -> Image.Image:
    """(3, H, W) in [-1, 1] (values outside are clipped) => RGB image; rounds to the nearest of 256 levels."""
    levels = (x.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def mask_to_tensor(hole_mask: Image.Image) -> Tensor:
    """Hole mask (mode L, white = hole) => keep mask (1, H, W) float32: 0 where the grey level is >= 128, else 1."""
    hole = torch.from_numpy(np.array(hole_mask.convert("L")))
    return (hole < 128).float()[None]


def exemplar_to_tensor(exemplar: Image.Image, size: int) -> Tensor:
    """Exemplar as the tower sees it when editing: squashed to a square (bicubic), CLIP-normalised (3, size, size)."""
    return clip_normalise(exemplar.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def clip_normalise(image: Image.Image | np.ndarray) -> Tensor:
    """RGB image or (H, W, 3) uint8 => (3, H, W) float32 with CLIP's mean and standard deviation removed."""
    mean, std = torch.tensor(CLIP_MEAN), torch.tensor(CLIP_STD)
    return _unit(_levels(image)).sub_(mean[:, None, None]).div_(std[:, None, None])


def exemplar_to_pixels(x: Tensor) -> Tensor:
    """The inverse of `clip_normalise` on tensors (..., 3, E, E), to pixels in [-1, 1]."""
    mean, std = x.new_tensor(CLIP_MEAN), x.new_tensor(CLIP_STD)
    return 2 * (x * std[:, None, None] + mean[:, None, None]) - 1


def _levels(image: Image.Image | np.ndarray) -> Tensor:
    """RGB => (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _unit(levels: Tensor) -> Tensor:
    """uint8 => float32 in [0, 1], contiguous."""
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


# ---- exemplar augmentation ----


class ExemplarAugmentation(NamedTuple):
    """What is done to an exemplar, in this order. The defaults do nothing."""

    flip: bool = False  # left-right
    angle: float = 0.0  # degrees, counter-clockwise, about the centre
    blur: int = 0  # side of the box filter, pixels; 0 = none
    shifts: np.ndarray | None = None  # (3, 2) pixels x, y: how far the affine map moves its three points


def draw_augmentation(rng: np.random.Generator, size: int, strength: float = 1.0) -> ExemplarAugmentation:
    """Random augmentation for an exemplar of side `size`; `strength` multiplies angles and lengths.

    The recipe names albumentations 0.4.3's HorizontalFlip, Rotate(limit=20), Blur(p=0.3) and ElasticTransform(p=0.3).
    The last one's displacement field is at most 0.018 px and is left out; what acts is its random affine map: three
    points moved by up to 50 px each. Lengths in pixels are the recipe's at 224 px and scaled to `size`.
    """
    flip = rng.random() < 0.5
    angle = strength * float(rng.uniform(-20, 20)) if rng.random() < 0.5 else 0.0
    scale = strength * size / 224
    blur = int(rng.choice([3, 5, 7]) * scale) | 1 if rng.random() < 0.3 else 0  # | 1: to the next odd side
    shifts = rng.uniform(-50 * scale, 50 * scale, size=(3, 2)) if rng.random() < 0.3 else None
    return ExemplarAugmentation(flip, angle, blur, shifts)


def augment_exemplar(pixels: np.ndarray, size: int, augmentation: ExemplarAugmentation) -> np.ndarray:
    """Squash an exemplar to a square and augment it. Borders are filled by reflection.

    Args:
        pixels: (H, W, 3) uint8.
        size: side E of the result.

    Returns:
        (E, E, 3) uint8.
    """
    import cv2  # part of the training extra; editing does not augment

    flip, angle, blur, shifts = augmentation
    pixels = cv2.resize(np.ascontiguousarray(pixels), (size, size), interpolation=cv2.INTER_LINEAR)
    if flip:
        pixels = cv2.flip(pixels, 1)
    if angle:
        pixels = _warp(pixels, cv2.getRotationMatrix2D((size / 2, size / 2), angle, 1.0))
    if blur:
        pixels = cv2.blur(pixels, (blur, blur))
    if shifts is not None:
        centre, arm = size // 2, size // 3
        points = centre + np.array([(arm, arm), (arm, -arm), (-arm, -arm)], dtype=np.float32)
        pixels = _warp(pixels, cv2.getAffineTransform(points, points + shifts.astype(np.float32)))
    return pixels


def _warp(pixels: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    import cv2

    side = pixels.shape[0]
    return cv2.warpAffine(pixels, matrix, (side, side), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT_101)
