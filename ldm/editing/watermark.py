"""Marks that tell where a picture came from: an invisible watermark in its pixels.

Dimension key: W, H picture size, pixels · N blocks · n bits of the text.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from ldm.files import UserError

WATERMARK = "StableDiffusionV1"  # the original's, which detectors of such pictures look for
MIN_PIXELS = 256 * 256  # below that too few blocks are left for each bit; readers refuse smaller pictures, too
_LEVEL = 36.0  # between two values that say the same bit
_TO_U = np.array([-0.147, -0.289, 0.436], np.float32)  # RGB to the blue difference of YUV
_FROM_U = np.array([0.0, -0.395, 2.032], np.float32)


def add_watermark(picture: Image.Image, text: str = WATERMARK) -> Image.Image:
    """Write a text invisibly into all of a picture.

    Every block of 8 x 8 pixels holds one bit: the largest value of its halved blue difference is moved to one of two
    kinds of levels. The format is that of the package `invisible-watermark` (method dwtDct), which can read it. It is
    written anew because that package brings a second OpenCV, and because here the moved value stays the largest of
    its block: without that only a third of photographs can be read again.

    Args:
        picture: RGB, at least `MIN_PIXELS`.
        text: at most as many bytes in UTF-8 as a quarter of the blocks have bits.

    Returns:
        RGB of the same size; pixels change by a few grey levels, mostly in blue.

    Raises:
        UserError: the picture is too small, or the text empty or too long for it.
    """
    bits = np.unpackbits(np.frombuffer(text.encode(), np.uint8))
    check_watermark(picture.size, text)
    pixels = np.asarray(picture.convert("RGB"), np.float32)
    blocks, place = _blocks(pixels)
    bit = np.resize(bits, len(blocks)).astype(np.float32)
    rows = np.arange(len(blocks))
    largest, second = blocks[rows, place], np.sort(blocks[:, 1:], axis=1)[:, -2]
    offset = _LEVEL * (0.25 + 0.5 * bit)
    level = np.rint((largest - offset) / _LEVEL) * _LEVEL + offset
    level += _LEVEL * (level <= second)  # it must stay the largest to be found again
    change = np.zeros_like(blocks)
    change[rows, place] = level - largest
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    grid = change.reshape(height // 8, width // 8, 4, 4).swapaxes(1, 2).reshape(height // 2, width // 2)
    of_pixels = np.repeat(np.repeat(grid / 2, 2, axis=0), 2, axis=1)
    marked = pixels.copy()
    marked[:height, :width] += of_pixels[..., None] * _FROM_U
    return Image.fromarray(np.clip(np.rint(marked), 0, 255).astype(np.uint8))


def read_watermark(picture: Image.Image, length: int = len(WATERMARK)) -> bytes:
    """The text that a picture is marked with; of one without a mark, any bytes.

    Args:
        picture: as it was written; a photograph of it, or a resized or cropped copy, is not readable.
        length: of the text in bytes.

    Raises:
        UserError: the picture is too small for a text of that length.
    """
    check_watermark(picture.size, "?" * length)
    blocks, place = _blocks(np.asarray(picture.convert("RGB"), np.float32))
    votes = blocks[np.arange(len(blocks)), place] % _LEVEL > _LEVEL / 2
    count = 8 * length
    bits = [votes[i::count].mean() > 0.5 for i in range(count)]
    return np.packbits(bits).tobytes()


def check_watermark(size: tuple[int, int], text: str) -> None:
    """Whether a picture of a size, (W, H), can hold a text.

    Raises:
        UserError: it is too small, or the text empty or too long for it.
    """
    num_bits, num_blocks = 8 * len(text.encode()), (size[0] // 8) * (size[1] // 8)
    if size[0] * size[1] < MIN_PIXELS or not 0 < num_bits <= num_blocks // 4:
        raise UserError(
            f"watermark: got a text of {num_bits // 8} bytes for a picture of {size[0]} x {size[1]}, expected 1 to "
            f"{num_blocks // 32} bytes and {MIN_PIXELS} pixels or more; leave out the watermark"
        )


def _blocks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(N, 16) blocks of the halved blue difference, row by row, and (N,) where each is largest, not at its start."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    u = pixels[:height, :width] @ _TO_U + 128
    halved = u.reshape(height // 2, 2, width // 2, 2).sum((1, 3)) / 2  # Haar's approximation
    blocks = halved.reshape(height // 8, 4, width // 8, 4).swapaxes(1, 2).reshape(-1, 16)
    return blocks, blocks[:, 1:].argmax(1) + 1
