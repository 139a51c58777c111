"""Similarity of pairs of pictures, and what a mean over many of them is worth.

Dimension key: N items · D feature channels · R bootstrap resamples · H, W pixels.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.evaluation.features import SQUASH, FeatureNetwork
from ldm.evaluation.identification import Estimate
from ldm.evaluation.regions import hole_box

_BLOCK = 1 << 22  # items drawn at a time by the bootstrap: 32 MiB of indices


def cosine_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """100 times the cosine of paired features.

    Args:
        a: (N, D).
        b: (N, D).

    Returns:
        (N,) float64 in [-100, 100].

    Raises:
        ValueError: the shapes differ, or a feature is zero or not finite.

    Source: paper, section 4.1 (CLIP score), there between the edited region and the exemplar.
    """
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"got features {a.shape} and {b.shape}, expected two arrays of the same shape (N, D)")
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    defined = np.isfinite(norms) & (norms > 0)
    if not defined.all():
        raise ValueError(f"features of pair {int(np.argmin(defined))} are zero or not finite: no cosine is defined")
    return np.clip(100 * (a * b).sum(1) / norms, -100, 100)


def mean_interval(
    values: Sequence[float] | np.ndarray,
    *,
    groups: Sequence[Hashable] | None = None,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """The mean with its 95 % interval: percentiles of the means of resampled items.

    Args:
        values: N finite numbers.
        groups: N labels; items with equal labels (several edits with one exemplar) are resampled together,
            since they are no independent evidence. None: each item for itself.
        num_resamples: R.
        seed: of the bootstrap.

    Returns:
        The estimate; its limits are nan where all items are of one group, which says nothing about others.

    Raises:
        ValueError: there are no values, or not finite ones, or not one group per value.
    """
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1 or not len(numbers) or not np.isfinite(numbers).all():
        bad = int((~np.isfinite(numbers)).sum())
        raise ValueError(f"got {numbers.shape} values, {bad} of them not finite, expected at least one, all finite")
    if groups is None:
        groups = range(len(numbers))
    if len(groups) != len(numbers):
        raise ValueError(f"got {len(groups)} groups for {len(numbers)} values, expected one each")
    index = {group: k for k, group in enumerate(dict.fromkeys(groups))}
    labels = np.array([index[group] for group in groups])
    m = len(index)
    mean = numbers.mean()
    if m == 1:
        return Estimate(value=float(mean), low=float("nan"), high=float("nan"), n=len(numbers))

    sums = np.bincount(labels, weights=numbers - mean)  # about the mean: no rounding error where values are large
    sizes = np.bincount(labels)
    rng = np.random.default_rng(seed)
    means, left = [], num_resamples
    while left:
        rows = min(left, max(1, _BLOCK // m))
        drawn = rng.integers(m, size=(rows, m))
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
        left -= rows
    low, high = mean + np.quantile(np.concatenate(means), [0.025, 0.975])
    return Estimate(value=float(mean), low=float(low), high=float(high), n=len(numbers))


@torch.inference_mode()
def region_similarities(
    network: FeatureNetwork, pictures: Sequence[Image.Image], hole: Image.Image, exemplars: Sequence[Image.Image]
) -> list[float]:
    """How much the hole's box of each picture looks like the exemplar: cosine x 100, of several exemplars the mean."""
    device = next(network.parameters()).device
    box = hole_box(pictures[0], hole)
    views = [network.preprocess(picture, SQUASH, box) for picture in pictures]
    views += [network.preprocess(exemplar, SQUASH) for exemplar in exemplars]
    features = F.normalize(network(torch.stack(views).to(device)), dim=1).cpu()
    regions, wanted = features[: len(pictures)], features[len(pictures) :]
    return (100 * regions @ wanted.T).mean(1).tolist()


def paper_box(hole_mask: Image.Image) -> tuple[int, int, int, int]:
    """The box that the paper's CLIP score looks at: left, top, right, bottom (exclusive), pixels.

    It spans from the first to the last pixel of grey level 255, in the order of reading. For a filled rectangle
    that is the rectangle without its last row and column; for any other shape it is no bounding box. Kept as it
    is, for comparison with published figures; `ldm.evaluation.regions.hole_box` is the hole's true box.

    Args:
        hole_mask: mode L (H, W).

    Raises:
        ValueError: no pixel is 255, or the rule leaves an empty box.
    """
    rows, columns = np.nonzero(np.asarray(hole_mask.convert("L")) == 255)
    if not len(rows):
        raise ValueError("got a mask without a pixel of 255, expected a hole (white, 255)")
    box = (int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))
    if box[2] <= box[0] or box[3] <= box[1]:
        raise ValueError(f"got a hole of which the paper's rule makes the empty box {box}; use the hole's own box")
    return box
