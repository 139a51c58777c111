"""`golden/eval` holds features of 60 + 60 pictures and what the published scripts made of them."""

from __future__ import annotations

import json
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm.evaluation import frechet
from ldm.evaluation.frechet import (
    RunningStatistics,
    Statistics,
    frechet_distance,
    frechet_estimate,
    kid,
    neighbours,
    statistics_of,
)
from ldm.files import UserError
from tests.procweights import read_golden

GOLDEN = Path(__file__).parent.parent / "golden" / "eval"


@pytest.fixture(scope="module")
def features() -> dict[str, np.ndarray]:
    return {name: tensor.numpy() for name, tensor in read_golden("eval/features").items()}


@pytest.fixture(scope="module")
def expected() -> dict[str, float]:
    return json.loads((GOLDEN / "golden_eval.json").read_text())


def precision_recall(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    fakes, reals = neighbours(real, fake, k)
    return float(fakes.mean()), float(reals.mean())


def normal(n: int, d: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, scale, (n, d))


# ---- Fréchet distance ----


def test_golden_of_singular_covariances(features: dict[str, np.ndarray], expected: dict[str, float]) -> None:
    real, generated = features["feat_gt"].astype(np.float64), features["feat_gen"].astype(np.float64)
    distance = frechet_distance(statistics_of(real), statistics_of(generated))
    # 60 items span 59 of 512 directions. The recorded values carry the noise of the other 453 (a matrix square root's,
    # and that of square roots of rounding errors), so they agree with each other and with this to some 1e-6 only.
    assert distance == pytest.approx(expected["fid_eigen_reference"], rel=1e-5)
    assert distance == pytest.approx(float(str(expected["fid_60_vs_60_512d_singular"]).split()[1]), rel=1e-5)
    # Without that noise: tr (A^½ B A^½)^½ from the items themselves, which hold no other directions.
    x, y = real - real.mean(0), generated - generated.mean(0)
    cross = np.linalg.svd(x @ y.T, compute_uv=False).sum() / 59
    shift = real.mean(0) - generated.mean(0)
    exact = shift @ shift + (np.square(x).sum() + np.square(y).sum()) / 59 - 2 * cross
    assert distance == pytest.approx(exact, rel=1e-10)


def test_golden_of_well_conditioned_covariances(features: dict[str, np.ndarray], expected: dict[str, float]) -> None:
    a, b = (statistics_of(features[name].astype(np.float64) @ features["proj16"]) for name in ("feat_gt", "feat_gen"))
    assert frechet_distance(a, b) == pytest.approx(expected["fid_16d_eigen_reference"], rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(expected["fid_16d_nonsingular_official_fn"], rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(2, 40), m=st.integers(2, 40), d=st.integers(1, 12))
def test_distance_is_symmetric_never_negative_and_zero_to_itself(seed: int, n: int, m: int, d: int) -> None:
    a, b = statistics_of(normal(n, d, seed, 3.0)), statistics_of(normal(m, d, seed + 1, shift=0.5))
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert frechet_distance(a, b) >= 0
    assert frechet_distance(a, a) <= 1e-10 * np.trace(a.cov)


def test_closed_form_of_two_normal_distributions() -> None:
    a = Statistics(10, np.zeros(3), np.diag([1.0, 4.0, 0.0]))
    b = Statistics(10, np.array([3.0, 0.0, 0.0]), np.diag([9.0, 1.0, 25.0]))
    assert frechet_distance(a, b) == pytest.approx(9 + (1 - 3) ** 2 + (2 - 1) ** 2 + 25, rel=1e-12)


def test_different_networks_or_dimensions_are_not_compared() -> None:
    a, b = statistics_of(normal(5, 4, 0), "CLIP"), statistics_of(normal(5, 4, 1), "DINOv2")
    with pytest.raises(UserError, match=r'"CLIP" and of "DINOv2"'):
        frechet_distance(a, b)
    assert frechet_distance(a, statistics_of(normal(5, 4, 1))) > 0  # not recorded
    with pytest.raises(UserError, match="4 and of 3 channels"):
        frechet_distance(a, statistics_of(normal(5, 3, 1)))


# ---- statistics ----


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.lists(st.integers(0, 9), min_size=1, max_size=8), d=st.integers(1, 6))
def test_statistics_do_not_depend_on_the_chunks(seed: int, sizes: list[int], d: int) -> None:
    x = normal(sum(sizes) + 2, d, seed, shift=1e4)  # far from zero, where raw squares would lose digits
    running = RunningStatistics()
    for chunk in np.split(x, np.cumsum(sizes)):
        running.add(chunk)
    result = running.result()
    assert result.n == len(x)
    assert np.allclose(result.mean, x.mean(0), rtol=1e-13, atol=0)
    # np.cov centres values near 1e4 to some 1e-12: rounding of the input, not of the merging.
    assert np.allclose(result.cov, np.cov(x, rowvar=False).reshape(d, d), rtol=1e-9, atol=1e-10)


def test_memory_does_not_grow_with_the_number_of_pictures() -> None:
    chunk = normal(500, 512, 0).astype(np.float32)
    running = RunningStatistics()
    tracemalloc.start()
    for _ in range(80):
        running.add(chunk.copy())
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert running.result().n == 40_000
    assert peak < 20e6  # the features alone are 82 MB; a covariance is 2 MB


def test_statistics_survive_the_disk(tmp_path: Path) -> None:
    saved = statistics_of(normal(9, 4, 0), "CLIP ViT-B/32 (OpenAI)")
    saved.save(tmp_path / "new folder" / "real.npz")
    loaded = Statistics.load(tmp_path / "new folder" / "real.npz")
    assert (loaded.n, loaded.network) == (9, "CLIP ViT-B/32 (OpenAI)")
    assert np.array_equal(loaded.mean, saved.mean)
    assert np.array_equal(loaded.cov, saved.cov)
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["real.npz"]


def test_unusable_files_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "real.npz"
    with pytest.raises(UserError, match=r"real\.npz"):
        Statistics.load(path)
    path.write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(UserError, match=r"real\.npz"):
        Statistics.load(path)
    statistics_of(normal(9, 4, 0)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"real\.npz"):
        Statistics.load(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"real\.npz"):
        Statistics.load(path)
    np.save(path.with_suffix(".npy"), np.zeros(3))
    with pytest.raises(UserError, match=r"real\.np"):
        Statistics.load(path.with_suffix(".npy"))
    np.savez(path, mu=np.zeros(4), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"real\.npz: .*pytorch-fid"):
        Statistics.load(path)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1), n=3)  # a pickle, which is not read
    with pytest.raises(UserError, match=r"real\.np"):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("part", "value"),
    [
        *[("sigma", bad) for bad in (np.eye(3), np.full((4, 4), np.nan), np.triu(np.ones((4, 4))), -np.eye(4))],
        *[("sigma", np.diag([1, 1, 1, bad])) for bad in (np.nan, np.inf)],
        *[("mu", bad) for bad in (np.full(4, np.nan), np.full(4, -np.inf), np.array(["a"] * 4))],
        *[("n", bad) for bad in (1, np.nan, np.inf, [5], "many")],
    ],
)
def test_statistics_that_are_no_numbers_are_refused(tmp_path: Path, part: str, value: Any) -> None:
    path = tmp_path / "real.npz"
    np.savez(path, **{"mu": np.zeros(4), "sigma": np.eye(4), "n": np.array(5), part: value})
    with pytest.raises(UserError, match=r"real\.npz: "):
        Statistics.load(path)


@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.integers(0, 19))
def test_features_that_are_not_finite_have_no_distance(value: float, position: int) -> None:
    features = normal(5, 4, 0)
    features.flat[position] = value
    for run in (lambda: statistics_of(features), lambda: frechet_estimate(features, statistics_of(normal(5, 4, 1)))):
        with np.errstate(invalid="ignore"), pytest.raises(UserError):
            run()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_equal_images_have_a_distance_without_warnings(n: int) -> None:
    equal, real = np.tile(normal(1, 4, 0), (n, 1)), normal(9, 4, 1)
    with warnings.catch_warnings(action="error"):
        assert frechet_estimate(equal, statistics_of(equal), num_resamples=5).value == 0
        estimate = frechet_estimate(equal, statistics_of(real), num_resamples=5)
    shift = np.square(equal[0] - real.mean(0)).sum() + np.trace(np.cov(real.T))
    assert estimate.low == pytest.approx(estimate.value) and estimate.value == pytest.approx(shift)


def test_one_image_has_no_covariance() -> None:
    running = RunningStatistics()
    with pytest.raises(UserError, match="0 "):
        running.result()
    running.add(normal(1, 4, 0))
    with pytest.raises(UserError, match="1 "):
        running.result()


# ---- interval ----


def test_interval_is_seeded_and_around_the_measured_distance(features: dict[str, np.ndarray]) -> None:
    real = statistics_of(features["feat_gt"])
    estimate = frechet_estimate(features["feat_gen"], real, num_resamples=60, seed=1)
    assert estimate == frechet_estimate(features["feat_gen"], real, num_resamples=60, seed=1)
    assert estimate.value == frechet_distance(statistics_of(features["feat_gen"]), real)
    assert estimate.low < estimate.value < estimate.high
    with pytest.raises(UserError, match="16 and of 512"):
        frechet_estimate(features["feat_gen"] @ features["proj16"], real, num_resamples=2)


@pytest.mark.parametrize("n", [10, 60])  # below and above D: the two ways to the eigenvalues
def test_resamples_are_measured_as_the_set_is(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Identity:
        def integers(self, low: int, high: int, size: int) -> np.ndarray:
            return np.arange(low, high)

    x, real = normal(n, 20, 0, 2.0), statistics_of(normal(200, 20, 1))
    monkeypatch.setattr(np.random, "default_rng", lambda _: Identity())
    found = frechet_estimate(x, real, num_resamples=1)
    assert found.low == found.high == pytest.approx(frechet_distance(statistics_of(x), real), rel=1e-9)


def test_interval_covers_what_other_items_give() -> None:
    rng = np.random.default_rng(0)
    real = statistics_of(rng.normal(size=(2000, 4)))
    sets = [1.3 * rng.normal(size=(200, 4)) + 0.2 for _ in range(40)]
    found = [frechet_estimate(x, real, num_resamples=100, seed=k) for k, x in enumerate(sets)]
    average = np.mean([estimate.value for estimate in found])
    covered = np.mean([estimate.low <= average <= estimate.high for estimate in found])
    assert covered >= 0.85  # 0.95 is meant; 40 draws have a standard deviation of 0.035


# ---- KID ----


def polynomial_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """The squared maximum mean discrepancy under KID's kernel, by its definition."""
    n, d = x.shape
    xx, xy, yy = ((a @ b.T / d + 1) ** 3 for a, b in ((x, x), (x, y), (y, y)))
    return float((xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)) / (n * (n - 1)) - 2 * xy.mean())


def with_error(x: np.ndarray, y: np.ndarray, **options: int) -> tuple[float, float]:
    """The kernel distance and its standard error."""
    found = kid(x, y, **options)
    assert found.value - found.low == pytest.approx(found.high - found.value)
    return found.value / 1000, (found.high - found.value) / 1960


def test_kid_is_unbiased_and_its_error_is_that_of_other_items() -> None:
    rng = np.random.default_rng(0)
    measured = [
        with_error(rng.normal(size=(60, 6)), 1.2 * rng.normal(size=(60, 6)) + 0.3, subsets=20, seed=k)
        for k in range(100)
    ]
    values, errors = np.array(measured).T
    truth = polynomial_mmd(rng.normal(size=(2000, 6)), 1.2 * rng.normal(size=(2000, 6)) + 0.3)
    assert values.mean() == pytest.approx(truth, abs=4 * values.std() / np.sqrt(len(values)))
    # A spread of 100 values is known to 7 %; the jackknife of halves takes in some second-order noise on top.
    assert 0.8 < errors.mean() / values.std() < 1.5
    null = np.array(
        [with_error(rng.normal(size=(40, 6)), rng.normal(size=(50, 6)), subsets=20, seed=k) for k in range(80)]
    )
    assert null[:, 0].mean() == pytest.approx(0, abs=4 * null[:, 0].std() / np.sqrt(80))


def test_kid_draws_subsets_of_the_asked_size(features: dict[str, np.ndarray]) -> None:
    real, generated = (features[name].astype(np.float64) for name in ("feat_gt", "feat_gen"))
    value, error = with_error(real, generated, subsets=50, subset_size=20)
    assert (value, error) == with_error(real, generated, subsets=50, subset_size=20)
    assert value == pytest.approx(polynomial_mmd(real, generated), abs=2 * error)
    with pytest.raises(UserError, match="3 "):
        kid(normal(3, 4, 0), normal(9, 4, 0))


# ---- precision and recall ----


def brute_force(items: np.ndarray, members: np.ndarray, k: int) -> float:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b))

    radii = [sorted(distance(a, b) for j, b in enumerate(members) if j != i)[k - 1] for i, a in enumerate(members)]
    return float(np.mean([any(distance(x, a) <= r for a, r in zip(members, radii, strict=True)) for x in items]))


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(5, 14), m=st.integers(5, 14), k=st.integers(1, 4))
def test_precision_and_recall_equal_a_loop(seed: int, n: int, m: int, k: int) -> None:
    real, fake = normal(n, 3, seed), normal(m, 3, seed + 1, shift=0.7)
    assert precision_recall(real, fake, k) == (brute_force(fake, real, k), brute_force(real, fake, k))


def test_precision_and_recall_do_not_depend_on_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, fake = normal(50, 5, 0), normal(60, 5, 1, 0.8)
    whole = precision_recall(real, fake)
    blocks = frechet._squared_distances
    monkeypatch.setattr(frechet, "_squared_distances", lambda a, b: blocks(a, b, 7))
    assert precision_recall(real, fake) == whole


def test_precision_and_recall_never_hold_all_distances() -> None:
    real, fake = normal(3000, 4, 0), normal(3000, 4, 1)
    tracemalloc.start()
    precision_recall(real, fake)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 35e6  # all distances are 72 MB, those of a block 6 MB


def test_what_precision_and_recall_tell_apart() -> None:
    real = normal(80, 4, 0, shift=50.0)
    assert precision_recall(real, real) == (1.0, 1.0)
    assert precision_recall(real, real + 1000) == (0.0, 0.0)
    few_kinds = np.repeat(real[:4], 20, axis=0)  # copies of four real items: all lie among them, few are like them
    assert precision_recall(real, few_kinds) == (1.0, pytest.approx(0.05))
    with pytest.raises(UserError, match="k = 3"):
        precision_recall(real, real[:3])
