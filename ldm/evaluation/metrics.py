"""Metrics of edited images: plain functions from images of equal sizes or finite features to numbers.

Dimension key: N items · D feature channels · R bootstrap resamples · H, W pixels.
"""

import math
from collections.abc import Hashable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import ArrayLike
from PIL import Image
from torch import Tensor

from ldm.editing.hole_masks import TO_BINARY
from ldm.evaluation.features import SQUASH, FeatureNetwork, finite_features
from ldm.evaluation.frechet import Estimate
from ldm.files import UserError
from ldm.images import Box

SSIM_SIGMA, SSIM_RADIUS = 1.5, 5  # pixels: a Gaussian window of 11 x 11
Groups = Sequence[Hashable] | None  # a label per item, equal for items that belong together
CORNER_CELLS = 8  # a corner is an eighth of the width by an eighth of the height


def hole_box(hole_mask: Image.Image) -> Box:
    """Return the bounding box of the hole: grey levels of 128 and more of a mask in mode L."""
    if box := hole_mask.point(TO_BINARY).getbbox():
        return Box(*box)
    raise UserError("got an empty mask, expected a hole (white, 255)")


def paper_box(hole_mask: Image.Image) -> Box | None:
    """Return the box that the paper's CLIP score crops; None: the rule leaves no pixel.

    The published script goes from the first to the last pixel of grey level 255 in reading order. For a filled
    rectangle this lacks the last row and column; for other shapes it is not a bounding box.
    """
    rows, columns = np.nonzero(np.asarray(hole_mask.convert("L")) == 255)
    if not len(rows) or columns[-1] <= columns[0] or rows[-1] <= rows[0]:
        return None
    return Box(int(columns[0]), int(rows[0]), int(columns[-1]), int(rows[-1]))


def cosine_scores(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return 100 times the cosine of paired features: (N, D) and (N, D) => (N,) float64 in [-100, 100].

    Source: paper, section 4.1 (CLIP score), between the edited region and the exemplar.
    """
    a, b = a.astype(np.float64), b.astype(np.float64)
    return np.clip(100 * (a * b).sum(1) / (_norms(a) * _norms(b)), -100, 100)


def _norms(features: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(features, axis=1)
    if not norms.all():
        raise UserError(f"features of item {int(np.argmin(norms))} are zero: their cosine is undefined")
    return norms


def region_similarities(
    network: FeatureNetwork, images: Sequence[Image.Image], hole: Image.Image, exemplars: Sequence[Image.Image]
) -> list[float]:
    """Return, per image, 100 times the cosine between its hole box and the exemplar, averaged over exemplars."""
    box = hole_box(hole)
    views = [network.preprocess(image, SQUASH, box) for image in images]
    views += [network.preprocess(exemplar, SQUASH) for exemplar in exemplars]
    names = [f"result {k}" for k in range(1, len(images) + 1)] + ["exemplar"] * len(exemplars)
    features = F.normalize(torch.from_numpy(finite_features(network, torch.stack(views), names)), dim=1)
    return (100 * features[: len(images)] @ features[len(images) :].T).mean(1).tolist()


def identification(
    regions: np.ndarray, exemplars: np.ndarray, groups: Groups = None, *, num_resamples: int = 1000, seed: int = 0
) -> tuple[Estimate, np.ndarray]:
    """Compute the share of pairs in which a region is closer (cosine) to its own exemplar than to another one.

    A tie counts one half: regions (N, D) that say nothing about their exemplars (N, D) score 0.5. Items with equal
    labels, or without labels with equal features of the exemplar, show the same exemplar and are not compared. The
    interval resamples exemplars, each with all its items, because pairs share items, and items share exemplars.

    Returns the share of all ordered pairs, and (N,), the share of the pairs of each region.
    """
    labels = _numbers([row.tobytes() for row in exemplars] if groups is None else groups)
    comparable = labels[:, None] != labels[None, :]  # (N, N): whether pair (i, j) counts
    if not comparable.any():
        raise UserError(f"got {len(labels)} item(s) with the same exemplar, expected at least two different exemplars")
    regions, exemplars = (x / _norms(x)[:, None] for x in (regions.astype(np.float64), exemplars.astype(np.float64)))
    similarity = regions @ exemplars.T  # (N, N): region i, exemplar j
    own = np.diagonal(similarity)[:, None]
    identified = comparable * ((own > similarity) + 0.5 * (own == similarity))

    m = labels.max() + 1
    draws = np.random.default_rng(seed).multinomial(m, np.full(m, 1 / m), size=num_resamples)
    counts = draws[:, labels].astype(np.float64)  # (R, N)
    pairs = ((counts @ comparable) * counts).sum(1)
    shares = ((counts @ identified) * counts).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(shares, [0.025, 0.975]) if len(shares) else (0.0, 1.0)
    total = float(identified.sum() / comparable.sum())
    return Estimate(total, float(low), float(high), len(labels)), identified.sum(1) / comparable.sum(1)


def _numbers(labels: Iterable[Hashable]) -> np.ndarray:
    """Return (N,) whole numbers, equal where the labels are equal, in order of appearance."""
    index: dict[Hashable, int] = {}
    return np.array([index.setdefault(label, len(index)) for label in labels])


def mean_interval(values: ArrayLike, *, groups: Groups = None, num_resamples: int = 1000, seed: int = 0) -> Estimate:
    """Return the mean of N finite values with the percentile interval of a bootstrap; nan for a single group.

    Items with equal labels in `groups` (several edits with one exemplar) are not independent and resampled together.
    """
    numbers = np.asarray(values, dtype=np.float64)
    labels = _numbers(range(len(numbers)) if groups is None else groups)
    mean, m = float(numbers.mean()), int(labels.max()) + 1
    if m == 1:
        return Estimate(mean, math.nan, math.nan, len(numbers))
    sums = np.bincount(labels, weights=numbers - mean)  # about the mean: no rounding error where values are large
    sizes = np.bincount(labels)
    drawn = np.random.default_rng(seed).integers(m, size=(num_resamples, m))
    low, high = mean + np.quantile(sums[drawn].sum(1) / sizes[drawn].sum(1), [0.025, 0.975])
    return Estimate(mean, float(low), float(high), len(numbers))


def corner_colors(image: Image.Image) -> np.ndarray:
    """Return (4, 3), the mean colours of the corners, grey levels 0 to 255; a corner is 1/8 of each side long."""
    cells = np.array(image.convert("RGB").resize((CORNER_CELLS, CORNER_CELLS), Image.Resampling.BOX), dtype=np.float64)
    return cells[[0, 0, -1, -1], [0, -1, 0, -1]]


def copied_background(edited: np.ndarray, exemplars: np.ndarray, true_images: np.ndarray) -> np.ndarray:
    """Measure how far the corners of edited regions moved from the scene's colours to the exemplar's: (N,).

    Pasting the exemplar is the trivial solution of training on an image's own crops (paper, section 3.2); the corners,
    which objects hardly ever cover, reveal it. All three are (N, 4, 3) `corner_colors`, of the hole boxes except the
    exemplars'. The mean is the least-squares share: 0 for the true image, 1 for a pasted exemplar.
    """
    d = exemplars - true_images
    return ((edited - true_images) * d).sum((1, 2)) / (d**2).sum((1, 2)).mean()


class BackgroundError(NamedTuple):
    """Differences outside the hole; nan if there is nothing to compare."""

    ssim: float  # in [-1, 1], 1 for equal backgrounds; mean over the windows without a pixel of the hole
    psnr: float  # dB against a range of 255; infinite for equal backgrounds
    max_abs: float  # largest difference of a channel, grey levels 0 to 255


def background(result: Image.Image, scene: Image.Image, hole_mask: Image.Image) -> BackgroundError:
    """Compare an edit with its scene outside the hole.

    Source: Wang et al. 2004, section III-B (SSIM: Gaussian window, K1 = 0.01, K2 = 0.03), averaged over the channels.
    """
    hole = torch.from_numpy(np.array(hole_mask.convert("L"))) >= 128
    if hole.all():
        return BackgroundError(math.nan, math.nan, math.nan)
    # (3, H, W) float64 grey levels, 0 to 255
    x, y = (torch.from_numpy(np.array(i.convert("RGB"))).permute(2, 0, 1).double() for i in (result, scene))
    difference = (x - y)[:, ~hole]
    psnr = float(10 * torch.log10(255**2 / difference.square().mean()))  # tensors divide by zero to infinity
    return BackgroundError(_ssim(x, y, hole), psnr, float(difference.abs().max()))


def _ssim(x: Tensor, y: Tensor, hole: Tensor) -> float:
    """Return the mean SSIM of (3, H, W) images over the windows in the image and outside the hole (H, W), or nan."""
    radius = SSIM_RADIUS
    if min(hole.shape) <= 2 * radius:
        return math.nan
    touched = F.max_pool2d(hole[None].float(), 2 * radius + 1, stride=1)[0] > 0  # per window within the image
    # This import takes half a second, and only this function needs it.
    from torchmetrics.functional.image import structural_similarity_index_measure as ssim

    _, windows = ssim(x[None] / 255, y[None] / 255, sigma=SSIM_SIGMA, data_range=1.0, return_full_image=True)
    return float(windows[0, :, radius:-radius, radius:-radius][:, ~touched].mean())
