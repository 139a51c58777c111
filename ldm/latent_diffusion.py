"""Paint by Example as one module: what is trained, sampled, saved and loaded.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · C input channels of the UNet · D token
channels · T diffusion steps · L context tokens: 1 with exemplars unless `exemplar_encoder.tokens` is `all`, 77 with
text, 78 with both.
Source: Yang et al. 2023, "Paint by Example: Exemplar-based Image Editing with Diffusion Models".
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm import samplers
from ldm.checkpoint.convert import autoencoder_keys, weight_files
from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import (
    CONDITION_ENCODER,
    SCHEDULE_BUFFERS,
    TOWER,
    check_keys,
    check_prediction,
    check_schedule,
    identify,
    is_finite,
    to_file_keys,
    to_module_keys,
)
from ldm.config import RELIGHTING_CHANNELS, Config, ConfigError, ModelConfig, load_config
from ldm.diffusion import (
    DiffusionModel,
    Generators,
    check_input_width,
    draw_noise,
    q_sample,
    send,
    target,
    to_eps,
    to_x_0,
)
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.controlnet import Steering
from ldm.models.efficientnet import EfficientNetTower
from ldm.models.exemplar_encoder import ExemplarEncoder
from ldm.models.layers import Uninitialised
from ldm.models.text_encoder import TextEncoder
from ldm.models.unet import UNetModel
from ldm.pixel_diffusion import load_pixel_model

DECODED_PIXELS = {"cpu": 512**2, "gpu": 4 * 512**2}  # decoded together: the decoder needs about 3 KB for each


class LatentDiffusion(DiffusionModel):
    """UNet, first stage, encoders of the condition and noise schedule, under the published attribute names.

    The denoiser is `unet(x (B, C, h, w), t (B,), context (B, L, D))` -> (B, Z, h, w). Only the parts that the config
    needs are built. Methods stand in the order of their use: encode, condition, train or sample, decode. Raises
    `ConfigError` if the parts do not fit together.
    """

    alphas_cumprod: Tensor
    betas: Tensor
    latent_std: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        Z, D, text = config.first_stage.embed_dim, config.unet.context_dim, config.text_encoder.hidden_size
        widths = {"x_t": config.unet.out_channels, "z_masked": Z, "keep_mask": 1, "hole_mask": 1}
        check_input_width(config, widths | dict.fromkeys(RELIGHTING_CHANNELS, Z))
        if config.condition != "exemplar" and text != D:
            raise ConfigError(f"model.text_encoder.hidden_size: got {text}, expected model.unet.context_dim, {D}")
        super().__init__(UNetModel(config.unet), config)
        self.reads_exemplars, self.reads_text = config.condition != "text", config.condition != "exemplar"
        self.inpaints = not set(config.input_channels) & set(RELIGHTING_CHANNELS)
        # attention to a context of one token needs no queries and keys
        self.single_token = not self.reads_text and config.exemplar_encoder.tokens == "pooled"
        self.first_stage_model = AutoencoderKL(config.first_stage)
        self.downsampling = self.first_stage_model.downsampling  # pixels per latent cell and side
        if self.reads_exemplars:
            self.cond_stage_model = ExemplarEncoder(config.exemplar_encoder)
            self.proj_out = nn.Linear(config.exemplar_encoder.hidden_size, config.unet.context_dim)
            self.learnable_vector = nn.Parameter(nn.init.normal_(torch.empty(1, 1, config.unet.context_dim)))
        if self.reads_text:
            self.text_encoder = TextEncoder(config.text_encoder)
        std = torch.tensor(config.latent_std)[:, None, None] if config.latent_std else None
        self.register_buffer("latent_std", std, persistent=False)
        for name, values in self.schedule.buffers().items():
            self.register_buffer(name, values)  # for the file format; computations use `ac`
        self._empty_prompt_cache: tuple[Any, Tensor] | None = None

    def encode_image(
        self, x: Tensor, generator: Generators | Tensor = None, index: Sequence[int] | None = None
    ) -> Tensor:
        """Encode pixels (N, 3, H, W) in [-1, 1] as scaled latents (B, Z, h, w), float32 of about unit variance.

        Each latent is a draw of its own, by a generator or noise (B, Z, h, w) that is there. `index` says which image
        each of the B shows; by default each image gives one, a single image one for each generator.
        """
        posterior = self.first_stage_model.encode(x.to(self.weight_dtype))  # pixels [-1, 1] => q(z | x)
        posterior = posterior if index is None else posterior[index]
        return self.config.scale_factor * posterior.sample(generator).float()  # sampled as in the original

    def encode_exemplar(self, pixel_values: Tensor) -> Tensor:
        """Encode exemplars (B, 3, S, S), normalised as for CLIP, as context (B, L, D)."""
        return self.encode_features(self.cond_stage_model.features(pixel_values.to(self.weight_dtype)))

    def encode_features(self, features: Tensor) -> Tensor:
        """Encode the image tower's output, `ExemplarEncoder.features`, as context (B, L, D)."""
        return self.proj_out(self.cond_stage_model.tokens(features.to(self.weight_dtype)))

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """Encode B prompts as context (B, L, D)."""
        return self.text_encoder(send(self.text_encoder.tokenize(prompts), self.betas.device))

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

    def context(self, exemplar: Tensor | None = None, prompts: Sequence[str] | None = None) -> Tensor:
        """Concatenate the tokens (B, L, D) that the model reads: of exemplars, then of B prompts.

        Without an exemplar the learned token for "no exemplar" is used, without prompts the empty one.
        """
        parts = []
        if self.reads_exemplars:
            parts.append(self.learnable_vector if exemplar is None else exemplar)
        if self.reads_text:
            parts.append(self._empty_prompt() if prompts is None else self.encode_text(prompts))
        batch = max(len(part) for part in parts)
        return torch.cat([part.expand(batch, -1, -1) for part in parts], dim=1)

    def null_context(self, negative_prompt: str | None = None) -> Tensor:
        """(1, L, D) for "no condition" in classifier-free guidance; a negative prompt replaces the empty one.

        With `tokens: all` the one learned token is broadcast over L; attention over identical tokens equals attention
        to one, so this is exact.
        """
        return self.context(None, None if negative_prompt is None else [negative_prompt])

    def drop_condition(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Put the null context where `dropped` (B,) bool is true. Source: Ho & Salimans 2022, Alg. 1."""
        return torch.where(dropped[:, None, None], self.null_context().to(context.dtype), context)

    def c_concat(self, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """Concatenate the UNet's channels behind x_t (B, C - Z, h, w), the same at every step, in the config's order.

        With `latent_std` the channels of z_masked are divided by it.

        Args:
            z_masked: (B, Z, h, w) scaled latent of the image with a mid-grey hole.
            keep_mask: (B, 1, H, W) or (B, 1, h, w) in [0, 1], 1 = keep; resized as in the checkpoint's training.
        """
        scaled = z_masked if self.latent_std is None else z_masked / self.latent_std
        channels = {"z_masked": scaled, "keep_mask": latent_mask(keep_mask, z_masked)}
        channels["hole_mask"] = latent_hole(keep_mask, z_masked)
        return torch.cat([z_masked[:, :0], *(channels[name] for name in self.config.input_channels[1:])], dim=1)

    def preconditioning(self, ac_t: Tensor) -> tuple[Tensor | float, Tensor | float, Tensor | float]:
        """Return c_in, c_skip, c_out at ac_t, () or (B, 1, 1, 1): the prediction is c_skip x_t + c_out UNet(c_in x_t).

        They keep the UNet's input and target at unit variance where `latent_std` is not 1, and leave to it what no
        multiple of x_t explains. Errors of small channels, details, count as little as they do in pixels.

        Source: Karras et al. 2022 (EDM), Eq. 7 and appendix B.6, here for v and for each channel.
        """
        if self.latent_std is None:
            return 1.0, 0.0, 1.0
        ac_t, std = ac_t.float(), self.latent_std
        variance = ac_t * std**2 + 1 - ac_t  # of x_t
        # v = alpha eps - sigma x_0: c_skip = E[v x_t] / E[x_t^2], c_out^2 = the variance that is left
        return variance.rsqrt(), (ac_t * (1 - ac_t)).sqrt() * (1 - std**2) / variance, std * variance.rsqrt()

    def unet_input(self, x_t: Tensor, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """Concatenate the UNet's channels (B, C, h, w): x_t (B, Z, h, w), then `c_concat`."""
        return torch.cat([x_t, self.c_concat(z_masked, keep_mask)], dim=1)

    def loss(
        self,
        z_0: Tensor,
        z_masked: Tensor,
        keep_mask: Tensor,
        context: Tensor,
        t: Tensor,
        eps: Tensor,
        distance: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Compute the denoising objective of each sample: (B,) mean squared errors over the latent.

        Args:
            z_0: (B, Z, h, w) scaled latent of the image. z_masked, keep_mask: as for `c_concat`.
            context: (B, L, D), with null tokens in place of dropped conditions.
            t: (B,) timesteps. eps: (B, Z, h, w) standard normal noise.
            distance: of the predicted z_0 and the true one, (B,), added to the error.

        Source: Yang et al. 2023, Eq. 4 (with Ho et al. 2020, Eq. 14; v: Salimans & Ho 2022).
        """
        x_t = q_sample(z_0, t, eps, self.ac)  # alpha_t z_0 + sigma_t eps
        c_in, c_skip, c_out = self.preconditioning(self.ac[t].reshape(-1, 1, 1, 1))
        x = self.unet_input(c_in * x_t, z_masked, keep_mask).to(self.weight_dtype)  # => input channels (B, C, h, w)
        prediction = c_skip * x_t + c_out * self.unet(x, t, context).float()
        expected = target(z_0, eps, t, self.config.parameterization, self.ac)  # eps, v or z_0
        loss = F.mse_loss(prediction, expected, reduction="none").flatten(1).mean(1)  # || ... ||^2 / (Z h w)
        if distance is not None:
            loss = loss + distance(to_x_0(prediction, x_t, t, self.config.parameterization, self.ac), z_0)
        return loss

    @torch.no_grad()
    def sample(
        self,
        c_concat: Tensor,
        context: Tensor,
        *,
        null_context: Tensor | None = None,
        sampler: str = "dpm_solver_pp",
        num_steps: int = 20,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_rescale: float = 0.0,
        eta: float = 0.0,
        x_T: Tensor | None = None,
        z_0: Tensor | None = None,
        strength: float = 1.0,
        generator: Generators = None,
        steering: Steering | None = None,
        on_step: samplers.OnStep | None = None,
    ) -> Tensor:
        """Turn noise into scaled latents (B, Z, h, w), float32; `EditSettings` explains the settings of sampling.

        Args:
            c_concat, context: (B, C - Z, h, w), the UNet's channels behind x_t, and (B, L, D).
            null_context: (1, L or 1, D) or (B, L, D), from which guidance leads away; None: the model's own.
            guidance_scale: 1 is without guidance; None: the model's.
            x_T: (B, Z, h, w) start noise; drawn when None.
            z_0: (B, Z, h, w) scaled latent to which noise is added as the start; None: noise alone.
            strength: of that noise, as the share of the timesteps, in (0, 1]; all steps are taken from there on.
            generator: source of all noise, one for the batch or one per sample.
        """
        device, ac = c_concat.device, self.schedule.alphas_cumprod
        null = self.null_context() if null_context is None else null_context
        shape = len(c_concat), self.config.unet.out_channels, *c_concat.shape[2:]
        noise = partial(draw_noise, shape, generator, device=device)
        x = noise() if x_T is None else x_T.to(device, torch.float32)
        share = 1.0 if z_0 is None else strength
        if not 0 < share <= 1:
            raise ValueError(f"strength: got {strength:g}, expected more than 0, at most 1")
        ac = ac[: max(1, round(share * len(ac)))]  # the first part of a schedule is a schedule
        last = int(self.config.last_level * len(ac))
        timesteps = [last + t for t in samplers.choose_timesteps(sampler, len(ac) - last, num_steps)]
        if z_0 is not None:
            x = q_sample(z_0.to(device, torch.float32), timesteps[0], x, self.ac)
        tokens = context.to(self.weight_dtype)
        guidance_scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        if guidance_scale != 1.0:  # both branches are one batch: first "no condition", then the condition
            tokens = torch.cat([null.to(tokens).expand_as(tokens), tokens])
        unet, steer = self.unet.prepare(timesteps, tokens), steering and steering.prepare(timesteps, tokens)
        eps_fn = self._guided(c_concat, unet, steer, guidance_scale, guidance_interval, guidance_rescale)
        # noise x_T => scaled latents x_0
        return samplers.sample(
            sampler, eps_fn, x, ac, num_steps, eta=eta, noise=noise, timesteps=timesteps, on_step=on_step
        )

    def _guided(
        self, c: Tensor, unet: Callable[..., Any], steer: Any, scale: float, levels: Sequence[float], rescale: float
    ) -> samplers.EpsModel:
        """Return the noise prediction, with guidance where the noise level t / T is in [levels[0], levels[1]]."""
        B, Z, t_last = len(c), self.config.unet.out_channels, max(1, len(self.ac) - 1)
        # the UNet's input, which holds all channels but x_t; a second branch comes first
        inputs = c.new_empty(1 if scale == 1.0 else 2, B, Z + c.shape[1], *c.shape[2:], dtype=self.weight_dtype)
        inputs[:, :, Z:] = c

        def eps_fn(x_t: Tensor, t: int) -> Tensor:
            guided = scale != 1.0 and levels[0] <= t / t_last <= levels[1]  # Kynkäänniemi et al. 2024, Eq. 5
            branches = inputs if guided else inputs[-1:]
            c_in, c_skip, c_out = self.preconditioning(self.schedule.alphas_cumprod[t])
            branches[:, :, :Z] = c_in * x_t
            x = branches.flatten(0, 1)
            prediction = unet(x, t, steer and steer(x[:, :Z], t, guided))
            # a copy: the next step of a CUDA graph overwrites its output
            prediction = c_skip * x_t + c_out * prediction.to(torch.float32, copy=True).unflatten(0, (-1, B))
            null, conditional = prediction[0], prediction[-1]
            prediction = samplers.classifier_free(conditional, null, scale, rescale) if guided else conditional
            # eps, v or x_0 => eps
            return to_eps(prediction, x_t, t, self.config.parameterization, self.schedule.alphas_cumprod)

        return eps_fn

    def decode_latents(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        """Decode scaled latents (B, Z, h, w) to pixels (B, 3, H, W), float32 in about [-1, 1], not clamped.

        A mask-conditioned decoder reads the pixels of `image` (B, 3, H, W) where `keep_mask` (B, 1, H, W) is 1.
        """
        z = (z / self.config.scale_factor).to(self.weight_dtype)  # scaled latents => latents
        pixels = self.downsampling**2 * z[0, 0].numel()
        size = max(1, DECODED_PIXELS["cpu" if z.device.type == "cpu" else "gpu"] // pixels)
        known = (x.to(self.weight_dtype) for x in (image, keep_mask) if x is not None)
        parts = zip(*(x.split(size) for x in (z, *known)), strict=True)
        return torch.cat([self.first_stage_model.decode(*part).float() for part in parts])  # => pixels [-1, 1]


def latent_mask(keep_mask: Tensor, z: Tensor) -> Tensor:
    """Resize a keep mask (B, 1, H, W) to the grid and dtype of latents z (B, Z, h, w): bilinear, no antialiasing."""
    if keep_mask.shape[2:] != z.shape[2:]:
        keep_mask = F.interpolate(keep_mask.float(), size=z.shape[2:], mode="bilinear", align_corners=False)
    return keep_mask.to(z.dtype)


def latent_hole(keep_mask: Tensor, z: Tensor) -> Tensor:
    """Turn a keep mask (B, 1, H, W) into a hole mask, 1 = paint, likewise: nearest, as Stable Diffusion inpainting."""
    hole = (keep_mask <= 0.5).to(z.dtype)  # each cell takes its upper left pixel
    return hole if hole.shape[2:] == z.shape[2:] else F.interpolate(hole, size=z.shape[2:], mode="nearest")


# --- Loading ----------------------------------------------------------------------------------------------------------


def load_model(
    config: str | Path | DictConfig | Config,
    checkpoint: str | Path | None = None,
    *,
    decoder: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
) -> LatentDiffusion:
    """Build the model of a config and load a checkpoint into it, strictly; in evaluation mode, without gradients.

    A config of `model.kind: pixel` or `classifier`, or instead of one the file of improved-diffusion or
    guided-diffusion, gives what `load_pixel_model` does.

    Args:
        checkpoint: `.ckpt` or `.safetensors` in the published layout; None leaves the weights random.
        decoder: a mask-conditioned decoder for the first stage, a file or folder for `replace_decoder`.
        dtype: type of the weights; the noise schedule stays float32.
        compile: compile the UNet at its first call, which takes minutes at full size, for every new shape again; on
            CUDA its kernels are replayed as one graph.

    Raises:
        ConfigError: the config cannot be used.
        CheckpointError: the file is unreadable, holds another model, or was trained with another schedule.
        ValueError: float16 on the CPU.
    """
    if dtype == torch.float16 and torch.device(device).type == "cpu":
        raise ValueError("float16 on the CPU: its convolutions are slow or missing there; use float32 or bfloat16")
    if str(config).endswith((".pt", ".pth", ".ckpt", ".safetensors")):
        return cast(Any, load_pixel_model(cast(str, config), device=device, dtype=dtype))
    model_config = load_config(config).model
    if model_config.kind != "latent":
        return cast(Any, load_pixel_model(checkpoint, config, device=device, dtype=dtype))
    with Uninitialised() if checkpoint else nullcontext():
        model = LatentDiffusion(model_config)
    if checkpoint is not None:
        load_weights(model, read_checkpoint(checkpoint), str(checkpoint), dtype=dtype)
        if model.reads_text:
            model.text_encoder.find_tokenizer(Path(checkpoint).parent)
    if decoder is not None:
        model.first_stage_model = replace_decoder(model.first_stage_model, decoder)
    for parameter in model.requires_grad_(False).eval().parameters():
        parameter.data = parameter.data.to(dtype)
    model = model.to(device)
    if not model.betas.is_cuda:  # takes a tenth from encoding and decoding on a CPU; not measured on a GPU
        model.first_stage_model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if compile:  # in place, so the names of the weights stay
        model.unet.compile(dynamic=False, mode="reduce-overhead" if model.betas.is_cuda else None)
    return model


def load_weights(model: LatentDiffusion, state: dict[str, Tensor], source: str, *, dtype: torch.dtype) -> None:
    """Give a model the tensors of a checkpoint in the published layout.

    Tensors of type `dtype` are not copied. Raises `CheckpointError`, which names `source`, if the model is another.
    """
    check_prediction(state, model.config.parameterization, source=source)
    state = to_module_keys(state, expected=model.state_dict())
    expected = {name: x.shape for name, x in model.state_dict().items() if name not in SCHEDULE_BUFFERS}
    weights = {name: x for name, x in state.items() if name not in SCHEDULE_BUFFERS}
    check_keys(expected, weights, source=source)
    schedule = model.schedule.buffers()
    check_schedule(schedule, state, source=source)
    del state
    for name in list(weights):  # one by one, so that a mapped tensor's pages are released before the next is read
        if weights[name].is_floating_point():
            weights[name] = weights.pop(name).to(dtype)
    model.load_state_dict({**weights, **schedule}, strict=True, assign=True)


def first_not_finite(model: LatentDiffusion) -> str | None:
    """Name the first weight, as in files, that holds NaN or Inf; None if all are finite.

    It reads every weight, so it is for telling the cause of a result that is not finite.
    """
    weights = to_file_keys({name: x for name, x in model.state_dict().items() if name not in SCHEDULE_BUFFERS})
    return next((name for name, x in weights.items() if not is_finite(x)), None)


def add_imagenet_tower(state: dict[str, Tensor], encoder: ExemplarEncoder) -> dict[str, Tensor]:
    """Add an EfficientNet tower's ImageNet weights to a checkpoint's tensors (module names) if it has no tower."""
    tower = encoder.transformer
    if not isinstance(tower, EfficientNetTower) or any(name.startswith(TOWER) for name in state):
        return state
    return {**state, **{TOWER + name: tensor for name, tensor in tower.imagenet_state().items()}}


def replace_decoder(first_stage: AutoencoderKL, path: str | Path) -> AutoencoderKL:
    """Return the first stage with a mask-conditioned decoder, whose width and depth are read from its file.

    Raises CheckpointError if the file is missing, holds no such decoder, does not fit, or is for another encoder.
    """
    file = weight_files(Path(path))[0]
    state = read_checkpoint(file)
    try:
        state = autoencoder_keys(state)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from None
    last = state.get("decoder.conv_out.weight")
    if last is None or not any(name.startswith(CONDITION_ENCODER) for name in state):
        kind = identify(state)
        raise CheckpointError(f"{file}: holds no mask-conditioned decoder (docs/asymmetric.md); this is {kind}")
    config, dtype = first_stage.config, first_stage.quant_conv.weight.dtype
    width = last.shape[1] / (config.ch * config.ch_mult[0])
    blocks = {name.split(".")[4] for name in state if name.startswith("decoder.up.0.block.")}
    config = replace(config, decoder="asymmetric", decoder_width=width, decoder_res_blocks=len(blocks) - 1)
    with Uninitialised():
        result = AutoencoderKL(config)
    check_keys({name: x.shape for name, x in result.state_dict().items()}, state, source=file)
    encoder = {n: x for n, x in first_stage.state_dict().items() if n.startswith(("encoder.", "quant_conv."))}
    for name, x in encoder.items():  # the bounds admit equal weights that were rounded to half precision
        if not torch.allclose(x.float(), state[name].to(x.device).float(), rtol=1e-2, atol=1e-3):
            raise CheckpointError(f"{file}: trained for another encoder ({name} differs); use this model's own decoder")
    result.load_state_dict({name: x.to(dtype) for name, x in state.items()} | encoder, assign=True)
    return result
