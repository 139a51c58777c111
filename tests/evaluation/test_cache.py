from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from ldm.evaluation.cache import FeatureCache
from ldm.files import UserError


def features(n: int, dim: int = 8, seed: int = 0) -> dict[str, np.ndarray]:
    rows = np.random.default_rng(seed).normal(size=(n, dim)).astype(np.float32)
    return {f"{seed}/{k}": row for k, row in enumerate(rows)}


def assert_holds(cache: FeatureCache, expected: dict[str, np.ndarray]) -> None:
    found = cache.get(expected)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)


def test_what_is_put_is_found_again(tmp_path: Path) -> None:
    path = tmp_path / "new" / "cache.sqlite"
    kept = features(5)
    with FeatureCache(path) as cache:
        assert cache.get(kept) == {}
        cache.put(kept)
        cache.put(kept)
        assert_holds(cache, kept)
    with FeatureCache(path) as cache:
        assert_holds(cache, kept)
        found = cache.get(["0/1", "unknown"])
        assert list(found) == ["0/1"]
        assert found["0/1"].dtype == np.float32


def test_a_file_is_known_by_its_content_and_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldm.evaluation import cache as module

    read: list[Path] = []
    original = module.sha256_file
    monkeypatch.setattr(module, "sha256_file", lambda path: read.append(path) or original(path))
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_bytes(b"same")
    b.write_bytes(b"same")
    with FeatureCache(tmp_path / "cache.sqlite") as cache:
        first = cache.content_hash(a)
        assert first == cache.content_hash(b) == cache.content_hash(a)
        assert read == [a, b]
        a.write_bytes(b"other")
        assert cache.content_hash(a) != first
        with pytest.raises(UserError, match=f"{tmp_path / 'c'}: cannot be read .*check the path"):
            cache.content_hash(tmp_path / "c")


def write_batches(path: Path, seed: int) -> None:
    with FeatureCache(path) as cache:
        for k in range(20):
            cache.put(features(10, seed=1000 * seed + k))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forking, which is quick")
def test_processes_share_a_cache(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=write_batches, args=(path, seed)) for seed in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    with FeatureCache(path) as cache:
        for seed in range(4):
            for k in range(20):
                assert_holds(cache, features(10, seed=1000 * seed + k))


def write_for_ever(path: Path) -> None:
    with FeatureCache(path) as cache:
        for seed in range(10**9):
            cache.put(features(10, seed=seed))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by forking, which is quick")
def test_a_killed_process_leaves_whole_batches(tmp_path: Path) -> None:
    path = tmp_path / "cache.sqlite"
    process = multiprocessing.get_context("fork").Process(target=write_for_ever, args=(path,))
    process.start()
    deadline = time.monotonic() + 60
    while not (path.exists() and path.stat().st_size > 20_000) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with FeatureCache(path) as cache:
        assert_holds(cache, features(10, seed=0))
        seed = 0
        while found := cache.get(features(10, seed=seed)):
            assert len(found) == 10
            seed += 1
        cache.put(features(3, seed=999_999_999))
        assert_holds(cache, features(3, seed=999_999_999))


@pytest.mark.parametrize("damage", ["no database", "cut off", "a changed byte"])
def test_a_damaged_cache_is_named_with_the_remedy(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "cache.sqlite"
    kept = features(200, dim=64)
    with FeatureCache(path) as cache:
        cache.put(kept)
    content = bytearray(path.read_bytes())
    if damage == "no database":
        content[:] = b"not a database, but a text that is long enough to be taken for one" * 50
    elif damage == "cut off":
        del content[len(content) // 2 :]
    else:
        content[content.index(kept["0/7"].tobytes()) + 5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: .*damaged.*delete it"), FeatureCache(path) as cache:
        cache.get(kept)


def test_a_full_disk_is_said_once_and_survived(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "cache.sqlite"
    first, second = features(5), features(500, dim=512, seed=1)
    with FeatureCache(path) as cache:
        cache.put(first)
        cache._connection.execute("PRAGMA max_page_count = 20")  # what SQLite then reports is that the disk is full
        cache.put(second)
        cache.put(features(500, dim=512, seed=2))
        assert [record.getMessage() for record in caplog.records] == [
            f"{path}: cannot be written (database or disk is full); going on without keeping features"
        ]
        assert_holds(cache, first)
        assert cache.get(second) == {}


def test_a_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another place"):
        FeatureCache(tmp_path / "file" / "cache.sqlite")
    with pytest.raises(UserError, match=f"{tmp_path}: cannot be used .*choose another place"):
        FeatureCache(tmp_path)


def test_a_database_of_something_else_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "other.sqlite"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE features (name TEXT)")
    connection.commit()
    connection.close()
    with pytest.raises(UserError, match=f"{path}: "), FeatureCache(path) as cache:
        cache.get(["key"])
