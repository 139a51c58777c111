from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from ldm.evaluation.features import image_features, load_feature_network

pytest.importorskip("efficientnet_lite_pytorch")


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    sizes = [(60, 40), (224, 224), (300, 500), (1, 1), (64, 64)]
    return [
        Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in (sizes[i % 5] for i in range(n))
    ]


def test_features_are_deterministic_and_do_not_depend_on_the_batch() -> None:
    network = load_feature_network()
    images = pictures(5)
    at_once = image_features(network, images)
    assert at_once.shape == (5, 1280)
    assert at_once.dtype == np.float32
    assert np.array_equal(at_once, image_features(network, images))
    # Different batch sizes may choose different kernels: float32 rounding through 50 layers.
    assert np.allclose(at_once, image_features(network, images, batch_size=2), atol=1e-4)
    assert image_features(network, []).shape == (0, 1280)


def test_features_see_more_than_pixels() -> None:
    # A mirrored picture is far away in pixels, yet shows the same thing.
    ramp = np.linspace(0, 255, 128, dtype=np.uint8)
    disc = ((np.hypot(*(np.mgrid[:128, :128] - 40.0)) < 30) * 200).astype(np.uint8)
    picture = Image.fromarray(np.stack([disc, np.tile(ramp, (128, 1)), 255 - disc], -1))
    other = Image.fromarray(np.random.default_rng(1).integers(0, 256, (128, 128, 3), dtype=np.uint8))
    mirrored = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    a, b, c = image_features(load_feature_network(), [picture, mirrored, other])
    assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > a @ c / np.linalg.norm(a) / np.linalg.norm(c)
