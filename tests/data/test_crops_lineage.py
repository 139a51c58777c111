"""Crops of images against guided-diffusion's, byte for byte."""

from __future__ import annotations

import random

import numpy as np
import pytest
from PIL import Image

from ldm.data.image_folder import crop
from tests.lineage import lineage


@pytest.mark.parametrize("size", sorted({key.split("/")[0] for key in lineage("data_crops")}))
def test_crops(size: str) -> None:
    golden = lineage("data_crops")
    image = Image.fromarray(golden[f"{size}/image"].numpy())
    np.testing.assert_array_equal(crop(image, 32), golden[f"{size}/center"].numpy())
    for seed in (0, 1):
        rng = random.Random(seed)
        np.testing.assert_array_equal(crop(image, 32, rng.randrange), golden[f"{size}/random_seed{seed}"].numpy())
