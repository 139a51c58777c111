"""Measure time and memory of the Fréchet distance against the usual way, which keeps all features.

    python benchmarks/frechet.py                    # 5,000 and 40,000 images of 512 features
    python benchmarks/frechet.py --pictures         # also from image files through the feature stream

The usual way is NumPy's covariance of all features and SciPy's `sqrtm`, on the same features as ours. With --pictures a
small network replaces the real one, to measure the memory of reading, not of a network.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

DIM = 512
CHUNK = 500


def chunks(count: int, seed: int) -> Iterator[np.ndarray]:
    """Yield the features of `count` images in chunks."""
    mixing = np.random.default_rng(0).normal(size=(DIM, DIM)).astype(np.float32) / DIM**0.5
    rng = np.random.default_rng(seed)
    for start in range(0, count, CHUNK):
        yield (rng.normal(size=(min(CHUNK, count - start), DIM)).astype(np.float32) + 0.02 * seed) @ mixing


def ours(count: int) -> float:
    from ldm.evaluation.frechet import RunningStatistics, frechet_distance

    sets = [RunningStatistics("benchmark") for _ in range(2)]
    for seed, statistics in enumerate(sets):
        for chunk in chunks(count, seed):
            statistics.add(chunk)
    return frechet_distance(sets[0].result(), sets[1].result())


def usual(count: int) -> float:
    from scipy.linalg import sqrtm

    a, b = (np.concatenate(list(chunks(count, seed))).astype(np.float64) for seed in range(2))
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    shift = a.mean(0) - b.mean(0)
    return float(shift @ shift + np.trace(cov_a) + np.trace(cov_b) - 2 * np.trace(np.real(sqrtm(cov_a @ cov_b))))


def pictures(count: int) -> float:
    """Return the distance of image files to themselves, with statistics as `scripts/evaluate.py --real FOLDER`."""
    import torch
    from PIL import Image

    from ldm.evaluation.features import FeatureNetwork, View, iter_features, normalised_square
    from ldm.evaluation.frechet import RunningStatistics, frechet_distance

    torch.manual_seed(0)
    tower = torch.nn.Linear(3 * 16 * 16, DIM)
    preprocess = normalised_square(16, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    network = FeatureNetwork("benchmark", tower, lambda x: tower(x.flatten(1)), DIM, preprocess)
    rng, running = np.random.default_rng(0), RunningStatistics("benchmark")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{k:05}.png" for k in range(count)]
        for path in paths:
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        for features in iter_features(network, [View(path, "whole") for path in paths]):
            running.add(features)
    statistics = running.result()
    return frechet_distance(statistics, statistics)


WAYS = {"ours": ours, "usual": usual, "pictures": pictures}


def measured(way: str, count: int) -> tuple[float, float, float]:
    """Measure distance, seconds and peak MiB of one way in its own process."""
    command = [sys.executable, __file__, "--way", way, "--count", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    distance, seconds, peak = map(float, done.stdout.split())
    return distance, seconds, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--counts", type=int, nargs="+", default=[5000, 40000], metavar="N", help="default: 5000 40000")
    parser.add_argument("--pictures", action="store_true", help="also read image files")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.way:
        start = time.perf_counter()
        distance = WAYS[args.way](args.count)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(distance, time.perf_counter() - start, peak)
        return
    for count in args.counts:
        found = {way: measured(way, count) for way in ("ours", "usual")}
        (value, seconds, peak), (peer, peer_seconds, peer_peak) = found["ours"], found["usual"]
        print(
            f"{count:6} pictures: distance {value:.6f} and {peer:.6f}; {seconds:.1f} s and {peer_seconds:.1f} s "
            f"({peer_seconds / seconds:.1f}x); peak {peak:.0f} MiB and {peer_peak:.0f} MiB"
        )
        if args.pictures:
            _, seconds, peak = measured("pictures", count)
            print(f"{count:6} image files, streamed: {seconds:.0f} s, peak {peak:.0f} MiB")


if __name__ == "__main__":
    main()
