"""Paint by Example as one module: what is trained, sampled, saved and loaded.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · C input channels of the UNet · D token
channels · L context tokens: 1 with exemplars unless `exemplar_encoder.tokens` is `all`, 77 with text, 78 with both.
Source: Yang et al. 2023, "Paint by Example: Exemplar-based Image Editing with Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm.checkpoint.io import read_checkpoint
from ldm.checkpoint.keys import SCHEDULE_BUFFERS, TOWER, check_keys, check_schedule, to_module_keys
from ldm.config import INPUT_CHANNELS, RELIGHTING_CHANNELS, Config, ConfigError, ModelConfig, load_config
from ldm.decoders import replace_decoder
from ldm.diffusion import Generators, draw_noise, make_schedule, q_sample, target, to_eps
from ldm.models.asymmetric import build_autoencoder
from ldm.models.control import Steering
from ldm.models.efficientnet import EfficientNetTower
from ldm.models.exemplar_encoder import ExemplarEncoder
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNetModel
from ldm.samplers import SAMPLERS, OnStep, first_timestep


def latent_mask(keep_mask: Tensor, z: Tensor) -> Tensor:
    """A keep mask (B, 1, H, W) on the grid and in the dtype of latents z (B, Z, h, w): bilinear, no antialiasing."""
    if keep_mask.shape[2:] != z.shape[2:]:
        keep_mask = F.interpolate(keep_mask.float(), size=z.shape[2:], mode="bilinear", align_corners=False)
    return keep_mask.to(z.dtype)


def latent_hole(keep_mask: Tensor, z: Tensor) -> Tensor:
    """Where a keep mask (B, 1, H, W) says paint, 1, on the grid and in the dtype of latents z (B, Z, h, w).

    Cut at a half, and of each cell the upper left pixel, as for Stable Diffusion inpainting.
    """
    hole = (keep_mask <= 0.5).to(z.dtype)
    return hole if hole.shape[2:] == z.shape[2:] else F.interpolate(hole, size=z.shape[2:], mode="nearest")


class DiffusionWrapper(nn.Module):
    """Holds the UNet one level down, where the published checkpoint has it."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(nn.Module):
    """UNet, first stage, encoders of the condition and noise schedule, under the published attribute names.

    What a config has no use for is not there: `cond_stage_model`, `proj_out` and `learnable_vector` with exemplars,
    `text_encoder` with text.

    Args:
        config: sizes and conventions; see `ldm.config.ModelConfig`.

    Raises:
        ConfigError: the parts do not fit together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        _check_widths(config)
        self.config = config
        self.model = DiffusionWrapper(UNetModel(config.unet))
        self.first_stage_model = build_autoencoder(config.first_stage)
        if self.reads_exemplars:
            self.cond_stage_model = ExemplarEncoder(config.exemplar_encoder)
            self.proj_out = nn.Linear(config.exemplar_encoder.hidden_size, config.unet.context_dim)
            self.learnable_vector = nn.Parameter(torch.randn(1, 1, config.unet.context_dim))
        if self.reads_text:
            self.text_encoder = TextEncoder(config.text_encoder)
        self.schedule = make_schedule(config.schedule)
        for name, values in self.schedule.buffers().items():
            self.register_buffer(name, values)

    alphas_cumprod: Tensor
    betas: Tensor

    @property
    def reads_exemplars(self) -> bool:
        return self.config.condition != "text"

    @property
    def reads_text(self) -> bool:
        return self.config.condition != "exemplar"

    @property
    def inpaints(self) -> bool:
        return not set(self.config.input_channels) & set(RELIGHTING_CHANNELS)

    @property
    def single_token(self) -> bool:
        """Whether the context is one token, to which attention needs no queries and keys."""
        return not self.reads_text and self.config.exemplar_encoder.tokens == "pooled"

    @property
    def unet(self) -> UNetModel:
        """The denoiser: `unet(x (B, C, h, w), t (B,), context (B, L, D))` -> (B, Z, h, w)."""
        return self.model.diffusion_model

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side."""
        return self.first_stage_model.downsampling

    @property
    def null_context(self) -> Tensor:
        """(1, L, D), what stands for "no condition" in classifier-free guidance: see `context`.

        With several tokens of an exemplar the learned one, L = 1, takes the place of each: attention to equal tokens
        is attention to one.
        """
        return self.context()

    def encode_image(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Pixels to scaled latents, by sampling the posterior as the original does.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            generator: source of the posterior noise, one for the batch or one per sample.

        Returns:
            (B, Z, h, w) float32, about unit variance.
        """
        posterior = self.first_stage_model.encode(x.to(self.weight_dtype))
        return self.config.scale_factor * posterior.sample(generator).float()

    def decode_latents(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        """Latents to pixels.

        Args:
            z: (B, Z, h, w), scaled.
            image, keep_mask: (B, 3, H, W) in [-1, 1] and (B, 1, H, W), 1 = keep: what is known of the picture, for a
                first stage that looks at it.

        Returns:
            (B, 3, H, W) float32, about [-1, 1], not clamped.
        """
        dtype = self.weight_dtype
        known = (x if x is None else x.to(dtype) for x in (image, keep_mask))
        return self.first_stage_model.decode((z / self.config.scale_factor).to(dtype), *known).float()

    def encode_exemplar(self, pixel_values: Tensor) -> Tensor:
        """Exemplars (B, 3, S, S), normalised as for CLIP, to context (B, L, D)."""
        return self.encode_features(self.cond_stage_model.features(pixel_values.to(self.weight_dtype)))

    def encode_features(self, features: Tensor) -> Tensor:
        """What the image tower saw, `ExemplarEncoder.features`, to context (B, L, D)."""
        return self.proj_out(self.cond_stage_model.tokens(features.to(self.weight_dtype)))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """B prompts to context (B, L, D).

        Raises:
            UserError: the tokenizer is missing.
        """
        return self.text_encoder(self.text_encoder.tokenize(prompts).to(self.betas.device))

    def context(self, exemplar: Tensor | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        """All tokens of the condition: the exemplar's, then the text's, whichever of them the model reads.

        Args:
            exemplar: (B, L, D) from `encode_exemplar`; None: the learned token that stands for no exemplar.
            prompts: B of them; None: the empty prompt, which stands for no text.

        Returns:
            (B, L, D); B is 1 with neither.
        """
        parts = []
        if self.reads_exemplars:
            parts.append(self.learnable_vector if exemplar is None else exemplar)
        if self.reads_text:
            parts.append(self.encode_text([""] if prompts is None else prompts))
        batch = max(len(part) for part in parts)
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

    def concat_condition(self, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """What follows x_t among the UNet's channels, the same at every step, in the config's order.

        Args:
            z_masked: (B, Z, h, w) scaled latent of the image with a mid-grey hole.
            keep_mask: (B, 1, H, W) or (B, 1, h, w) in [0, 1], 1 = keep; brought to the latent grid as in the
                checkpoint's training, see `ModelConfig.input_channels`.

        Returns:
            (B, C - Z, h, w).
        """
        parts = {
            "z_masked": lambda: z_masked,
            "keep_mask": lambda: latent_mask(keep_mask, z_masked),
            "hole_mask": lambda: latent_hole(keep_mask, z_masked),
        }
        names = self.config.input_channels[1:]
        return torch.cat([z_masked[:, :0], *(parts[name]() for name in names)], dim=1)  # a UNet may see x_t alone

    def unet_input(self, x_t: Tensor, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """The UNet's channels (B, C, h, w): x_t (B, Z, h, w), then `concat_condition`."""
        return torch.cat([x_t, self.concat_condition(z_masked, keep_mask)], dim=1)

    def loss(self, z_0: Tensor, z_masked: Tensor, keep_mask: Tensor, context: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The denoising objective, per sample.

        Args:
            z_0: (B, Z, h, w) scaled latent of the image.
            z_masked, keep_mask: as for `concat_condition`.
            context: (B, L, D), null tokens already in place of dropped conditions.
            t: (B,) timesteps. eps: (B, Z, h, w) standard normal noise.

        Returns:
            (B,) mean squared error over the latent.

        Source: Yang et al. 2023, Eq. 4 (with Ho et al. 2020, Eq. 14; v: Salimans & Ho 2022).
        """
        x_t = q_sample(z_0, t, eps, self.alphas_cumprod)
        prediction = self.unet(self.unet_input(x_t, z_masked, keep_mask), t, context)
        wanted = target(z_0, eps, t, self.config.parameterization, self.alphas_cumprod)
        return F.mse_loss(prediction.float(), wanted, reduction="none").flatten(1).mean(1)

    def drop_condition(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Put the null context where `dropped` (B,) bool is true. Source: Ho & Salimans 2022, Alg. 1."""
        return torch.where(dropped[:, None, None], self.null_context.to(context.dtype), context)

    def sample(self, z_masked: Tensor, keep_mask: Tensor, context: Tensor, **sampling: Any) -> Tensor:
        """Fill the hole: noise to scaled latents (B, Z, h, w) float32.

        Args:
            z_masked, keep_mask: as for `concat_condition`.
            context, **sampling: of `denoise`.
        """
        return self.denoise(self.concat_condition(z_masked, keep_mask), context, **sampling)

    @torch.no_grad()
    def denoise(
        self,
        still: Tensor,
        context: Tensor,
        *,
        null_context: Tensor | None = None,
        sampler: str = "dpm_solver_pp",
        num_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        x_T: Tensor | None = None,
        z_0: Tensor | None = None,
        strength: float = 1.0,
        generator: Generators = None,
        steering: Steering | None = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Noise to scaled latents, given what the UNet sees beside them.

        Args:
            still: (B, C - Z, h, w), the channels after x_t.
            context: (B, L, D).
            null_context: (1, L or 1, D) or (B, L, D), what guidance leads away from; None is the model's own.
            sampler: ddpm | ddim | plms | dpm_solver_pp | unipc.
            num_steps: denoising steps.
            guidance_scale: s in `eps_null + s (eps_cond - eps_null)`; 1 evaluates the condition's branch alone.
            guidance_interval: the noise levels with guidance, as shares of the timesteps: 0 is data, 1 is noise. At
                others the condition's branch is evaluated alone.
            eta: DDIM's stochasticity in [0, 1].
            x_T: (B, Z, h, w) start noise; drawn when None.
            z_0: (B, Z, h, w) scaled latent to begin with instead of noise alone; noise is added to it.
            strength: of that noise, as the share of the timesteps, in (0, 1]; all steps are taken from there on.
            generator: source of all noise, one for the batch or one per sample.
            steering: control networks with their pictures.
            on_step: called after each step as `on_step(step, num_steps, x_t, x_0)`.

        Returns:
            (B, Z, h, w) float32.

        Raises:
            ValueError: unknown sampler, impossible step count, scale or interval.

        Source: Ho & Salimans 2022, Eq. 6 (guidance); Kynkäänniemi et al. 2024, Eq. 5 (in an interval).
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: got {low:g} to {high:g}, expected 0 <= low <= high <= 1")
        device, dtype = still.device, self.weight_dtype
        still, context = still.to(dtype), context.to(dtype)
        null_context = self.null_context if null_context is None else null_context
        with_null = torch.cat([null_context.to(dtype).expand_as(context), context])
        alone, both = (still, context), (still.repeat(2, 1, 1, 1), with_null)

        def denoise(x_t: Tensor, t: int) -> Tensor:
            guided = guidance_scale != 1.0 and low <= t / (self.schedule.num_timesteps - 1) <= high
            conditions, tokens = both if guided else alone
            x = x_t.repeat(2, 1, 1, 1) if guided else x_t
            steps = torch.full((x.shape[0],), t, device=device)
            residuals = steering and steering.residuals(x.to(dtype), steps, tokens, guided=guided)
            prediction = self.unet(torch.cat([x.to(dtype), conditions], dim=1), steps, tokens, residuals).float()
            eps = to_eps(prediction, x, steps, self.config.parameterization, self.alphas_cumprod)
            if not guided:
                return eps
            eps_null, eps_cond = eps.chunk(2)
            return eps_null + guidance_scale * (eps_cond - eps_null)

        def noise() -> Tensor:
            shape = torch.Size([len(still), self.config.unet.out_channels, *still.shape[2:]])
            return draw_noise(shape, generator, device=device)

        x_T = noise() if x_T is None else x_T.to(device, torch.float32)
        alphas_cumprod = self.schedule.alphas_cumprod
        if z_0 is not None:
            if not 0 < strength <= 1:
                raise ValueError(f"strength: got {strength:g}, expected more than 0, at most 1")
            # The rest of the schedule is a schedule; noise is added up to where the sampler begins.
            alphas_cumprod = alphas_cumprod[: max(1, round(strength * len(alphas_cumprod)))]
            start = torch.tensor([first_timestep(sampler, alphas_cumprod, num_steps)], device=device)
            x_T = q_sample(z_0.to(device, torch.float32), start.expand(len(z_0)), x_T, self.alphas_cumprod)
        return SAMPLERS[sampler](denoise, x_T, alphas_cumprod, num_steps, eta=eta, noise=noise, on_step=on_step)

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that inputs are cast to before a network sees them."""
        return next(self.unet.parameters()).dtype


def _check_widths(config: ModelConfig) -> None:
    Z, text = config.first_stage.embed_dim, config.text_encoder.hidden_size
    widths = dict.fromkeys(INPUT_CHANNELS, Z) | {"x_t": config.unet.out_channels, "keep_mask": 1, "hole_mask": 1}
    parts = {name: widths[name] for name in config.input_channels}
    if config.unet.in_channels != sum(parts.values()):
        listed = " + ".join(f"{name} {width}" for name, width in parts.items())
        raise ConfigError(
            f"model.unet.in_channels: got {config.unet.in_channels}, expected {sum(parts.values())} ({listed}, see "
            "model.input_channels)"
        )
    if config.condition != "exemplar" and text != config.unet.context_dim:
        raise ConfigError(
            f"model.text_encoder.hidden_size: got {text}, expected model.unet.context_dim, {config.unet.context_dim}"
        )


def load_model(
    config: str | Path | DictConfig | Config,
    checkpoint: str | Path | None = None,
    *,
    decoder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> LatentDiffusion:
    """Build the model of a config and load a checkpoint into it, strictly.

    The modules are built without memory and take the checkpoint's tensors, so that a full-size model
    costs one copy of its weights.

    Args:
        config: path of a YAML file, or a loaded config.
        checkpoint: `.ckpt` or `.safetensors` in the published layout; None leaves the weights random.
        decoder: a mask-conditioned decoder for the first stage, a file or folder for `replace_decoder`.
        device: where the model goes.
        dtype: type of the weights; the noise schedule stays float32.

    Returns:
        The model in evaluation mode, without gradients.

    Raises:
        ConfigError: the config cannot be used.
        CheckpointError: the file is unreadable, holds another model, or was trained with another schedule.
        ValueError: float16 on the CPU.
    """
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        raise ValueError("float16 on the CPU: its convolutions are slow or missing there; use float32 or bfloat16")
    model_config = load_config(config).model
    if checkpoint is None:
        model = LatentDiffusion(model_config)
    else:
        with torch.device("meta"):
            model = LatentDiffusion(model_config)
        load_weights(model, read_checkpoint(checkpoint), str(checkpoint), dtype=dtype)
        if model.reads_text:
            model.text_encoder.find_tokenizer(Path(checkpoint).parent)
    if decoder is not None:
        model.first_stage_model = replace_decoder(model.first_stage_model, decoder)
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def add_imagenet_tower(state: dict[str, Tensor], encoder: ExemplarEncoder) -> dict[str, Tensor]:
    """A checkpoint's tensors under module names, and an EfficientNet tower's ImageNet weights if it has no tower.

    Raises:
        UserError: those weights are needed, and their package is not installed.
    """
    tower = encoder.transformer
    if not isinstance(tower, EfficientNetTower) or any(name.startswith(TOWER) for name in state):
        return state
    return {**state, **{TOWER + name: tensor for name, tensor in tower.imagenet_state().items()}}


def load_weights(model: LatentDiffusion, state: dict[str, Tensor], source: str, *, dtype: torch.dtype) -> None:
    """Give a model, built on the meta device or not, the tensors of a checkpoint in the published layout.

    Args:
        model: receives the tensors themselves where their type is already `dtype`.
        state: file names to tensors, as `read_checkpoint` returns them.
        source: name of the file, for messages.
        dtype: type that the weights get.

    Raises:
        CheckpointError: keys or shapes differ, or the schedule is another one.
    """
    state = to_module_keys(state)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in SCHEDULE_BUFFERS}
    given = {name: tensor for name, tensor in state.items() if name not in SCHEDULE_BUFFERS}
    check_keys(expected, given, source=source)
    schedule = model.schedule.buffers()
    check_schedule(schedule, state, source=source)
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    model.load_state_dict({**weights, **schedule}, strict=True, assign=True)
    device = next(model.unet.parameters()).device
    if model.reads_exemplars:
        model.cond_stage_model.restore_position_ids(device)
    if model.reads_text:
        model.text_encoder.restore_position_ids(device)
