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

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ldm.config import ScheduleConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """Variances of the forward process, float64 on the CPU."""

    betas: Tensor  # (T,) in (0, 1): variance added by step t
    alphas_cumprod: Tensor  # (T,) in (0, 1), decreasing: share of x_0's variance left in x_t

    def buffers(self) -> dict[str, Tensor]:
        """Compute the 12 schedule buffers of a checkpoint, (T,) float32 each, by their names in the file."""
        ac = self.alphas_cumprod
        ac_prev = torch.cat([ac.new_ones(1), ac[:-1]])  # 1, which means no noise, before step 0
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
    """Build the noise schedule of a config.

    `linear`: betas evenly spaced (DDPM, section 4). `scaled_linear`: their square roots evenly spaced (Stable
    Diffusion). `cosine`: alphas_cumprod follows a squared cosine, betas at most 0.999 (iDDPM, Eq. 17).
    """
    T, start, end = config.num_timesteps, config.linear_start, config.linear_end
    # the device is named because models are built under torch.device("meta")
    if config.name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64, device="cpu") ** 2
    elif config.name == "linear":
        betas = torch.linspace(start, end, T, dtype=torch.float64, device="cpu")
    else:
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        # f(t) = cos^2((t / T + s) / (1 + s) pi / 2),  ac_t = f(t) / f(0),  beta_t = 1 - ac_t / ac_(t - 1)
        f = torch.cos((u + config.cosine_s) / (1 + config.cosine_s) * math.pi / 2) ** 2
        betas = (1 - f[1:] / f[:-1]).clamp(max=0.999)
    schedule = NoiseSchedule(betas=betas, alphas_cumprod=torch.cumprod(1 - betas, dim=0))  # ac_t = prod (1 - beta_s)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Stretch a schedule until its last step is noise alone: 1e-8 of x_0's variance, so that logarithms exist.

    Otherwise a model learns that even x_T contains the mean of x_0, and samples from noise have medium brightness.

    Source: Lin et al. 2024 (arXiv:2305.08891), algorithm 1.
    """
    alpha = schedule.alphas_cumprod.sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # shift the end to 0, scale back to alpha_0
    ac = alpha.square().clamp(min=1e-8)
    return NoiseSchedule(betas=1 - ac / torch.cat([ac.new_ones(1), ac[:-1]]), alphas_cumprod=ac)


def posterior_coefficients(ac_t: Tensor, ac_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute coef_x_0, coef_x_t, variance of q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, variance I).

    Args:
        ac_t, ac_prev: (S,) float64, alphas_cumprod of x_t, in (0, 1), and of x_prev, in [ac_t, 1], which may lie
            several timesteps before x_t.

    Source: DDPM, Eq. 6 and 7.
    """
    alpha = ac_t / ac_prev  # of the step from x_prev to x_t
    beta = 1 - alpha
    coef_x_0 = ac_prev.sqrt() * beta / (1 - ac_t)  # sqrt(ac_prev) beta / (1 - ac_t)
    coef_x_t = alpha.sqrt() * (1 - ac_prev) / (1 - ac_t)  # sqrt(alpha) (1 - ac_prev) / (1 - ac_t)
    return coef_x_0, coef_x_t, beta * (1 - ac_prev) / (1 - ac_t)


# Below: x_0, x_t, eps, v are (B, ...); t is (B,) int64 in [0, T), or one number; alphas_cumprod is (T,) float32 on the
# same device, for one number also on the CPU, which spares a GPU the coefficients; a parameterization is what a network
# predicts: eps, v or x0.


def q_sample(x_0: Tensor, t: Tensor | int, eps: Tensor, alphas_cumprod: Tensor) -> Tensor:
    """Diffuse x_0 to step t with the noise eps. Source: DDPM, Eq. 4."""
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_0.ndim)
    return alpha_t * x_0.float() + sigma_t * eps.float()


def target(x_0: Tensor, eps: Tensor, t: Tensor, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """Return the right output of a network for x_t = q_sample(x_0, t, eps).

    Source: DDPM, Eq. 14 (eps); Salimans & Ho 2022, section 4 and appendix D (v).
    """
    x_0, eps = x_0.float(), eps.float()
    if parameterization == "v":
        alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_0.ndim)
        return alpha_t * eps - sigma_t * x_0  # v
    return {"eps": eps, "x0": x_0}[parameterization]


def to_eps(prediction: Tensor, x_t: Tensor, t: Tensor | int, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """Return the noise in x_t according to a network's output: the inverse of `target`."""
    prediction, x_t = prediction.float(), x_t.float()
    if parameterization == "eps":
        return prediction
    alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
    if parameterization == "v":
        return sigma_t * x_t + alpha_t * prediction  # Salimans & Ho 2022, appendix D
    return (x_t - alpha_t * prediction) / sigma_t  # x_0: DDPM, Eq. 4 solved for eps


def min_snr_weight(t: Tensor, gamma: float, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """Return weights (B,) that turn squared errors at t into errors of x_0 times min(SNR, gamma).

    They reduce the influence of timesteps with little noise, whose targets are hard to learn and of little use.

    Source: Hang et al. 2023, section 3.4.
    """
    ac_t = alphas_cumprod[t].float()
    snr = ac_t / (1 - ac_t)  # alpha_t^2 / sigma_t^2
    # squared error of the prediction = error_ratio * squared error of x_0
    error_ratio = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / error_ratio


def _alpha_sigma(alphas_cumprod: Tensor, t: Tensor | int, ndim: int) -> tuple[Tensor, Tensor]:
    """Return alpha_t and sigma_t: scalars, or float32 shaped (B, 1, ...) to scale a tensor of ndim axes."""
    ac_t = alphas_cumprod[t]
    if isinstance(t, Tensor):
        ac_t = ac_t.float().reshape(-1, *[1] * (ndim - 1))
    return ac_t.sqrt(), (1 - ac_t).sqrt()


Generators = torch.Generator | Sequence[torch.Generator] | None


def draw_noise(shape: Sequence[int], generator: Generators = None, *, device: torch.device | str = "cpu") -> Tensor:
    """Draw standard normal noise of shape (B, …), float32.

    The numbers are drawn on the generators' own device, CPU as a rule, and then moved: equal seeds give equal noise on
    every device. With one generator per sample the noise of a sample does not depend on its neighbours; None takes
    torch's global generator. ValueError if there are neither one nor B generators.
    """
    if isinstance(generator, Sequence):
        if len(generator) != shape[0]:
            raise ValueError(f"got {len(generator)} generators for a batch of {shape[0]}, expected one per sample")
        noise = torch.empty(tuple(shape), device=generator[0].device)
        for sample, source in zip(noise, generator, strict=True):
            sample.normal_(generator=source)
    else:
        source = generator.device if generator else torch.device("cpu")
        noise = torch.randn(tuple(shape), generator=generator, device=source)
    return send(noise, device)


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a tensor on a device; from the CPU to a GPU without waiting for the GPU."""
    on_cpu = tensor.device.type == "cpu"
    if on_cpu and torch.device(device).type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=on_cpu)  # to the CPU it would return before the values are there


def send_together(tensors: Sequence[Tensor], device: torch.device | str) -> list[Tensor]:
    """Return tensors on a device by one `send`; each begins at a multiple of its numbers' size in bytes."""
    buffer = send(torch.cat([x.flatten().view(torch.uint8) for x in tensors]), device)
    parts = buffer.split([x.nbytes for x in tensors])
    return [part.view(x.dtype).view(x.shape) for part, x in zip(parts, tensors, strict=True)]
