from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.evaluation.identification import identification, identified_shares


def brute_force(regions: np.ndarray, exemplars: np.ndarray, labels: list[int]) -> float:
    def cosine(a: np.ndarray, b: np.ndarray) -> float:
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))

    scores = []
    for i in range(len(regions)):
        for j in range(len(regions)):
            if labels[i] == labels[j]:
                continue
            own, other = cosine(regions[i], exemplars[i]), cosine(regions[i], exemplars[j])
            scores.append(0.5 if own == other else float(own > other))
    return float(np.mean(scores))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 9), distinct=st.integers(2, 9))
def test_equals_a_loop_over_all_pairs(seed: int, n: int, distinct: int) -> None:
    rng = np.random.default_rng(seed)
    labels = [0, 1, *rng.integers(0, distinct, n - 2).tolist()]
    regions, exemplars = rng.normal(size=(2, n, 5))
    measured = identification(regions, exemplars, labels, num_resamples=20)
    assert measured.value == pytest.approx(brute_force(regions, exemplars, labels), abs=1e-12)
    assert measured.n == n
    shares = identified_shares(regions, exemplars, labels)
    others = np.array([sum(label != own for label in labels) for own in labels])
    assert (shares * others).sum() / others.sum() == pytest.approx(measured.value, abs=1e-12)


def test_random_features_are_at_chance() -> None:
    rng = np.random.default_rng(0)
    values = [identification(*rng.normal(size=(2, 60, 16)), num_resamples=1).value for _ in range(200)]
    # One run has a standard deviation near 0.035 (pairs of one item go together), so the mean of 200 has
    # one near 0.0025: 0.01 is four of them.
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)


def test_regions_that_ignore_the_exemplar_score_exactly_chance() -> None:
    rng = np.random.default_rng(1)
    same_region = np.tile(rng.normal(size=(1, 8)), (10, 1))
    assert identification(same_region, rng.normal(size=(10, 8))).value == pytest.approx(0.5)


def test_copies_are_always_identified_and_scale_does_not_matter() -> None:
    exemplars = np.random.default_rng(2).normal(size=(12, 7))
    measured = identification(exemplars * 3.0, exemplars)
    assert (measured.value, measured.low, measured.high) == (1.0, 1.0, 1.0)


def test_interval_is_seeded_and_covers_the_truth() -> None:
    def draw(seed: int, n: int = 40) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        exemplars = rng.normal(size=(n, 8))
        return exemplars + 2.0 * rng.normal(size=(n, 8)), exemplars

    assert identification(*draw(0)) == identification(*draw(0))
    assert identification(*draw(0)) != identification(*draw(0), seed=1)
    truth = identification(*draw(999, n=1500), num_resamples=1).value
    covered = sum(e.low <= truth <= e.high for e in (identification(*draw(s), num_resamples=200) for s in range(100)))
    # 95 of 100 are expected; the binomial's standard deviation is 2.2, and a percentile bootstrap at
    # 40 items is a little too narrow: 86 is four standard deviations below.
    assert covered >= 86


def test_items_with_the_same_exemplar_are_not_compared() -> None:
    rng = np.random.default_rng(3)
    exemplars = rng.normal(size=(3, 6))
    exemplars[1] = exemplars[0]
    regions = exemplars + 0.01 * rng.normal(size=(3, 6))
    assert identification(regions, exemplars).value == 1.0


@pytest.mark.parametrize(
    ("regions", "exemplars", "message"),
    [
        (np.ones((3, 4)), np.ones((2, 4)), "same shape"),
        (np.ones((3, 4)), np.ones((3, 4)), "two different exemplars"),
        (np.zeros((2, 4)), np.eye(2, 4), "item 0"),
        (np.full((2, 4), np.nan), np.eye(2, 4), "not finite"),
    ],
)
def test_unusable_features_are_refused(regions: np.ndarray, exemplars: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        identification(regions, exemplars)


def test_repeated_exemplars_do_not_narrow_the_interval() -> None:
    rng = np.random.default_rng(4)
    exemplars = rng.normal(size=(15, 8))
    regions = exemplars + 2.0 * rng.normal(size=(15, 8))
    once = identification(regions, exemplars)
    five_times = identification(np.repeat(regions, 5, 0), np.repeat(exemplars, 5, 0))
    assert five_times.value == pytest.approx(once.value, abs=1e-12)
    assert (five_times.low, five_times.high) == pytest.approx((once.low, once.high), abs=1e-12)
