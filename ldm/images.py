"""Image files, boxes, and conversions between images and tensors, shared by training, editing and evaluation."""

from __future__ import annotations

import io
import logging
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, PngImagePlugin, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ldm.files import Skipped, UserError, atomic_write

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
Image.init()  # not every version of Pillow has each format
_KNOWN = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "PSD", "QOI", "TGA")
FORMATS = tuple(name for name in _KNOWN if name in Image.OPEN)
_SIGNED = FORMATS[:-1]  # formats with a signature; a TGA file is taken for one only where somebody names it
MID_GREY = (128, 128, 128)  # 0 in the model's range, as the inside of a hole
# EXIF orientation => how viewers turn the stored pixels
TURNS = {number: Image.Transpose(turn) for number, turn in {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}.items()}
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)  # what Pillow raises on damaged files

Picture = Image.Image | str | os.PathLike[str] | bytes | IO[bytes] | np.ndarray | Tensor  # see `open_image`

PngImagePlugin.MAX_TEXT_CHUNK = 16 * 2**20  # bytes, unpacked; Pillow's 1 MiB refuses profiles of printers, workflows
logger = logging.getLogger(__name__)


class Box(NamedTuple):
    """Pixel box: left and top inclusive, right and bottom exclusive."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> tuple[int, int]:
        return self.right - self.left, self.bottom - self.top

    def clipped(self, width: int, height: int) -> Box:
        """Return the part within an image of that size."""
        return Box(max(self.left, 0), max(self.top, 0), min(self.right, width), min(self.bottom, height))


def pad_box(box: Box, size: tuple[int, int], padding: int) -> Box:
    """Extend `box` by `padding` pixels on each side, but not beyond an image of `size` (width, height)."""
    return Box(box.left - padding, box.top - padding, box.right + padding, box.bottom + padding).clipped(*size)


def open_image(picture: Picture, name: str = "the image") -> Image.Image:
    """Read an image as viewers show it: RGB, fully loaded; an RGB image without EXIF is returned as it is.

    EXIF orientation is applied; palette, grey, CMYK and 16-bit images are converted; transparent parts are laid over
    mid-grey, the model's value for unknown pixels. The first frame of an animation is read.

    Args:
        picture: a path; an image; bytes or an open file; an array (H, W) or (H, W, C), or a tensor (H, W) or (C, H, W),
            of 1, 3 or 4 channels, with levels 0 to 255, or floats in [0, 1], or bool; a uint16 array (H, W). Grey of 16
            or 32 bits in which no level is above 255 is read as 8 bits.
        name: what messages call a picture that is no path.

    UserError if it is missing, damaged, no image, or beyond Pillow's limit of 179 million pixels.
    """
    return read_picture(picture, lambda image: flatten(image, MID_GREY), name)


def load_mask(picture: Picture, name: str = "the mask") -> Image.Image:
    """Read a hole mask (mode L, white = paint here) like `open_image`, transparent parts as black (keep), 1 as 255."""
    return read_picture(picture, mask_levels, name)


def open_upright(picture: Picture, name: str = "the image") -> Image.Image:
    """Read an image like `open_image`, but keep transparency: RGBA if it has some, else RGB."""
    return read_picture(picture, flatten, name)


def mask_levels(image: Image.Image) -> Image.Image:
    """Convert an upright image to a mask's grey levels, mode L, see `load_mask`."""
    grey = flatten(image, (0, 0, 0)).convert("L")
    return grey.point([0, *[255] * 255]) if grey.getextrema() == (0, 1) else grey


def read_picture(picture: Picture, convert: Callable[[Image.Image], Image.Image], name: str) -> Image.Image:
    """Read a picture upright and convert it; see `open_image`."""
    if isinstance(picture, (str, os.PathLike)):
        name = str(picture)
    try:
        with warnings.catch_warnings(action="ignore"), _opened(picture) as image:  # of many pixels, of senseless EXIF
            image.load()
            turn = TURNS.get(exif_orientation(image))
            return convert(image if turn is None else image.transpose(turn))
    except Exception as error:  # of damaged files; Pillow's decoders raise nearly anything
        reason = str(error) or type(error).__name__
        is_address = re.match(r"\w{2,}:/", name)
        reasons = {
            UserError: reason,
            FileNotFoundError: "an address; download it first" if is_address else "no such file; check the path",
            IsADirectoryError: "a folder; name a file in it",
            UnidentifiedImageError: "not an image file that can be read; save it as PNG or JPEG",
            Image.DecompressionBombError: "has more than 179 million pixels; reduce its size first",
        }
        damaged = f"damaged or unsupported image ({reason}); re-save it as PNG or JPEG"
        raise UserError(f"{name}: {reasons.get(type(error), damaged)}") from None


def _opened(picture: Any) -> AbstractContextManager[Image.Image]:
    """Open what holds an image; the context closes what is opened here."""
    if isinstance(picture, (np.ndarray, Tensor)):
        picture = _from_array(picture)
    if isinstance(picture, Image.Image):  # Pillow converts La to LA only
        return nullcontext(picture.convert("LA") if picture.mode == "La" else picture)
    if isinstance(picture, (bytes, bytearray)):
        picture = io.BytesIO(picture)
    if not (isinstance(picture, (str, os.PathLike)) or hasattr(picture, "read")):
        expected = "an image, a path, bytes, an open file, an array or a tensor"
        raise UserError(f"got {type(picture).__name__}, expected {expected}")
    return Image.open(picture, formats=FORMATS)


def _from_array(array: np.ndarray | Tensor) -> Image.Image:
    values, order = array, "(H, W, C)"
    if isinstance(values, Tensor):
        values, order = values.detach().cpu(), "(C, H, W)"
        values = (values.float() if values.is_floating_point() else values).numpy()  # NumPy has no bfloat16
        values = np.moveaxis(values, 0, -1) if values.ndim == 3 else values
    kind, top = values.dtype.kind, 1 if values.dtype.kind in "fb" else 255
    is_shaped = values.ndim in (2, 3) and values.shape[2:] in ((), (1,), (3,), (4,)) and values.size
    is_deep = values.dtype == np.uint16 and values.ndim == 2  # as in 16-bit files
    if not is_shaped or kind not in "fbiu" or not (is_deep or 0 <= values.min() <= values.max() <= top):  # NaN, too
        got = f"{type(array).__name__} of shape {(*array.shape,)} and type {array.dtype}"
        raise UserError(f"got {got}, expected uint8, or floats in [0, 1], (H, W), or {order} with 1, 3 or 4 channels")
    levels = values if is_deep else np.rint(values * (255.0 / top)).astype(np.uint8)
    return Image.fromarray(levels[..., 0] if levels.shape[2:] == (1,) else levels)


def exif_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8, of an opened image; 1 if there is none or it is damaged."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow's reading of EXIF raises nearly anything; the pixels may be sound
        return 1
    return int(orientation) if orientation in range(1, 9) else 1


def same_aspect(size: tuple[int, int], other: tuple[int, int]) -> bool:
    """Tell whether two (W, H) are of one image in two sizes, up to a pixel of rounding on each side."""
    return abs(size[0] * other[1] - size[1] * other[0]) <= max(sum(size), sum(other))


def find_images(folder: str | Path, skipped: Skipped | None = None) -> list[Path]:
    """List the image files in a folder and its subfolders, recognised by their content, sorted by path.

    Links are followed, each folder once. Names that begin with "." are left out; other files that are no images go to
    `skipped`, or are counted in one warning. UserError if there is no image.
    """
    if not Path(folder).is_dir():
        raise UserError(f"{folder}: {'a file, not a' if Path(folder).exists() else 'no such'} folder; check the path")
    found, others = [], Skipped() if skipped is None else skipped
    for path in tqdm(walk(folder), desc=f"looking for images in {folder}", unit=" files", leave=False, delay=3):
        try:
            with warnings.catch_warnings(action="ignore"), Image.open(path, formats=_SIGNED):
                found.append(path)
        except UNREADABLE as error:
            reason = "no images" if isinstance(error, UnidentifiedImageError) else "unreadable"
            others.add(reason if path.exists() else "missing", path.relative_to(folder))
    if not found:
        raise UserError(f"{folder}: holds no images{f' but {others}' if others else ''}; check the path")
    if others and skipped is None:
        logger.warning("%s: %d images; passed over: %s", folder, len(found), others)
    return sorted(found)


def walk(folder: str | Path) -> Iterator[Path]:
    """Yield the paths of the files below a folder that are not hidden."""
    for place, names in walk_folders(folder):
        paths = (Path(place, name) for name in names if not name.startswith("."))
        yield from (path for path in paths if path.is_file() or not path.exists())  # no pipes; broken links


def walk_folders(folder: str | Path) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and those below it that are not hidden, with their files' names; links are followed once."""
    seen = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(place)) in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".")]
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))  # a link after what it names
        yield place, names


def flatten(image: Image.Image, background: tuple[int, int, int] | None = None) -> Image.Image:
    """Convert any mode to RGB, if needed, with transparent parts over `background`; without one keep them, as RGBA.

    Of the metadata a colour profile stays if it is for RGB.
    """
    has_profile = image.mode in ("RGB", "RGBA", "P", "PA") and "icc_profile" in image.info
    info: dict[Any, Any] = {"icc_profile": image.info["icc_profile"]} if has_profile else {}
    if image.mode == "RGB" and image.info == info:
        return image
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range")
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip it at 255
        grey = np.asarray(image).astype(np.int64).clip(0, 65535)
        if grey.max() > 255:  # else levels of 8 bits, which would all be black
            grey = (grey + 128) // 257
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        if background is not None:
            image = Image.alpha_composite(Image.new("RGBA", image.size, (*background, 255)), image)
    result = image.convert("RGBA" if image.has_transparency_data and background is None else "RGB")
    result.info = info
    return result


def save_png(image: Image.Image, path: str | Path, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically, with `text` in its metadata (tEXt, or iTXt beyond Latin-1)."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(key, value)
    with atomic_write(path) as partial:
        image.save(partial, format="png", pnginfo=info, compress_level=4)


def pil_to_tensor(image: Image.Image) -> Tensor:
    """Convert an RGB image to (3, H, W) float32 in [-1, 1]."""
    return levels_to_tensor(torch.from_numpy(np.array(image)).permute(2, 0, 1))


def levels_to_tensor(levels: Tensor) -> Tensor:
    """Convert (3, H, W) uint8 to float32 in [-1, 1], contiguous."""
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255).mul_(2).sub_(1)


def tensor_to_pil(x: Tensor) -> Image.Image:
    """Convert (3, H, W) in [-1, 1] to an RGB image: clips, and rounds to the nearest of 256 levels."""
    levels = (x.detach().float().clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def mask_to_tensor(hole_mask: Image.Image) -> Tensor:
    """Convert a hole mask (white = hole) to a keep mask (1, H, W) float32: 0 where the grey level is >= 128, else 1."""
    return (torch.from_numpy(np.array(hole_mask.convert("L"))) < 128).float()[None]


def exemplar_to_tensor(exemplar: Image.Image, size: int) -> Tensor:
    """Squash an exemplar to a square (bicubic), as for editing: CLIP-normalised (3, size, size)."""
    return normalise(exemplar.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def normalise(
    image: Image.Image | np.ndarray, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
) -> Tensor:
    """Normalise an RGB image or (H, W, 3) uint8 by mean and standard deviation of [0, 1]: (3, H, W) float32."""
    levels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    x = levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    return x.sub_(torch.tensor(mean)[:, None, None]).div_(torch.tensor(std)[:, None, None])


def exemplar_to_pixels(x: Tensor) -> Tensor:
    """Invert CLIP's `normalise` on tensors (..., 3, E, E), to pixels in [-1, 1]."""
    mean, std = x.new_tensor(CLIP_MEAN), x.new_tensor(CLIP_STD)
    return 2 * (x * std[:, None, None] + mean[:, None, None]) - 1
