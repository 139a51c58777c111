"""Samplers on the device: the CPU's results, and no step that waits for the GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.parity import RUNS, Run, expected_trajectory, trajectory
from ldm.latent_diffusion import LatentDiffusion
from ldm.samplers import SAMPLERS

NOISELESS = [name for name in SAMPLERS if name != "ddpm"]


@pytest.fixture
def model(tiny_model: LatentDiffusion, device: str) -> LatentDiffusion:
    return copy.deepcopy(tiny_model).to(device)


def arguments(model: LatentDiffusion, golden: dict[str, Tensor], device: str) -> dict[str, Any]:
    values = {name: golden[f"sample/{name}"].to(device) for name in ("z_inpaint", "mask", "cond", "x_T")}
    c_concat = model.c_concat(values["z_inpaint"], values["mask"])
    return {"c_concat": c_concat, "context": values["cond"], "x_T": values["x_T"]}


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_gives_the_cpus_result(
    golden: dict[str, Tensor],
    tiny_model: LatentDiffusion,
    model: LatentDiffusion,
    device: str,
    sampler: str,
    guidance_scale: float,
) -> None:
    settings: dict[str, Any] = dict(sampler=sampler, num_steps=5, guidance_scale=guidance_scale, eta=0.0)
    if sampler == "ddim":
        settings["eta"] = 1.0
    results = [
        tested.sample(**arguments(tested, golden, where), **settings, generator=torch.Generator().manual_seed(0)).cpu()
        for tested, where in ((tiny_model, "cpu"), (model, device))
    ]
    # The random network lets values grow to 68, and guidance weighs the rounding of two predictions with 3 and 2:
    # float32 leaves 2e-6 of the largest value on the CPU (docs/parity.md); another device sums in another order.
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=1e-5 * results[0].abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("run", RUNS, ids=lambda run: run.name)
def test_the_references_trajectories(golden: dict[str, Tensor], tiny_model: LatentDiffusion, run: Run) -> None:
    """As on the CPU, where twice 2e-6 (x) and 9e-6 (x_0) of the largest value are allowed; here ten times that."""
    model = copy.deepcopy(tiny_model).to("cuda")
    got = trajectory(model, {name: tensor.cuda() for name, tensor in golden.items() if "sample/" in name}, run)
    for ours, theirs, tolerance in zip(got, expected_trajectory(golden, run), (4e-5, 2e-4), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=tolerance * theirs.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize("sampler", NOISELESS)
def test_no_step_waits_for_the_gpu(
    golden: dict[str, Tensor], tiny_model: LatentDiffusion, sampler: str, guidance_scale: float
) -> None:
    """Samplers without noise of their own, which comes from the CPU; the first run makes what is made once."""
    model = copy.deepcopy(tiny_model).to("cuda")
    inputs: dict[str, Any] = arguments(model, golden, "cuda")
    inputs |= {"sampler": sampler, "num_steps": 4, "guidance_scale": guidance_scale}
    expected = model.sample(**inputs)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = model.sample(**inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
