"""Metrics against formulas by hand, loops over all pairs and inputs with known results."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ldm.evaluation.metrics import (
    background,
    copied_background,
    corner_colors,
    cosine_scores,
    hole_box,
    identification,
    mean_interval,
    paper_box,
)
from ldm.files import UserError

# ---- regions ----


def test_box_bounds_the_hole() -> None:
    mask = Image.new("L", (20, 30), 127)  # kept, as in editing
    mask.putpixel((4, 6), 128)
    mask.putpixel((9, 17), 255)
    assert hole_box(mask) == (4, 6, 10, 18)


def test_an_empty_mask_has_no_box() -> None:
    with pytest.raises(UserError, match="empty"):
        hole_box(Image.new("L", (20, 30), 0))


# ---- similarity ----


def rectangle(width: int, height: int, left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (width, height), 0)
    mask.paste(255, (left, top, right, bottom))
    return mask


def test_cosine_scores_by_hand() -> None:
    a = np.array([[1, 0], [1, 1], [2, 0], [3e4, 4e4]], np.float32)
    b = np.array([[0, 5], [1, 0], [7, 0], [-3, -4]], np.float32)
    assert cosine_scores(a, b) == pytest.approx([0, 100 / math.sqrt(2), 100, -100], abs=1e-12)


def test_a_cosine_that_is_not_defined_is_refused() -> None:
    a = np.ones((3, 2), np.float32)
    b = a.copy()
    b[1] = 0
    with pytest.raises(UserError, match="item 1 "):
        cosine_scores(a, b)


def test_interval_of_a_mean_is_the_normal_one_for_many_items() -> None:
    values = np.random.default_rng(0).normal(1e6, 2, 2000)  # far from zero: nothing may be lost to rounding
    estimate = mean_interval(values, num_resamples=4000)
    assert estimate.value == pytest.approx(values.mean(), rel=1e-12)
    assert estimate.n == 2000
    half = 1.96 * values.std(ddof=1) / math.sqrt(2000)
    # The 2.5 % quantile of 4000 resamples has a standard error of about 4 % of the half-width.
    assert estimate.value - estimate.low == pytest.approx(half, rel=0.15)
    assert estimate.high - estimate.value == pytest.approx(half, rel=0.15)
    assert estimate == mean_interval(values, num_resamples=4000)
    assert estimate != mean_interval(values, num_resamples=4000, seed=1)


def test_items_of_one_group_count_as_one_piece_of_evidence() -> None:
    rng = np.random.default_rng(0)
    levels = rng.normal(size=100)
    values, groups = np.repeat(levels, 25), np.repeat(np.arange(100), 25)
    alone, grouped, once = mean_interval(values), mean_interval(values, groups=list(groups)), mean_interval(levels)
    assert grouped.value == alone.value
    # Copies of an item say nothing new: with groups the interval is that of the 100, without it 5 times too narrow.
    assert grouped.high - grouped.low == pytest.approx(once.high - once.low, rel=0.15)
    assert alone.high - alone.low == pytest.approx((once.high - once.low) / 5, rel=0.15)


def test_the_mean_of_one() -> None:
    one = mean_interval([3.0])
    assert (one.value, one.n) == (3.0, 1)
    assert math.isnan(one.low) and math.isnan(one.high)


@given(st.data())
def test_paper_box_of_a_rectangle_lacks_the_last_row_and_column(data: st.DataObject) -> None:
    left, top = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 20))
    right, bottom = left + data.draw(st.integers(2, 20)), top + data.draw(st.integers(2, 20))
    mask = rectangle(50, 45, left, top, right, bottom)
    assert hole_box(mask) == (left, top, right, bottom)
    assert paper_box(mask) == (left, top, right - 1, bottom - 1)


def test_paper_box_of_other_masks() -> None:
    soft = rectangle(20, 20, 5, 5, 10, 12)
    soft.putpixel((2, 2), 254)  # not 255: not seen
    assert paper_box(soft) == (5, 5, 9, 11)
    shape = rectangle(20, 20, 8, 3, 9, 4)
    shape.paste(255, (2, 5, 15, 10))  # below its topmost pixel the shape goes on to the left, which is not seen
    assert paper_box(shape) == (8, 3, 14, 9)
    for mask in (Image.new("L", (9, 9), 254), rectangle(9, 9, 3, 3, 4, 4), rectangle(9, 9, 1, 3, 8, 4)):
        assert paper_box(mask) is None


# ---- identification ----


def brute_force(regions: np.ndarray, exemplars: np.ndarray, labels: list[int]) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    scores = []
    for i in range(len(regions)):
        for j in range(len(regions)):
            if labels[i] == labels[j]:
                continue
            own, other = cosine(regions[i], exemplars[i]), cosine(regions[i], exemplars[j])
            scores.append(0.5 if own == other else float(own > other))
    return float(np.mean(scores))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9), distinct=st.integers(2, 9))
def test_equals_a_loop_over_all_pairs(seed: int, n: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [0, 1, *rng.integers(0, distinct, n - 2).tolist()]
    regions, exemplars = rng.normal(size=(2, n, 5))
    measured, shares = identification(regions, exemplars, labels, num_resamples=20)
    assert measured.value == pytest.approx(brute_force(regions, exemplars, labels), abs=1e-12)
    assert measured.n == n
    others = np.array([sum(label != own for label in labels) for own in labels])
    assert (shares * others).sum() / others.sum() == pytest.approx(measured.value, abs=1e-12)


def test_random_features_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    values = [identification(*rng.normal(size=(2, 60, 16)), num_resamples=1)[0].value for _ in range(200)]
    # One run has a standard deviation near 0.035 (pairs of one item go together), so the mean of 200 has
    # one near 0.0025: 0.01 is four of them.
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)


def test_regions_that_ignore_the_exemplar_score_exactly_chance() -> None:
    rng = np.random.default_rng(1)
    same_region = np.tile(rng.normal(size=(1, 8)), (10, 1))
    assert identification(same_region, rng.normal(size=(10, 8)))[0].value == pytest.approx(0.5)


def test_copies_are_always_identified_and_scale_does_not_matter() -> None:
    exemplars = np.random.default_rng(2).normal(size=(12, 7))
    measured, _ = identification(exemplars * 3.0, exemplars)
    assert (measured.value, measured.low, measured.high) == (1.0, 1.0, 1.0)


def test_interval_is_seeded_and_covers_the_truth() -> None:
    def draw(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        exemplars = rng.normal(size=(n, 8))
        return exemplars + 2.0 * rng.normal(size=(n, 8)), exemplars

    assert identification(*draw(0))[0] == identification(*draw(0))[0]
    assert identification(*draw(0))[0] != identification(*draw(0), seed=1)[0]
    truth = identification(*draw(999, n=1500), num_resamples=1)[0].value
    found = [identification(*draw(seed), num_resamples=200)[0] for seed in range(100)]
    covered = sum(estimate.low <= truth <= estimate.high for estimate in found)
    # 95 of 100 are expected; the binomial's standard deviation is 2.2, and a percentile bootstrap at
    # 40 items is a little too narrow: 86 is four standard deviations below.
    assert covered >= 86


def test_items_with_the_same_exemplar_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    exemplars = rng.normal(size=(3, 6))
    exemplars[1] = exemplars[0]
    regions = exemplars + 0.01 * rng.normal(size=(3, 6))
    assert identification(regions, exemplars)[0].value == 1.0


@pytest.mark.parametrize(
    ("regions", "exemplars", "message"),
    [(np.ones((3, 4)), np.ones((3, 4)), "two different exemplars"), (np.zeros((2, 4)), np.eye(2, 4), "item 0")],
)
def test_unusable_features_are_refused(regions: np.ndarray, exemplars: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identification(regions, exemplars)


def test_repeated_exemplars_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    exemplars = rng.normal(size=(15, 8))
    regions = exemplars + 2.0 * rng.normal(size=(15, 8))
    once, _ = identification(regions, exemplars)
    five_times, _ = identification(np.repeat(regions, 5, 0), np.repeat(exemplars, 5, 0))
    assert five_times.value == pytest.approx(once.value, abs=1e-12)
    assert (five_times.low, five_times.high) == pytest.approx((once.low, once.high), abs=1e-12)


# ---- copied background ----


CORNERS = np.random.default_rng(0)
EXEMPLARS, TRUE = CORNERS.uniform(0, 255, (2, 50, 4, 3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share(share: float) -> None:
    edited = share * EXEMPLARS + (1 - share) * TRUE
    assert copied_background(edited, EXEMPLARS, TRUE).mean() == pytest.approx(share)


def test_errors_without_an_exemplar_are_small() -> None:
    noise = CORNERS.normal(0, 40, TRUE.shape)
    # 600 numbers: the share's deviation is 40 / sqrt(600 * E[d^2]), E[d^2] = 255^2 / 6, hence 0.016.
    assert abs(copied_background(TRUE + noise, EXEMPLARS, TRUE).mean()) < 4 * 0.016


def test_pairs_that_tell_nothing_do_not_count() -> None:
    same = np.concatenate([TRUE, EXEMPLARS])  # the second half has exemplars with the corners of the true picture
    shares = copied_background(np.concatenate([EXEMPLARS, EXEMPLARS]), np.concatenate([EXEMPLARS] * 2), same)
    assert shares.mean() == pytest.approx(1)
    assert not shares[50:].any()


def test_corners_alone_are_seen() -> None:
    pixels = np.full((48, 80, 3), 200, dtype=np.uint8)
    pixels[6:42, 10:70] = CORNERS.integers(0, 256, (36, 60, 3))  # an object
    pixels[:6, :10] = (10, 20, 30)
    colours = corner_colors(Image.fromarray(pixels))
    assert colours.tolist() == [[10, 20, 30], *[[200, 200, 200]] * 3]


# ---- background ----


def scene(size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)


def mask_of(size: int, left: int, top: int, right: int, bottom: int) -> Image.Image:
    mask = Image.new("L", (size, size), 127)  # kept, as in editing
    mask.paste(128, (left, top, right, bottom))
    return mask


def test_what_happens_in_the_hole_does_not_count() -> None:
    pixels = scene()
    edit = pixels.copy()
    edit[20:40, 10:30] = 255 - edit[20:40, 10:30]
    error = background(Image.fromarray(edit), Image.fromarray(pixels), mask_of(64, 10, 20, 30, 40))
    # Equal pictures through float64 Gaussian windows: rounding only.
    assert error.ssim == pytest.approx(1, abs=1e-9)
    assert error.psnr == math.inf
    assert error.max_abs == 0


def test_figures_by_hand() -> None:
    pixels = np.full((64, 64, 3), 100, np.uint8)
    edit = pixels.copy()
    edit[0, 0, 1] = 110  # one channel of one pixel of the background
    edit[30, 30] = 0  # in the hole
    error = background(Image.fromarray(edit), Image.fromarray(pixels), mask_of(64, 16, 16, 48, 48))
    assert error.max_abs == 10
    mse = 10**2 / (3 * (64 * 64 - 32 * 32))
    assert error.psnr == pytest.approx(10 * math.log10(255**2 / mse), abs=1e-9)


def test_ssim_is_the_published_formula() -> None:
    x, y = scene(seed=0), scene(seed=1)
    y = (0.5 * x + 0.5 * y).astype(np.uint8)
    got = background(Image.fromarray(x), Image.fromarray(y), mask_of(64, 0, 0, 20, 64)).ssim
    g = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
    window = np.outer(g, g) / g.sum() ** 2
    values = []
    for top in range(64 - 10):
        for left in range(20, 64 - 10):  # windows right of the hole
            a, b = (p[top : top + 11, left : left + 11] / 255 for p in (x, y))
            ma, mb = (np.einsum("hw,hwc->c", window, p) for p in (a, b))
            va, vb, vab = (
                np.einsum("hw,hwc->c", window, p) for p in ((a - ma) ** 2, (b - mb) ** 2, (a - ma) * (b - mb))
            )
            c1, c2 = 0.01**2, 0.03**2
            values.append((2 * ma * mb + c1) * (2 * vab + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    # Both in float64; E[x^2] - E[x]^2 loses a few digits against the sums of squares here.
    assert got == pytest.approx(np.mean(values), abs=1e-9)


def test_where_nothing_is_left_to_compare() -> None:
    x, y = Image.fromarray(scene(seed=0)), Image.fromarray(scene(seed=1))
    error = background(x, y, Image.new("L", (64, 64), 255))
    assert all(map(math.isnan, error))
    frame = background(x, y, mask_of(64, 5, 5, 59, 59))  # pixels, but no window
    assert math.isnan(frame.ssim)
    assert frame.max_abs > 0 and math.isfinite(frame.psnr)
    tiny = background(x.crop((0, 0, 8, 8)), y.crop((0, 0, 8, 8)), Image.new("L", (8, 8), 0))
    assert math.isnan(tiny.ssim) and tiny.max_abs > 0
