from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm import images
from ldm.files import UserError


def photo(width: int = 40, height: int = 30) -> Image.Image:
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([x * 6, y * 8, (x + y) * 3], axis=-1).astype(np.uint8))


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


# ---- tensors ----


def test_image_to_tensor_and_back_is_exact() -> None:
    ramp = Image.fromarray(np.arange(256 * 3, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    x = images.pil_to_tensor(ramp)
    assert x.shape == (3, 16, 16) and x.dtype == torch.float32
    assert x.min() == -1 and x.max() == 1
    np.testing.assert_array_equal(np.asarray(images.tensor_to_pil(x)), np.asarray(ramp))


def test_tensor_to_pil_rounds_and_clips() -> None:
    x = torch.tensor([-2.0, 99.6 / 127.5 - 1, 2.0]).view(3, 1, 1)
    assert np.asarray(images.tensor_to_pil(x)).tolist() == [[[0, 100, 255]]]


def test_mask_threshold_is_the_original_s() -> None:
    hole = Image.fromarray(np.array([[0, 100, 127, 128, 155, 255]], dtype=np.uint8))
    assert images.mask_to_tensor(hole).tolist() == [[[1, 1, 1, 0, 0, 0]]]


def test_exemplar_is_squashed_and_normalised() -> None:
    got = images.exemplar_to_tensor(Image.new("RGB", (90, 60), (255, 0, 128)), 56)
    expected = (torch.tensor([1.0, 0.0, 128 / 255]) - torch.tensor(images.CLIP_MEAN)) / torch.tensor(images.CLIP_STD)
    torch.testing.assert_close(got, expected[:, None, None].expand(3, 56, 56))


# ---- files ----


def save(image: Image.Image, path: Path, **options: Any) -> Path:
    image.save(path, **options)
    return path


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise for viewing
    path = save(photo(40, 30), tmp_path / "turned.png", exif=exif)
    opened = images.open_image(path)
    assert opened.size == (30, 40)
    np.testing.assert_array_equal(pixels(opened), np.rot90(pixels(photo(40, 30)), -1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "LA", "RGBA"])
def test_any_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    path = save(photo().convert(mode), tmp_path / ("x.tif" if mode == "CMYK" else "x.png"))
    opened = images.open_image(path)
    assert opened.mode == "RGB" and opened.size == (40, 30)
    np.testing.assert_array_equal(pixels(opened), pixels(photo().convert(mode).convert("RGB")))


def test_transparent_parts_are_mid_grey_in_images_and_black_in_masks(tmp_path: Path) -> None:
    image = Image.new("RGBA", (2, 1), (255, 255, 255, 255))
    image.putpixel((1, 0), (255, 255, 255, 0))
    path = save(image, tmp_path / "x.png")
    assert pixels(images.open_image(path)).tolist() == [[[255] * 3, [128] * 3]]
    assert pixels(images.load_mask(path)).tolist() == [[255, 0]]


def test_transparent_palette_entry(tmp_path: Path) -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([200, 0, 0, 0, 200, 0])
    image.putpixel((1, 0), 1)
    path = save(image, tmp_path / "x.png", transparency=1)
    assert pixels(images.open_image(path)).tolist() == [[[200, 0, 0], [128] * 3]]


def test_16_bit_grey_keeps_its_range(tmp_path: Path) -> None:
    levels = np.array([[0, 257 * 7, 32896, 65535]], dtype=np.uint16)
    path = save(Image.fromarray(levels), tmp_path / "x.png")
    assert pixels(images.open_image(path))[..., 0].tolist() == [[0, 7, 128, 255]]
    assert pixels(images.load_mask(path)).tolist() == [[0, 7, 128, 255]]


def test_mask_of_any_mode_is_grey(tmp_path: Path) -> None:
    for mode in ("1", "L", "P", "RGB"):
        mask = images.load_mask(save(Image.new("L", (3, 2), 255).convert(mode), tmp_path / f"{mode}.png"))
        assert mask.mode == "L" and mask.getextrema() == (255, 255)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose pixels are missing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 100) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


def exif_without_sense() -> bytes:
    """A turned JPEG in which a number is kept as text; Pillow's turning fails on it."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 100  # orientation, width
    buffer = io.BytesIO()
    photo().save(buffer, "JPEG", exif=exif)
    entry = struct.pack(">HH", 0x0100, 4)
    spoilt = buffer.getvalue().replace(entry, struct.pack(">HH", 0x0100, 2))
    assert spoilt != buffer.getvalue()
    return spoilt


def test_profiles_stay_where_they_are_true(tmp_path: Path) -> None:
    profile = b"a profile"
    for mode, kept in (("RGB", True), ("RGBA", True), ("P", True), ("L", False), ("LA", False)):
        path = save(photo().convert(mode), tmp_path / f"{mode}.png", icc_profile=profile)
        for opened in (images.open_image(path), images.open_upright(path)):
            assert opened.info == ({"icc_profile": profile} if kept else {}), mode


def test_unusable_files_are_one_clear_line(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    photo(200, 200).save(buffer, "JPEG")
    float_tiff = io.BytesIO()
    Image.new("F", (2, 2)).save(float_tiff, "TIFF")
    contents = {
        "truncated.jpg": (buffer.getvalue()[:2000], "damaged"),
        "text.png": (b"not an image", "not an image"),
        "empty.png": (b"", "not an image"),
        "bomb.png": (png_of_size(20000, 10001), "million pixels"),
        "cut.png": (png_of_size(10, 10), "damaged"),
        "exif.jpg": (exif_without_sense(), "damaged"),
        "float.tif": (float_tiff.getvalue(), "floating-point"),
    }
    for file_name, (content, reason) in contents.items():
        path = tmp_path / file_name
        path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as caught:
            images.open_image(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        images.open_image(tmp_path / "missing.png")
    with pytest.raises(UserError, match=str(tmp_path)):
        images.load_mask(tmp_path)


# ---- folders ----


def names(found: list[Path], folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in found]


def test_images_of_a_folder_are_recognised_by_content(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kinds = {"a.JPG": "JPEG", "b.tif": "TIFF", "c.bmp": "BMP", "sub/d.jfif": "JPEG", "e": "PNG", "f.gif": "GIF"}
    for name, kind in kinds.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / name, format=kind)
    assert names(images.find_images(tmp_path), tmp_path) == sorted(kinds) and not caplog.records
    for name in (".hidden.png", "._a.JPG", ".cache/g.png", "sub/._d.jfif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        photo().save(tmp_path / name, format="PNG")
    (tmp_path / "notes.txt").write_text("0 0.5 0.5 0.1 0.1")
    (tmp_path / "empty.png").touch()
    (tmp_path / "vector.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    os.mkfifo(tmp_path / "pipe.png")
    assert names(images.find_images(tmp_path), tmp_path) == sorted(kinds)
    (record,) = caplog.records
    assert all(name in record.getMessage() for name in ("notes.txt", "empty.png", "vector.eps", "3 "))


def test_links_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    (folder / "z").mkdir(parents=True)
    elsewhere.mkdir()
    save(photo(), folder / "z" / "a.png")
    save(photo(), elsewhere / "b.png")
    (folder / "c.png").symlink_to(elsewhere / "b.png")
    (folder / "far").symlink_to(elsewhere, target_is_directory=True)
    (folder / "again").symlink_to(folder / "z", target_is_directory=True)
    (folder / "z" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "gone.png").symlink_to(tmp_path / "nothing")
    assert names(images.find_images(folder), folder) == ["c.png", "far/b.png", "z/a.png"]


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("text")
    for place, named in ((tmp_path, "notes.txt"), (tmp_path / "gone", "gone"), (tmp_path / "notes.txt", "a file")):
        with pytest.raises(UserError, match=named):
            images.find_images(place)
