"""The invisible watermark: found again, in the format of the package that the original uses, and hardly there."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from ldm.editing.editor import bundled_examples
from ldm.editing.watermark import WATERMARK, add_watermark, read_watermark
from ldm.files import UserError

SCENES = [folder / "scene.png" for folder in bundled_examples()]


def smooth_noise(width: int, height: int, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(2))


@settings(max_examples=20, deadline=None)
@given(
    width=st.integers(320, 420),
    height=st.integers(320, 420),
    text=st.text(min_size=1, max_size=10),
    seed=st.integers(0, 99),
)
def test_what_is_written_is_read(width: int, height: int, text: str, seed: int) -> None:
    picture = smooth_noise(width, height, seed)
    marked = add_watermark(picture, text)
    assert marked.size == picture.size
    assert read_watermark(marked, len(text.encode())) == text.encode()


@pytest.mark.parametrize("path", SCENES, ids=lambda path: path.parent.name)
def test_photographs(path: Path) -> None:
    with Image.open(path) as picture:
        marked = add_watermark(picture)
        error = np.asarray(marked, float) - np.asarray(picture.convert("RGB"), float)
    assert read_watermark(marked) == WATERMARK.encode()
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 37  # dB; 38.7 to 40.6 when this was written


def test_the_packages_own_mark_is_read() -> None:
    """Written by invisible-watermark 0.2.0, dwtDct, "Paint by Example!", over blue dots on grey."""
    with Image.open(Path(__file__).parents[1] / "golden" / "watermark.png") as picture:
        assert read_watermark(picture) == b"Paint by Example!"


def test_the_package_reads_ours() -> None:
    decoder = pytest.importorskip("imwatermark", reason="invisible-watermark is not installed").WatermarkDecoder
    marked = np.asarray(add_watermark(smooth_noise(400, 300, 0)))
    assert decoder("bytes", 8 * len(WATERMARK)).decode(marked[..., ::-1].copy(), "dwtDct") == WATERMARK.encode()


@pytest.mark.parametrize(("size", "text"), [((255, 256), "a"), ((256, 256), ""), ((256, 256), "a" * 33)])
def test_what_cannot_be_marked(size: tuple[int, int], text: str) -> None:
    with pytest.raises(UserError, match=f"{len(text)} bytes for an image of {size[0]} x 256"):
        add_watermark(Image.new("RGB", size), text)
