"""The window around a hole, and the colour correction at its edge."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.editing import geometry
from ldm.editing.geometry import MAX_CORRECTION, MAX_SIDE, cut, enlarge, fit_scene, fit_window, match_boundary_colors
from ldm.files import UserError
from ldm.images import Box


def keep_mask(height: int, width: int, box: tuple[int, int, int, int]) -> torch.Tensor:
    mask = torch.ones(1, 1, height, width)
    mask[:, :, box[0] : box[1], box[2] : box[3]] = 0
    return mask


@st.composite
def holes(draw: st.DrawFn) -> torch.Tensor:
    height, width = draw(st.integers(4, 70)), draw(st.integers(4, 70))
    top, left = draw(st.integers(0, height - 2)), draw(st.integers(1, width - 2))  # something is left to the left
    return keep_mask(height, width, (top, draw(st.integers(top + 1, height)), left, draw(st.integers(left + 1, width))))


@settings(max_examples=40, deadline=None)
@given(holes(), st.integers(0, 1000))
def test_a_constant_cast_is_removed_whatever_the_hole(mask: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(1, 3, *mask.shape[2:], generator=generator)
    cast = torch.tensor([0.15, -0.1, 0.05]).view(1, 3, 1, 1)
    corrected = match_boundary_colors(image + cast, image, mask)
    hole = (mask == 0).expand_as(image)
    torch.testing.assert_close(corrected[hole], image[hole], atol=1e-5, rtol=0)


def test_a_cast_that_changes_slowly_is_mostly_removed() -> None:
    mask = keep_mask(64, 64, (16, 48, 20, 52))
    image = torch.zeros(1, 3, 64, 64)
    cast = torch.linspace(-0.2, 0.2, 64).expand_as(image)
    left = match_boundary_colors(image + cast, image, mask)[(mask == 0).expand_as(image)]
    assert left.abs().mean() < 0.2 * cast[(mask == 0).expand_as(image)].abs().mean()


def test_what_is_painted_keeps_its_detail() -> None:
    """Only the surroundings decide: detail in the hole neither counts nor is touched."""
    mask = keep_mask(32, 32, (8, 24, 8, 24))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    painted = image.clone()
    painted[:, :, 10:20, 10:20] = 1.0
    assert torch.equal(match_boundary_colors(painted, image, mask), painted)


def test_what_reaches_over_the_edge_is_no_cast() -> None:
    """Painted over the edge, in colours that no decoder mistakes: corrected by the limit at most."""
    mask, image = keep_mask(32, 32, (8, 24, 8, 24)), torch.zeros(1, 3, 32, 32)
    painted = image + 1.0
    torch.testing.assert_close(
        match_boundary_colors(painted, image, mask)[(mask == 0).expand_as(image)],
        torch.tensor(1 - MAX_CORRECTION).expand(3 * 256),
    )


def test_a_hole_without_surroundings_is_left_alone() -> None:
    painted = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(match_boundary_colors(painted, torch.zeros(2, 3, 16, 16), torch.zeros(2, 1, 16, 16)), painted)


# ---- the window ----


@st.composite
def scenes(draw: st.DrawFn) -> tuple[tuple[int, int, int, int], tuple[int, int]]:
    width, height = draw(st.integers(1, 400)), draw(st.integers(1, 400))
    x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (x0, y0, draw(st.integers(x0 + 1, width)), draw(st.integers(y0 + 1, height))), (width, height)


@given(scenes(), st.floats(0, 3), st.integers(1, 100), st.booleans())
def test_window_contains_the_hole_and_stays_inside_where_it_can(
    scene: tuple[tuple[int, int, int, int], tuple[int, int]], margin: float, min_side: int, whole: bool
) -> None:
    (x0, y0, x1, y1), size = scene
    window = fit_window(Box(x0, y0, x1, y1), size, crop_margin=margin, min_side=min_side, whole_image=whole)
    assert window.size[0] == window.size[1] and 1 <= window.size[0] <= max(size)
    spans = ((window.left, window.right), (window.top, window.bottom))
    for (start, stop), (low, high), length in zip(spans, ((x0, x1), (y0, y1)), size, strict=True):
        assert start <= low and high <= stop
        if stop - start <= length:
            assert start >= 0 and stop <= length
        else:  # the border is reflected evenly on both sides
            assert abs((0 - start) - (stop - length)) <= 1
    if whole:
        assert window.size[0] == max(size)


def test_window_margins() -> None:
    # Room enough: half the longer side of the hole all around, centred.
    assert fit_window(Box(400, 300, 500, 350), (1000, 800)) == (350, 225, 550, 425)
    # At a corner it is moved inside.
    assert fit_window(Box(0, 0, 100, 100), (1000, 800)) == (0, 0, 200, 200)
    # A margin that does not fit shrinks to the short side …
    assert fit_window(Box(200, 0, 320, 120), (1000, 200)).size == (200, 200)
    # … but only to half of itself: then the window reaches over the border.
    assert fit_window(Box(200, 0, 380, 180), (1000, 200)) == (155, -35, 425, 235)
    # A tiny hole is not enlarged without bound.
    assert fit_window(Box(50, 50, 51, 51), (1000, 800), min_side=128).size == (128, 128)


def whole_square(image: Image.Image, window: Box) -> Image.Image:
    """The square as it is defined, at once."""
    box = window.clipped(*image.size)
    edges = [(box.top - window.top, window.bottom - box.bottom), (box.left - window.left, window.right - box.right)]
    pixels = np.asarray(image.crop(box))
    return Image.fromarray(np.pad(pixels, [*edges, *[(0, 0)] * (pixels.ndim - 2)], mode="reflect"))


@settings(max_examples=60, deadline=None)
@given(scenes(), st.floats(0, 2), st.booleans(), st.sampled_from([16, 33, 64]), st.integers(0, 3000))
def test_strips_make_the_same_square(
    scene: tuple[tuple[int, int, int, int], tuple[int, int]], margin: float, whole: bool, side: int, strip: int
) -> None:
    """Bit for bit, there and back, whatever of the square is in memory at a time."""
    box, (width, height) = scene
    rng = np.random.default_rng(width + 1000 * height)
    image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    window = fit_window(Box(*box), image.size, crop_margin=margin, whole_image=whole)
    painted = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
    place = window.clipped(*image.size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "STRIP", strip)
        small = cut(image, window, side, Image.Resampling.BICUBIC)
        share = cut(image.convert("L"), window, side, Image.Resampling.BOX, "F")
        enlarged = enlarge(painted, window, place)
    square = whole_square(image, window)
    assert small.tobytes() == square.resize((side, side), Image.Resampling.BICUBIC).tobytes()
    expected = whole_square(image.convert("L"), window).convert("F").resize((side, side), Image.Resampling.BOX)
    assert share.tobytes() == expected.tobytes()
    large = painted.resize(window.size, Image.Resampling.BICUBIC)
    moved = [edge - start for edge, start in zip(place, (window.left, window.top) * 2, strict=True)]
    assert enlarged.tobytes() == large.crop(Box(*moved)).tobytes()


@pytest.mark.parametrize("size", [(60000, 3), (3, 20000), (9000, 7), (5, 6000)])
def test_memory_grows_with_the_hole_and_not_with_the_square_around_it(size: tuple[int, int]) -> None:
    scene, hole = Image.effect_noise(size, 50).convert("RGB"), Image.new("L", size, 255)
    hole.putpixel((0, 0), 0)
    tracemalloc.start()
    fitted = fit_scene(scene, hole, 64)
    result = fitted.put_back(torch.zeros(3, 64, 64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 60 * 2**20  # 6000^2 pixels would be 108 MB
    assert fitted.image.shape == (1, 3, 64, 64) and result.size == size
    assert (
        result.getpixel((0, 0)) == scene.getpixel((0, 0))
        and result.getpixel((size[0] // 2, size[1] // 2)) == (128,) * 3
    )


def test_a_long_strip_keeps_its_place() -> None:
    """Beyond the side up to which both ways are one: the same up to rounding, lying and upright."""
    lying = Image.fromarray(np.linspace(0, 255, 20000).astype(np.uint8)[None].repeat(3, 0)).convert("RGB")
    upright = lying.transpose(Image.Transpose.TRANSPOSE)
    for scene in (lying, upright):
        window = fit_window(Box(0, 0, *scene.size), scene.size)
        square = cut(scene, window, 64, Image.Resampling.BICUBIC)
        back = enlarge(square, window, window.clipped(*scene.size))
        assert np.abs(np.asarray(back).astype(int) - np.asarray(scene)).max() <= 3


def test_a_square_that_is_too_wide() -> None:
    with pytest.raises(UserError, match=str(MAX_SIDE)):
        fit_window(Box(0, 0, MAX_SIDE + 1, 1), (MAX_SIDE + 1, 1))
