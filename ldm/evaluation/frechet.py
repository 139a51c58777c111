"""Distances between two sets of images, computed from the features of one network.

Dimensions: N, M items · D feature channels · B items of a chunk.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ldm.files import UserError, atomic_write


@dataclass(frozen=True)
class Estimate:
    """A number from n items with the limits of its 95 % interval (nan if there is none)."""

    value: float
    low: float
    high: float
    n: int
    note: str = ""  # added to the description of the metric


@dataclass(frozen=True, eq=False)
class Statistics:
    """Mean and covariance of the features of `n` images."""

    n: int
    mean: np.ndarray  # (D,) float64
    cov: np.ndarray  # (D, D) float64, unbiased (divided by n - 1)
    network: str = ""  # exact name of the feature network; "" = not recorded, then it is not compared

    def __post_init__(self) -> None:
        if not (np.isfinite(self.mean).all() and np.isfinite(self.cov).all()):
            raise UserError("got features, or their mean or covariance, that are not finite; compute them again")

    @cached_property
    def factor(self) -> np.ndarray:
        """F (D, rank) with F Fᵀ = cov."""
        eigenvalues, vectors = np.linalg.eigh(self.cov)
        eigenvalues = _cleaned(eigenvalues)
        kept = eigenvalues > 0
        return vectors[:, kept] * np.sqrt(eigenvalues[kept])

    def save(self, path: str | Path) -> None:
        """Write an `.npz` with `mu`, `sigma`, `n` and `network`, atomically."""
        with atomic_write(path) as partial, open(partial, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.cov, n=np.int64(self.n), network=np.str_(self.network))

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read a file of `save`, or one with `mu`, `sigma` and `n` but no network's name."""
        try:
            with np.load(path, allow_pickle=False) as file:
                mean, cov, n = (file[name].astype(np.float64) for name in ("mu", "sigma", "n"))
                network = str(file.get("network", ""))
        except KeyError as error:
            hint = "; pytorch-fid's files are of another network" if "'n " in f"{error} " else ""
            raise UserError(f"{path}: lacks {error}{hint}; compute it from the images instead") from None
        except (OSError, ValueError, EOFError, AttributeError, TypeError, zipfile.BadZipFile) as error:
            raise UserError(f"{path}: no readable .npz of statistics ({error}); --write-real writes one") from error
        fits = mean.ndim == 1 and cov.shape == (mean.size,) * 2 and n.ndim == 0
        fits = fits and all(np.isfinite(x).all() for x in (mean, cov, n)) and n >= 2
        if not (fits and np.allclose(cov, cov.T, rtol=1e-6) and (np.diag(cov) >= 0).all()):
            raise UserError(f"{path}: no finite mean and covariance of at least 2 images; compute it again")
        return cls(int(n), mean, cov, network)


class RunningStatistics:
    """Statistics of features that arrive in chunks, in constant memory.

    Each chunk is centred by its own mean (Chan, Golub and LeVeque 1983), or rounding would spoil small variances.
    """

    def __init__(self, network: str = "") -> None:
        self.network, self.n = network, 0
        self._mean = self._scatter = np.zeros(())  # (D,) and (D, D), the sum of the outer products of deviations

    def add(self, features: np.ndarray) -> None:
        """Add a chunk (B, D), B >= 0."""
        if not len(features):
            return
        chunk, total = features.astype(np.float64), self.n + len(features)
        mean = chunk.mean(0)
        centred, shift = chunk - mean, mean - self._mean
        # S = S_a + S_b + (m_b - m_a)(m_b - m_a)ᵀ n_a n_b / (n_a + n_b)
        between = np.outer(shift, shift) * (self.n * len(chunk) / total)
        self._scatter = self._scatter + (centred.T @ centred + between)
        self._mean, self.n = self._mean + shift * (len(chunk) / total), total

    def result(self) -> Statistics:
        """Return the statistics of all chunks, of two items or more."""
        if self.n < 2:
            raise UserError(f"got {self.n} image(s), expected at least 2: fewer have no covariance")
        return Statistics(self.n, self._mean, self._scatter / (self.n - 1), self.network)


def statistics_of(features: np.ndarray, network: str = "") -> Statistics:
    """Return the statistics of features (N, D)."""
    running = RunningStatistics(network)
    running.add(features)
    return running.result()


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """Compute the Fréchet distance of two normal distributions, |mean_a - mean_b|² + tr(A + B - 2 (A^½ B A^½)^½).

    The last trace is the sum of the singular values of F_aᵀ F_b, where A = F_a F_aᵀ.

    Source: Dowson and Landau 1982; Heusel et al. 2017 (FID).
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(f"got features of {a.mean.size} and of {b.mean.size} channels; use one network for both")
    if a.network and b.network and a.network != b.network:
        raise UserError(f'got features of "{a.network}" and of "{b.network}"; compute both with the same network')
    cross = np.linalg.svd(a.factor.T @ b.factor, compute_uv=False).sum()
    shift = a.mean - b.mean
    return max(0.0, float(shift @ shift + np.trace(a.cov) + np.trace(b.cov) - 2 * cross))


def frechet_estimate(features: np.ndarray, real: Statistics, *, num_resamples: int = 200, seed: int = 0) -> Estimate:
    """Compute the Fréchet distance of N items to fixed statistics, with a bootstrap over the items.

    A resample holds fewer distinct items than the set, so its distance is larger on average; the quantiles are shifted
    by this mean excess. For small N the interval is conservative (in simulations 98 to 99 % at N <= 4 D).
    """
    x, n = features.astype(np.float64), len(features)
    value = frechet_distance(statistics_of(x, real.network), real)
    real_trace, rng, distances = np.trace(real.cov), np.random.default_rng(seed), np.empty(num_resamples)
    for k in tqdm(range(num_resamples), desc="FID interval", unit="resample", delay=3, leave=False):
        drawn = x[rng.integers(0, n, n)]
        mean = drawn.mean(0)
        centred, shift = drawn - mean, mean - real.mean
        # tr (R^½ C R^½)^½ with the resample's covariance C = XᵀX / (n - 1): singular values of X F / √(n - 1)
        projected = centred @ real.factor
        gram = projected @ projected.T if n < projected.shape[1] else projected.T @ projected
        cross = np.sqrt(_cleaned(np.linalg.eigvalsh(gram)) / (n - 1)).sum()
        distances[k] = shift @ shift + np.square(centred).sum() / (n - 1) + real_trace - 2 * cross
    low, high = np.quantile(distances, [0.025, 0.975]) - (distances.mean() - value)
    return Estimate(value, max(0.0, float(low)), max(0.0, float(high)), n)


def _cleaned(eigenvalues: np.ndarray) -> np.ndarray:
    """Set eigenvalues that are zero up to rounding to zero; the square root would magnify them."""
    noise = eigenvalues.size * np.finfo(np.float64).eps * max(float(eigenvalues.max(initial=0.0)), 0.0)
    return np.where(eigenvalues > noise, eigenvalues, 0.0)


def kid(x: np.ndarray, y: np.ndarray, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Estimate:
    """Compute the kernel distance x 1000 of features (N, D) from others (M, D).

    It is the mean, over random subsets of at most half the smaller set, of the squared maximum mean discrepancy under
    the kernel (x·y / D + 1)³, unbiased, hence possibly negative. The interval extends over 1.96 standard errors of the
    delete-d jackknife on both sides, each the spread x sqrt(size / (N - size)) with N of the smaller set.

    Source: Bińkowski et al. 2018, "Demystifying MMD GANs", Eq. 4.
    """
    from torchmetrics.image.kid import poly_mmd

    if (n := min(len(x), len(y))) < 4:
        raise UserError(f"got {n} images, expected at least 4 for KID")
    size, rng = min(subset_size, n // 2), np.random.default_rng(seed)
    bar = tqdm(range(subsets), desc="KID", unit="subset", delay=3, leave=False)
    drawn = ((torch.from_numpy(z[rng.choice(len(z), size, replace=False)]).double() for z in (x, y)) for _ in bar)
    values = 1000 * np.array([float(poly_mmd(a, b)) for a, b in drawn])
    variance = values.var(ddof=1)  # the share 1 / subsets stems from the finite number of subsets
    value, margin = float(values.mean()), 1.96 * float(np.sqrt(variance * (size / (n - size) + 1 / subsets)))
    return Estimate(value, value - margin, value + margin, len(y))


def neighbours(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Find the fakes (M, D) among the real items (N, D), and the real items among the fakes: (M,) and (N,) bool.

    An item lies among a set if some member of the set is at least as close to it as to that member's own k-th
    neighbour. The means are precision and recall. Source: Kynkäänniemi et al. 2019.
    """
    real, fake = real.astype(np.float64), fake.astype(np.float64)
    if min(len(real), len(fake)) <= k:
        raise UserError(f"got {len(real)} and {len(fake)} images, expected more than k = {k} of each")
    centre = real.mean(0)  # distances are differences of squares: small vectors lose less
    real, fake = real - centre, fake - centre
    return _among(fake, real, k), _among(real, fake, k)


def _among(items: np.ndarray, members: np.ndarray, k: int) -> np.ndarray:
    """Find the `items` within the k-th neighbour's distance of at least one of `members`."""
    # Position k of the sorted distances: position 0 is the member itself. Copies: a view would keep its block.
    nearest = (np.partition(d, k, axis=1)[:, k].copy() for d in _squared_distances(members, members))
    radii = np.concatenate([*nearest])
    return np.concatenate([(d <= radii).any(1) for d in _squared_distances(items, members)])


def _squared_distances(a: np.ndarray, b: np.ndarray, rows: int = 256) -> Iterator[np.ndarray]:
    """Yield |a|² + |b|² - 2 a·b of blocks of rows; distances below 1e-6 of the vectors' length count as zero."""
    for start in tqdm(range(0, len(a), rows), desc="neighbours", unit="block", delay=3, leave=False):
        block = a[start : start + rows]
        norms = np.square(block).sum(1)[:, None] + np.square(b).sum(1)[None, :]
        squared = norms - 2 * (block @ b.T)
        squared[squared < 1e-12 * norms] = 0.0
        yield squared
