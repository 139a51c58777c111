"""Layouts of the published checkpoints."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

GOLDEN = Path(__file__).parent.parent / "golden"


@pytest.fixture(scope="session")
def manifest() -> Callable[[str], dict[str, Tensor]]:
    """Reads a manifest as tensors without memory."""

    def read(name: str) -> dict[str, Tensor]:
        with open(GOLDEN / name, newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
        return {
            row["name"]: torch.empty(json.loads(row["shape"]), dtype=getattr(torch, row["dtype"]), device="meta")
            for row in rows
        }

    return read


@pytest.fixture(scope="session")
def official(manifest: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return manifest("official_state_dict.tsv")


@pytest.fixture(scope="session")
def sd_full_ema(manifest: Callable[[str], dict[str, Tensor]]) -> dict[str, Tensor]:
    return manifest("sd_v1_4_state_dict.tsv")
