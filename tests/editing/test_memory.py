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
import resource
import torch
from ldm.editing.cli import keep_freed_memory
torch.set_num_threads(1)
layers = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(8)))
x = torch.zeros(1, 16, 160, 160)

@torch.inference_mode()
def faults():
    for count in range(12):
        if count == 2:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        layers(x)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

given_back = faults()
assert keep_freed_memory()
print(faults(), given_back)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_used_again() -> None:
    """Ten passes of a small network whose tensors have 1.6 MiB, 400 pages each: 80 of them are made."""
    done = subprocess.run([sys.executable, "-c", FAULTS], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    kept, given_back = map(int, done.stdout.split())
    assert 10 * kept < given_back


@pytest.mark.parametrize("library", ["", "musl"])
def test_other_c_libraries_are_left_alone(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "libc_ver", lambda: (library, ""))
    monkeypatch.setattr(ctypes, "CDLL", None)
    assert not keep_freed_memory()
