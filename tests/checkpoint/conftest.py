"""Layouts of the published checkpoints."""

from __future__ import annotations

import pytest
from torch import Tensor

from tests.procweights import layout


@pytest.fixture(scope="session")
def official() -> dict[str, Tensor]:
    return layout("official")


@pytest.fixture(scope="session")
def sd_full_ema() -> dict[str, Tensor]:
    return layout("sd_v1_4")
