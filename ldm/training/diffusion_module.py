"""Training of the latent diffusion model: what a loss is computed from, and which parameters are trained.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · L context tokens · D token channels ·
T diffusion steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import NEW_PARTS
from ldm.config import Config, LoggingConfig
from ldm.diffusion import draw_noise, send_together
from ldm.images import exemplar_to_pixels
from ldm.latent_diffusion import LatentDiffusion, add_imagenet_tower
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.layers import CrossAttention
from ldm.training.denoising import DenoisingTraining
from ldm.training.ema import trained_parameters
from ldm.training.first_stage_module import PerceptualDistance
from ldm.training.module import parts_of

Weights = dict[str, Tensor]


class DiffusionTraining(LatentDiffusion, DenoisingTraining):
    """The diffusion model with its training step; keys in checkpoints are those of the plain model.

    Trained: UNet, with exemplars also mapper, final norm, projection and null token, and the towers if the config asks
    for it; or some layers alone. Frozen: the rest, and parameters without effect on a one-token context.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.model)
        self.set_up(config)
        self.perceptual = PerceptualDistance()
        self.train()
        self.first_stage_model.requires_grad_(False)
        for tower in self.towers:
            tower.requires_grad_(self.options.train_tower)
        if self.options.trainable != "all":
            attention = CrossAttention if self.options.trainable == "input_conv_attention" else ()
            self.requires_grad_(False)
            for module in [self.unet.input_blocks[0], *(m for m in self.unet.modules() if isinstance(m, attention))]:
                module.requires_grad_(True)
        for parameter in self.unet.single_token_dead_parameters() if self.single_token else ():
            parameter.requires_grad_(False)

    @property
    def towers(self) -> list[Any]:
        """The image and text encoders, which come with pretrained weights."""
        towers = [self.cond_stage_model.transformer] if self.reads_exemplars else []
        return [*towers, self.text_encoder.transformer] if self.reads_text else towers

    def add_lora(self, seed: int) -> None:
        """If the config asks for LoRA, train low-rank additions to the UNet's attention weights and nothing else.

        Source: Hu et al. 2022, section 4.1, with alpha = r.
        """
        if not (rank := self.options.lora_rank):
            return
        from peft import LoraConfig, inject_adapter_in_model  # seconds of import

        self.requires_grad_(False)
        cross = "v" if self.single_token else "q|k|v"  # queries and keys of one token have no effect
        targets = rf".*\.(attn1\.to_(q|k|v|out\.0)|attn2\.to_({cross}|out\.0))"
        torch.manual_seed(seed)  # a first import of peft draws numbers, a second one does not
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self.unet)

    def train(self, mode: bool = True) -> DiffusionTraining:
        """Set the mode of the trained parts; frozen parts stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        for tower in () if self.options.train_tower else self.towers:
            tower.eval()
        return self

    def starting_weights(self, state: Weights, source: str | None, from_scratch: bool) -> tuple[Weights, list[str]]:
        """Return what is loaded from a checkpoint's tensors (module names) and the names that may be missing there.

        Missing may be the parts that Paint by Example adds; from scratch, everything that is trained; never a frozen
        part with an effect, which raises CheckpointError. The config gets the tokenizer that the model reads.
        """
        options = self.options
        if self.reads_exemplars:
            state = add_imagenet_tower(state, self.cond_stage_model)
        unused = set() if options.use_prior else {name for name, _ in trained_parameters(self)}
        fresh = NEW_PARTS if options.fresh_conditioning else ()
        state = {name: x for name, x in state.items() if name not in unused and not name.startswith(fresh)}
        dead = set(self.unet.single_token_dead_parameters()) if self.single_token else set()
        from_scratch = from_scratch or not options.use_prior
        missing = {name: p for name, p in self.named_parameters() if name not in state}
        random = {name for name, p in missing.items() if from_scratch and (p.requires_grad or p in dead)}
        random |= {name for name in missing if name.startswith(NEW_PARTS)}
        if refused := missing.keys() - (set() if options.lora_rank else random):  # LoRA trains none of them
            raise CheckpointError(
                f"{source or 'no checkpoint given'}: {len(refused)} tensors would stay random: {parts_of(refused)}. "
                "Pass a complete file (scripts/modify_checkpoints.py); --train-from-scratch allows it for trained parts"
            )
        if self.reads_text:
            folder = self.text_encoder.find_tokenizer(Path(source or "").parent)
            self.text_encoder.tokenize([""])  # fails where captions could not be read
            self.config.text_encoder.tokenizer = str(folder.resolve())
        return state, list(missing)

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute each sample's `LatentDiffusion.loss` (B,), with its timestep (B,).

        Every draw comes from the sample's own generator, seeded by its `key`, in the order: posterior noise of image
        and masked image, t, eps, null-drop. A sample's loss does not depend on its neighbours.
        """
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        noise = self.posterior_noise(generators)
        draws = noise, *self.draw(noise.chunk(2)[0].shape, generators)
        noise, t, eps, dropped = send_together(draws, batch["keep_mask"].device)
        z_0, z_masked = self.latents(batch, noise)  # pixels [-1, 1] => scaled latents (B, Z, h, w)
        context = self.batch_context(batch)  # exemplars, captions => tokens (B, L, D)
        context = self.drop_condition(context, dropped)  # the null token with probability p_uncond
        # || eps - eps_theta([x_t, z_masked, keep_mask], t, context) ||^2 with x_t = alpha_t z_0 + sigma_t eps
        perceptual = self.options.perceptual_weight > 0 and self.global_step >= self.options.perceptual_start
        distance = self.perceptual_distance if perceptual else None
        return self.loss(z_0, z_masked, batch["keep_mask"], context, t, eps, distance), t

    def perceptual_distance(self, z_pred: Tensor, z_0: Tensor) -> Tensor:
        """Compute the weighted perceptual distance (B,) of scaled latents (B, Z, h, w), decoded by the linear path.

        Source: Lin & Yang 2024 (Diffusion Model with Perceptual Loss), here with a classifier's features of x_0.
        """
        pixels = (self.first_stage_model.decode_linear(z / self.config.scale_factor) for z in (z_pred, z_0))
        return self.options.perceptual_weight * self.perceptual(*pixels).float()

    def posterior_noise(self, generators: list[torch.Generator]) -> Tensor:
        """Draw the noise of B images' posteriors, then that of the masked images', on the CPU: (2 B, Z, h, w)."""
        side = self.config.image_size // self.downsampling
        shape = 2 * len(generators), self.config.first_stage.embed_dim, side, side
        return draw_noise(shape, [*generators, *generators])

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], noise: Tensor) -> tuple[Tensor, Tensor]:
        """Encode image and masked image in one call, or take cached posteriors, as scaled latents (B, Z, h, w)."""
        if "image_moments" in batch:
            moments = torch.cat([batch["image_moments"], batch["masked_moments"]])
            z = self.config.scale_factor * DiagonalGaussian(moments).sample(noise)
        else:
            z = self.encode_image(torch.cat([batch["image"], batch["masked_image"]]), noise)
        z_0, z_masked = z.chunk(2)
        return z_0, z_masked

    def draw(self, shape: torch.Size, generators: list[torch.Generator]) -> tuple[Tensor, Tensor, Tensor]:
        """Draw what the loss is an expectation over, one sample after the other, on the CPU.

        t is (B,) int64 in [0, T), eps (B, Z, h, w) of the given shape, dropped (B,) bool for the condition.
        """
        draws = [(self.draw_timestep(g), self.draw_eps(shape[1:], g), torch.rand((), generator=g)) for g in generators]
        t, eps, u = (torch.stack(column) for column in zip(*draws, strict=True))
        dropped = (u[:1].expand_as(u) if self.options.null_drop == "per_batch" else u) < self.options.p_uncond
        return t, eps, dropped

    def batch_context(self, batch: dict[str, Any]) -> Tensor:
        """Encode exemplars, or their cached features, and captions as context (B, L, D)."""
        if not self.reads_exemplars:
            exemplar = None
        elif "exemplar_features" in batch and not self.options.train_tower:
            exemplar = self.encode_features(batch["exemplar_features"])
        else:
            exemplar = self.encode_exemplar(batch["exemplar"])
        return self.context(exemplar, batch.get("caption"))

    def preview(self, batch: dict[str, Any], options: LoggingConfig) -> list[Tensor]:
        """Return scenes, masked scenes, exemplars if the model reads them, and samples; (B, 3, H, W) in [-1, 1]."""
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        z_0, z_masked = self.latents(batch, self.posterior_noise(generators).to(batch["keep_mask"].device))
        c_concat, context = self.c_concat(z_masked, batch["keep_mask"]), self.batch_context(batch)
        settings: dict[str, Any] = {"num_steps": options.sampler_steps, "guidance_scale": options.guidance_scale}
        sample = self.sample(c_concat, context, **settings, generator=generators)
        scene, masked, sample = (self.decode_latents(z) for z in (z_0, z_masked, sample))
        exemplars = [exemplar_to_pixels(batch["exemplar"])] if self.reads_exemplars else []
        return [scene, masked, *exemplars, sample]

    def parameter_groups(self) -> list[tuple[float, list[Parameter]]]:
        tower = {p for module in self.towers for p in module.parameters()}
        base_lr, trained = self.options.base_lr, [p for p in self.parameters() if p.requires_grad]
        parts = [p for p in trained if p not in tower], [p for p in trained if p in tower]
        lrs = base_lr, self.options.tower_lr_scale * base_lr
        return [(lr, part) for lr, part in zip(lrs, parts, strict=True) if part]
