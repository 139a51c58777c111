"""Samplers: pure functions from noise x_T to x_0, by a noise prediction eps_fn(x_t, t).

Notation: B batch · T diffusion steps · x (B, ...), float32, or float64 if x_T is · ac = alphas_cumprod ·
alpha = sqrt(ac) · sigma = sqrt(1 - ac) · lambda = log(alpha / sigma). Coefficients are Python floats (float64) from the
CPU, so nothing waits for the device.

Two choices of timesteps; `spaced_timesteps` makes a third one:

- `ddim` and `plms` follow the paper's code: every (T // num_steps)-th timestep, beginning with 1. The last step leads
  to timestep 0, whose small noise stays in the result.
- `ddpm`, `dpm_solver_pp` and `unipc` go from T - 1, where the process is closest to the pure noise they start from,
  to 0, its least noise, and only from there straight to x_0. The steps get denser towards 0, because lambda changes
  fastest there. With 20 steps of DPM-Solver++ on Stable Diffusion's schedule, detail with a standard deviation of 0.1
  keeps 98 % of it; uniform timesteps keep 85 %, and diffusers' "linspace" and "trailing", which go to x_0 from about
  T / num_steps, 41 %.

Every sampler takes `eps_fn`, x (B, ...) at the first timestep, ac (T,) on the CPU, and its timesteps, the noisiest
first. It is a generator: each step yields its result x and the x_0 that was predicted. `sample` runs it to the end.
With `clip` each predicted x_0 is kept in [-1, 1], as pixels are.

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239); Song et al. 2021 (DDIM, arXiv:2010.02502); Liu et al. 2022 (PNDM,
arXiv:2202.09778); Lu et al. 2022 (DPM-Solver++, arXiv:2211.01095); Zhao et al. 2023 (UniPC, arXiv:2302.04867);
Karras et al. 2022 (EDM, arXiv:2206.00364); Lugmayr et al. 2022 (RePaint, arXiv:2201.09865).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm.diffusion import NoiseSchedule, Reverse, posterior_coefficients, q_sample

# noise prediction; of a pair, the second one leads from x_0 on (CFG++, DDIM alone)
Eps = Tensor | tuple[Tensor, Tensor]
EpsModel = Callable[[Tensor, int], Tensor]  # (x_t, t) => eps_pred, in the shape of x_t
ReverseModel = Callable[[Tensor, int], Reverse]  # (x_t, t) => p(x_(t - 1) | x_t)
Noise = Callable[[], Tensor]  # draws a fresh standard normal tensor in the shape of x
OnStep = Callable[[int, int, Tensor, Tensor], None]  # (step from 1, num_steps, x_t after it, x_0_pred)
Steps = Iterator[tuple[Tensor, Tensor]]  # (x, x_0_pred) after each step


def sample(
    sampler: str,
    eps_fn: EpsModel,
    x_T: Tensor,
    ac: Tensor,
    num_steps: int,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    timesteps: Sequence[int] | None = None,
    clip: bool = False,
    on_step: OnStep | None = None,
) -> Tensor:
    """Run a sampler of `SAMPLERS` from standard normal x_T to x_0, (B, ...) both.

    Args:
        eta: share of DDPM's noise that `ddim` adds along the way, in [0, 1].
        noise: source of the noise that `ddpm` and `ddim` add; None takes torch's global generator.
        timesteps: replace the sampler's own choice of `num_steps` from 1 to T; the noisiest first.
        on_step: called after every step.

    Raises:
        ValueError: unknown sampler, an `eta` that it does not have, or a step count out of range.
    """
    timesteps = timesteps or choose_timesteps(sampler, len(ac), num_steps)
    if not 0 <= eta <= (sampler == "ddim"):
        raise ValueError(f"eta: got {eta} with {sampler}, expected 0, or for ddim up to 1 (as much noise as DDPM)")
    x = x_T.to(torch.promote_types(x_T.dtype, torch.float32))
    noise = noise or partial(torch.randn_like, x)
    options: dict[str, Any] = {"ddpm": {"noise": noise}, "ddim": {"noise": noise, "eta": eta}}.get(sampler, {})
    steps = SAMPLERS[sampler](eps_fn, x, ac, timesteps, clip=clip, **options)
    for step, (x, x_0) in enumerate(steps, start=1):
        if on_step:
            on_step(step, len(timesteps), x, x_0)
    return x


# --- Timesteps --------------------------------------------------------------------------------------------------------


def choose_timesteps(sampler: str, T: int, num_steps: int) -> list[int]:
    """Return the timesteps of a sampler, the noisiest first; it starts with the noise of that one."""
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
    if not 1 <= num_steps <= T:
        raise ValueError(f"num_steps: got {num_steps}, expected 1 to {T} (the model's diffusion steps)")
    return uniform_timesteps(T, num_steps) if sampler in ("ddim", "plms") else quadratic_timesteps(T, num_steps)


def uniform_timesteps(T: int, num_steps: int) -> list[int]:
    """Return timesteps from the noisiest down to 1, as the paper's code chooses them.

    With c = T // num_steps they are 1, 1 + c, 1 + 2c, ... below T: one more than num_steps where c does not fit
    (30 => 31, 7 => 8). The original fails where 1 + kc = T (333, and all above T / 2); here that one becomes T - 1.
    """
    return sorted({min(1 + t, T - 1) for t in range(0, T, T // num_steps)}, reverse=True)


def quadratic_timesteps(T: int, num_steps: int) -> list[int]:
    """Return num_steps distinct timesteps from T - 1 down to 0, about proportional to squares: DDIM, appendix D.2."""
    if num_steps == 1:
        return [T - 1]
    timesteps = [0]
    for k in range(1, num_steps):  # t_k = (T - 1) (k / (S - 1))^2, at least one apart
        timesteps.append(max(timesteps[-1] + 1, round((T - 1) * (k / (num_steps - 1)) ** 2)))
    return timesteps[::-1]


def spaced_timesteps(T: int, text: str) -> list[int]:
    """Return the timesteps that improved-diffusion and guided-diffusion call TEXT, the noisiest first.

    "a,b,c" cuts the chain into equal parts and takes a, b, c evenly spaced timesteps of them, both ends included;
    "ddimN" takes every (T // N)-th from 0, which has to give exactly N; "" takes all.

    Raises:
        ValueError: TEXT is none of these, or asks for more than there is.
    """
    if text.startswith("ddim"):
        count = int(text[4:]) if text[4:].isdecimal() else 0
        stride = -(-T // count) if count else T
        if stride == T or len(range(0, T, stride)) != count:
            raise ValueError(
                f"timesteps: got {text!r}, expected ddimN with an N that a whole stride of {T} steps gives"
            )
        return list(range(0, T, stride))[::-1]
    counts = [int(n) if n.strip().isdecimal() else 0 for n in text.split(",")] if text else [T]
    timesteps, start = [], 0
    for i, count in enumerate(counts):
        size = T // len(counts) + (i < T % len(counts))
        if not 1 <= count <= size:
            raise ValueError(f"timesteps: got {text!r}, expected numbers from 1 to {size} such as 250, or ddim25")
        stride, position = (size - 1) / (count - 1) if count > 1 else 1.0, 0.0
        for _ in range(count):
            timesteps.append(start + round(position))
            position += stride  # accumulated, as in the published code, whose rounding depends on it
        start += size
    return timesteps[::-1]


# --- Ancestral sampling and DDIM --------------------------------------------------------------------------------------


def predict_x_0(x: Tensor, eps: Tensor, ac_t: float, clip: bool = False) -> Tensor:
    """Predict x_0 = (x_t - sigma_t eps) / alpha_t. Source: DDPM, Eq. 15."""
    x_0 = (x - (1 - ac_t) ** 0.5 * eps.to(x.dtype)) / ac_t**0.5
    return x_0.clamp(-1, 1) if clip else x_0


def ancestral(reverse: ReverseModel, x: Tensor, num_steps: int, noise: Noise) -> Steps:
    """Sample x_prev ~ p(x_prev | x_t) with the model's own variance, through all steps of a chain.

    Source: DDPM, Algorithm 2; a shorter chain is `NoiseSchedule.spaced`.
    """
    for k in reversed(range(num_steps)):
        p = reverse(x, k)
        x = _draw(p, k, noise)
        yield x, p.x_0


def _draw(p: Reverse, k: int, noise: Noise) -> Tensor:
    """Draw x_(k - 1); the last step has no noise."""
    return p.mean + (0.5 * p.log_variance).exp() * noise() if k else p.mean


def ddpm(eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], noise: Noise, clip: bool = False) -> Steps:
    """Sample ancestrally: x_prev ~ q(x_prev | x_t, x_0_pred). Source: DDPM, Algorithm 2 with the variance of Eq. 7.

    Fewer steps than T skip timesteps; the posterior then spans the gap (iDDPM, section 4).
    """
    ac_ts = ac.double()[timesteps]
    ac_prevs = torch.cat([ac_ts[1:], ac_ts.new_ones(1)])  # the last step leads to ac = 1, no noise
    posterior = posterior_coefficients(1 - ac_ts / ac_prevs, ac_ts, ac_prevs)
    coefficients = torch.stack([ac_ts, *posterior], dim=1).tolist()
    for t, (ac_t, coef_x_0, coef_x_t, variance) in zip(timesteps, coefficients, strict=True):
        x_0 = predict_x_0(x, eps_fn(x, t), ac_t, clip)
        x = coef_x_0 * x_0 + coef_x_t * x  # mean of q(x_prev | x_t, x_0), Eq. 7
        if t != timesteps[-1]:  # the last variance is 0
            x = x + math.sqrt(variance) * noise()
        yield x, x_0


def ddim_steps(ac: Tensor, timesteps: Sequence[int], eta: float) -> Iterator[tuple[int, float, float, float]]:
    """Yield (t, ac_t, ac_prev, sigma) of the steps through `timesteps`, to timestep 0 and from there to x_0.

    Source: DDIM, Eq. 16.
    """
    acs = [*ac.tolist(), 1.0]  # the last one, without noise, is x_0 itself
    for t, t_prev in pairwise([*timesteps, 0 if timesteps[-1] else -1]):
        ac_t, ac_prev = acs[t], acs[t_prev]
        # sigma, of the noise added, = eta sqrt((1 - ac_prev) / (1 - ac_t)) sqrt(1 - ac_t / ac_prev)
        yield t, ac_t, ac_prev, eta * math.sqrt((1 - ac_prev) / (1 - ac_t) * (1 - ac_t / ac_prev))


def _ddim_step(
    x: Tensor, eps: Eps, ac_t: float, ac_prev: float, sigma: float = 0.0, clip: bool = False
) -> tuple[Tensor, Tensor]:
    """Return x_prev without its fresh noise, and the predicted x_0. Source: DDIM, Eq. 12."""
    eps, direction = eps if isinstance(eps, tuple) else (eps, None)
    eps = eps.to(x.dtype)
    x_0 = predict_x_0(x, eps, ac_t, clip)
    if direction is not None:
        eps = direction.to(x.dtype)
    elif clip:
        eps = (x - ac_t**0.5 * x_0) / (1 - ac_t) ** 0.5
    # x_prev = alpha_prev x_0 + sqrt(1 - ac_prev - sigma^2) eps
    return ac_prev**0.5 * x_0 + (1 - ac_prev - sigma**2) ** 0.5 * eps, x_0


def ddim(
    eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], eta: float, noise: Noise, clip: bool = False
) -> Steps:
    """Sample by DDIM, deterministically if eta = 0. Source: DDIM, Eq. 12 and 16."""
    for t, ac_t, ac_prev, sigma in ddim_steps(ac, timesteps, eta):
        x, x_0 = _ddim_step(x, eps_fn(x, t), ac_t, ac_prev, sigma, clip)
        if sigma > 0:
            x = x + sigma * noise()  # the last term of Eq. 12
        yield x, x_0


def invert(eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], clip: bool = False) -> Steps:
    """Run DDIM backwards, from x_0 to the noise that leads to it. Source: DDIM, section 4.3; ADM, appendix F.

    Timesteps are those of `ddim`, the noisiest first. As in the published code the last step goes on to noise alone.
    """
    rising = timesteps[::-1]
    for t, ac_next in zip(rising, [*ac[rising[1:]].tolist(), 0.0], strict=True):
        x, x_0 = _ddim_step(x, eps_fn(x, t), ac[t].item(), ac_next, clip=clip)
        yield x, x_0


def interpolate(x_1: Tensor, x_2: Tensor, share: float) -> Tensor:
    """Interpolate spherically between noises (B, ...), share 0 is x_1. Source: DDIM, Eq. 67 (Shoemake 1985)."""
    a, b = x_1.flatten(1).double(), x_2.flatten(1).double()
    cosine = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))
    angle = cosine.clamp(-1, 1).acos().reshape(-1, *[1] * (x_1.ndim - 1))
    mixed = (((1 - share) * angle).sin() * x_1 + (share * angle).sin() * x_2) / angle.sin()
    return torch.where(angle < 1e-6, torch.lerp(x_1, x_2, share), mixed).to(x_1.dtype)


# Weights of the newest predictions, by the number of predictions.
ADAMS_BASHFORTH = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


def plms(eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], clip: bool = False) -> Steps:
    """Sample by pseudo linear multistep: DDIM's step with a multistep combination of noise predictions.

    The first step averages the predictions at both of its ends (improved Euler): one prediction more than steps.
    Source: PNDM, Eq. 12, with lower-order starts in place of its Runge-Kutta steps.
    """
    history: list[Tensor] = []  # predictions, newest first
    for t, *step in ddim_steps(ac, timesteps, eta=0.0):
        history = [eps_fn(x, t).to(x.dtype), *history[:3]]
        if len(history) == 1:
            x_prev, _ = _ddim_step(x, history[0], *step, clip=clip)
            t_prev = timesteps[:2][-1]
            eps = (history[0] + eps_fn(x_prev, t_prev).to(x.dtype)) / 2
        else:
            weights = ADAMS_BASHFORTH[len(history)]
            eps = torch.stack([w * e for w, e in zip(weights, history, strict=True)]).sum(0)
        x, x_0 = _ddim_step(x, eps, *step, clip=clip)
        yield x, x_0


# --- High-order solvers of the probability-flow ODE, in x_0 and lambda ------------------------------------------------


class _Knot:
    """A point of the solvers' grid."""

    def __init__(self, t: int, ac: float) -> None:
        self.t, self.ac, self.alpha, self.sigma = t, ac, math.sqrt(ac), math.sqrt(1 - ac)
        self.lam = math.log(self.alpha / self.sigma) if ac < 1 else math.inf


def dpm_solver_pp(
    eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], clip: bool = False, corrector: bool = False
) -> Steps:
    """Sample by DPM-Solver++(2M): second order, one prediction per step; the first and the last step have order 1.

    Source: DPM-Solver++, Algorithm 2.
    """
    knots = [*(_Knot(t, ac_t) for t, ac_t in zip(timesteps, ac[timesteps].tolist(), strict=True)), _Knot(-1, 1.0)]
    x_start = x  # where the last step began
    x_0s: list[Tensor] = []  # predictions at the last three knots
    for i, (here, there) in enumerate(pairwise(knots)):
        x_0s = [*x_0s[-2:], predict_x_0(x, eps_fn(x, here.t), here.ac, clip)]
        if corrector and i > 0:  # UniC: take the last step again, now that the prediction at its end is known
            x = _advance(x_start, knots[i - 1], here, _interpolate(knots, i - 1, x_0s))
        x_start = x
        x = _advance(x, here, there, _extrapolate(knots, i, x_0s))
        yield x, x_0s[-1]


def unipc(eps_fn: EpsModel, x: Tensor, ac: Tensor, timesteps: Sequence[int], clip: bool = False) -> Steps:
    """Sample by UniPC of order 2, B(h) = e^h - 1 ("bh2"): DPM-Solver++(2M), each step corrected by the next prediction.

    The prediction at the end of a step serves its correction and the next step, so there is one per step.

    Source: UniPC, Algorithms 1 and 2, predicting x_0; the predictor of order 2 is then the step of DPM-Solver++(2M).
    """
    return dpm_solver_pp(eps_fn, x, ac, timesteps, clip, corrector=True)


def _advance(x: Tensor, here: _Knot, there: _Knot, x_0: Tensor) -> Tensor:
    """Follow the probability-flow ODE from knot to knot with a constant x_0. Source: DPM-Solver++, Eq. 8."""
    h = there.lam - here.lam
    # x_there = sigma_there / sigma_here x_here + alpha_there (1 - e^-h) x_0
    return there.sigma / here.sigma * x - there.alpha * math.expm1(-h) * x_0


def _extrapolate(knots: list[_Knot], i: int, x_0s: list[Tensor]) -> Tensor:
    """Estimate the mean x_0 over the step from knot i by past predictions. Source: DPM-Solver++, Algorithm 2 (D_i)."""
    if i == 0 or i == len(knots) - 2:  # one prediction only; or lambda = inf ahead, where x_0 itself is the limit
        return x_0s[-1]
    h_last, h = knots[i].lam - knots[i - 1].lam, knots[i + 1].lam - knots[i].lam
    # D_i = x_0(i) + (x_0(i) - x_0(i - 1)) / 2r with r = h_last / h
    return x_0s[-1] + h / (2 * h_last) * (x_0s[-1] - x_0s[-2])


def _interpolate(knots: list[_Knot], i: int, x_0s: list[Tensor]) -> Tensor:
    """Estimate the mean x_0 over the step from knot i by predictions up to its end. Source: UniPC, section 3 (UniC)."""
    change = x_0s[-1] - x_0s[-2]
    if i == 0:  # the first step is of order 1, the others of order 2
        return x_0s[-2] + change / 2
    h_last, h = knots[i].lam - knots[i - 1].lam, knots[i + 1].lam - knots[i].lam
    # For data prediction z = -h, phi_1(z) = (e^z - 1) / z and phi_k+1(z) = (phi_k(z) - 1 / k!) / z. The names below
    # hold z phi_k(z), and b_k = k! phi_k+1 / phi_1.
    phi_1 = math.expm1(-h)
    phi_2 = phi_1 / -h - 1
    phi_3 = phi_2 / -h - 1 / 2
    b_1, b_2 = phi_2 / phi_1, 2 * phi_3 / phi_1
    # The weights solve w_last + w_here = b_1 and r w_last + w_here = b_2 with r = (lambda_last - lambda_here) / h.
    r = -h_last / h
    w_last = (b_2 - b_1) / (r - 1)
    return x_0s[-2] + w_last / r * (x_0s[-3] - x_0s[-2]) + (b_1 - w_last) * change


# --- EDM's sampler, in x = x_0 + sigma eps ----------------------------------------------------------------------------


def heun(
    denoise: Callable[[Tensor, float], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    noise: Noise,
    churn: float = 0.0,
    churn_range: tuple[float, float] = (0.0, math.inf),
    churn_noise: float = 1.0,
) -> Steps:
    """Sample by EDM's solver of second order; its `churn` adds noise along the way. Source: EDM, Algorithm 2.

    Args:
        denoise: (x, sigma) => x_0.
        x: (B, ...), sigmas[0] times standard normal noise.
        sigmas: falling noise levels; the last step goes from the last one to 0.
        churn, churn_range, churn_noise: S_churn, [S_tmin, S_tmax] and S_noise of the paper.
    """
    for sigma, sigma_next in pairwise([*sigmas, 0.0]):
        churns = churn > 0 and churn_range[0] <= sigma <= churn_range[1]
        raised = sigma * (1 + min(churn / len(sigmas), math.sqrt(2) - 1)) if churns else sigma
        if churns:
            x = x + math.sqrt(raised**2 - sigma**2) * churn_noise * noise()
        x_0 = denoise(x, raised)
        slope = (x - x_0) / raised
        x_next = x + (sigma_next - raised) * slope
        if sigma_next > 0:
            slope = (slope + (x_next - denoise(x_next, sigma_next)) / sigma_next) / 2
            x_next = x + (sigma_next - raised) * slope
        x = x_next
        yield x, x_0


# --- Inpainting with an unconditional model ---------------------------------------------------------------------------


def repaint_steps(num_steps: int, jump_length: int = 10, resamples: int = 10) -> list[int]:
    """Return the steps that x visits, from num_steps - 1 to -1 (x_0): every jump_length steps, resamples - 1 times,
    it goes back up by as many. Source: RePaint, appendix B."""
    jumps = dict.fromkeys(range(0, num_steps - jump_length, jump_length), resamples - 1)
    steps = [num_steps - 1]
    while steps[-1] >= 0:
        if jumps.get(steps[-1], 0) > 0:
            jumps[steps[-1]] -= 1
            steps.extend(range(steps[-1] + 1, steps[-1] + 1 + jump_length))
        steps.append(steps[-1] - 1)
    return steps


def repaint(
    reverse: ReverseModel,
    x: Tensor,
    x_0: Tensor,
    keep_mask: Tensor,
    schedule: NoiseSchedule,
    noise: Noise,
    jump_length: int = 10,
    resamples: int = 10,
) -> Steps:
    """Fill the holes of x_0 (B, ...) with a model that knows nothing of holes; keep_mask is 1 where x_0 is kept.

    The known part is diffused to each step; going back up mixes both parts. Source: RePaint, Algorithm 1.
    """
    for k, following in pairwise(repaint_steps(len(schedule.betas), jump_length, resamples)):
        if following > k:
            beta = schedule.betas[following].item()
            x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise()
            continue
        known = q_sample(x_0, k, noise(), schedule.alphas_cumprod)
        p = reverse(keep_mask * known + (1 - keep_mask) * x, k)
        x = _draw(p, k, noise)
        if following < 0:
            x = torch.where(keep_mask == 1, x_0, x)
        yield x, p.x_0


# --- Guidance ---------------------------------------------------------------------------------------------------------


def classifier_free(
    conditional: Tensor, null: Tensor, scale: float, rescale: float = 0.0, parallel: float = 1.0
) -> Tensor:
    """Lead a prediction (B, ...) away from that without a condition. Source: Ho & Salimans 2022, Eq. 6.

    Args:
        rescale: share of the result that gets the standard deviation of `conditional`, against over-exposure.
            Source: Lin et al. 2024 (arXiv:2305.08891), Eq. 15 and 16.
        parallel: share that is kept of the change along `conditional`, which saturates colours.
            Source: Sadat et al. 2024 (APG, arXiv:2410.02416), section 4.
    """
    change = conditional - null
    if parallel != 1:
        direction = F.normalize(conditional.flatten(1).double(), dim=1)
        along = (change.flatten(1).double() * direction).sum(1, keepdim=True) * direction
        change = change - (1 - parallel) * along.to(change).reshape(change.shape)
    guided = conditional + (scale - 1) * change
    if rescale:
        axes = tuple(range(1, guided.ndim))
        ratio = conditional.std(axes, keepdim=True) / guided.std(axes, keepdim=True)
        guided = guided * (rescale * ratio + 1 - rescale)
    return guided


SAMPLERS: dict[str, Callable[..., Steps]] = {f.__name__: f for f in (ddpm, ddim, plms, dpm_solver_pp, unipc)}
