from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps, PngImagePlugin

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


def test_pixels_decide_whether_a_file_is_sound(tmp_path: Path) -> None:
    """Not what stands beside them: EXIF that cannot be rewritten or read, comments in any script, bytes at the end."""
    (tmp_path / "exif.jpg").write_bytes(exif_without_sense())
    assert images.open_image(tmp_path / "exif.jpg").size == (30, 40)
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "Grüße aus Köln \u65e5\u672c".encode(), 8
    buffer = io.BytesIO()
    photo(40, 30).save(buffer, "JPEG", exif=exif)
    expected = images.open_image(buffer.getvalue())
    assert expected.size == (30, 40)
    for tail in (b"\0" * 1000, b"\xff\xd8\xff\xe1junk", b"MotionPhoto_Data" + bytes(range(256))):
        np.testing.assert_array_equal(pixels(images.open_image(buffer.getvalue() + tail)), pixels(expected))
    photo(40, 30).save(tmp_path / "broken.jpg", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    assert images.open_image(tmp_path / "broken.jpg").size == (40, 30)


def test_inverted_cmyk_of_photoshop(tmp_path: Path) -> None:
    """Photoshop writes inverted inks; its marker says so."""
    red = Image.new("RGB", (16, 16), (200, 40, 40)).convert("CMYK")
    red.save(tmp_path / "red.jpg", quality=95)  # Pillow writes the marker and inverts, too
    assert b"Adobe" in (tmp_path / "red.jpg").read_bytes()
    opened = pixels(images.open_image(tmp_path / "red.jpg"))
    assert np.abs(opened.astype(int) - (200, 40, 40)).max() < 12


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_turned_as_by_pillow(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    photo(40, 30).save(buffer, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(buffer))
    np.testing.assert_array_equal(pixels(images.open_image(buffer)), pixels(expected))


def test_anything_that_holds_an_image_is_read(tmp_path: Path) -> None:
    expected = pixels(photo())
    path = save(photo(), tmp_path / "x.png")
    chw = torch.from_numpy(expected.copy()).permute(2, 0, 1)
    with open(path, "rb") as file:
        kinds = [path, str(path), path.read_bytes(), bytearray(path.read_bytes()), io.BytesIO(path.read_bytes()), file]
        kinds += [photo(), Image.open(path), expected, expected.astype(np.int64), expected / 255, chw, chw / 255]
        kinds += [(chw / 255).double().requires_grad_(), expected[::-1][::-1], chw.int()]
        for kind in kinds:
            for _ in range(2):  # an open file, too
                np.testing.assert_array_equal(pixels(images.open_image(kind)), expected)


def test_channels_of_arrays() -> None:
    rng = np.random.default_rng(0)
    grey, rgba = rng.integers(0, 256, (6, 5), dtype=np.uint8), rng.integers(0, 256, (6, 5, 4), dtype=np.uint8)
    for one in (grey, grey[..., None], torch.from_numpy(grey), torch.from_numpy(grey)[None]):
        assert pixels(images.open_image(one))[..., 1].tolist() == grey.tolist()
    np.testing.assert_array_equal(pixels(images.open_upright(rgba)), rgba)
    np.testing.assert_array_equal(pixels(images.open_upright(torch.from_numpy(rgba).permute(2, 0, 1) / 255)), rgba)
    deep = grey.astype(np.uint16) * 257
    assert pixels(images.open_image(deep))[..., 0].tolist() == grey.tolist()


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (None, "NoneType"),
        (7, "int"),
        ({"path": "x.png"}, "dict"),
        ([[0, 1], [2, 3]], "list"),
        ("https://example.com/a.png", "download"),
        (Path("https://example.com/a.png"), "download"),
        ("s3://bucket/a.png", "download"),
        (r"C:\Users\me\a.png", "no such file"),
        (b"", "not an image"),
        (b"hello", "not an image"),
        (np.zeros((3, 6, 5), np.uint8), "ndarray of shape (3, 6, 5)"),
        (np.zeros((6, 5, 2), np.uint8), "(6, 5, 2)"),
        (np.zeros((1, 6, 5, 3), np.uint8), "(1, 6, 5, 3)"),
        (np.zeros(5, np.uint8), "(5,)"),
        (np.zeros((0, 5, 3), np.uint8), "(0, 5, 3)"),
        (np.full((6, 5, 3), 1.5), "float64"),
        (np.full((6, 5, 3), -0.1), "float64"),
        (np.full((6, 5, 3), np.nan), "float64"),
        (np.full((6, 5, 3), 300), "int64"),
        (np.full((6, 5), -1), "int64"),
        (np.zeros((6, 5), complex), "complex128"),
        (np.array([["a", "b"]]), "<U1"),
        (torch.zeros(6, 5, 3), "Tensor of shape (6, 5, 3)"),
        (torch.full((3, 6, 5), -1.0), "float32"),
        (torch.zeros(2, 3, 6, 5), "(2, 3, 6, 5)"),
        (torch.full((3, 6, 5), torch.nan, dtype=torch.bfloat16), "bfloat16"),
    ],
)
@pytest.mark.parametrize("reader", [images.open_image, images.open_upright, images.load_mask])
def test_other_things_are_refused_by_name(reader: Callable[[Any], object], picture: Any, words: str) -> None:
    with pytest.raises(UserError) as caught:
        reader(picture)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_every_mode_of_pillow_is_read_or_refused() -> None:
    rgb = Image.new("RGB", (4, 3), (200, 100, 50))
    grey = rgb.convert("L")
    level = grey.getpixel((0, 0))
    for image in (grey, grey.convert("LA"), grey.convert("LA").convert("La"), grey.convert("I"), grey.convert("RGBX")):
        assert images.open_image(image).getpixel((0, 0)) == (level,) * 3, image.mode
        assert images.open_upright(image).getpixel((0, 0))[:3] == (level,) * 3, image.mode  # pyright: ignore
    for mode in ("RGBA", "RGBa", "RGBX", "CMYK", "P", "HSV", "YCbCr"):
        image = rgb.convert("RGBA").convert(mode) if mode == "RGBa" else rgb.convert(mode)
        assert np.abs(pixels(images.open_image(image)).astype(int) - (200, 100, 50)).max() <= 6, mode
    with pytest.raises(UserError):
        images.open_image(Image.new("F", (4, 3)))


@given(
    st.integers(1, 3000),
    st.integers(1, 3000),
    st.floats(0.05, 8),
    st.sampled_from([round, math.floor, math.ceil]),
    st.sampled_from([round, math.floor, math.ceil]),
)
def test_a_resized_image_keeps_its_aspect(width: int, height: int, scale: float, one: Any, other: Any) -> None:
    resized = max(1, one(width * scale)), max(1, other(height * scale))
    assert images.same_aspect((width, height), resized) and images.same_aspect(resized, (width, height))


def test_other_aspects() -> None:
    for size, other in (
        ((96, 64), (64, 96)),
        ((384, 256), (300, 100)),
        ((64, 64), (67, 64)),
        ((4000, 3000), (1000, 748)),
    ):
        assert not images.same_aspect(size, other)


def test_profiles_stay_where_they_are_true(tmp_path: Path) -> None:
    profile = b"a profile"
    for mode, kept in (("RGB", True), ("RGBA", True), ("P", True), ("L", False), ("LA", False)):
        path = save(photo().convert(mode), tmp_path / f"{mode}.png", icc_profile=profile)
        for opened in (images.open_image(path), images.open_upright(path)):
            assert opened.info == ({"icc_profile": profile} if kept else {}), mode


@pytest.mark.parametrize("kind", ["zTXt", "iTXt", "iCCP"])
def test_large_texts_and_profiles_do_not_keep_an_image_from_being_read(kind: str, tmp_path: Path) -> None:
    large, texts = "".join(map(chr, np.random.default_rng(0).integers(32, 127, 2_000_000))), PngImagePlugin.PngInfo()
    if kind == "zTXt":
        texts.add_text("workflow", large, zip=True)
    elif kind == "iTXt":
        texts.add_itxt("workflow", large, zip=True)
    profile = {"icc_profile": large.encode()} if kind == "iCCP" else {}
    photo().save(tmp_path / "large.png", pnginfo=texts, **profile)
    np.testing.assert_array_equal(images.open_image(tmp_path / "large.png"), photo())
    assert images.find_images(tmp_path) == [tmp_path / "large.png"]


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
