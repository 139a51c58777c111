"""The benchmark for a GPU, run on the CPU with the tiny model: what it writes, not how long anything takes."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from ldm.config import load_config

WORDS = ["--tiny", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def short_and_counted_once() -> Iterator[None]:
    """Counting the model's operations takes longer than most entries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu, "STEPS", 2)
        operations = gpu.operations(load_config(gpu.ROOT / "configs" / "tiny.yaml"))
        patch.setattr(gpu, "operations", lambda _: operations)
        yield


def measured(folder: Path, *words: str) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Return rows by entry, and what was skipped."""
    assert gpu.main(["--out", str(folder), *WORDS, *words]) == 0
    content = json.loads((folder / "speed.json").read_text())
    return {row["entry"]: row for row in content["rows"]}, content["skipped"]


def test_every_entry_gives_a_row_beside_diffusers(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    rows, skipped = measured(tmp_path, "--seconds", "600")
    assert not skipped
    kinds = (gpu.STEP, gpu.EDIT, gpu.ENCODE, gpu.DECODE, gpu.TRAIN, gpu.CACHED, gpu.ONLINE, gpu.LOADER, gpu.MATMUL)
    assert {entry.partition(":")[0] for entry in rows} == set(kinds)
    table = (tmp_path / "speed.md").read_text()
    for entry, row in rows.items():
        kind = entry.partition(":")[0]
        assert f"| {entry} |" in table
        if kind != gpu.LOADER:
            assert row["ms"] > 0 and row["tflops"] > 0 and 0 < row["share_of_peak"] < math.inf, row
        if kind in (gpu.STEP, gpu.EDIT, gpu.ENCODE, gpu.DECODE, gpu.TRAIN):
            assert 0 < row["ratio"] < math.inf
            assert row["difference"] < 1e-5  # rounding of float32: the same weights, inputs and noise


def test_without_diffusers_its_columns_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setattr(gpu, "ENTRIES", (gpu.Entry(gpu.STEP, 2), gpu.Entry(gpu.EDIT)))
    rows, _ = measured(tmp_path)
    assert len(rows) == 2 and all(row["ms"] > 0 and row["ratio"] is None and not row["note"] for row in rows.values())
    assert "diffusers / ours" not in (tmp_path / "speed.md").read_text()


def test_a_failing_entry_is_a_row_with_its_reason_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate 80 GiB\nmore")

    monkeypatch.setattr(gpu.Bench, "_train", fail)
    monkeypatch.setattr(gpu, "ENTRIES", (gpu.Entry(gpu.TRAIN, 2), gpu.Entry(gpu.MATMUL)))
    failed, matmul = measured(tmp_path)[0].values()
    assert failed["ms"] is None and failed["note"].startswith("OutOfMemoryError: tried to allocate 80 GiB")
    assert matmul["ms"] > 0


def test_what_does_not_fit_into_the_seconds_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = gpu.Entry(gpu.EDIT, seconds=1e6), gpu.Entry(gpu.MATMUL, seconds=0)
    monkeypatch.setattr(gpu, "ENTRIES", entries)
    rows, skipped = measured(tmp_path, "--seconds", "60")
    assert [name.partition(":")[0] for name in (*rows, *skipped)] == [gpu.MATMUL, gpu.EDIT]
    assert skipped[0] in (tmp_path / "speed.md").read_text()


def test_an_interruption_loses_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu.Bench, "_infer", interrupt)
    monkeypatch.setattr(gpu, "ENTRIES", (gpu.Entry(gpu.MATMUL), gpu.Entry(gpu.EDIT)))
    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path)
    assert len(json.loads((tmp_path / "speed.json").read_text())["rows"]) == 1
