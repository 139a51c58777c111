"""Copied background: 0 for the true picture, 1 for a pasted exemplar, and the share in between."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.copying import copied_background, corner_colours

rng = np.random.default_rng(0)
EXEMPLARS, TRUE = rng.uniform(0, 255, (2, 50, 4, 3))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_share(share: float) -> None:
    edited = share * EXEMPLARS + (1 - share) * TRUE
    assert copied_background(edited, EXEMPLARS, TRUE).mean() == pytest.approx(share)


def test_errors_without_an_exemplar_are_small() -> None:
    noise = rng.normal(0, 40, TRUE.shape)
    # 600 numbers: the share's deviation is 40 / sqrt(600 * E[d^2]), E[d^2] = 255^2 / 6, hence 0.016.
    assert abs(copied_background(TRUE + noise, EXEMPLARS, TRUE).mean()) < 4 * 0.016


def test_pairs_that_tell_nothing_do_not_count() -> None:
    same = np.concatenate([TRUE, EXEMPLARS])  # the second half has exemplars with the corners of the true picture
    shares = copied_background(np.concatenate([EXEMPLARS, EXEMPLARS]), np.concatenate([EXEMPLARS] * 2), same)
    assert shares.mean() == pytest.approx(1)
    assert not shares[50:].any()


def test_corners_alone_are_seen() -> None:
    pixels = np.full((48, 80, 3), 200, dtype=np.uint8)
    pixels[6:42, 10:70] = rng.integers(0, 256, (36, 60, 3))  # an object
    pixels[:6, :10] = (10, 20, 30)
    colours = corner_colours(Image.fromarray(pixels))
    assert colours.tolist() == [[10, 20, 30], *[[200, 200, 200]] * 3]


def test_errors() -> None:
    with pytest.raises(ValueError, match="cannot be told"):
        copied_background(TRUE, TRUE, TRUE)
    with pytest.raises(ValueError, match="expected equal"):
        copied_background(TRUE[:3], EXEMPLARS, TRUE)
