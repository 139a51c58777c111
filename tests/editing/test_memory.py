from __future__ import annotations

import ctypes
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.editing.cli import keep_freed_memory

REPOSITORY = Path(__file__).parents[2]
FAULTS = """
import resource, sys
import torch
from ldm.editing.cli import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
torch.set_num_threads(1)
layers = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)))
x = torch.zeros(1, 16, 160, 160)
with torch.inference_mode():
    for count in range(12):
        if count == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layers(x)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    """Ten passes of a small network whose tensors have 1.6 MiB, 400 pages each: 80 of them are made."""

    def faults(word: str) -> int:
        words = [sys.executable, "-c", FAULTS, word]
        return int(subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout)

    assert 10 * faults("keep") < faults("give back")


@pytest.mark.parametrize("library", ["", "musl"])
def test_other_c_libraries_are_left_alone(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not keep_freed_memory()
