from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.data import masks
from ldm.images import Box, pad_box

GOLDEN = Path(__file__).parents[1] / "golden" / "data"
RECORDS: list[dict[str, Any]] = json.loads((GOLDEN / "samples.json").read_text())
ARBITRARY = [record for record in RECORDS if record["arbitrary"]]


class Replay(np.random.Generator):
    """A generator that hands out recorded (low, high, value) draws and insists on their bounds."""

    def __init__(self, draws: list[list[int]]) -> None:
        super().__init__(np.random.PCG64(0))
        self.draws = list(draws)

    def integers(self, low: Any, high: Any = None, *args: Any, **kwargs: Any) -> Any:
        expected_low, expected_high, value = self.draws.pop(0)
        assert (low, high, kwargs) == (expected_low, expected_high, {"endpoint": True})
        return value


def name(record: dict[str, Any]) -> str:
    return f"{record['image']}_s{record['seed']}"


def size_of(record: dict[str, Any]) -> tuple[int, int]:
    return record["W"], record["H"]


def contains(outer: Box, inner: Box) -> bool:
    left, top, right, bottom = outer
    return left <= inner.left and top <= inner.top and right >= inner.right and bottom >= inner.bottom


def is_hole(mask: Image.Image) -> np.ndarray:
    values = np.asarray(mask)
    assert mask.mode == "L" and set(np.unique(values)) <= {0, 255}
    return values == 255


# ---- the original's own geometry, from its recorded draws ----


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_growth_and_exemplar_crop_replay_the_original(record: dict[str, Any]) -> None:
    box = Box(*record["bbox"])
    rng = Replay(record["grow_draws"])
    assert masks.grow_box(box, Box(0, 0, *size_of(record)), rng) == tuple(record["extended_bbox"])
    assert not rng.draws
    assert pad_box(box, size_of(record), 10) == tuple(record["bbox_pad"])


@pytest.mark.parametrize("record", RECORDS, ids=name)
def test_crop_window_replays_the_original_where_it_did_not_squash(record: dict[str, Any]) -> None:
    size, grown = size_of(record), Box(*record["extended_bbox"])
    left, top, right, bottom = record["crop_xyxy"]
    if right - left == bottom - top:
        rng = Replay(record["crop_draws"])
        assert masks.crop_window(size, grown, rng) == (left, top, right, bottom)
        assert not rng.draws
    else:  # the original stretched the whole image to a square
        window = masks.crop_window(size, grown, np.random.default_rng(0))
        assert window.right - window.left == window.bottom - window.top
        assert contains(window, grown)


@pytest.mark.parametrize("record", [r for r in RECORDS if r["seed"] == 0], ids=name)
def test_rectangle_equals_the_original(record: dict[str, Any]) -> None:
    hole = masks.rectangle_hole(size_of(record), Box(*record["extended_bbox"]))
    keep = np.asarray(Image.open(GOLDEN / f"mask_full_{name(record)}.png"))
    np.testing.assert_array_equal(np.asarray(hole), 255 - keep)


@pytest.mark.parametrize("record", ARBITRARY, ids=name)
def test_outline_and_filling_are_the_original_s(record: dict[str, Any]) -> None:
    """The original's points are ours plus whole-pixel jitter (it drops many by accident of rounding)."""
    polygon = np.array(record["polygon"])
    curves = masks.outline_curves(Box(*record["bbox"]), Box(*record["extended_bbox"])).reshape(-1, 2)
    jitter = polygon[:, None] - curves[None]
    is_jitter = (np.abs(jitter - jitter.round()) < 1e-9) & (np.abs(jitter) < masks.JITTER + 1e-9)
    assert is_jitter.all(axis=-1).any(axis=-1).all()
    hole = is_hole(masks.polygon_hole(size_of(record), polygon))
    assert 1 - hole.mean() == pytest.approx(record["mask_full_mean"], abs=1e-6)  # recorded in float32


def test_arbitrary_shapes_are_distributed_like_the_original_s() -> None:
    """Area over the box's area, and reach beyond the box per side, averaged over the recorded shapes.

    Ours are 3 % larger, because the original's cut 2.8 % off the box on average, and reach as far within half a pixel.
    Tolerances are twice these, of which the noise of 30 draws per shape is a small part.
    """
    rng = np.random.default_rng(0)
    ratios, reaches = [], []
    for record in ARBITRARY:
        box, grown, size = Box(*record["bbox"]), Box(*record["extended_bbox"]), size_of(record)

        def measure(polygon: np.ndarray, box: Box = box, size: tuple[int, int] = size) -> list[float]:
            ys, xs = np.nonzero(is_hole(masks.polygon_hole(size, polygon)))
            area = (box.right - box.left) * (box.bottom - box.top)
            reach = box.left - xs.min(), box.top - ys.min(), xs.max() + 1 - box.right, ys.max() + 1 - box.bottom
            return [len(xs) / area, *reach]

        theirs = np.array(measure(np.array(record["polygon"])))
        ours = np.mean([measure(masks.arbitrary_polygon(box, grown, rng)) for _ in range(30)], axis=0)
        ratios.append(ours[0] / theirs[0])
        reaches.append(ours[1:] - theirs[1:])
    assert 1.0 < np.mean(ratios) < 1.07
    assert np.abs(np.mean(reaches, axis=0)).max() < 1.0


# ---- properties ----


@st.composite
def images_with_boxes(draw: st.DrawFn, shortest: int = 1, longest: int = 200) -> tuple[tuple[int, int], Box]:
    width, height = draw(st.integers(shortest, longest)), draw(st.integers(shortest, longest))
    left, top = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return (width, height), Box(left, top, draw(st.integers(left + 1, width)), draw(st.integers(top + 1, height)))


seeds = st.integers(0, 2**32 - 1)
ONE_PIXEL = ((64, 48), Box(10, 20, 11, 21))
FULL_IMAGE = ((64, 48), Box(0, 0, 64, 48))
CORNER = ((64, 48), Box(40, 0, 64, 20))
TINY_IMAGE = ((1, 1), Box(0, 0, 1, 1))


def degenerate(test: Any) -> Any:
    for case in (ONE_PIXEL, FULL_IMAGE, CORNER, TINY_IMAGE):
        test = example(case=case, seed=0)(test)
    return test


@degenerate
@given(images_with_boxes(), seeds)
def test_grown_box_holds_the_box_and_leaves_most_of_the_free_space(case: Any, seed: int) -> None:
    size, box = case
    grown = masks.grow_box(box, Box(0, 0, *size), np.random.default_rng(seed))
    assert contains(grown, box) and (grown.clipped(*size) == grown)
    assert grown.left >= 0.6 * box.left and size[0] - grown.right >= 0.6 * (size[0] - box.right)
    assert grown.top >= 0.6 * box.top and size[1] - grown.bottom >= 0.6 * (size[1] - box.bottom)


@degenerate
@given(images_with_boxes(), seeds)
@settings(deadline=None)
def test_hole_contains_the_box_and_stays_near_the_grown_box(case: Any, seed: int) -> None:
    size, box = case
    rng = np.random.default_rng(seed)
    grown = masks.grow_box(box, Box(0, 0, *size), rng)
    jitter = int(rng.integers(0, masks.JITTER, endpoint=True))
    arbitrary = is_hole(masks.polygon_hole(size, masks.arbitrary_polygon(box, grown, rng, jitter)))
    rectangle = is_hole(masks.rectangle_hole(size, grown))
    for hole in (arbitrary, rectangle):
        assert hole.shape == size[::-1]
        assert hole[box.top : box.bottom, box.left : box.right].all()
    # The filling includes its right and bottom edge, so one pixel more there.
    reach = pad_box(grown, size, jitter + 1)
    arbitrary[reach.top : reach.bottom, reach.left : reach.right] = False
    assert not arbitrary.any()


@degenerate
@given(images_with_boxes(), seeds)
def test_outline_is_simple(case: Any, seed: int) -> None:
    """Each side runs forward along its edge of the box and outside it: nothing crosses, nothing is inside out."""
    size, box = case
    rng = np.random.default_rng(seed)
    polygon = masks.arbitrary_polygon(box, masks.grow_box(box, Box(0, 0, *size), rng), rng)
    top, right, bottom, left = polygon.reshape(4, -1, 2)
    assert (np.diff(top[:, 0]) >= 0).all() and (np.diff(right[:, 1]) >= 0).all()
    assert (np.diff(bottom[:, 0]) <= 0).all() and (np.diff(left[:, 1]) <= 0).all()
    assert (top[:, 1] <= box.top).all() and (right[:, 0] >= box.right).all()
    assert (bottom[:, 1] >= box.bottom).all() and (left[:, 0] <= box.left).all()
    x, y = polygon.T
    area = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum() / 2  # positive: clockwise on the screen
    assert area >= (box.right - box.left) * (box.bottom - box.top) - 1e-6


@degenerate
@given(images_with_boxes(), seeds)
def test_crop_is_a_square_that_holds_the_grown_box(case: Any, seed: int) -> None:
    size, grown = case
    window = masks.crop_window(size, grown, np.random.default_rng(seed))
    assert window.right - window.left == window.bottom - window.top > 0
    assert contains(window, grown)
    fits = max(grown.right - grown.left, grown.bottom - grown.top) <= min(size)
    assert (window.clipped(*size) == window) == fits


@given(images_with_boxes(), st.tuples(st.floats(0.01, 2), st.floats(0.01, 2)).map(sorted), st.integers(1, 80), seeds)
def test_context_window_is_the_box_and_its_margins(case: Any, margins: list[float], min_side: int, seed: int) -> None:
    size, box = case
    low, high = margins
    rng = np.random.default_rng(seed)
    window = masks.crop_around_box(size, box, (low, high), min_side, rng)
    side, longest = window.right - window.left, max(box.right - box.left, box.bottom - box.top)
    assert side == window.bottom - window.top
    assert contains(window, box)
    assert (window.clipped(*size) == window) == (longest <= min(size))
    if longest <= min(size):
        # the margin is rounded to whole pixels
        assert side >= min(*size, max(min_side, longest * (1 + 2 * low) - 1))
        assert side <= min(*size, max(min_side, longest * (1 + 2 * high) + 1))
    frame = window.clipped(*size)
    assert (frame.clipped(*size) == frame) and contains(window, frame)
    grown = masks.grow_box(box, frame, rng)
    assert contains(frame, grown) and contains(grown, box)


def test_context_window_uses_all_margins_and_places() -> None:
    size, grown = (1000, 1000), Box(480, 490, 520, 510)
    windows = [masks.crop_around_box(size, grown, (0.1, 1.0), 1, np.random.default_rng(seed)) for seed in range(400)]
    margins = [((window.right - window.left) / 40 - 1) / 2 for window in windows]
    assert min(margins) < 0.12 and max(margins) > 0.9
    assert 0.4 < np.mean(np.array(margins) < 0.1**0.5) < 0.6  # log-uniform: half below the geometric mean; 4 sigma
    places = [(grown.left - window.left) / max(1, window.right - window.left - 40) for window in windows]
    assert min(places) < 0.05 and max(places) > 0.95


@given(st.tuples(st.integers(8, 200), st.integers(8, 200)), seeds)
def test_irregular_holes_are_holes(size: tuple[int, int], seed: int) -> None:
    hole = masks.irregular_hole(size, np.random.default_rng(seed))
    assert hole.size == size and is_hole(hole).any()
    assert np.array_equal(hole, masks.irregular_hole(size, np.random.default_rng(seed)))


def test_irregular_holes_are_large_varied_and_of_one_kind_at_every_size() -> None:
    shares = {}
    for side in (64, 128):
        holes = [is_hole(masks.irregular_hole((side, side), np.random.default_rng(seed))) for seed in range(400)]
        shares[side] = [hole.mean() for hole in holes]
        assert np.min(shares[side]) < 0.05 and np.max(shares[side]) > 0.75
        # half of them are up to four rectangles, which begin and end at up to eight rows
        straight = [(hole[1:] != hole[:-1]).any(1).sum() <= 8 for hole in holes]
        assert 160 < np.sum(straight) < 240  # four standard errors
        touched = np.mean(holes, axis=0)
        assert touched.min() > 0.05  # no place is always known
    # the same seeds draw the same shapes, but for rounding to pixels
    assert np.mean(np.abs(np.subtract(*shares.values()))) < 0.03


@given(images_with_boxes(), seeds)
def test_overhanging_crop_overhangs_evenly_along_the_short_side_only(case: Any, seed: int) -> None:
    (width, height), grown = case
    window = masks.crop_window((width, height), grown, np.random.default_rng(seed))
    if window.clipped(width, height) != window:
        across = (window.top, window.bottom - height) if width > height else (window.left, window.right - width)
        along = (window.left, window.right, width) if width > height else (window.top, window.bottom, height)
        assert -1 <= across[0] + across[1] <= 0 and across[0] < 0
        assert along[0] >= 0 and along[1] <= along[2]


@given(
    st.tuples(st.integers(1, 100), st.integers(1, 100)),
    st.tuples(*[st.floats(-50, 150)] * 4),
)
def test_clipped_box_is_inside_the_image_and_not_empty(
    size: tuple[int, int], corners: tuple[float, float, float, float]
) -> None:
    box = masks.clip_box(*corners, size)
    assert (box.clipped(*size) == box) and box.left < box.right and box.top < box.bottom


def test_clip_box_truncates_like_the_original() -> None:
    assert masks.clip_box(60.5, 40.2, 150.9, 120.0, (256, 192)) == (60, 40, 150, 120)


@pytest.mark.parametrize(
    ("size", "scale"), [((1024, 768), 1.0), ((512, 900), 1.0), ((64, 64), 0.125), ((512, 256), 0.5)]
)
def test_lengths_shrink_with_images_shorter_than_512(size: tuple[int, int], scale: float) -> None:
    assert masks.pixel_scale(size) == scale
