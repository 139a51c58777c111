"""Identification: does an edit show its own exemplar rather than another one?

Given features of N edited regions and of their N exemplars, an ordered pair (i, j) of items with
different exemplars is *identified* when region i is closer (cosine) to exemplar i than to exemplar
j. The measure is the share of identified pairs; a tie counts one half. Regions that say nothing
about their exemplars score 0.5, whatever the features.

Dimension key: N items · D feature channels · R bootstrap resamples.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A measured share of N items, with the 95 % interval of a bootstrap over their exemplars."""

    value: float
    low: float
    high: float
    n: int


def identification(
    region_features: np.ndarray,
    exemplar_features: np.ndarray,
    exemplar_ids: Sequence[Hashable] | None = None,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Share of pairs in which a region is closer to its own exemplar than to another one.

    The interval resamples exemplars, each with all its items: pairs share items, and items share
    exemplars, so treating them as independent would make it far too narrow.

    Args:
        region_features: (N, D), features of the edited regions.
        exemplar_features: (N, D), features of the exemplars that were asked for.
        exemplar_ids: N labels; items with equal labels show the same exemplar and are not compared.
            None: items are the same exemplar where their features are equal.
        num_resamples: R.
        seed: of the bootstrap.

    Raises:
        ValueError: shapes differ, a feature is zero or not finite, or no two exemplars differ.
    """
    labels, comparable, identified = _pairs(region_features, exemplar_features, exemplar_ids)
    rng = np.random.default_rng(seed)
    m = labels.max() + 1
    counts = rng.multinomial(m, np.full(m, 1 / m), size=num_resamples)[:, labels].astype(np.float64)  # (R, N)
    pairs = ((counts @ comparable) * counts).sum(1)
    shares = ((counts @ identified) * counts).sum(1)[pairs > 0] / pairs[pairs > 0]
    low, high = np.quantile(shares, [0.025, 0.975]) if len(shares) else (0.0, 1.0)
    return Estimate(value=float(identified.sum() / comparable.sum()), low=float(low), high=float(high), n=len(labels))


def identified_shares(
    region_features: np.ndarray, exemplar_features: np.ndarray, exemplar_ids: Sequence[Hashable] | None = None
) -> np.ndarray:
    """(N,) of each region, in how many of its pairs it is closer to its own exemplar; see `identification`."""
    _, comparable, identified = _pairs(region_features, exemplar_features, exemplar_ids)
    return identified.sum(1) / comparable.sum(1)


def _pairs(
    region_features: np.ndarray, exemplar_features: np.ndarray, exemplar_ids: Sequence[Hashable] | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(N,) numbers of the exemplars; (N, N) whether region i has another exemplar than item j, and is identified."""
    if region_features.ndim != 2 or region_features.shape != exemplar_features.shape:
        raise ValueError(
            f"got region features {region_features.shape} and exemplar features {exemplar_features.shape}, "
            "expected two arrays of the same shape (N, D)"
        )
    n = len(region_features)
    if exemplar_ids is None:
        exemplar_ids = [row.tobytes() for row in np.ascontiguousarray(exemplar_features)]
    if len(exemplar_ids) != n:
        raise ValueError(f"got {len(exemplar_ids)} exemplar ids for {n} items, expected one each")
    numbers = {label: k for k, label in enumerate(dict.fromkeys(exemplar_ids))}
    labels = np.array([numbers[label] for label in exemplar_ids])
    comparable = labels[:, None] != labels[None, :]
    if not comparable.any():
        raise ValueError(f"got {n} item(s) with the same exemplar, expected at least two different exemplars")

    similarity = _unit(region_features) @ _unit(exemplar_features).T  # (N, N): region i, exemplar j
    own = np.diagonal(similarity)[:, None]
    identified = comparable * ((own > similarity) + 0.5 * (own == similarity))
    return labels, comparable, identified


def _unit(features: np.ndarray) -> np.ndarray:
    features = features.astype(np.float64)
    norm = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(norm).all() or not (norm > 0).all():
        bad = int(np.flatnonzero(~(np.isfinite(norm) & (norm > 0)))[0])
        raise ValueError(f"features of item {bad} are zero or not finite: a cosine with them is undefined")
    return features / norm
