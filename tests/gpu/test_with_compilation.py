"""A compiled UNet gives what it gives eagerly. Compiling takes a minute, so these tests come last."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldm.latent_diffusion import LatentDiffusion, load_model
from tests.conftest import TINY_CONFIG
from tests.gpu.test_sampling import NOISELESS, arguments
from tests.gpu.test_training import PRECISION, assert_losses_near, place, tolerance
from tests.training.conftest import Fit, MakeConfig


@pytest.fixture(scope="module")
def compiled(tiny_checkpoint: Path) -> LatentDiffusion:
    return load_model(TINY_CONFIG, tiny_checkpoint, device="cuda", compile=True)


@pytest.mark.gpu
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", NOISELESS)
def test_every_sampler(
    golden: dict[str, Tensor],
    tiny_model: LatentDiffusion,
    compiled: LatentDiffusion,
    sampler: str,
    guidance_scale: float,
) -> None:
    """Its kernels are a graph that writes to the same memory in every step: what a sampler keeps must be a copy."""
    settings: dict[str, Any] = dict(sampler=sampler, num_steps=5, guidance_scale=guidance_scale)
    expected = tiny_model.sample(**arguments(tiny_model, golden, "cpu"), **settings)
    for _ in range(3):  # the graph is warmed up, recorded and replayed
        got = compiled.sample(**arguments(compiled, golden, "cuda"), **settings).cpu()
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


@pytest.mark.gpu
def test_training(fit: Fit, make_config: MakeConfig, tmp_path: Path) -> None:
    for name, flag, where in (("exact", "false", "cpu"), ("compiled", "true", "cuda")):
        config = make_config(*place(where, PRECISION[where]), f"training.compile={flag}", "trainer.max_epochs=1")
        assert fit(config, tmp_path / name)[1] == 0
    assert_losses_near(tmp_path / "compiled", tmp_path / "exact", 2 * tolerance("cuda", PRECISION["cuda"]))
