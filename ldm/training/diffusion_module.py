"""Training on Lightning: one step, the optimizer, what a run must survive.

Dimensions: B batch · h, w latent cells · Z latent channels · T diffusion steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.func import functional_call

from ldm.checkpoint.keys import NEW_PARTS
from ldm.config import Config, ConfigError, FirstStageTrainingConfig, LoggingConfig, TrainingConfig
from ldm.data.masks import irregular_hole
from ldm.diffusion import min_snr_weight
from ldm.images import exemplar_to_pixels, mask_to_tensor
from ldm.latent_diffusion import LatentDiffusion
from ldm.models.autoencoder import AsymmetricAutoencoderKL, DiagonalGaussian, build_autoencoder
from ldm.models.discriminator import PatchDiscriminator
from ldm.models.efficientnet import EfficientNetTower, efficientnet_stages, load_feature_network, normalise
from ldm.models.layers import CrossAttention, SpatialTransformer
from ldm.models.unet import ResBlock
from ldm.training.fsdp import shard
from ldm.training.timesteps import LossAwareTimesteps


class NonFiniteLoss(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint from before is untouched."""


def check_finite(loss: Tensor, module: pl.LightningModule, batch_idx: int) -> None:
    """Raise NonFiniteLoss, naming the step, when the loss is NaN or infinite in any process."""
    value = loss.item()
    if module.trainer.strategy.reduce_boolean_decision(not math.isfinite(value), all=False):
        found = f"loss is {value}" if not math.isfinite(value) else "loss is NaN or infinite in another process,"
        raise NonFiniteLoss(
            f"{found} at step {module.global_step}, batch {batch_idx}: training stopped and the last good "
            "checkpoint kept. Resume from it with a lower learning rate, gradient clipping "
            "(trainer.gradient_clip_val=1.0) or trainer.precision=32-true"
        )


def lr_factor(warmup_steps: int, schedule: str, total_steps: int) -> Callable[[int], float]:
    """Learning rate over its base value, by optimizer step.

    Linear from 1e-6 to 1 over `warmup_steps`, then constant, or a cosine down to 0.05 at `total_steps`.

    Source: the original's `LambdaLinearScheduler` (warm-up); Loshchilov & Hutter 2017, Eq. 5 (cosine).
    """

    def factor(step: int) -> float:
        if step < warmup_steps:
            return 1e-6 + (1.0 - 1e-6) * step / warmup_steps
        if schedule == "constant" or total_steps <= warmup_steps:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / (total_steps - warmup_steps))
        return 0.05 + 0.95 * 0.5 * (1.0 + math.cos(math.pi * progress))

    return factor


class DiffusionTraining(LatentDiffusion, pl.LightningModule):
    """The diffusion model with its training step; keys in checkpoints are those of the plain model.

    Trained: UNet (`training.trainable`: all of it or some), with exemplars also mapper, final norm, projection and null
    token, and the towers of image and text where the config asks for it. Frozen: the rest, and whatever has no effect
    on a one-token context.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.model)
        self.options = config.training
        loss_aware = config.training.timesteps == "loss_aware"
        self.timesteps = LossAwareTimesteps(config.model.schedule.num_timesteps) if loss_aware else None
        self.first_stage_model.requires_grad_(False)
        for tower in self.towers:
            tower.requires_grad_(self.options.train_tower)
        if self.options.trainable != "all":
            self.requires_grad_(False)
            self.unet.input_blocks[0].requires_grad_(True)
        if self.options.trainable == "input_conv_attention":
            for module in self.unet.modules():
                if isinstance(module, CrossAttention):
                    module.requires_grad_(True)
        if self.single_token:
            for parameter in self.unet.single_token_dead_parameters():
                parameter.requires_grad_(False)
        self.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.options.compile:
            self.unet.compile()
        self.train()

    @property
    def towers(self) -> list[Any]:
        """What sees images and reads text, trained elsewhere."""
        towers = [self.cond_stage_model.transformer] if self.reads_exemplars else []
        return [*towers, self.text_encoder.transformer] if self.reads_text else towers

    def add_lora(self, seed: int) -> None:
        """Train low-rank additions to the UNet's attention weights and nothing else, where the config asks for it.

        Args:
            seed: of the additions' starting values.

        Source: Hu et al. 2022, section 4.1, with alpha = r.
        """
        if not (rank := self.options.lora_rank):
            return
        from peft import LoraConfig, inject_adapter_in_model  # seconds of import

        self.requires_grad_(False)
        cross = r"attn2\.to_(q|k|v|out\.0)"
        if self.single_token:
            cross = r"attn2\.to_(v|out\.0)"  # the others have no effect
        targets = rf".*\.(attn1\.to_(q|k|v|out\.0)|{cross})"
        torch.manual_seed(seed)  # a first import of peft draws numbers, a second one does not
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets), self.unet)

    def train(self, mode: bool = True) -> DiffusionTraining:
        """Frozen parts stay in evaluation mode."""
        super().train(mode)
        self.first_stage_model.eval()
        if not self.options.train_tower:
            for tower in self.towers:
                tower.eval()
        return self

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        torch.manual_seed(int(batch["key"][0]))  # dropout: the only draw that is not made per sample
        losses, t = self.losses(batch)
        gamma = self.options.min_snr_gamma
        weights = min_snr_weight(t, gamma, self.config.parameterization, self.ac) if gamma > 0 else 1.0
        weighted, uniform = weights * losses, torch.ones_like(losses)
        if self.timesteps is not None:
            uniform = self.timesteps.weight(t)
        loss = (uniform * weighted).mean()
        check_finite(loss, self, batch_idx)
        if self.timesteps is not None:
            seen: Any = self.all_gather((t, weighted.detach()))
            self.timesteps.update(*(values.flatten() for values in seen))
        self.log("train/loss", (uniform * losses.detach()).mean(), prog_bar=True)
        quartile = 4 * t // self.config.schedule.num_timesteps
        for q in quartile.unique().tolist():
            self.log(f"train/loss_t{q + 1}of4", losses.detach()[quartile == q].mean())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """The error of prediction, under the EMA weights where EMA is on; the noise is the same in every epoch."""
        losses, _ = self.losses(batch)
        self.log("val/loss", losses.mean(), prog_bar=True, sync_dist=True, batch_size=len(losses))

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Per-sample losses (B,) and the timesteps (B,) they were drawn at.

        Every draw comes from the sample's own generator, seeded by its `key`, in the order: posterior noise of
        image and masked image, t, eps, null-drop.
        """
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        z_0, z_masked = self.latents(batch, generators)
        t = torch.stack([self._draw_timestep(g) for g in generators])
        eps = torch.stack([self._draw_eps(z_0.shape[1:], g) for g in generators]).to(z_0)
        u = torch.stack([torch.rand((), generator=g) for g in generators])
        if self.options.null_drop == "per_batch":
            u = u[:1].expand_as(u)
        t, dropped = t.to(z_0.device), (u < self.options.p_uncond).to(z_0.device)
        context = self.drop_condition(self.batch_context(batch), dropped)
        return self.loss(z_0, z_masked, batch["keep_mask"], context, t, eps), t

    def batch_context(self, batch: dict[str, Any]) -> Tensor:
        """The condition (B, L, D) of exemplars, seen or as cached features, and captions."""
        exemplar = None
        if self.reads_exemplars:
            if "exemplar_features" in batch and not self.options.train_tower:
                exemplar = self.encode_features(batch["exemplar_features"])
            else:
                exemplar = self.encode_exemplar(batch["exemplar"])
        return self.context(exemplar, batch.get("caption"))

    def _draw_timestep(self, generator: torch.Generator) -> Tensor:
        """Source of logit_normal: Esser et al. 2024 (Stable Diffusion 3), Eq. 19 with location 0 and scale 1."""
        T = self.config.schedule.num_timesteps
        if self.timesteps is not None and self.training:
            return self.timesteps.draw(generator)
        if self.options.timesteps == "logit_normal":
            return (T * torch.randn((), generator=generator).sigmoid()).long().clamp(max=T - 1)
        return torch.randint(T, (), generator=generator)

    def _draw_eps(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Source of the offset: Guttenberg 2023 (Diffusion with Offset Noise)."""
        eps = torch.randn(shape, generator=generator)
        if self.options.offset_noise > 0:
            eps += self.options.offset_noise * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
        return eps

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], generators: list[torch.Generator]) -> tuple[Tensor, Tensor]:
        """Scaled latents (B, Z, h, w) of image and masked image, encoded in one call or drawn from cached moments."""
        if "image_moments" in batch:
            posteriors = [DiagonalGaussian(batch[name]) for name in ("image_moments", "masked_moments")]
            z_0, z_masked = (self.config.scale_factor * p.sample(generators) for p in posteriors)
            return z_0, z_masked
        pixels = torch.cat([batch["image"], batch["masked_image"]])
        z_0, z_masked = self.encode_image(pixels, [*generators, *generators]).chunk(2)
        return z_0, z_masked

    def preview(self, batch: dict[str, Any], options: LoggingConfig) -> list[Tensor]:
        """Scenes, masked scenes, exemplars if the model reads them, samples; (N, 3, S, S) in [-1, 1].

        Noise depends on the samples' keys.
        """
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        z_0, z_masked = self.latents(batch, generators)
        sample = self.sample(
            self.c_concat(z_masked, batch["keep_mask"]),
            self.batch_context(batch),
            num_steps=options.sampler_steps,
            guidance_scale=options.guidance_scale,
            generator=generators,
        )
        scene, masked, sample = (self.decode_latents(z) for z in (z_0, z_masked, sample))
        exemplars = [exemplar_to_pixels(batch["exemplar"])] if self.reads_exemplars else []
        return [scene, masked, *exemplars, sample]

    def configure_model(self) -> None:
        """Called by Lightning once processes know each other; nothing to do but for `trainer.strategy: fsdp2`."""
        if self.device_mesh is not None:
            self.unet.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
            blocks = [m for m in self.unet.modules() if isinstance(m, ResBlock | SpatialTransformer)]
            for tower in self.towers:
                if not isinstance(tower, EfficientNetTower):
                    blocks += tower.encoder.layers
            shard(self, self.device_mesh["data_parallel"], blocks, ("training_step", "validation_step", "preview"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        options = self.options
        tower = {p for module in self.towers for p in module.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        parts = [p for p in trained if p not in tower], [p for p in trained if p in tower]
        groups = [{"params": part, "lr": lr} for part, lr in zip(parts, self._lrs(), strict=True) if part]
        optimizer = adamw(options.optimizer)(groups, weight_decay=options.weight_decay)
        return _with_schedule(optimizer, options, self.trainer)

    def _lrs(self) -> tuple[float, float]:
        """Of everything but the tower, and of the tower."""
        return self.options.base_lr, self.options.tower_lr_scale * self.options.base_lr

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.timesteps is not None:
            checkpoint["timesteps"] = self.timesteps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.timesteps is not None and "timesteps" in checkpoint:
            self.timesteps.load_state_dict(checkpoint["timesteps"])
        override_optimizer_hparams(checkpoint, self._lrs(), weight_decay=self.options.weight_decay)


class PerceptualDistance:
    """Mean absolute difference of what a frozen ImageNet classifier sees, over its resolutions.

    No part of the module that uses it: its weights are in no checkpoint and are loaded with the first call.

    Source: Johnson et al. 2016, Eq. 2 (feature reconstruction), here with L1 and EfficientNet-Lite0.
    """

    def __init__(self) -> None:
        self._network: Any = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance (a scalar) of pixels (B, 3, H, W) in [-1, 1]; 0 for equal pictures, differentiable in both."""
        if self._network is None:
            self._network = load_feature_network(x.device)
        stages = (efficientnet_stages(self._network, normalise(127.5 * (pixels + 1.0))) for pixels in (x, y))
        return torch.stack([F.l1_loss(a, b) for a, b in zip(*stages, strict=True)]).mean()


class FirstStageTraining(pl.LightningModule):
    """The autoencoder with its training step: L1 + perceptual + KL, and a patch discriminator if asked for.

    One optimizer serves both sides of the adversarial game: the autoencoder sees the discriminator with
    detached weights, the discriminator sees detached reconstructions, so that neither's gradient reaches
    the other. The adversarial weight is fixed, not balanced by gradient norms.

    An asymmetric decoder is trained by itself: the encoder, and with it what latents mean, is frozen, and there is no
    KL. It is told everything but an irregular hole, or nothing, so that it serves both in edits and without.

    Args:
        config: the run.

    Source: Rombach et al. 2022, appendix G; Esser et al. 2021, Eq. 6 (hinge game); Zhu et al. 2023, section 3.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.options = config.first_stage_training
        self.first_stage_model = model = build_autoencoder(config.model.first_stage)
        self.frozen_encoder = isinstance(model, AsymmetricAutoencoderKL)
        if self.frozen_encoder:
            for part in (model.encoder, model.quant_conv, model.post_quant_conv):
                part.requires_grad_(False)
        # A posterior that starts as wide as the prior drowns colour in noise for the first thousands of steps.
        bias = model.quant_conv.bias
        assert bias is not None
        with torch.no_grad():
            bias.chunk(2)[1].fill_(-6.0)
        self.discriminator = PatchDiscriminator() if self.options.adversarial_weight > 0 else None
        self.perceptual = PerceptualDistance() if self.options.perceptual_weight > 0 else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch, "train")
        check_finite(loss, self, batch_idx)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        self._loss(batch, "val")

    def _loss(self, batch: dict[str, Tensor], split: str) -> Tensor:
        image, options = batch["image"], self.options
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        posterior = self.first_stage_model.encode(image)
        known = (image, self._keep_mask(batch)) if self.frozen_encoder else ()
        reconstruction = self.first_stage_model.decode(posterior.sample(generators), *known).float()
        terms = {"l1": F.l1_loss(reconstruction, image)}
        loss = terms["l1"]
        if not self.frozen_encoder:
            terms["kl"] = posterior.kl().mean()
            loss = loss + options.kl_weight * terms["kl"]
        if options.colour_weight > 0:
            # One value per latent cell and channel, so that detail cannot outvote colour; squared, so that
            # the few saturated cells cannot be outvoted by the many grey ones.
            cell = self.first_stage_model.downsampling
            terms["colour"] = F.mse_loss(F.avg_pool2d(reconstruction, cell), F.avg_pool2d(image, cell))
            loss = loss + options.colour_weight * terms["colour"]
        if self.perceptual is not None and self.global_step >= options.perceptual_start:
            terms["perceptual"] = self.perceptual(reconstruction, image)
            loss = loss + options.perceptual_weight * terms["perceptual"]
        terms["psnr"] = -10.0 * torch.log10(F.mse_loss(reconstruction.clamp(-1, 1), image) / 4.0)
        terms["loss"] = loss
        if self.discriminator is not None and self.global_step >= options.adversarial_start and split == "train":
            frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
            terms["generator"] = -functional_call(self.discriminator, frozen, (reconstruction,)).mean()
            real, fake = self.discriminator(image), self.discriminator(reconstruction.detach())
            terms["discriminator"] = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
            loss = loss + options.adversarial_weight * terms["generator"] + terms["discriminator"]
        self.log_dict(
            {f"{split}/{name}": value.detach() for name, value in terms.items()},
            prog_bar=True,
            sync_dist=split == "val",
            batch_size=len(image),
        )
        return loss

    def _keep_mask(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, 1, H, W), 1 where the decoder is told the picture; it depends on the samples' keys alone."""
        height, width = batch["image"].shape[2:]
        masks = []
        for key in batch["key"].tolist():
            rng = np.random.default_rng(key)
            blind = rng.random() < self.options.p_no_condition
            masks.append(
                torch.zeros(1, height, width) if blind else mask_to_tensor(irregular_hole((width, height), rng))
            )
        return torch.stack(masks).to(batch["image"])

    def preview(self, batch: dict[str, Tensor], options: LoggingConfig) -> list[Tensor]:
        """Scenes and their reconstructions (N, 3, S, S) in [-1, 1]; with all but the holes known, where that counts."""
        model, image, keep_mask = self.first_stage_model, batch["image"], batch["keep_mask"]
        z = model.encode(image).mode()
        return [image, model.decode(z), *([model.decode(z, image, keep_mask)] if self.frozen_encoder else [])]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trained, lr=self.options.base_lr, betas=(0.5, 0.9))
        return _with_schedule(optimizer, self.options, self.trainer)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        override_optimizer_hparams(checkpoint, [self.options.base_lr])


def _with_schedule(
    optimizer: torch.optim.Optimizer, options: TrainingConfig | FirstStageTrainingConfig, trainer: pl.Trainer
) -> OptimizerLRScheduler:
    factor = lr_factor(options.warmup_steps, options.lr_schedule, int(trainer.estimated_stepping_batches))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def adamw(name: str) -> Callable[..., torch.optim.Optimizer]:
    """The AdamW that `training.optimizer` names; they differ in speed and memory, not in what they compute.

    Raises:
        ConfigError: it is not installed.

    Source: Loshchilov and Hutter 2019; adamw_8bit: Dettmers et al. 2022, through bitsandbytes.
    """
    if name == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise ConfigError(
                "training.optimizer: adamw_8bit needs bitsandbytes; pip install bitsandbytes, or use adamw_fused"
            ) from None
        return AdamW8bit
    return partial(torch.optim.AdamW, fused=name == "adamw_fused" or None)


def override_optimizer_hparams(checkpoint: dict[str, Any], lrs: Sequence[float], **settings: float) -> None:
    """Put the config's settings in the place of a checkpoint's, which would silently win on resume.

    Args:
        lrs: of the parameter groups, of which a checkpoint may have fewer.
    """
    for optimizer, scheduler in zip(checkpoint["optimizer_states"], checkpoint["lr_schedulers"], strict=True):
        factors = [lr / base for lr, base in zip(lrs, scheduler["base_lrs"], strict=False)]
        scheduler["base_lrs"] = list(lrs[: len(factors)])
        scheduler["_last_lr"] = [f * last for f, last in zip(factors, scheduler["_last_lr"], strict=True)]
        for group, lr, factor in zip(optimizer["param_groups"], lrs, factors, strict=False):
            group.update(settings, initial_lr=lr, lr=factor * group["lr"])


def uninitialised(model: DiffusionTraining, given: set[str], *, from_scratch: bool) -> tuple[list[str], list[str]]:
    """Parameters that a checkpoint leaves at random initial values, as (acceptable, refused) names.

    Acceptable are the parts that Paint by Example adds; from scratch, everything that is trained.
    Never acceptable is a frozen part with an effect: nothing would ever give it values.

    Args:
        model: with `requires_grad` set as it will be trained.
        given: names that the checkpoint holds.
        from_scratch: whether every trained part may start from random weights.
    """
    harmless = {id(p) for p in model.unet.single_token_dead_parameters()} if model.single_token else set()
    acceptable, refused = [], []
    for name, parameter in model.named_parameters():
        if name not in given:
            from_nothing = from_scratch and (parameter.requires_grad or id(parameter) in harmless)
            (acceptable if name.startswith(NEW_PARTS) or from_nothing else refused).append(name)
    return acceptable, refused
