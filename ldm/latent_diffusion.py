"""Paint by Example as one module: what is trained, sampled, saved and loaded.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · C input channels of the UNet · D token
channels · T diffusion steps · L context tokens: 1 with exemplars unless `exemplar_encoder.tokens` is `all`, 77 with
text, 78 with both.
Source: Yang et al. 2023, "Paint by Example: Exemplar-based Image Editing with Diffusion Models".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm import samplers
from ldm.checkpoint.convert import autoencoder_keys, weight_files
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import CONDITION_ENCODER, SCHEDULE_BUFFERS, TOWER, check_keys, check_schedule, to_module_keys
from ldm.config import INPUT_CHANNELS, RELIGHTING_CHANNELS, Config, ConfigError, ModelConfig, load_config
from ldm.diffusion import Generators, draw_noise, make_schedule, q_sample, target, to_eps
from ldm.models.autoencoder import AsymmetricAutoencoderKL, AutoencoderKL, build_autoencoder
from ldm.models.controlnet import Steering
from ldm.models.efficientnet import EfficientNetTower
from ldm.models.exemplar_encoder import ExemplarEncoder
from ldm.models.layers import restore_position_ids
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNetModel


class DiffusionWrapper(nn.Module):
    """Holds the UNet one level down, where the published checkpoint has it."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(nn.Module):
    """UNet, first stage, encoders of the condition and noise schedule, under the published attribute names.

    Only the parts that the config needs are built: `cond_stage_model`, `proj_out` and `learnable_vector` for exemplars,
    `text_encoder` for text. Methods stand in the order of a training step and an edit: encode, condition, denoise,
    decode.

    Args:
        config: sizes and conventions; see `ldm.config.ModelConfig`.

    Raises:
        ConfigError: the parts do not fit together.
    """

    alphas_cumprod: Tensor
    betas: Tensor

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
            self.register_buffer(name, values)  # for the file format; computations use `ac`
        self._ac: Tensor | None = None
        self._empty_prompt_cache: tuple[tuple[Any, ...], Tensor] | None = None

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
        """Whether the context is one token; attention to it needs no queries and keys."""
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
    def weight_dtype(self) -> torch.dtype:
        """The type to which inputs are cast before a network reads them."""
        return next(self.unet.parameters()).dtype

    @property
    def ac(self) -> Tensor:
        """(T,) alphas_cumprod of the float64 schedule, rounded to float32 once, on the model's device.

        Not the buffer: `module.to(bfloat16)` and the trainer's `bf16-true` round buffers with the weights, which makes
        sigma_t 0 at the first timesteps.
        """
        device = self.betas.device
        if self._ac is None or self._ac.device != device:
            self._ac = self.schedule.alphas_cumprod.to(device, torch.float32)
        return self._ac

    def encode_image(self, x: Tensor, generator: Generators = None) -> Tensor:
        """Encode pixels as scaled latents, by sampling the posterior as the original does.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            generator: source of the posterior noise, one for the batch or one per sample.

        Returns:
            (B, Z, h, w) float32, about unit variance.
        """
        posterior = self.first_stage_model.encode(x.to(self.weight_dtype))
        return self.config.scale_factor * posterior.sample(generator).float()

    def encode_exemplar(self, pixel_values: Tensor) -> Tensor:
        """Encode exemplars (B, 3, S, S), normalised as for CLIP, as context (B, L, D)."""
        return self.encode_features(self.cond_stage_model.features(pixel_values.to(self.weight_dtype)))

    def encode_features(self, features: Tensor) -> Tensor:
        """Encode the image tower's output, `ExemplarEncoder.features`, as context (B, L, D)."""
        return self.proj_out(self.cond_stage_model.tokens(features.to(self.weight_dtype)))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as context (B, L, D).

        Raises:
            UserError: the tokenizer is missing.
        """
        return self.text_encoder(self.text_encoder.tokenize(prompts).to(self.betas.device))

    def context(self, exemplar: Tensor | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        """Concatenate all tokens of the condition: the exemplar's, then the text's, if the model reads them.

        Args:
            exemplar: (B, L, D) from `encode_exemplar`; None: the learned token for "no exemplar".
            prompts: B of them; None: the empty prompt.

        Returns:
            (B, L, D); B is 1 without both.
        """
        parts = []
        if self.reads_exemplars:
            parts.append(self.learnable_vector if exemplar is None else exemplar)
        if self.reads_text:
            parts.append(self._empty_prompt() if prompts is None else self.encode_text(prompts))
        batch = max(len(part) for part in parts)
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

    def null_context(self, negative_prompt: str | None = None) -> Tensor:
        """(1, L, D), the context for "no condition" in classifier-free guidance.

        With `tokens: all` the one learned token is broadcast over L; attention over identical tokens equals attention
        to one, so this is exact.

        Args:
            negative_prompt: takes the place of the empty prompt.
        """
        return self.context(None, None if negative_prompt is None else [negative_prompt])

    def _empty_prompt(self) -> Tensor:
        """(1, L, D) of the empty prompt; while the text tower is frozen it runs once, not once per training step."""
        parameters = list(self.text_encoder.parameters())
        if any(p.requires_grad for p in parameters):
            return self.encode_text([""])
        first, device = parameters[0], self.betas.device.type
        has_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if has_autocast else None
        # loading weights replaces parameters or writes into them, which counts their version up
        key = id(first), first._version, first.dtype, first.device, autocast
        if self._empty_prompt_cache is None or self._empty_prompt_cache[0] != key:
            self._empty_prompt_cache = key, self.encode_text([""])
        return self._empty_prompt_cache[1]

    def drop_condition(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Put the null context where `dropped` (B,) bool is true. Source: Ho & Salimans 2022, Alg. 1."""
        return torch.where(dropped[:, None, None], self.null_context().to(context.dtype), context)

    def c_concat(self, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """Concatenate the UNet's channels behind x_t, which are the same at every step, in the config's order.

        Args:
            z_masked: (B, Z, h, w) scaled latent of the image with a mid-grey hole.
            keep_mask: (B, 1, H, W) or (B, 1, h, w) in [0, 1], 1 = keep; resized to the latent grid as in the
                checkpoint's training, see `ModelConfig.input_channels`.

        Returns:
            (B, C - Z, h, w); no channels for a text-to-image model, which reads x_t alone.
        """
        channels = {
            "z_masked": z_masked,
            "keep_mask": latent_mask(keep_mask, z_masked),
            "hole_mask": latent_hole(keep_mask, z_masked),
        }
        return torch.cat([z_masked[:, :0], *(channels[name] for name in self.config.input_channels[1:])], dim=1)

    def unet_input(self, x_t: Tensor, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """Concatenate the UNet's channels (B, C, h, w): x_t (B, Z, h, w), then `c_concat`."""
        return torch.cat([x_t, self.c_concat(z_masked, keep_mask)], dim=1)

    def loss(self, z_0: Tensor, z_masked: Tensor, keep_mask: Tensor, context: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Compute the denoising objective of each sample.

        Args:
            z_0: (B, Z, h, w) scaled latent of the image.
            z_masked, keep_mask: as for `c_concat`.
            context: (B, L, D), with null tokens in place of dropped conditions.
            t: (B,) timesteps. eps: (B, Z, h, w) standard normal noise.

        Returns:
            (B,) mean squared error over the latent.

        Source: Yang et al. 2023, Eq. 4 (with Ho et al. 2020, Eq. 14; v: Salimans & Ho 2022).
        """
        x_t = q_sample(z_0, t, eps, self.ac)  # alpha_t z_0 + sigma_t eps
        x = self.unet_input(x_t, z_masked, keep_mask).to(self.weight_dtype)
        prediction = self.unet(x, t, context)
        expected = target(z_0, eps, t, self.config.parameterization, self.ac)  # eps, v or z_0
        return F.mse_loss(prediction.float(), expected, reduction="none").flatten(1).mean(1)

    @torch.no_grad()
    def sample(
        self,
        c_concat: Tensor,
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
        on_step: samplers.OnStep | None = None,
    ) -> Tensor:
        """Turn noise into scaled latents (B, Z, h, w), float32.

        Args:
            c_concat: (B, C - Z, h, w), the UNet's channels behind x_t.
            context: (B, L, D).
            null_context: (1, L or 1, D) or (B, L, D), from which guidance leads away; None: the model's own.
            sampler: ddpm | ddim | plms | dpm_solver_pp | unipc.
            num_steps: denoising steps.
            guidance_scale: s in `eps_null + s (eps_cond - eps_null)`; 1 evaluates the condition's branch alone.
            guidance_interval: the noise levels with guidance, as shares of the timesteps: 0 is data, 1 is noise. At
                others the condition's branch is evaluated alone.
            eta: DDIM's stochasticity in [0, 1].
            x_T: (B, Z, h, w) start noise; drawn when None.
            z_0: (B, Z, h, w) scaled latent to which noise is added as the start; None: noise alone.
            strength: of that noise, as the share of the timesteps, in (0, 1]; all steps are taken from there on.
            generator: source of all noise, one for the batch or one per sample.
            steering: control networks with their hint images.
            on_step: called after each step as `on_step(step, num_steps, x_t, x_0)`.

        Raises:
            ValueError: unknown sampler, or a step count, scale, interval, eta or strength out of range.

        Source: Ho & Salimans 2022, Eq. 6 (guidance); Kynkäänniemi et al. 2024, Eq. 5 (in an interval).
        """
        if not math.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale: got {guidance_scale}, expected a finite number")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: got {low:g} to {high:g}, expected 0 <= low <= high <= 1")
        if not 0 < strength <= 1:
            raise ValueError(f"strength: got {strength:g}, expected more than 0, at most 1")
        device, dtype, t_last = c_concat.device, self.weight_dtype, max(1, self.schedule.num_timesteps - 1)
        null_context = (self.null_context() if null_context is None else null_context).to(dtype)
        c_concat, context = c_concat.to(dtype), context.to(dtype)
        # both branches of guidance are one batch: first "no condition", then the condition
        both = c_concat.repeat(2, 1, 1, 1), torch.cat([null_context.expand_as(context), context])

        def eps_fn(x_t: Tensor, t: int) -> Tensor:
            guided = guidance_scale != 1.0 and low <= t / t_last <= high
            c, tokens = both if guided else (c_concat, context)
            x = x_t.repeat(2, 1, 1, 1) if guided else x_t
            steps = torch.full((len(x),), t, device=device)
            residuals = steering and steering.residuals(x.to(dtype), steps, tokens, guided=guided)
            prediction = self.unet(torch.cat([x.to(dtype), c], dim=1), steps, tokens, residuals).float()
            eps = to_eps(prediction, x, steps, self.config.parameterization, self.ac)
            if not guided:
                return eps
            eps_null, eps_cond = eps.chunk(2)
            return eps_null + guidance_scale * (eps_cond - eps_null)

        def noise() -> Tensor:
            shape = len(c_concat), self.config.unet.out_channels, *c_concat.shape[2:]
            return draw_noise(shape, generator, device=device)

        x = noise() if x_T is None else x_T.to(device, torch.float32)
        ac = self.schedule.alphas_cumprod
        if z_0 is not None:
            # the first part of a schedule is a schedule; its sampler begins at t, up to where noise is added
            ac = ac[: max(1, round(strength * len(ac)))]
            t = torch.full((len(z_0),), samplers.first_timestep(sampler, ac, num_steps), device=device)
            x = q_sample(z_0.to(device, torch.float32), t, x, self.ac)
        return samplers.sample(sampler, eps_fn, x, ac, num_steps, eta=eta, noise=noise, on_step=on_step)

    def decode_latents(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        """Decode latents to pixels.

        Args:
            z: (B, Z, h, w), scaled.
            image, keep_mask: (B, 3, H, W) in [-1, 1] and (B, 1, H, W), 1 = keep: the known pixels, for a first stage
                whose decoder reads them.

        Returns:
            (B, 3, H, W) float32, about [-1, 1], not clamped.
        """
        dtype = self.weight_dtype
        known = (x if x is None else x.to(dtype) for x in (image, keep_mask))
        return self.first_stage_model.decode((z / self.config.scale_factor).to(dtype), *known).float()


def latent_mask(keep_mask: Tensor, z: Tensor) -> Tensor:
    """Resize a keep mask (B, 1, H, W) to the grid and dtype of latents z (B, Z, h, w): bilinear, no antialiasing."""
    if keep_mask.shape[2:] != z.shape[2:]:
        keep_mask = F.interpolate(keep_mask.float(), size=z.shape[2:], mode="bilinear", align_corners=False)
    return keep_mask.to(z.dtype)


def latent_hole(keep_mask: Tensor, z: Tensor) -> Tensor:
    """Turn a keep mask (B, 1, H, W) into a hole mask, 1 = paint, on the grid and in the dtype of latents (B, Z, h, w).

    Values are cut at 0.5, and each cell takes its upper left pixel, as for Stable Diffusion inpainting.
    """
    hole = (keep_mask <= 0.5).to(z.dtype)
    return hole if hole.shape[2:] == z.shape[2:] else F.interpolate(hole, size=z.shape[2:], mode="nearest")


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


# --- Loading ----------------------------------------------------------------------------------------------------------


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
        device: device of the model.
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


def load_weights(model: LatentDiffusion, state: dict[str, Tensor], source: str, *, dtype: torch.dtype) -> None:
    """Give a model, built on the meta device or not, the tensors of a checkpoint in the published layout.

    Args:
        model: receives the tensors themselves where their type is already `dtype`.
        state: file names to tensors, as `read_checkpoint` returns them.
        source: name of the file, for messages.
        dtype: type of the weights.

    Raises:
        CheckpointError: keys, shapes or the schedule differ.
    """
    state = to_module_keys(state)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in SCHEDULE_BUFFERS}
    weights = {name: tensor for name, tensor in state.items() if name not in SCHEDULE_BUFFERS}
    check_keys(expected, weights, source=source)
    schedule = model.schedule.buffers()
    check_schedule(schedule, state, source=source)
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    model.load_state_dict({**weights, **schedule}, strict=True, assign=True)
    restore_position_ids(model, next(model.unet.parameters()).device)


def add_imagenet_tower(state: dict[str, Tensor], encoder: ExemplarEncoder) -> dict[str, Tensor]:
    """Add an EfficientNet tower's ImageNet weights to a checkpoint's tensors (module names) if it has no tower.

    Raises:
        UserError: those weights are needed, and their package is not installed.
    """
    tower = encoder.transformer
    if not isinstance(tower, EfficientNetTower) or any(name.startswith(TOWER) for name in state):
        return state
    return {**state, **{TOWER + name: tensor for name, tensor in tower.imagenet_state().items()}}


def replace_decoder(first_stage: AutoencoderKL, path: str | Path) -> AsymmetricAutoencoderKL:
    """Return the first stage with a mask-conditioned decoder, whose width and depth are read from its file.

    Args:
        first_stage: its encoder stays.
        path: the authors' checkpoint, a training run's, an exported one, or the folder of a `diffusers` component.

    Raises:
        CheckpointError: the file is missing, holds no such decoder, does not fit, or was trained for an encoder whose
            latents mean something else.
    """
    file = decoder_file(path)
    state = read_checkpoint(file)
    try:
        state = autoencoder_keys(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    last = state.get("decoder.conv_out.weight")
    if last is None or last.dim() != 4 or not any(name.startswith(CONDITION_ENCODER) for name in state):
        raise CheckpointError(
            f"{file}: holds no mask-conditioned decoder ({CONDITION_ENCODER}…); give one that was trained with "
            "model.first_stage.decoder=asymmetric, or the authors' (docs/asymmetric.md)"
        )
    config = first_stage.config
    blocks = {name.split(".")[4] for name in state if name.startswith("decoder.up.0.block.")}
    config = replace(
        config,
        decoder="asymmetric",
        decoder_width=last.shape[1] / (config.ch * config.ch_mult[0]),
        decoder_res_blocks=len(blocks) - 1,
    )
    with torch.device("meta"):
        result = AsymmetricAutoencoderKL(config)
    check_keys({name: tensor.shape for name, tensor in result.state_dict().items()}, state, source=file)
    encoder = {n: x for n, x in first_stage.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    # the bounds admit equal weights that were rounded to half precision
    same = (torch.allclose(x.float(), state[n].to(x.device).float(), rtol=1e-2, atol=1e-3) for n, x in encoder.items())
    if not all(same):
        raise CheckpointError(
            f"{file}: was trained for another encoder than this model's, so that latents mean something else; give the "
            "decoder that was trained for this model"
        )
    dtype = first_stage.quant_conv.weight.dtype
    result.load_state_dict({**{name: tensor.to(dtype) for name, tensor in state.items()}, **encoder}, assign=True)
    return result


def decoder_file(path: str | Path) -> Path:
    """Return the file with a decoder's weights: `path` itself, or the one in the folder of a `diffusers` component.

    Raises:
        CheckpointError: there is no such file.
    """
    path = Path(path)
    file = weight_files(path)[0] if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; give a mask-conditioned decoder's checkpoint or diffusers folder")
    return file
