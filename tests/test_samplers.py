"""Samplers against closed-form solutions for Gaussian data, and against diffusers' schedulers.

For data ~ N(mu, s^2) every x_t is Gaussian too, with mean alpha_t mu and variance alpha_t^2 s^2 + sigma_t^2. So the
best noise prediction is known, and so is the probability-flow ODE: it keeps the standardised x_t constant.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.config import ScheduleConfig
from ldm.diffusion import make_schedule, to_eps
from ldm.samplers import SAMPLERS, ddim_steps, quadratic_timesteps, sample, uniform_timesteps

MU, S = 0.4, 0.7
DETERMINISTIC = ("ddim", "plms", "dpm_solver_pp", "unipc")


class Gaussian:
    """Data ~ N(MU, S^2) under a schedule: exact noise prediction, exact flow, number of evaluations."""

    def __init__(self, alphas_cumprod: Tensor) -> None:
        self.ac = alphas_cumprod.double().tolist()
        self.calls: list[int] = []

    def mean_std(self, t: int) -> tuple[float, float]:
        ac_t = self.ac[t]
        return math.sqrt(ac_t) * MU, math.sqrt(ac_t * S**2 + 1 - ac_t)

    def denoise(self, x: Tensor, t: int) -> Tensor:
        self.calls.append(t)
        mean, std = self.mean_std(t)
        return math.sqrt(1 - self.ac[t]) * (x - mean) / std**2

    def flow(self, x: Tensor, t_from: int, t_to: int) -> Tensor:
        (mean_from, std_from), (mean_to, std_to) = self.mean_std(t_from), self.mean_std(t_to)
        return mean_to + (x - mean_from) * (std_to / std_from)


def schedule(name: str) -> Tensor:
    return make_schedule(ScheduleConfig(name=name)).alphas_cumprod


# --- Timesteps --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_steps", [10, 30, 50, 100, 200])
@pytest.mark.parametrize("eta", [0, 1])
def test_ddim_steps_are_the_official_ones(golden: dict[str, Tensor], num_steps: int, eta: int) -> None:
    ac = make_schedule(ScheduleConfig()).buffers()["alphas_cumprod"]
    steps = reversed([*ddim_steps(ac, uniform_timesteps(1000, num_steps), eta)])
    ts, acs, acs_prev, sigmas = (list(column) for column in zip(*steps, strict=True))
    names = ("timesteps", "alphas", "alphas_prev", f"eta{eta}/sigmas")
    official = [golden[f"schedule/ddim{num_steps}/{name}"].tolist() for name in names]
    assert [ts, acs, acs_prev] == official[:3]
    # the original divides the float32 alphas in float32, here it is float64; measured: 1.8e-8
    assert sigmas == pytest.approx(official[3], rel=0, abs=6e-8)


@pytest.mark.parametrize(
    ("num_steps", "length", "first"),
    [
        (1, 1, 1),
        (7, 8, 995),
        (30, 31, 991),
        (50, 50, 981),
        (500, 500, 999),
        (333, 334, 999),
        (501, 999, 999),
        (1000, 999, 999),
    ],
)
def test_uniform_timesteps_where_the_step_count_does_not_divide(num_steps: int, length: int, first: int) -> None:
    timesteps = uniform_timesteps(1000, num_steps)
    assert (len(timesteps), timesteps[0], timesteps[-1]) == (length, first, 1)


def test_quadratic_timesteps_run_from_the_noisiest_to_the_cleanest() -> None:
    assert quadratic_timesteps(1000, 1) == [999]
    assert quadratic_timesteps(1000, 4) == [999, 444, 111, 0]
    assert quadratic_timesteps(1000, 1000) == list(range(999, -1, -1))
    for T, stride in ((5, 1), (50, 1), (1000, 37)):
        for num_steps in range(2, T + 1, stride):
            timesteps = quadratic_timesteps(T, num_steps)
            assert (len(timesteps), timesteps[0], timesteps[-1]) == (num_steps, T - 1, 0)
            assert all(a > b for a, b in pairwise(timesteps))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(sampler: str, num_steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps: got {num_steps}"):
        sample(sampler, lambda x, t: x, torch.zeros(1), schedule("cosine"), num_steps)


def test_options_that_do_not_fit_are_refused() -> None:
    ac, x = schedule("cosine"), torch.zeros(1)
    for name, eta in (("ddpm", 0.5), ("plms", 0.5), ("dpm_solver_pp", 0.5), ("unipc", 0.5), ("ddim", 1.5)):
        with pytest.raises(ValueError, match=f"eta: got {eta}"):
            sample(name, lambda x, t: x, x, ac, 5, eta=eta)
    with pytest.raises(ValueError, match="sampler: got 'euler'"):
        sample("euler", lambda x, t: x, x, ac, 5)


# --- Gaussian data ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("plms", 2), ("dpm_solver_pp", 2), ("unipc", 3)])
def test_order_of_convergence(sampler: str, order: int) -> None:
    """Error against the exact flow over lambda in [-3, 3], in float64.

    The schedule makes the sampler's steps even in lambda, and is so fine that rounding to timesteps hardly matters;
    then each doubling of the number of steps divides the error by 2^order. UniPC of order 2 reaches 3 by its
    corrector (UniPC, Theorem 3.1).
    """
    u = torch.linspace(0, 1, 28801, dtype=torch.float64)
    ac = torch.sigmoid(6 - 12 * (u if sampler in ("ddim", "plms") else u.sqrt()))  # sigmoid(2 lambda)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64)
    log_errors = []
    for intervals in (40, 80, 160):
        data, path = Gaussian(ac), []
        # the solvers have a knot at either end of the intervals; their last step leads from there to x_0
        num_steps = intervals if sampler in ("ddim", "plms") else intervals + 1
        sample(sampler, data.denoise, x_T, ac, num_steps, on_step=lambda *args, path=path: path.append(args[2]))
        reached = path[intervals - 1]
        log_errors.append(math.log2((reached - data.flow(x_T, data.calls[0], 0)).abs().max().item()))
    # measured slopes: 0.99 to 1.00, 2.00 to 2.02, 1.98 to 2.00 and 2.98 to 3.00
    assert -np.diff(log_errors) == pytest.approx([order, order], abs=0.1)


@pytest.mark.parametrize("name", ["scaled_linear", "linear", "cosine"])
@pytest.mark.parametrize(
    ("sampler", "num_steps", "tolerance"),
    # about 1.5 times the largest error over the three schedules
    [("ddim", 1000, 5e-3), ("plms", 50, 3e-3), ("dpm_solver_pp", 20, 1.7e-2), ("unipc", 20, 1.1e-2)],
)
def test_deterministic_samplers_follow_the_flow(name: str, sampler: str, num_steps: int, tolerance: float) -> None:
    ac = schedule(name)
    data = Gaussian(ac)
    x_T = torch.linspace(-2, 2, 9)
    x_0 = sample(sampler, data.denoise, x_T, ac, num_steps)
    assert x_0.dtype == torch.float32
    assert (x_0 - data.flow(x_T, data.calls[0], 0)).abs().max() < tolerance


@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_reach_the_data(name: str, sampler: str, eta: float) -> None:
    ac = schedule(name)
    data = Gaussian(ac)
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    mean_T, std_T = data.mean_std(999)
    x_T = mean_T + std_T * torch.randn(n, generator=generator)
    x_0 = sample(sampler, data.denoise, x_T, ac, 250, eta=eta, noise=lambda: torch.randn(n, generator=generator))
    # four standard errors, and what 250 steps lose: 0.01 to 0.02 of the spread, falling as 1 / num_steps
    assert x_0.mean().item() == pytest.approx(MU, abs=4 * S / math.sqrt(n) + 0.01)
    assert x_0.std().item() == pytest.approx(S, abs=4 * S / math.sqrt(2 * n) + 0.03)


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_float32_is_enough_where_almost_no_signal_is_left(sampler: str, parameterization: str) -> None:
    """The cosine schedule ends at alphas_cumprod = 2e-9; x_0 there is a difference divided by 5e-5."""
    ac = schedule("cosine")
    buffer = ac.float()

    def x_0(dtype: torch.dtype) -> Tensor:
        data = Gaussian(ac)

        def denoise(x: Tensor, t: int) -> Tensor:
            eps = data.denoise(x.double(), t)
            if dtype == torch.float64:
                return eps
            alpha, sigma = math.sqrt(data.ac[t]), math.sqrt(1 - data.ac[t])
            x_0 = (x.double() - sigma * eps) / alpha
            prediction = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0}[parameterization]
            return to_eps(prediction, x, torch.tensor([t]), parameterization, buffer)

        generator = torch.Generator().manual_seed(1)
        x_T = torch.randn(1, 256, generator=generator).to(dtype)
        noise = lambda: torch.randn(1, 256, generator=generator).to(dtype)  # noqa: E731
        return sample(sampler, denoise, x_T, ac, 100, noise=noise)

    # rounding x_T to 1e-7 may move the first x_0 by 2e-3, of which later steps leave 4e-5 or less
    torch.testing.assert_close(x_0(torch.float32).double(), x_0(torch.float64), rtol=0, atol=1e-4)


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # numpy 2 in diffusers
@pytest.mark.parametrize("name", ["scaled_linear", "cosine"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 20, 50])
@pytest.mark.parametrize("sampler", ["dpm_solver_pp", "unipc"])
def test_agrees_with_diffusers(sampler: str, num_steps: int, name: str) -> None:
    from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

    noise_schedule = make_schedule(ScheduleConfig(name=name))
    options: dict[str, Any] = {
        "trained_betas": noise_schedule.betas.numpy(),
        "solver_order": 2,
        "final_sigmas_type": "zero",
    }
    if sampler == "dpm_solver_pp":
        peer = DPMSolverMultistepScheduler(algorithm_type="dpmsolver++", lower_order_final=True, **options)
    else:
        peer = UniPCMultistepScheduler(solver_type="bh2", **options)
    # none of its spacings is ours, and its sigmas are float32 (at the end of the cosine schedule off by 2e-5)
    peer.set_timesteps(num_steps)
    timesteps = quadratic_timesteps(1000, num_steps)
    ac = noise_schedule.alphas_cumprod[timesteps]
    peer.timesteps = torch.tensor(timesteps)
    peer.sigmas = torch.cat([((1 - ac) / ac).sqrt(), ac.new_zeros(1)])

    def denoise(x: Tensor, t: int) -> Tensor:
        ac_t = noise_schedule.alphas_cumprod[t]
        return (x - ac_t.sqrt() * torch.tanh(2 * x + math.sin(t / 100))) / (1 - ac_t).sqrt()

    x_T = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x = x_T
    for t in peer.timesteps:
        x = peer.step(denoise(x, int(t)), t, x, return_dict=False)[0]
    ours = sample(sampler, denoise, x_T, noise_schedule.alphas_cumprod, num_steps)
    # the peer's DPM-Solver++ rounds x to float32 at every step, its UniPC agrees to 1e-13
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-5)


# --- Calling convention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "eta", "evaluations", "draws"),
    [
        ("ddpm", 0, 10, 9),
        ("ddim", 0, 10, 0),
        ("ddim", 1, 10, 10),
        ("plms", 0, 11, 0),
        ("dpm_solver_pp", 0, 10, 0),
        ("unipc", 0, 10, 0),
    ],
)
def test_evaluations_draws_and_callbacks(sampler: str, eta: float, evaluations: int, draws: int) -> None:
    ac = schedule("scaled_linear")
    data = Gaussian(ac)
    drawn, seen = [], []

    def noise() -> Tensor:
        drawn.append(1)
        return torch.zeros(2, 3)

    x_T = torch.ones(2, 3)
    x_0 = sample(sampler, data.denoise, x_T, ac, 10, eta=eta, noise=noise, on_step=lambda *args: seen.append(args))
    assert (len(data.calls), len(drawn)) == (evaluations, draws)
    assert [args[:2] for args in seen] == [(step, 10) for step in range(1, 11)]
    assert all(x.shape == pred.shape == x_T.shape for _, _, x, pred in seen)
    torch.testing.assert_close(seen[-1][2], x_0, rtol=0, atol=0)
    assert torch.equal(x_T, torch.ones(2, 3))  # the caller's noise is left alone


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("num_steps", [1, 2, 3, 8])
def test_few_steps_and_half_precision_networks(sampler: str, num_steps: int) -> None:
    ac = schedule("cosine")
    data = Gaussian(ac)
    x_0 = sample(
        sampler,
        lambda x, t: data.denoise(x, t).bfloat16(),
        torch.randn(8).half(),
        ac,
        num_steps,
        noise=lambda: torch.randn(8),
    )
    assert x_0.dtype == torch.float32
    assert x_0.isfinite().all()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_nothing_waits_for_the_device(sampler: str) -> None:
    """Tensors on the meta device have no values: reading one on the host, as a synchronising call does, fails."""
    x_T = torch.empty(2, 4, 8, 8, device="meta")
    eta = 1.0 if sampler == "ddim" else 0.0
    noise = lambda: torch.empty_like(x_T)  # noqa: E731
    x_0 = sample(sampler, lambda x, t: x * 0.5, x_T, schedule("cosine"), 5, eta=eta, noise=noise)
    assert x_0.device.type == "meta"


def test_equal_predictions_make_samplers_agree() -> None:
    """A constant noise prediction is integrated exactly by every first-order step, so by all orders."""
    ac = schedule("scaled_linear")
    x_T, eps = torch.randn(2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, second = (sample(sampler, lambda x, t: eps, x_T, ac, 20) for sampler in ("plms", "ddim"))
    torch.testing.assert_close(first, second, rtol=1e-10, atol=1e-10)
    # with x_0 constant instead (a point as data), every deterministic sampler knows the answer at once
    point = torch.full((16,), 0.3, dtype=torch.float64)

    def denoise(x: Tensor, t: int) -> Tensor:
        return (x - ac[t].sqrt() * point) / (1 - ac[t]).sqrt()

    for solver in ("dpm_solver_pp", "unipc"):
        torch.testing.assert_close(sample(solver, denoise, x_T, ac, 7), point, rtol=1e-10, atol=1e-10)
