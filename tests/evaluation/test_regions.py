from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.regions import copy_paste, hole_region


def test_region_is_the_bounding_box_of_the_hole() -> None:
    scene = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    mask = Image.new("L", scene.size, 127)  # kept, as in editing
    mask.putpixel((4, 6), 128)
    mask.putpixel((9, 17), 255)
    assert np.array_equal(np.asarray(hole_region(scene, mask)), np.asarray(scene)[6:18, 4:10])
    pasted = np.asarray(copy_paste(scene, mask, Image.new("RGB", (3, 3), (1, 2, 3))))
    assert (pasted[6:18, 4:10] == (1, 2, 3)).all()
    assert np.array_equal(pasted[:6], np.asarray(scene)[:6])


def test_what_cannot_be_cropped_is_refused() -> None:
    scene = Image.new("RGB", (20, 30))
    with pytest.raises(ValueError, match="equal sizes"):
        hole_region(scene, Image.new("L", (30, 20), 255))
    with pytest.raises(ValueError, match="empty mask"):
        hole_region(scene, Image.new("L", (20, 30), 0))
