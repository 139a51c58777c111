"""Diffusion in pixel space: unconditional, by class, or upsampling; what improved- and guided-diffusion train.

Dimensions: B batch · C image channels · H, W pixels · T diffusion steps · S steps of a sampling run · K classes.
Sources: Nichol & Dhariwal 2021 (iDDPM, arXiv:2102.09672); Dhariwal & Nichol 2021 (ADM, arXiv:2105.05233);
Karras et al. 2022 (EDM, arXiv:2206.00364); Chen et al. 2023 (self-conditioning, arXiv:2208.04202).
"""

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from ldm import samplers
from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import UNET, State, check_keys, misfit
from ldm.checkpoint.openai import examine, is_openai, to_module_layout
from ldm.config import Config, ConfigError, ModelConfig, load_config
from ldm.diffusion import (
    DiffusionModel,
    Generators,
    NoiseSchedule,
    Reverse,
    check_input_width,
    draw_noise,
    karras_sigmas,
    p_mean_variance,
    prior_bpd,
    q_sample,
    target,
    to_eps,
    to_x_0,
    vlb_term,
)
from ldm.models.classifier import ClassifierModel
from ldm.models.layers import Uninitialised
from ldm.models.unet import UNetModel

logger = logging.getLogger(__name__)
SAMPLERS = (*samplers.SAMPLERS, "heun")


@dataclass(frozen=True)
class Guidance:
    """How strongly labels lead. The defaults are plain: no guidance by a classifier, no correction of the other.

    `scale`, `rescale` and `parallel` are those of `samplers.classifier_free`; `plus_plus` takes the direction of noise
    from the unconditional prediction (CFG++, Chung et al. 2024, arXiv:2406.08070; DDIM alone). `classifier` shifts each
    step by `classifier_scale` times the gradient of its log p(y | x_t) (ADM, Algorithms 1 and 2).
    """

    scale: float = 1.0
    rescale: float = 0.0
    parallel: float = 1.0
    plus_plus: bool = False
    classifier: Callable[[Tensor, Tensor], Tensor] | None = None
    classifier_scale: float = 1.0

    def gradient(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return classifier_scale times the gradient of log p(labels | x_t) with respect to x_t, (B, C, H, W)."""
        assert self.classifier is not None
        with torch.enable_grad():
            x = x_t.detach().requires_grad_()
            log_p = self.classifier(x, t).log_softmax(1).gather(1, labels[:, None])
            return self.classifier_scale * torch.autograd.grad(log_p.sum(), x)[0]


class PixelDiffusion(DiffusionModel):
    """A model of images, with the UNet `unet(x (B, C_in, H, W), t (B,), labels (B,) or None)` -> (B, C or 2 C, H, W).

    Raises `ConfigError` if the parts of the config do not fit together.
    """

    def __init__(self, config: ModelConfig) -> None:
        channels = config.unet.out_channels // (2 if config.variance == "learned_range" else 1)
        check_input_width(config, dict.fromkeys(("x_t", "low_res", "x_0_pred"), channels))
        if config.unet.context_dim:
            raise ConfigError(f"model.unet.context_dim: got {config.unet.context_dim}, expected 0 for model.kind pixel")
        super().__init__(UNetModel(config.unet), config)
        self.channels = channels
        self.is_edm = config.schedule.name == "edm"
        self.parameterization = "x0" if self.is_edm else config.parameterization

    def network(
        self,
        x_t: Tensor,
        t: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
        x_0_pred: Tensor | None = None,
    ) -> Tensor:
        """Run the UNet: (B, C, H, W), with a learned variance (B, 2 C, H, W), float32; with EDM this is x_0.

        Args:
            x_t: (B, C, H, W) of the variance-preserving process.
            t: (B,) timesteps; with EDM noise levels sigma.
            labels: (B,) in [0, K); -1 means none.
            low_res: (B, C, h, w) in [-1, 1], enlarged here. x_0_pred: (B, C, H, W), earlier prediction; None is zero.
        """
        x, time, skip, gain = x_t, t, None, 1.0
        if self.is_edm:
            sigma, scale = t.reshape(-1, 1, 1, 1), self.config.schedule.sigma_data
            noisy, total = x_t * (1 + sigma**2).sqrt(), sigma**2 + scale**2  # x_0 + sigma eps
            x, time = noisy / total.sqrt(), t.log() / 4  # c_in x and c_noise: EDM, Table 1
            skip, gain = scale**2 / total * noisy, sigma * scale / total.sqrt()  # c_skip x and c_out
        inputs = [x]
        if low_res is not None:
            inputs.append(F.interpolate(low_res, x.shape[2:], mode="bilinear", align_corners=False))
        if "x_0_pred" in self.config.input_channels:
            inputs.append(torch.zeros_like(x) if x_0_pred is None else x_0_pred)
        output = self.unet(torch.cat(inputs, dim=1).to(self.weight_dtype), time, labels).float()
        return output if skip is None else skip + gain * output

    def loss(
        self,
        x_0: Tensor,
        t: Tensor,
        eps: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
        *,
        objective: str = "simple",
        vlb_weight: float | None = None,
        self_condition: Tensor | None = None,
    ) -> Tensor:
        """Compute the training objective of each sample, (B,).

        Args:
            x_0, eps: (B, C, H, W) images in [-1, 1] and noise. t: (B,) timesteps; with EDM noise levels.
            labels, low_res: as for `network`.
            objective: `simple` (mean squared error), `vlb` (T times a term of the bound, in bits per dimension) or
                `hybrid` (the sum of the error and `vlb_weight`, by default T / 1000, times that term, in which only the
                variance is learned: iDDPM, Eq. 16).
            self_condition: (B,) bool, samples that are also shown a first prediction.
        """
        schedule, index = self.schedule.to(t.device), t
        if self.is_edm:
            ac = 1 / (1 + t.double() ** 2)
            schedule, index = NoiseSchedule(ac, ac), torch.arange(len(t), device=t.device)
        x_t = q_sample(x_0, index, eps, schedule.alphas_cumprod)
        run = partial(self.network, x_t, t, labels, low_res)
        first = None
        if self_condition is not None:
            with torch.no_grad():
                output = run()[:, : self.channels]
            first = to_x_0(output, x_t, index, self.parameterization, schedule.alphas_cumprod)
            first = first * self_condition.reshape(-1, 1, 1, 1)
        output = run(first)
        prediction = output[:, : self.channels]
        expected = target(x_0, eps, index, self.parameterization, schedule.alphas_cumprod)
        error = (prediction - expected).square().flatten(1).mean(1)
        if self.is_edm:  # lambda(sigma): EDM, section 5
            scale = self.config.schedule.sigma_data
            return (t**2 + scale**2) / (t * scale) ** 2 * error
        if objective == "simple":
            return error
        if objective == "hybrid":
            output = torch.cat([prediction.detach(), output[:, self.channels :]], dim=1)
        term = vlb_term(x_0, x_t, t, self.reverse(output, x_t, t, schedule), schedule)
        T = len(self.schedule.betas)
        return T * term if objective == "vlb" else error + (T / 1000 if vlb_weight is None else vlb_weight) * term

    def reverse(
        self, output: Tensor, x_t: Tensor, t: Tensor | int, schedule: NoiseSchedule, clip: bool = False
    ) -> Reverse:
        """Return the step back that an output of `network` means."""
        kind, variance = self.parameterization, self.config.variance
        return p_mean_variance(output, x_t, t, schedule, parameterization=kind, variance=variance, clip=clip)

    # --- Sampling -----------------------------------------------------------------------------------------------------

    def chain(self, sampler: str, steps: str) -> NoiseSchedule:
        """Choose the steps of a sampler: their number, or for `ddpm` and `ddim` any text for `spaced_timesteps`.

        Raises ValueError for a text that says neither.
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        T, sigmas = len(self.schedule.betas), self.schedule.sigmas
        if not self.is_edm and sampler in ("ddpm", "ddim"):
            timesteps = samplers.spaced_timesteps(T, steps)[::-1]
        elif not steps.isdecimal() or int(steps) < 1:
            raise ValueError(f"timesteps: got {steps!r}, expected a number of steps for {sampler}")
        elif self.is_edm or sampler == "heun":
            levels = karras_sigmas(int(steps), sigmas[0].item(), sigmas[-1].item())[::-1]
            times = levels if self.is_edm else np.interp(np.log(levels), sigmas.log().numpy(), range(T)).tolist()
            return NoiseSchedule.of_sigmas(levels, times)
        else:
            timesteps = samplers.choose_timesteps(sampler, T, int(steps))[::-1]
        return self.schedule.spaced(timesteps)

    @torch.no_grad()
    def sample(
        self,
        x_T: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
        *,
        sampler: str = "ddpm",
        steps: str = "250",
        guidance: Guidance = Guidance(),
        eta: float = 0.0,
        clip: bool = True,
        generator: Generators = None,
        on_step: samplers.OnStep | None = None,
    ) -> Tensor:
        """Turn standard normal noise (B, C, H, W) into images, in [-1, 1] if clipped (their x_0 is), float32.

        Args:
            labels, low_res: as for `network`.
            sampler: `ddpm` (with the model's own variance), `heun`, or one of `samplers.SAMPLERS`.
            steps: as for `chain`.
            generator: source of further noise, one for the batch or one per sample.
        """
        chain, noise = self.chain(sampler, steps), partial(draw_noise, x_T.shape, generator, device=x_T.device)
        num_steps, ac, x = len(chain.times), chain.alphas_cumprod, x_T
        denoiser = _Denoiser(self, chain, labels, low_res, guidance, clip)
        if sampler == "heun":
            sigmas = chain.sigmas.tolist()[::-1]
            results = samplers.heun(denoiser.x_0_at, x_T * sigmas[0], sigmas, noise)
        elif sampler == "ddpm":
            results = samplers.ancestral(denoiser.reverse, x_T, num_steps, noise)
        else:
            options = {"eta": eta, "noise": noise} if sampler == "ddim" else {}
            clip = clip and guidance.classifier is None  # else x_0 is clipped before guidance, not after it
            timesteps = range(num_steps)[::-1]
            results = samplers.SAMPLERS[sampler](denoiser.eps, x_T, ac, timesteps, clip=clip, **options)
        for step, (x, x_0) in enumerate(results, start=1):
            if on_step:
                on_step(step, num_steps, x, x_0)
        return x

    @torch.no_grad()
    def bits_per_dim(
        self,
        x_0: Tensor,
        labels: Tensor | None = None,
        low_res: Tensor | None = None,
        *,
        steps: str = "",
        clip: bool = True,
        noise: Callable[[], Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Bound the negative log-likelihood of 8-bit images (B, C, H, W) in [-1, 1].

        Returns `vb`, `mse` (of eps) and `x_0_mse`, (B, S) in rising order of the steps, `prior` and `total` (B,),
        the bound in bits per dimension. With fewer `steps` than T it is the bound of the shorter chain.

        Source: iDDPM, section 2.
        """
        chain, noise = self.chain("ddpm", steps), noise or partial(torch.randn_like, x_0)
        denoiser, tables = _Denoiser(self, chain, labels, low_res, Guidance(), clip), chain.to(x_0.device)
        terms: dict[str, list[Tensor]] = {"vb": [], "mse": [], "x_0_mse": []}
        for k in reversed(range(len(chain.times))):
            eps = noise()
            x_t = q_sample(x_0, k, eps, chain.alphas_cumprod)
            p = denoiser.reverse(x_t, k)
            eps_pred = to_eps(p.x_0, x_t, k, "x0", chain.alphas_cumprod)
            terms["vb"].append(vlb_term(x_0, x_t, torch.full((len(x_0),), k, device=x_0.device), p, tables))
            terms["mse"].append((eps_pred - eps).square().flatten(1).mean(1))
            terms["x_0_mse"].append((p.x_0 - x_0).square().flatten(1).mean(1))
        columns = {name: torch.stack(values[::-1], dim=1) for name, values in terms.items()}
        prior = prior_bpd(x_0, tables)
        return {**columns, "prior": prior, "total": columns["vb"].sum(1) + prior}


@dataclass
class _Denoiser:
    """A model with its conditions and guidance, as samplers call it."""

    model: PixelDiffusion
    chain: NoiseSchedule
    labels: Tensor | None
    low_res: Tensor | None
    guidance: Guidance
    clip: bool
    last: Tensor | None = None  # x_0 of the step before, for self-conditioning

    def run(self, x: Tensor, time: float, k: int, ac: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run the network, guided without a classifier: its output, x_0, and the prediction without labels, if any."""
        model, g, C = self.model, self.guidance, self.model.channels
        t, labels = self._times(x, time), self.labels if model.config.unet.num_classes else None
        if g.scale == 1 or labels is None:
            output, null = model.network(x, t, labels, self.low_res, self.last), None
        else:
            both = [torch.full_like(labels, -1), labels]
            twice = (part if part is None else torch.cat([part, part]) for part in (self.low_res, self.last))
            null, output = model.network(torch.cat([x, x]), torch.cat([t, t]), torch.cat(both), *twice).chunk(2)
            guided = samplers.classifier_free(output[:, :C], null[:, :C], g.scale, g.rescale, g.parallel)
            output, null = torch.cat([guided, output[:, C:]], dim=1), null[:, :C]
        x_0 = to_x_0(output[:, :C], x, k, model.parameterization, ac)
        x_0 = x_0.clamp(-1, 1) if self.clip else x_0
        if "x_0_pred" in model.config.input_channels:
            self.last = x_0
        return output, x_0, null

    def _times(self, x: Tensor, time: float) -> Tensor:
        return torch.full((len(x),), time, device=x.device)

    def _gradient(self, x: Tensor, k: int) -> Tensor:
        assert self.labels is not None
        return self.guidance.gradient(x, self._times(x, self.chain.times[k]), self.labels)

    def reverse(self, x: Tensor, k: int) -> Reverse:
        """Return p(x_(k - 1) | x_k); a classifier shifts its mean by variance times gradient: ADM, Algorithm 1."""
        output, _, _ = self.run(x, self.chain.times[k], k, self.chain.alphas_cumprod)
        p = self.model.reverse(output, x, k, self.chain, self.clip)
        if self.guidance.classifier is None:
            return p
        return p._replace(mean=p.mean + p.log_variance.exp() * self._gradient(x, k))

    def eps(self, x: Tensor, k: int) -> samplers.Eps:
        """Return the noise in x_k; a classifier changes it as a score: ADM, Algorithm 2."""
        ac, kind = self.chain.alphas_cumprod, self.model.parameterization
        output, x_0, null = self.run(x, self.chain.times[k], k, ac)
        if self.guidance.classifier is not None:  # x_0 is clipped before guidance, not after it
            return to_eps(x_0, x, k, "x0", ac) - math.sqrt(1 - ac[k].item()) * self._gradient(x, k)
        eps = to_eps(output[:, : self.model.channels], x, k, kind, ac)
        return (eps, to_eps(null, x, k, kind, ac)) if self.guidance.plus_plus and null is not None else eps

    def x_0_at(self, x: Tensor, sigma: float) -> Tensor:
        """Return x_0 for x_0 + sigma eps, at any noise level."""
        ac = torch.tensor([1 / (1 + sigma**2)], dtype=torch.float64)
        levels = self.chain.sigmas.log().numpy()
        time = sigma if self.model.is_edm else float(np.interp(math.log(sigma), levels, self.chain.times))
        return self.run(x * math.sqrt(ac.item()), time, 0, ac)[1]


class Classifier(DiffusionModel):
    """A classifier of noisy images; its `unet` is half of one."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(ClassifierModel(config.unet, config.classifier, config.image_size), config)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """(B, C, H, W) and (B,) timesteps -> logits (B, K), float32."""
        return self.unet(x_t.to(self.weight_dtype), t).float()


# --- Loading ----------------------------------------------------------------------------------------------------------


def load_pixel_model(
    checkpoint: str | Path | None,
    config: str | Path | DictConfig | Config | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> PixelDiffusion | Classifier:
    """Load a model strictly, in evaluation mode and without gradients.

    Args:
        checkpoint: a file of this project, or of improved-diffusion or guided-diffusion, whose architecture is read off
            its shapes; None leaves the weights of `config` random.
        config: needed for a file of this project, and for unpublished ones of the others, of which shapes do not tell
            `model.schedule`, `model.image_size`, and `num_heads` or `head_channels` in `model.unet`.

    Raises:
        ConfigError: the config cannot be used, or is missing.
        CheckpointError: the file is unreadable or holds another model.
    """
    sources: list[Any] = [] if config is None else [config]
    state = {} if checkpoint is None else read_checkpoint(checkpoint)
    if is_openai(state):
        found = examine(state)
        logger.warning("%s: %s", checkpoint, found.summary)  # shown unless logging is set up otherwise
        if config is None and not found.is_published:
            keys = "model.schedule, model.image_size and model.unet.num_heads or head_channels"
            raise ConfigError(f"{checkpoint}: {found.summary}, none of the published ones; pass a config with {keys}")
        sources.insert(0, OmegaConf.create(found.config))
    elif config is None:
        raise ConfigError(f"{checkpoint}: {misfit(state, 'pass the config that it was trained with')}")
    model_config = load_config(*sources).model
    with Uninitialised() if checkpoint else nullcontext():
        model = (Classifier if model_config.kind == "classifier" else PixelDiffusion)(model_config)
    if checkpoint is not None:
        state = named_as_here(state, model_config, model_config.attention_layout)
        check_keys({name: x.shape for name, x in model.state_dict().items()}, state, source=checkpoint)
        model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval().to(device, dtype)


def named_as_here(state: State, config: ModelConfig, attention_layout: str = "") -> State:
    """Return a file's tensors under this project's names and in its order, whichever of the three wrote it.

    By default the order in a published file is known, that in another one the config's.
    """
    if not is_openai(state):
        return state
    layout = attention_layout or examine(state).config["model"].get("attention_layout", config.attention_layout)
    return to_module_layout(state, UNET, layout, config.unet.num_heads, config.unet.head_channels)
