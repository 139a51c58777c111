"""The diffusion process: noise schedules, q(x_t | x_0), and what a network may predict about it.

With alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 - alphas_cumprod[t]),

    x_t = alpha_t * x_0 + sigma_t * eps,        eps ~ N(0, I)
    v   = alpha_t * eps - sigma_t * x_0

so any two of x_0, x_t, eps, v give the other two. Schedules are computed in float64 and live on the CPU; the
functions on tensors compute and return float32, whatever the dtype of the network.

Dimensions: B batch · T diffusion steps · ... the remaining axes of x, any number of them.

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239); Nichol & Dhariwal 2021 (iDDPM, arXiv:2102.09672);
Salimans & Ho 2022 (progressive distillation, arXiv:2202.00512); Hang et al. 2023 (min-SNR, arXiv:2303.09556).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import ConfigError, ScheduleConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """The variances of the forward process.

    Attributes:
        betas: (T,) float64 on the CPU, in (0, 1): variance added by step t.
        alphas_cumprod: (T,) float64 on the CPU, in (0, 1), decreasing: share of x_0's variance left in x_t.
    """

    betas: Tensor
    alphas_cumprod: Tensor

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod_prev(self) -> Tensor:
        """(T,) alphas_cumprod of the step before; 1, no noise at all, before step 0."""
        return torch.cat([self.alphas_cumprod.new_ones(1), self.alphas_cumprod[:-1]])

    def buffers(self) -> dict[str, Tensor]:
        """The 12 schedule buffers of a checkpoint, (T,) float32 each, by their names in the file."""
        ac, ac_prev = self.alphas_cumprod, self.alphas_cumprod_prev
        coef_x_0, coef_x_t, variance = posterior_coefficients(ac, ac_prev)
        buffers = {
            "betas": self.betas,
            "alphas_cumprod": ac,
            "alphas_cumprod_prev": ac_prev,
            "sqrt_alphas_cumprod": ac.sqrt(),
            "sqrt_one_minus_alphas_cumprod": (1 - ac).sqrt(),
            "log_one_minus_alphas_cumprod": (1 - ac).log(),
            "sqrt_recip_alphas_cumprod": (1 / ac).sqrt(),
            "sqrt_recipm1_alphas_cumprod": (1 / ac - 1).sqrt(),
            "posterior_variance": variance,
            # the variance is 0 at t = 0; the bound keeps its logarithm finite
            "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
            "posterior_mean_coef1": coef_x_0,
            "posterior_mean_coef2": coef_x_t,
        }
        return {name: buffer.float() for name, buffer in buffers.items()}


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """Build the noise schedule that a config names.

    `linear`: betas evenly spaced (DDPM, section 4). `scaled_linear`: their square roots evenly spaced (Stable
    Diffusion). `cosine`: alphas_cumprod follows a squared cosine, betas at most 0.999 (iDDPM, Eq. 17).

    Raises:
        ConfigError: an unknown name, no timesteps, or bounds outside 0 < linear_start <= linear_end < 1.
    """
    T = config.num_timesteps
    if T < 1:
        raise ConfigError(f"schedule.num_timesteps: got {T}, expected at least 1")
    start, end = config.linear_start, config.linear_end
    if not 0 < start <= end < 1:
        raise ConfigError(
            f"schedule.linear_start, linear_end: got {start}, {end}, expected 0 < linear_start <= linear_end < 1"
        )
    # the device is named because models are built under torch.device("meta")
    match config.name:
        case "scaled_linear":
            roots = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64, device="cpu")
            betas = roots**2
        case "linear":
            betas = torch.linspace(start, end, T, dtype=torch.float64, device="cpu")
        case "cosine":
            u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
            f = torch.cos((u + config.cosine_s) / (1 + config.cosine_s) * math.pi / 2) ** 2
            betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
        case _:
            raise ConfigError(f"schedule.name: got {config.name!r}, expected scaled_linear, linear or cosine")
    schedule = NoiseSchedule(betas=betas, alphas_cumprod=torch.cumprod(1 - betas, dim=0))
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Stretch a schedule until its last step is noise alone: 1e-8 of x_0's variance, so that logarithms exist.

    Without it a model learns that even x_T knows the mean of x_0, and samples from noise are of middling brightness.

    Source: Lin et al. 2024 (Common Diffusion Noise Schedules and Sample Steps are Flawed), algorithm 1.
    """
    alpha = schedule.alphas_cumprod.sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    ac = alpha.square().clamp(min=1e-8)
    return NoiseSchedule(betas=1 - ac / torch.cat([ac.new_ones(1), ac[:-1]]), alphas_cumprod=ac)


def posterior_coefficients(ac_t: Tensor, ac_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q(x_prev | x_t, x_0) = N(coef_x_0 * x_0 + coef_x_t * x_t, variance * I).

    Args:
        ac_t: (S,) float64, alphas_cumprod of x_t, in (0, 1).
        ac_prev: (S,) float64, alphas_cumprod of x_prev, in [ac_t, 1]; x_prev may lie several timesteps before x_t.

    Returns:
        coef_x_0, coef_x_t, variance: (S,) each.

    Source: DDPM, Eq. 6 and 7.
    """
    alpha = ac_t / ac_prev
    beta = 1 - alpha
    coef_x_0 = ac_prev.sqrt() * beta / (1 - ac_t)
    coef_x_t = alpha.sqrt() * (1 - ac_prev) / (1 - ac_t)
    return coef_x_0, coef_x_t, beta * (1 - ac_prev) / (1 - ac_t)


# Below: x_0, x_t, eps, v are (B, ...); t is (B,) int64 in [0, T); alphas_cumprod is (T,) float32 beside them.


def q_sample(x_0: Tensor, t: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_t: x_0 diffused to step t with the noise eps. Source: DDPM, Eq. 4."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_0.ndim)
    return alpha_t * x_0.float() + sigma_t * eps.float()


def x_0_from_eps(x_t: Tensor, t: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The x_0 that q_sample turned into x_t with this noise. Source: DDPM, Eq. 15."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    return (x_t.float() - sigma_t * eps.float()) / alpha_t


def eps_from_x_0(x_t: Tensor, t: Tensor, x_0: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """The noise by which q_sample turned this x_0 into x_t. Source: DDPM, Eq. 4 solved for eps."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    return (x_t.float() - alpha_t * x_0.float()) / sigma_t


def velocity(x_0: Tensor, t: Tensor, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """v = alpha_t * eps - sigma_t * x_0. Source: Salimans & Ho 2022, section 4 and appendix D."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_0.ndim)
    return alpha_t * eps.float() - sigma_t * x_0.float()


def x_0_from_v(x_t: Tensor, t: Tensor, v: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """x_0 = alpha_t * x_t - sigma_t * v. Source: Salimans & Ho 2022, appendix D."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    return alpha_t * x_t.float() - sigma_t * v.float()


def eps_from_v(x_t: Tensor, t: Tensor, v: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """eps = sigma_t * x_t + alpha_t * v. Source: Salimans & Ho 2022, appendix D."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    return sigma_t * x_t.float() + alpha_t * v.float()


def target(x_0: Tensor, eps: Tensor, t: Tensor, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """What a network of this parameterization (eps | v | x0) should output for x_t = q_sample(x_0, t, eps)."""
    match parameterization:
        case "eps":
            return eps.float()
        case "v":
            return velocity(x_0, t, eps, alphas_cumprod)
        case "x0":
            return x_0.float()
    raise ValueError(f"parameterization: got {parameterization!r}, expected eps, v or x0")


def to_eps(prediction: Tensor, x_t: Tensor, t: Tensor, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """The noise in x_t according to the output of a network of this parameterization (eps | v | x0)."""
    match parameterization:
        case "eps":
            return prediction.float()
        case "v":
            return eps_from_v(x_t, t, prediction, alphas_cumprod)
        case "x0":
            return eps_from_x_0(x_t, t, prediction, alphas_cumprod)
    raise ValueError(f"parameterization: got {parameterization!r}, expected eps, v or x0")


def min_snr_weight(t: Tensor, gamma: float, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """What to multiply squared errors at t with, for them to count as errors of x_0 times min(SNR, gamma).

    Timesteps with little noise, whose targets are many times harder than they are useful, so count less.

    Returns:
        (B,), where SNR = alpha_t^2 / sigma_t^2: min(SNR, gamma) over SNR for eps, SNR + 1 for v, 1 for x0.

    Source: Hang et al. 2023 (Efficient Diffusion Training via Min-SNR Weighting Strategy), section 3.4.
    """
    ac_t = alphas_cumprod[t].float()
    snr = ac_t / (1 - ac_t)
    per_error_of_x_0 = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / per_error_of_x_0


def _alpha_sigma(alphas_cumprod: Tensor, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
    """alpha_t and sigma_t, float32, shaped (B, 1, ...) to scale a tensor of ndim axes."""
    ac_t = alphas_cumprod[t].float().reshape(-1, *[1] * (ndim - 1))
    return ac_t.sqrt(), (1 - ac_t).sqrt()


Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(
    shape: Sequence[int],
    generator: Generators = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise of shape (B, …).

    The numbers are drawn on the generators' own device, CPU as a rule, and then moved: equal seeds
    give equal noise on every device.

    Args:
        shape: (B, …).
        generator: one generator for the whole batch, or B of them, so that a sample's noise does not
            depend on its neighbours; None takes torch's global one.

    Raises:
        ValueError: the number of generators is not B.
    """
    if generator is None or isinstance(generator, torch.Generator):
        source = generator.device if generator is not None else torch.device("cpu")
        return torch.randn(tuple(shape), generator=generator, device=source).to(device, dtype)
    if len(generator) != shape[0]:
        raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}, expected one per sample")
    samples = [torch.randn(tuple(shape[1:]), generator=g, device=g.device).to(device, dtype) for g in generator]
    return torch.stack(samples)
