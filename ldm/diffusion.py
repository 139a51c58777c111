"""The diffusion process: noise schedules, q(x_t | x_0), and what a network may predict about it.

With alpha_t = sqrt(alphas_cumprod[t]) and sigma_t = sqrt(1 - alphas_cumprod[t]),

    x_t = alpha_t * x_0 + sigma_t * eps,        eps ~ N(0, I)
    v   = alpha_t * eps - sigma_t * x_0

so any two of x_0, x_t, eps, v give the other two. Coefficients are computed in float64 and rounded last; the functions
on tensors compute and return float32, whatever the dtype of the network.

Dimensions: B batch · C channels · T diffusion steps · ... the remaining axes of x, any number of them.

Sources: Ho et al. 2020 (DDPM, arXiv:2006.11239); Nichol & Dhariwal 2021 (iDDPM, arXiv:2102.09672);
Salimans & Ho 2022 (progressive distillation, arXiv:2202.00512); Hang et al. 2023 (min-SNR, arXiv:2303.09556);
Karras et al. 2022 (EDM, arXiv:2206.00364).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ldm.config import ConfigError, ModelConfig, ScheduleConfig


@dataclass(frozen=True)
class NoiseSchedule:
    """Variances of the forward process, float64, on the CPU unless `to` moves them."""

    betas: Tensor  # (T,) in (0, 1): variance added by step t
    alphas_cumprod: Tensor  # (T,) in (0, 1), decreasing: share of x_0's variance left in x_t
    times: Sequence[float] = ()  # (T,) what a network is told at each step, where that is not its number

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return the schedule on a device, the same each time; MPS has no float64, there it is rounded."""
        if (place := str(device)) not in self._copies:
            dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
            copy = NoiseSchedule(self.betas.to(device, dtype), self.alphas_cumprod.to(device, dtype), self.times)
            self._copies[place] = self if place == "cpu" else copy
        return self._copies[place]

    @cached_property
    def _copies(self) -> dict[str, "NoiseSchedule"]:
        return {}

    def spaced(self, timesteps: Sequence[int]) -> "NoiseSchedule":
        """Return the shorter chain through some ascending timesteps. Source: iDDPM, Eq. 19."""
        return NoiseSchedule.of_ac(self.alphas_cumprod[list(timesteps)], timesteps)

    @classmethod
    def of_ac(cls, ac: Tensor, times: Sequence[float] = ()) -> "NoiseSchedule":
        """Return the chain with these alphas_cumprod."""
        return cls(1 - ac / torch.cat([ac.new_ones(1), ac[:-1]]), ac, times)

    @classmethod
    def of_sigmas(cls, sigmas: Sequence[float], times: Sequence[float] = ()) -> "NoiseSchedule":
        """Return the chain whose noise relative to x_0 rises through `sigmas`: x_t / alpha_t = x_0 + sigma eps."""
        return cls.of_ac(1 / (1 + torch.tensor(sigmas, dtype=torch.float64, device="cpu") ** 2), times or sigmas)

    @property
    def sigmas(self) -> Tensor:
        """(T,) noise relative to x_0: sigma_t / alpha_t."""
        return (1 / self.alphas_cumprod - 1).sqrt()

    @cached_property
    def posterior(self) -> tuple[Tensor, Tensor, Tensor]:
        """(T,) coef_x_0, coef_x_t and variance of q(x_(t - 1) | x_t, x_0), as in `posterior_coefficients`."""
        ac = self.alphas_cumprod
        return posterior_coefficients(self.betas, ac, torch.cat([ac.new_ones(1), ac[:-1]]))  # no noise before step 0

    @cached_property
    def log_variances(self) -> tuple[Tensor, Tensor]:
        """(T,) logarithms of the least and the largest sensible variance of p(x_(t - 1) | x_t), posterior and beta.

        The posterior's is 0 at t = 0; there that of t = 1 is taken (beta for T = 1), as in the published models.
        """
        variance = self.posterior[2]
        first = variance[1:2] if len(variance) > 1 else self.betas
        return torch.cat([first, variance[1:]]).log(), self.betas.log()

    def buffers(self) -> dict[str, Tensor]:
        """Compute the 12 schedule buffers of a checkpoint, (T,) float32 each, by their names in the file."""
        ac = self.alphas_cumprod
        coef_x_0, coef_x_t, variance = self.posterior
        buffers = {
            "betas": self.betas,
            "alphas_cumprod": ac,
            "alphas_cumprod_prev": torch.cat([ac.new_ones(1), ac[:-1]]),
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


class DiffusionModel(nn.Module):
    """A network, under its name in published checkpoints, and its noise schedule; base of the three kinds of model."""

    def __init__(self, network: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.config, self.schedule = config, make_schedule(config.schedule)
        self.model = nn.ModuleDict({"diffusion_model": network})

    @property
    def unet(self) -> Any:
        """The network."""
        return self.model["diffusion_model"]

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type to which inputs are cast before a network reads them."""
        return next(self.unet.parameters()).dtype

    @property
    def ac(self) -> Tensor:
        """(T,) alphas_cumprod of the schedule, float64, on the model's device."""
        # not a buffer: `module.to(bfloat16)` and `bf16-true` would round it, which makes sigma_t 0 at first timesteps
        return self.schedule.to(next(self.unet.parameters()).device).alphas_cumprod


def check_input_width(config: ModelConfig, widths: Mapping[str, int]) -> None:
    """Refuse a UNet whose inputs are not among those of `widths`, name => channels, or that has other channels."""
    names, channels = config.input_channels, config.unet.in_channels
    if unknown := [name for name in names if name not in widths]:
        expected = f"{', '.join(widths)} with model.kind {config.kind}"
        raise ConfigError(f"model.input_channels: got {', '.join(unknown)}, expected some of {expected}")
    if (total := sum(widths[name] for name in names)) != channels:
        parts = " + ".join(f"{name} {widths[name]}" for name in names)
        expected = f"{total} ({parts}, see model.input_channels)"
        raise ConfigError(f"model.unet.in_channels: got {channels}, expected {expected}")


def make_schedule(config: ScheduleConfig) -> NoiseSchedule:
    """Build the noise schedule of a config.

    `linear`: betas evenly spaced (DDPM, section 4). `scaled_linear`: their square roots evenly spaced (Stable
    Diffusion). `cosine`: alphas_cumprod follows a squared cosine, betas at most 0.999 (iDDPM, Eq. 17). `sigmoid`: it
    follows a sigmoid from -3 to 3 (Jabri et al. 2022, arXiv:2212.11972). `edm`: noise levels whose 7th roots are evenly
    spaced (EDM, Eq. 5); training draws its own.
    """
    T, start, end = config.num_timesteps, config.linear_start, config.linear_end
    if config.name == "edm":
        return NoiseSchedule.of_sigmas(karras_sigmas(T, config.sigma_min, config.sigma_max)[::-1])
    # the device is named because models are built under torch.device("meta")
    if config.name == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64, device="cpu") ** 2
    elif config.name == "linear":
        betas = torch.linspace(start, end, T, dtype=torch.float64, device="cpu")
    else:
        u = torch.arange(T + 1, dtype=torch.float64, device="cpu") / T
        # cosine: f(t) = cos^2((t / T + s) / (1 + s) pi / 2);  ac_t = f(t) / f(0),  beta_t = 1 - ac_t / ac_(t - 1)
        f = torch.cos((u + config.cosine_s) / (1 + config.cosine_s) * math.pi / 2) ** 2
        if config.name == "sigmoid":
            f = torch.sigmoid(u.new_tensor(3)) - torch.sigmoid(6 * u - 3)
        betas = (1 - f[1:] / f[:-1]).clamp(0, 0.999)
    schedule = NoiseSchedule(betas=betas, alphas_cumprod=torch.cumprod(1 - betas, dim=0))  # ac_t = prod (1 - beta_s)
    return zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule


def karras_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[float]:
    """Return noise levels from sigma_max down to sigma_min, evenly spaced as their rho-th roots. Source: EDM, Eq. 5."""
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return [(high + i / max(1, num_steps - 1) * (low - high)) ** rho for i in range(num_steps)]


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Stretch a schedule until its last step is noise alone: 1e-8 of x_0's variance, so that logarithms exist.

    Otherwise a model learns that even x_T contains the mean of x_0, and samples from noise have medium brightness.

    Source: Lin et al. 2024 (arXiv:2305.08891), algorithm 1.
    """
    alpha = schedule.alphas_cumprod.sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])  # shift the end to 0, scale back to alpha_0
    return NoiseSchedule.of_ac(alpha.square().clamp(min=1e-8))


def posterior_coefficients(beta: Tensor, ac_t: Tensor, ac_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute coef_x_0, coef_x_t, variance of q(x_prev | x_t, x_0) = N(coef_x_0 x_0 + coef_x_t x_t, variance I).

    Args:
        beta: (S,) float64, 1 - ac_t / ac_prev: variance added between x_prev, perhaps several timesteps back, and x_t.
        ac_t, ac_prev: (S,) float64, alphas_cumprod of x_t, in (0, 1), and of x_prev, in [ac_t, 1].

    Source: DDPM, Eq. 6 and 7.
    """
    coef_x_0 = ac_prev.sqrt() * beta / (1 - ac_t)  # sqrt(ac_prev) beta / (1 - ac_t)
    coef_x_t = (1 - beta).sqrt() * (1 - ac_prev) / (1 - ac_t)  # sqrt(alpha) (1 - ac_prev) / (1 - ac_t)
    return coef_x_0, coef_x_t, beta * (1 - ac_prev) / (1 - ac_t)


# Below: x_0, x_t, eps, v are (B, ...); t is (B,) int64 in [0, T), or one number; alphas_cumprod is (T,) on the same
# device, for one number also on the CPU, which spares a GPU the coefficients; a parameterization is what a network
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


def to_x_0(prediction: Tensor, x_t: Tensor, t: Tensor | int, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """Return the x_0 in x_t according to a network's output: the inverse of `target`."""
    prediction, x_t = prediction.float(), x_t.float()
    if parameterization == "x0":
        return prediction
    if parameterization == "v":
        alpha_t, sigma_t = _alpha_sigma(alphas_cumprod, t, x_t.ndim)
        return alpha_t * x_t - sigma_t * prediction  # Salimans & Ho 2022, appendix D
    ac_t = _at(alphas_cumprod, t, x_t.ndim)  # DDPM, Eq. 4 solved for x_0: x_t / alpha_t - sigma_t / alpha_t eps
    return _last((1 / ac_t).sqrt()) * x_t - _last((1 / ac_t - 1).sqrt()) * prediction


def min_snr_weight(t: Tensor, gamma: float, parameterization: str, alphas_cumprod: Tensor) -> Tensor:
    """Return weights (B,) that turn squared errors at t into errors of x_0 times min(SNR, gamma).

    They reduce the influence of timesteps with little noise, whose targets are hard to learn and of little use.
    gamma = inf weights the errors of x_0 by the SNR, which is an error of eps whatever the network predicts.

    Source: Hang et al. 2023, section 3.4.
    """
    ac_t = alphas_cumprod[t]
    snr = (ac_t / (1 - ac_t)).float()  # alpha_t^2 / sigma_t^2
    # squared error of the prediction = error_ratio * squared error of x_0
    error_ratio = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / error_ratio


def _alpha_sigma(alphas_cumprod: Tensor, t: Tensor | int, ndim: int) -> tuple[Tensor, Tensor]:
    """Return alpha_t and sigma_t: scalars, or float32 shaped (B, 1, ...) to scale a tensor of ndim axes."""
    ac_t = _at(alphas_cumprod, t, ndim)
    return _last(ac_t.sqrt()), _last((1 - ac_t).sqrt())


def _at(values: Tensor, t: Tensor | int, ndim: int) -> Tensor:
    """Return values (T,) at t: () for one number, else (B, 1, ...) with ndim axes."""
    return values[t].reshape(-1, *[1] * (ndim - 1)) if isinstance(t, Tensor) else values[t]


def _last(x: Tensor) -> Tensor:
    """Round coefficients to float32; a scalar takes part in float32 arithmetic as it is."""
    return x.float() if x.ndim else x


# --- The reverse process with its variances, and the variational bound ------------------------------------------------


class Reverse(NamedTuple):
    """p(x_(t - 1) | x_t) = N(mean, exp(log_variance) I), and the x_0 behind it; (B, ...) float32 each."""

    mean: Tensor
    log_variance: Tensor
    x_0: Tensor


def p_mean_variance(
    output: Tensor,
    x_t: Tensor,
    t: Tensor | int,
    schedule: NoiseSchedule,
    *,
    parameterization: str = "eps",
    variance: str = "posterior",
    clip: bool = False,
) -> Reverse:
    """Return the Gaussian that a network's output makes of the step from x_t to x_(t - 1).

    Args:
        output: (B, C, ...), or (B, 2C, ...) for `learned_range`: the prediction, then v in about [-1, 1].
        variance: `posterior` (that of q(x_(t - 1) | x_t, x_0)), `beta` (the largest that makes sense), or
            `learned_range`: exp((v + 1) / 2 log beta + (1 - v) / 2 log posterior).
        clip: keep x_0 in [-1, 1].

    Source: DDPM, Eq. 7 and section 3.2; iDDPM, Eq. 15.
    """
    C, ndim = x_t.shape[1], x_t.ndim
    x_0 = to_x_0(output[:, :C], x_t, t, parameterization, schedule.alphas_cumprod)
    x_0 = x_0.clamp(-1, 1) if clip else x_0
    coef_x_0, coef_x_t, _ = (_last(_at(values, t, ndim)) for values in schedule.posterior)
    low, high = (_at(values, t, ndim) for values in schedule.log_variances)
    if variance == "learned_range":
        share = (output[:, C:].float() + 1) / 2
        log_variance = share * _last(high) + (1 - share) * _last(low)
    else:  # at t = 0 the posterior's in both cases
        last = torch.as_tensor(t, device=low.device).reshape(low.shape) == 0
        fixed = low if variance == "posterior" else torch.where(last, low, high)
        log_variance = _last(fixed).to(x_0).expand_as(x_0)
    return Reverse(coef_x_0 * x_0 + coef_x_t * x_t.float(), log_variance, x_0)


def normal_kl(mean_1: Tensor | float, log_variance_1: Tensor, mean_2: Tensor | float, log_variance_2: Tensor) -> Tensor:
    """Return KL(N(mean_1, variance_1) || N(mean_2, variance_2)) in nats, elementwise."""
    ratio = (log_variance_1 - log_variance_2).exp() + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp()
    return 0.5 * (log_variance_2 - log_variance_1 - 1 + ratio)


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Return log p, in nats and elementwise, of 8-bit values x in [-1, 1] under N(mean, exp(log_scale)^2).

    Each value owns the interval of 1/255 around it, the first and the last one also the tail beyond.

    Source: DDPM, Eq. 13, with the approximation of the normal distribution by a tanh in the published code.
    """

    def cdf(z: Tensor) -> Tensor:
        return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    upper, lower = (cdf((-log_scale).exp() * (x - mean + half)) for half in (1 / 255, -1 / 255))
    share = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return share.clamp(min=1e-12).log()


def vlb_term(x_0: Tensor, x_t: Tensor, t: Tensor, p: Reverse, schedule: NoiseSchedule) -> Tensor:
    """Return a term of the variational bound, (B,) in bits per dimension: L_(t - 1), or L_0 at t = 0.

    Source: DDPM, Eq. 5; iDDPM, Eq. 4 to 7.
    """
    coef_x_0, coef_x_t, _ = (_last(_at(values, t, x_0.ndim)) for values in schedule.posterior)
    log_variance = _last(_at(schedule.log_variances[0], t, x_0.ndim))
    kl = normal_kl(coef_x_0 * x_0 + coef_x_t * x_t, log_variance, p.mean, p.log_variance)
    likelihood = discretised_log_likelihood(x_0, p.mean, 0.5 * p.log_variance)
    nats = torch.where(t == 0, -likelihood.flatten(1).mean(1), kl.flatten(1).mean(1))
    return nats / math.log(2)


def prior_bpd(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Return L_T = KL(q(x_T | x_0) || N(0, I)), (B,) in bits per dimension. Source: iDDPM, Eq. 7."""
    ac_T = schedule.alphas_cumprod[-1:].reshape(-1, *[1] * (x_0.ndim - 1))
    kl = normal_kl(_last(ac_T.sqrt()) * x_0, _last((1 - ac_T).log()), 0.0, torch.zeros_like(x_0[:1]))
    return kl.flatten(1).mean(1) / math.log(2)


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
