"""The comparison with diffusers on the CPU, with the tiny model: that both compute the same, not how long it takes."""

import json
import math
from pathlib import Path

import pytest

from benchmarks import speed
from benchmarks.timing import Spread, timed
from ldm.config import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_both_sides_compute_the_same_in_every_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("diffusers")
    monkeypatch.setattr(speed, "small", lambda: load_config(ROOT / "configs" / "tiny.yaml"))
    monkeypatch.setattr(speed, "STEPS", 4)
    assert speed.main(["--rounds", "1", "--json", str(tmp_path / "speed.json")]) == 0
    rows = json.loads((tmp_path / "speed.json").read_text())
    assert len(rows) == len(speed.WORKS)
    for row in rows:
        assert 0 < row["ratio"][0] <= row["ratio"][1] <= row["ratio"][2] < math.inf
        assert row["difference"] < 1e-5, row  # rounding of float32, also after steps of training and of sampling


def test_a_run_is_timed_with_its_result() -> None:
    found = timed(lambda: sum(range(1000)))
    assert found.result == 499500 and found.wall >= 0 and found.cpu >= 0


def test_a_spread_is_smallest_median_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 2.5]) == (1.0, 2.5, 3.0)
    assert str(Spread.of([3.0, 1.0, 2.5])) == "1.00 / 2.50 / 3.00"
