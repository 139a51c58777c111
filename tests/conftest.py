"""The tiny model with the reference's weights, and what the reference computed with it.

`golden/tiny_golden.safetensors` holds inputs and outputs of the published code in float32 on a CPU, run with the
weights of `golden/tiny_model.safetensors`. The reference repeated differs from itself by up to 6e-6.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldm.config import Config, load_config
from ldm.latent_diffusion import LatentDiffusion, load_model

GOLDEN = Path(__file__).parent / "golden"
TINY_CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"
TINY_CHECKPOINT = GOLDEN / "tiny_model.safetensors"

Close = Callable[[Tensor, Tensor], None]


@pytest.fixture(scope="session")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "tiny_golden.safetensors")


@pytest.fixture(scope="session")
def tiny_config() -> Config:
    return load_config(TINY_CONFIG)


@pytest.fixture(scope="session")
def tiny_checkpoint() -> Path:
    return TINY_CHECKPOINT


@pytest.fixture(scope="session")
def tiny_model() -> LatentDiffusion:
    """Shared: tests leave its weights and modes as they are."""
    return load_model(TINY_CONFIG, TINY_CHECKPOINT)


@pytest.fixture
def trainable_model() -> LatentDiffusion:
    """A copy of one's own, with gradients."""
    return load_model(TINY_CONFIG, TINY_CHECKPOINT).requires_grad_(True).train()


@pytest.fixture(scope="session")
def close() -> Close:
    """Asserts parity: 2e-5 absolute in float32, three times the reference's own spread of 6e-6."""

    def check(got: Tensor, expected: Tensor) -> None:
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)

    return check
