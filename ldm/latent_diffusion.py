"""Paint by Example as one module: what is trained, sampled, saved and loaded.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · L context tokens (1 unless
`exemplar_encoder.tokens` is `all`) · D token channels.
Source: Yang et al. 2023, "Paint by Example: Exemplar-based Image Editing with Diffusion Models".
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from ldm.checkpoint.io import CheckpointError, read_checkpoint
from ldm.checkpoint.keys import SCHEDULE_BUFFERS, TOWER, check_keys, to_module_keys
from ldm.config import Config, ConfigError, ModelConfig, load_config
from ldm.decoders import with_decoder
from ldm.diffusion import make_schedule, q_sample, target, to_eps
from ldm.models.asymmetric import build_autoencoder
from ldm.models.exemplar_encoder import EfficientNetTower, ExemplarEncoder
from ldm.models.unet import UNetModel
from ldm.noise import Generators, draw_noise
from ldm.samplers import SAMPLERS, OnStep


def latent_mask(keep_mask: Tensor, z: Tensor) -> Tensor:
    """A keep mask (B, 1, H, W) on the grid and in the dtype of latents z (B, Z, h, w): bilinear, no antialiasing."""
    if keep_mask.shape[2:] != z.shape[2:]:
        keep_mask = F.interpolate(keep_mask.float(), size=z.shape[2:], mode="bilinear", align_corners=False)
    return keep_mask.to(z.dtype)


class DiffusionWrapper(nn.Module):
    """Holds the UNet one level down, where the published checkpoint has it."""

    def __init__(self, unet: UNetModel) -> None:
        super().__init__()
        self.diffusion_model = unet


class LatentDiffusion(nn.Module):
    """UNet, first stage, exemplar encoder and noise schedule, under the published attribute names.

    Args:
        config: sizes and conventions; see `ldm.config.ModelConfig`.

    Raises:
        ConfigError: the parts do not fit together.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        expected = config.unet.out_channels + config.first_stage.embed_dim + 1
        if config.unet.in_channels != expected:
            raise ConfigError(
                f"model.unet.in_channels: got {config.unet.in_channels}, expected {expected} "
                f"(noisy latent {config.unet.out_channels} + latent of the masked image "
                f"{config.first_stage.embed_dim} + mask 1)"
            )
        self.config = config
        self.model = DiffusionWrapper(UNetModel(config.unet))
        self.first_stage_model = build_autoencoder(config.first_stage)
        self.cond_stage_model = ExemplarEncoder(config.exemplar_encoder)
        self.proj_out = nn.Linear(config.exemplar_encoder.hidden_size, config.unet.context_dim)
        self.learnable_vector = nn.Parameter(torch.randn(1, 1, config.unet.context_dim))
        self.schedule = make_schedule(config.schedule)
        for name, values in self.schedule.buffers().items():
            self.register_buffer(name, values)

    alphas_cumprod: Tensor

    @property
    def unet(self) -> UNetModel:
        """The denoiser: `unet(x (B, 9, h, w), t (B,), context (B, L, D))` -> (B, 4, h, w)."""
        return self.model.diffusion_model

    @property
    def downsampling(self) -> int:
        """Pixels per latent cell and side."""
        return self.first_stage_model.downsampling

    @property
    def null_context(self) -> Tensor:
        """(1, 1, D), the learned token that stands for "no exemplar" in classifier-free guidance.

        With several context tokens it takes the place of each: attention to equal tokens is attention to one.
        """
        return self.learnable_vector

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

    def unet_input(self, x_t: Tensor, z_masked: Tensor, keep_mask: Tensor) -> Tensor:
        """The UNet's channels in the published order: `[x_t, z_masked, keep_mask]`.

        Args:
            x_t: (B, Z, h, w) noisy latent.
            z_masked: (B, Z, h, w) scaled latent of the image with a mid-grey hole.
            keep_mask: (B, 1, H, W) or (B, 1, h, w) in [0, 1], 1 = keep; resized to the latent grid
                bilinearly without antialiasing, as in the checkpoint's training.

        Returns:
            (B, 2 Z + 1, h, w).
        """
        return torch.cat([x_t, z_masked, latent_mask(keep_mask, z_masked)], dim=1)

    def loss(self, z_0: Tensor, z_masked: Tensor, keep_mask: Tensor, context: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The denoising objective, per sample.

        Args:
            z_0: (B, Z, h, w) scaled latent of the image.
            z_masked, keep_mask: as for `unet_input`.
            context: (B, L, D), null tokens already in place of dropped exemplars.
            t: (B,) timesteps. eps: (B, Z, h, w) standard normal noise.

        Returns:
            (B,) mean squared error over the latent.

        Source: Yang et al. 2023, Eq. 4 (with Ho et al. 2020, Eq. 14; v: Salimans & Ho 2022).
        """
        x_t = q_sample(z_0, t, eps, self.alphas_cumprod)
        prediction = self.unet(self.unet_input(x_t, z_masked, keep_mask), t, context)
        wanted = target(z_0, eps, t, self.config.parameterization, self.alphas_cumprod)
        return F.mse_loss(prediction.float(), wanted, reduction="none").flatten(1).mean(1)

    def drop_exemplar(self, context: Tensor, dropped: Tensor) -> Tensor:
        """Put the null token where `dropped` (B,) bool is true. Source: Ho & Salimans 2022, Alg. 1."""
        return torch.where(dropped[:, None, None], self.null_context.to(context.dtype), context)

    @torch.no_grad()
    def sample(
        self,
        z_masked: Tensor,
        keep_mask: Tensor,
        context: Tensor,
        *,
        sampler: str = "dpm_solver_pp",
        num_steps: int = 20,
        guidance_scale: float = 5.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        eta: float = 0.0,
        x_T: Tensor | None = None,
        generator: Generators = None,
        on_step: OnStep | None = None,
    ) -> Tensor:
        """Fill the hole: noise to scaled latents.

        Args:
            z_masked, keep_mask: as for `unet_input`.
            context: (B, L, D) from `encode_exemplar`.
            sampler: ddpm | ddim | plms | dpm_solver_pp | unipc.
            num_steps: denoising steps.
            guidance_scale: s in `eps_null + s (eps_exemplar - eps_null)`; 1 evaluates the exemplar's branch alone.
            guidance_interval: the noise levels with guidance, as shares of the timesteps: 0 is data, 1 is noise. At
                others the exemplar's branch is evaluated alone.
            eta: DDIM's stochasticity in [0, 1].
            x_T: (B, Z, h, w) start noise; drawn when None.
            generator: source of all noise, one for the batch or one per sample.
            on_step: called after each step as `on_step(step, num_steps, x_t, x_0)`.

        Returns:
            (B, Z, h, w) float32.

        Raises:
            ValueError: unknown sampler, impossible step count or interval.

        Source: Ho & Salimans 2022, Eq. 6 (guidance); Kynkäänniemi et al. 2024, Eq. 5 (in an interval).
        """
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler: got {sampler!r}, expected one of {', '.join(SAMPLERS)}")
        low, high = guidance_interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"guidance_interval: got {low:g} to {high:g}, expected 0 <= low <= high <= 1")
        device, dtype = z_masked.device, self.weight_dtype
        still = torch.cat([z_masked, latent_mask(keep_mask, z_masked)], dim=1).to(dtype)
        context = context.to(dtype)
        with_null = torch.cat([self.null_context.to(dtype).expand_as(context), context])
        alone, both = (still, context), (still.repeat(2, 1, 1, 1), with_null)

        def denoise(x_t: Tensor, t: int) -> Tensor:
            guided = guidance_scale != 1.0 and low <= t / (self.schedule.num_timesteps - 1) <= high
            conditions, tokens = both if guided else alone
            x = x_t.repeat(2, 1, 1, 1) if guided else x_t
            steps = torch.full((x.shape[0],), t, device=device)
            prediction = self.unet(torch.cat([x.to(dtype), conditions], dim=1), steps, tokens).float()
            eps = to_eps(prediction, x, steps, self.config.parameterization, self.alphas_cumprod)
            if not guided:
                return eps
            eps_null, eps_exemplar = eps.chunk(2)
            return eps_null + guidance_scale * (eps_exemplar - eps_null)

        def noise() -> Tensor:
            return draw_noise(z_masked.shape, generator, device=device)

        x_T = noise() if x_T is None else x_T.to(device, torch.float32)
        return SAMPLERS[sampler](
            denoise, x_T, self.schedule.alphas_cumprod, num_steps, eta=eta, noise=noise, on_step=on_step
        )

    @property
    def weight_dtype(self) -> torch.dtype:
        """The type that inputs are cast to before a network sees them."""
        return self.learnable_vector.dtype


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
        decoder: a mask-conditioned decoder for the first stage, a file or folder for `with_decoder`.
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
    if decoder is not None:
        model.first_stage_model = with_decoder(model.first_stage_model, decoder)
    model.requires_grad_(False).eval()
    for parameter in model.parameters():
        if parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)
    return model.to(device)


def with_tower(state: dict[str, Tensor], encoder: ExemplarEncoder) -> dict[str, Tensor]:
    """A checkpoint's tensors under module names, and an EfficientNet tower's ImageNet weights if it has no tower.

    Raises:
        FeatureError: those weights are needed, and their package is not installed.
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
    for name in set(SCHEDULE_BUFFERS) & state.keys():
        rtol = 1e-2 if state[name].dtype == torch.bfloat16 else 1e-3  # files in half precision hold it so, too
        if state[name].shape != schedule[name].shape or not torch.allclose(
            state[name].float(), schedule[name], rtol=rtol, atol=1e-6
        ):
            raise CheckpointError(
                f"{source}: its noise schedule ({name}) is not the config's; "
                "set model.schedule to what it was trained with"
            )
    weights = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in given.items()}
    model.load_state_dict({**weights, **schedule}, strict=True, assign=True)
    model.cond_stage_model.restore_position_ids(model.learnable_vector.device)
