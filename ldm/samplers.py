"""Samplers: from noise x_T to x_0, as pure functions of the noise prediction eps_pred = denoise(x_t, t).

Every sampler has the signature of `Sampler`. Notation: ac = alphas_cumprod, alpha = sqrt(ac), sigma = sqrt(1 - ac),
lambda = log(alpha / sigma). Coefficients are Python floats (float64) worked out on the CPU, so nothing waits for the
device; x is float32, or float64 where x_T is.

Two choices of timesteps:

- `ddim` and `plms` follow the paper's code: every (T // num_steps)-th timestep, beginning with 1; the last step leads
  to timestep 0, whose small noise stays in the result.
- `ddpm`, `dpm_solver_pp` and `unipc` go from T - 1, where the process is closest to the pure noise they are given,
  to 0, its least noise, and only from there straight to x_0; the closer to 0, the denser, because lambda changes
  fastest there. Of Gaussian detail of standard deviation 0.1, 20 steps of DPM-Solver++ on Stable Diffusion's
  schedule so keep 98 %; with even timesteps it would be 85 %, and with diffusers' "linspace" or "trailing", which go
  to x_0 from about T / num_steps, 41 %.

Dimensions: B batch · T diffusion steps · x (B, ...), any further axes.

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239); Song et al. 2021 (DDIM, arXiv:2010.02502); Liu et al. 2022 (PNDM,
arXiv:2202.09778); Lu et al. 2022 (DPM-Solver++, arXiv:2211.01095); Zhao et al. 2023 (UniPC, arXiv:2302.04867).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ldm.diffusion import posterior_coefficients

Denoise = Callable[[Tensor, int], Tensor]
"""(x_t, t) => eps_pred, of x_t's shape."""
Noise = Callable[[], Tensor]
"""Draws a fresh standard normal tensor of x's shape."""
OnStep = Callable[[int, int, Tensor, Tensor], None]
"""(step, num_steps, x_t, x_0_pred), after every step: step counts from 1 to num_steps, x_t is where it led."""


class Sampler(Protocol):
    """What the functions of this module have in common."""

    def __call__(
        self,
        denoise: Denoise,
        x_T: Tensor,
        alphas_cumprod: Tensor,
        num_steps: int,
        *,
        eta: float = 0.0,
        noise: Noise | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Sample x_0.

        Args:
            denoise: the noise prediction, with guidance where wanted; called with t in [0, T).
            x_T: (B, ...) standard normal.
            alphas_cumprod: (T,) the schedule, on the CPU.
            num_steps: number of steps, from 1 to T.
            eta: in [0, 1]; for `ddim` only: noise added along the way, 0 none, 1 as much as DDPM.
            noise: source of that noise; only `ddpm` and `ddim` with eta > 0 call it.
            on_step: called after every step.

        Returns:
            x_0, (B, ...) float32.

        Raises:
            ValueError: num_steps, eta or noise do not fit.
        """
        ...


# --- Stochastic and DDIM-type samplers --------------------------------------------------------------------------------


def ddpm(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Ancestral sampling: x_prev ~ q(x_prev | x_t, x_0_pred).

    Fewer steps than T skip timesteps, the posterior spanning the gap (iDDPM, section 4).

    Source: DDPM, Algorithm 2 with the variance of Eq. 7.
    """
    _check_deterministic(eta)
    draw = _require(noise)
    timesteps = quadratic_timesteps(len(alphas_cumprod), num_steps)
    ac = alphas_cumprod.double()[timesteps]
    ac_prev = torch.cat([ac[1:], ac.new_ones(1)])
    coefficients = torch.stack([ac, *posterior_coefficients(ac, ac_prev)], dim=1).tolist()
    x = _at_least_float32(x_T)
    for step, (t, row) in enumerate(zip(timesteps, coefficients, strict=True), start=1):
        ac_t, coef_x_0, coef_x_t, variance = row
        x_0 = _x_0(x, denoise(x, t), ac_t)
        x = coef_x_0 * x_0 + coef_x_t * x
        if step < num_steps:  # the last variance is 0
            x = x + math.sqrt(variance) * draw()
        if on_step:
            on_step(step, num_steps, x, x_0)
    return x


def ddim(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DDIM; deterministic with eta 0. Source: DDIM, Eq. 12 and 16."""
    steps = ddim_steps(alphas_cumprod, num_steps, eta)
    draw = _require(noise) if eta > 0 else None
    x = _at_least_float32(x_T)
    for number, step in enumerate(steps, start=1):
        x, x_0 = _ddim_step(x, denoise(x, step.t), step)
        if draw:
            x = x + step.sigma * draw()
        if on_step:
            on_step(number, len(steps), x, x_0)
    return x


def plms(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """Pseudo linear multistep: DDIM's step with a multistep combination of noise predictions.

    The first step averages the predictions at both of its ends (improved Euler), so one more is made than steps.

    Source: PNDM, Eq. 12, with lower-order starts in place of its Runge-Kutta steps.
    """
    _check_deterministic(eta)
    steps = ddim_steps(alphas_cumprod, num_steps)
    x = _at_least_float32(x_T)
    history: list[Tensor] = []  # predictions, newest first
    for number, step in enumerate(steps, start=1):
        history = [denoise(x, step.t).to(x.dtype), *history[:3]]
        if number == 1:
            x_prev, _ = _ddim_step(x, history[0], step)
            t_prev = steps[min(1, len(steps) - 1)].t
            eps = (history[0] + denoise(x_prev, t_prev).to(x.dtype)) / 2
        else:
            weights = _ADAMS_BASHFORTH[len(history)]
            eps = torch.stack([w * e for w, e in zip(weights, history, strict=True)]).sum(0)
        x, x_0 = _ddim_step(x, eps, step)
        if on_step:
            on_step(number, len(steps), x, x_0)
    return x


_ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Weights of the newest predictions, by their number."""


class DDIMStep(NamedTuple):
    """A step from timestep t to the one before: ac there and here, and the noise added on the way."""

    t: int
    ac_t: float
    ac_prev: float
    sigma: float


def ddim_steps(alphas_cumprod: Tensor, num_steps: int, eta: float = 0.0) -> list[DDIMStep]:
    """The steps of `ddim` and `plms`, from the noisiest, as the paper's code chooses them.

    With c = T // num_steps the timesteps are 1, 1 + c, 1 + 2c, ... below T: one more than num_steps where c does not
    fit (30 => 31, 7 => 8). The original fails where 1 + kc = T (333, and all above T / 2); here that timestep is
    moved to T - 1.

    Args:
        alphas_cumprod: (T,) on the CPU.
        num_steps: from 1 to T.
        eta: in [0, 1].

    Raises:
        ValueError: num_steps or eta are out of range.

    Source: DDIM, Eq. 16 (sigma).
    """
    ac = alphas_cumprod.tolist()
    T = len(ac)
    _check_num_steps(T, num_steps)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta: got {eta}, expected 0 (deterministic) to 1 (as much noise as DDPM)")
    timesteps = sorted({min(1 + t, T - 1) for t in range(0, T, T // num_steps)}, reverse=True)
    steps = []
    for t, t_prev in pairwise([*timesteps, 0]):
        ac_t, ac_prev = ac[t], ac[t_prev]
        sigma = eta * math.sqrt((1 - ac_prev) / (1 - ac_t) * (1 - ac_t / ac_prev))
        steps.append(DDIMStep(t, ac_t, ac_prev, sigma))
    return steps


def _ddim_step(x: Tensor, eps: Tensor, step: DDIMStep) -> tuple[Tensor, Tensor]:
    """x_prev without its fresh noise, and the predicted x_0. Source: DDIM, Eq. 12."""
    eps = eps.to(x.dtype)
    x_0 = _x_0(x, eps, step.ac_t)
    x_prev = step.ac_prev**0.5 * x_0 + (1 - step.ac_prev - step.sigma**2) ** 0.5 * eps
    return x_prev, x_0


# --- High-order solvers of the probability-flow ODE, in x_0 and lambda ------------------------------------------------


def dpm_solver_pp(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """DPM-Solver++(2M): second order, one prediction per step; the first and the last step are of first order.

    Source: DPM-Solver++, Algorithm 2.
    """
    _check_deterministic(eta)
    knots = _knots(alphas_cumprod, num_steps)
    x = _at_least_float32(x_T)
    x_0s: list[Tensor] = []  # predictions at the knots
    for step, (here, there) in enumerate(pairwise(knots), start=1):
        x_0s = [*x_0s[-1:], _x_0(x, denoise(x, here.t), here.ac)]
        x = _advance(x, here, there, _extrapolate(knots, step - 1, x_0s))
        if on_step:
            on_step(step, num_steps, x, x_0s[-1])
    return x


def unipc(
    denoise: Denoise,
    x_T: Tensor,
    alphas_cumprod: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    on_step: OnStep | None = None,
) -> Tensor:
    """UniPC of order 2 with B(h) = e^h - 1 ("bh2"): DPM-Solver++(2M), each step corrected by the next prediction.

    The prediction at the end of a step serves its correction and the next step, so there is one per step.

    Source: UniPC, Algorithms 1 and 2, predicting x_0; the predictor of order 2 is then the step of DPM-Solver++(2M).
    """
    _check_deterministic(eta)
    knots = _knots(alphas_cumprod, num_steps)
    x = _at_least_float32(x_T)
    x_start = x  # where the last step began
    x_0s: list[Tensor] = []  # predictions at the knots
    for step, (here, there) in enumerate(pairwise(knots), start=1):
        x_0s = [*x_0s[-2:], _x_0(x, denoise(x, here.t), here.ac)]
        if step > 1:
            x = _advance(x_start, knots[step - 2], here, _interpolate(knots, step - 2, x_0s))
        x_start = x
        x = _advance(x, here, there, _extrapolate(knots, step - 1, x_0s))
        if on_step:
            on_step(step, num_steps, x, x_0s[-1])
    return x


class _Knot(NamedTuple):
    """A point of the solvers' grid."""

    t: int
    ac: float

    @property
    def alpha(self) -> float:
        return math.sqrt(self.ac)

    @property
    def sigma(self) -> float:
        return math.sqrt(1 - self.ac)

    @property
    def lam(self) -> float:
        return math.log(self.alpha / self.sigma) if self.ac < 1 else math.inf


def _knots(alphas_cumprod: Tensor, num_steps: int) -> list[_Knot]:
    """The quadratic timesteps and, behind them, the end without noise (whose t is not used)."""
    ac = alphas_cumprod.tolist()
    return [*(_Knot(t, ac[t]) for t in quadratic_timesteps(len(ac), num_steps)), _Knot(-1, 1.0)]


def _advance(x: Tensor, here: _Knot, there: _Knot, x_0: Tensor) -> Tensor:
    """Follow the probability-flow ODE from one knot to another as if the predicted x_0 were constant between them.

    Source: DPM-Solver++, Eq. 8 (the integral without its x_0); higher orders pass a better mean of x_0.
    """
    h = there.lam - here.lam
    return there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * x_0


def _extrapolate(knots: list[_Knot], i: int, x_0s: list[Tensor]) -> Tensor:
    """Mean x_0 over the step that begins at knot i, from the predictions up to there.

    The first step knows one prediction only; the last one leads to lambda = inf, where x_0 itself is the limit.

    Source: DPM-Solver++, Algorithm 2 (D_i).
    """
    if i == 0 or i == len(knots) - 2:
        return x_0s[-1]
    h_last, h = knots[i].lam - knots[i - 1].lam, knots[i + 1].lam - knots[i].lam
    return x_0s[-1] + h / (2 * h_last) * (x_0s[-1] - x_0s[-2])


def _interpolate(knots: list[_Knot], i: int, x_0s: list[Tensor]) -> Tensor:
    """Mean x_0 over the step that begins at knot i, from the predictions up to its end, knot i + 1.

    Source: UniPC, section 3 (UniC), of order 1 for the first step and 2 thereafter.
    """
    change = x_0s[-1] - x_0s[-2]
    if i == 0:
        return x_0s[-2] + change / 2
    h_last, h = knots[i].lam - knots[i - 1].lam, knots[i + 1].lam - knots[i].lam
    # moments of e^(lambda) over the step, divided by B(h), for data prediction (h => -h)
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    # weights (w_last, w_here) with w_last + w_here = b_1 and r * w_last + w_here = b_2
    r = -h_last / h
    w_last = (b_2 - b_1) / (r - 1)
    return x_0s[-2] + w_last / r * (x_0s[-3] - x_0s[-2]) + (b_1 - w_last) * change


# --- Shared -----------------------------------------------------------------------------------------------------------


def quadratic_timesteps(T: int, num_steps: int) -> list[int]:
    """num_steps distinct timesteps from T - 1 down to 0, about as the squares of even numbers.

    Source: DDIM, appendix D.2 (quadratic selection).
    """
    _check_num_steps(T, num_steps)
    if num_steps == 1:
        return [T - 1]
    timesteps = [0]
    for k in range(1, num_steps):
        timesteps.append(max(timesteps[-1] + 1, round((T - 1) * (k / (num_steps - 1)) ** 2)))
    return timesteps[::-1]


def first_timestep(sampler: str, alphas_cumprod: Tensor, num_steps: int) -> int:
    """Where a sampler begins: its x_T has the noise of that timestep."""
    if sampler in ("ddim", "plms"):
        return ddim_steps(alphas_cumprod, num_steps)[0].t
    return len(alphas_cumprod) - 1


def _x_0(x: Tensor, eps: Tensor, ac_t: float) -> Tensor:
    """x_0 predicted by a noise prediction. Source: DDPM, Eq. 15."""
    return (x - (1 - ac_t) ** 0.5 * eps.to(x.dtype)) / ac_t**0.5


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_num_steps(T: int, num_steps: int) -> None:
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps: got {num_steps}, expected 1 to {T} (the model's diffusion steps)")


def _check_deterministic(eta: float) -> None:
    if eta != 0:
        raise ValueError(f"eta: got {eta}, expected 0: only the sampler ddim takes another eta")


def _require(noise: Noise | None) -> Noise:
    if noise is None:
        raise ValueError("noise: got None, expected a function that draws noise; this sampler adds some at every step")
    return noise


SAMPLERS: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "dpm_solver_pp": dpm_solver_pp,
    "unipc": unipc,
}
"""The samplers by name."""
