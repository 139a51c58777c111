"""The step across a hole's edge, in images with known steps."""

import math

import numpy as np
from PIL import Image

from benchmarks.seams import seam


def ramp(step: int) -> Image.Image:
    """Brighter by `step` from each column to the next."""
    return Image.fromarray(np.repeat((step * np.arange(20, dtype=np.uint8))[None], 16, axis=0)).convert("RGB")


def hole(box: tuple[int, int, int, int]) -> Image.Image:
    mask = Image.new("L", (20, 16))
    mask.paste(255, box)
    return mask


def test_the_scene_itself_has_no_seam() -> None:
    found = seam(ramp(4), ramp(4), hole((5, 0, 12, 16)))  # its edges are columns alone
    assert (found.jump, found.usual) == (4, 4)


def test_a_patch_has_its_contrast() -> None:
    scene, result = Image.new("RGB", (20, 16), (100, 100, 100)), Image.new("RGB", (20, 16), (100, 100, 100))
    result.paste((130, 100, 100), (5, 4, 12, 9))
    found = seam(result, scene, hole((5, 4, 12, 9)))
    assert (found.jump, found.usual) == (10, 0)  # the mean of three channels
    assert seam(result, scene, hole((6, 5, 11, 8))).jump == 0  # elsewhere there is no step


def test_what_has_no_edge_has_no_seam() -> None:
    found = seam(ramp(4), ramp(4), hole((0, 0, 20, 16)))
    assert math.isnan(found.jump) and math.isnan(found.usual)
