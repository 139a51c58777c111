"""An invisible watermark in the pixels of an image.

Dimension key: W, H image size, pixels · N blocks · n bits of the text.
"""

import numpy as np
from PIL import Image

from ldm.files import UserError

WATERMARK = "StableDiffusionV1"  # the original's text, which detectors look for
MIN_PIXELS = 256 * 256  # smaller images have too few blocks for each bit; other readers refuse them, too
_LEVEL = 36.0  # distance between two values that mean the same bit
_TO_U = np.array([-0.147, -0.289, 0.436], np.float32)  # RGB to U of YUV, the blue difference
_FROM_U = np.array([0.0, -0.395, 2.032], np.float32)


def add_watermark(image: Image.Image, text: str | None = WATERMARK) -> Image.Image:
    """Write a text invisibly into all of an image; None leaves it as it is.

    Every block of 8 x 8 pixels holds one bit, in the format of the package `invisible-watermark` (method dwtDct): the
    largest coefficient of the block's U, averaged over 2 x 2 pixels, is quantised to (k + 1/4) or (k + 3/4) times a
    fixed step. The package itself is not used: it brings a second OpenCV, and can read again only a third of the
    photographs that it marks, because its change may stop the coefficient from being the largest.

    The result is RGB; pixels change by a few grey levels, mostly in blue. `check_watermark` says what it raises.
    """
    if text is None:
        return image
    check_watermark(image.size, text)
    bits = np.unpackbits(np.frombuffer(text.encode(), np.uint8))
    pixels = np.array(image.convert("RGB"), np.float32)
    blocks, place = _blocks(pixels)
    rows = np.arange(len(blocks))
    largest, second = blocks[rows, place], np.sort(blocks[:, 1:], axis=1)[:, -2]
    offset = _LEVEL * (0.25 + 0.5 * np.resize(bits, len(blocks)).astype(np.float32))
    level = np.rint((largest - offset) / _LEVEL) * _LEVEL + offset
    level += _LEVEL * (level <= second)  # it must stay the largest, or readers find another one
    change = np.zeros_like(blocks)
    change[rows, place] = level - largest
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    grid = change.reshape(height // 8, width // 8, 4, 4).swapaxes(1, 2).reshape(height // 2, width // 2)
    pixels[:height, :width] += np.kron(grid / 2, np.ones((2, 2), np.float32))[..., None] * _FROM_U
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def read_watermark(image: Image.Image, length: int = len(WATERMARK)) -> bytes:
    """Read the `length` bytes that an image is marked with; arbitrary ones without a mark, or if it was resized."""
    check_watermark(image.size, "?" * length)
    blocks, place = _blocks(np.asarray(image.convert("RGB"), np.float32))
    votes = blocks[np.arange(len(blocks)), place] % _LEVEL > _LEVEL / 2
    bits = [votes[i :: 8 * length].mean() > 0.5 for i in range(8 * length)]
    return np.packbits(bits).tobytes()


def check_watermark(size: tuple[int, int], text: str) -> None:
    """Raise UserError unless an image of size (W, H) has `MIN_PIXELS` and four blocks per bit of a non-empty text."""
    (width, height), num_bytes = size, len(text.encode())
    most = (width // 8) * (height // 8) // 32
    if width * height < MIN_PIXELS or not 0 < num_bytes <= most:
        limits = f"1 to {most} bytes and {MIN_PIXELS} pixels or more"
        raise UserError(f"watermark: got {num_bytes} bytes for an image of {width} x {height}, expected {limits}")


def _blocks(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the halved U of the blocks, (N, 16), and where each is largest apart from its first value, (N,)."""
    height, width = (side // 8 * 8 for side in pixels.shape[:2])
    u = pixels[:height, :width] @ _TO_U + 128
    halved = u.reshape(height // 2, 2, width // 2, 2).sum((1, 3)) / 2  # Haar's approximation
    blocks = halved.reshape(height // 8, 4, width // 8, 4).swapaxes(1, 2).reshape(-1, 16)
    return blocks, blocks[:, 1:].argmax(1) + 1
