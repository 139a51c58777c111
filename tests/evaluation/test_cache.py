from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.cache import FeatureCache
from ldm.files import UserError


def features(n: int, dim: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return {f"{seed}-{k}": row for k, row in enumerate(rows)}


def put_all(cache: FeatureCache, wanted: dict[str, np.ndarray]) -> None:
    for key, feature in wanted.items():
        cache.put(key, feature)


def assert_holds(cache: FeatureCache, expected: dict[str, np.ndarray]) -> None:
    for key, feature in expected.items():
        found = cache.get(key)
        assert found is not None
        assert found.dtype == np.float32
        assert np.array_equal(found, feature)


def test_stored_features_are_found_again(tmp_path: Path) -> None:
    stored, cache = features(5), FeatureCache(tmp_path / "new" / "cache")
    assert cache.get("0-1") is None
    put_all(cache, stored)
    put_all(cache, stored)
    assert_holds(cache, stored)
    assert_holds(FeatureCache(tmp_path / "new" / "cache"), stored)
    assert cache.get("unknown") is None


def write_for_ever(folder: Path, start: int) -> None:
    cache = FeatureCache(folder)
    for seed in range(start, start + 10**9):
        put_all(cache, features(10, seed=seed % 50))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forking, which is quick")
def test_killed_processes_that_share_a_folder_leave_whole_features(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_for_ever, args=(tmp_path / "cache", 0)) for _ in range(3)]
    for process in processes:
        process.start()
    cache, deadline = FeatureCache(tmp_path / "cache"), time.monotonic() + 60
    while cache.get("3-9") is None and time.monotonic() < deadline:
        time.sleep(0.01)
    for process in processes:
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    for seed in range(3):
        assert_holds(cache, features(10, seed=seed))
    for seed in range(50):
        found = {key: value for key in features(10, seed=seed) if (value := cache.get(key)) is not None}
        assert_holds(cache, {key: features(10, seed=seed)[key] for key in found})
    assert all(len(np.load(path)) == 8 for path in (tmp_path / "cache").rglob("*.npy") if path.name[0] != ".")


@pytest.mark.parametrize(
    "wrong", [np.full(8, np.nan), np.array([1, np.inf]), np.ones((2, 4)), np.array(["a", "b"]), np.zeros(8, complex)]
)
@pytest.mark.parametrize("is_archive", [False, True])
def test_what_is_no_feature_is_computed_anew(tmp_path: Path, wrong: np.ndarray, is_archive: bool) -> None:
    cache = FeatureCache(tmp_path)
    put_all(cache, features(2))
    (path,) = tmp_path.rglob("0-1.npy")
    wrong = wrong.astype(np.float32) if wrong.dtype == np.float64 else wrong
    with open(path, "wb") as file:
        np.savez(file, wrong) if is_archive else np.save(file, wrong)
    assert cache.get("0-1") is None
    assert cache.get("0-0") is not None


@pytest.mark.parametrize("content", [b"", b"not an array", b"cut"])
def test_a_damaged_feature_is_computed_anew(tmp_path: Path, content: bytes) -> None:
    cache = FeatureCache(tmp_path)
    put_all(cache, features(2))
    (path,) = tmp_path.rglob("0-1.npy")
    path.write_bytes(path.read_bytes()[:-7] if content == b"cut" else content)
    assert cache.get("0-1") is None
    put_all(cache, features(2))
    assert_holds(cache, features(2))


def test_a_full_disk_is_said_once_and_survived(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, cache = features(5), FeatureCache(tmp_path)
    put_all(cache, first)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    put_all(cache, features(5, seed=1))
    assert [str(tmp_path) in record.getMessage() for record in caplog.records] == [True]
    assert_holds(cache, first)
    assert cache.get("1-0") is None


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "cache"):
        with pytest.raises(UserError, match=str(folder)):
            FeatureCache(folder)
