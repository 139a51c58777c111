"""Training of the diffusion model: one step, its random draws, its parameters and their optimizer.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels · L context tokens · D token channels ·
T diffusion steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import NEW_PARTS
from ldm.config import Config, LoggingConfig, TrainingConfig
from ldm.diffusion import draw_noise, min_snr_weight, send_together
from ldm.images import exemplar_to_pixels
from ldm.latent_diffusion import LatentDiffusion, add_imagenet_tower
from ldm.models.autoencoder import DiagonalGaussian
from ldm.models.layers import CrossAttention
from ldm.training import fsdp
from ldm.training.ema import trained_parameters
from ldm.training.module import TrainingModule, adamw, override_optimizer_hparams, parts_of

Weights = dict[str, Tensor]


class DiffusionTraining(LatentDiffusion, TrainingModule):
    """The diffusion model with its training step; keys in checkpoints are those of the plain model.

    Trained: UNet, with exemplars also mapper, final norm, projection and null token, and the towers if the config asks
    for it; or some layers alone. Frozen: the rest, and parameters without effect on a one-token context.
    """

    def __init__(self, config: Config) -> None:
        super().__init__(config.model)
        self.options: TrainingConfig = config.training
        loss_aware = self.options.timesteps == "loss_aware"
        self.timesteps = LossAwareTimesteps(config.model.schedule.num_timesteps) if loss_aware else None
        self.unet.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if self.options.compile:
            self.unet.compile()
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

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        torch.manual_seed(batch["key"].tolist()[0])  # dropout: the only draw that is not made per sample
        if self.timesteps is not None:
            self.timesteps.update(self.trainer.log_every_n_steps)  # pyright: ignore[reportAttributeAccessIssue]
        losses, t = self.losses(batch)
        weighted, uniform = losses, torch.ones_like(losses)
        if (gamma := self.options.min_snr_gamma) > 0:
            weighted = min_snr_weight(t, gamma, self.config.parameterization, self.ac) * losses
        if self.timesteps is not None:
            uniform = self.timesteps.weight(t)  # 1 / (T p(t)): the objective of uniform timesteps
            history: Any = self.all_gather((t, weighted.detach()))
            self.timesteps.record(*(values.flatten() for values in history))
        quartile = 4 * t // self.config.schedule.num_timesteps
        self.record("train/loss", uniform * losses)
        for q in range(4):
            self.record(f"train/loss_t{q + 1}of4", losses, quartile == q)
        return (uniform * weighted).mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Log the prediction error, under the EMA weights where EMA is on; the noise is the same in every epoch."""
        losses, _ = self.losses(batch)
        self.log("val/loss", losses.mean(), prog_bar=True, sync_dist=True, batch_size=len(losses))

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
        return self.loss(z_0, z_masked, batch["keep_mask"], context, t, eps), t

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
        draws = [
            (self._draw_timestep(g), self._draw_eps(shape[1:], g), torch.rand((), generator=g)) for g in generators
        ]
        t, eps, u = (torch.stack(column) for column in zip(*draws, strict=True))
        dropped = (u[:1].expand_as(u) if self.options.null_drop == "per_batch" else u) < self.options.p_uncond
        return t, eps, dropped

    def _draw_timestep(self, generator: torch.Generator) -> Tensor:
        T = self.config.schedule.num_timesteps
        if self.timesteps is not None and self.training:
            return self.timesteps.draw(generator)
        if self.options.timesteps == "logit_normal":  # Esser et al. 2024, Eq. 19 with location 0 and scale 1
            return (T * torch.randn((), generator=generator).sigmoid()).long().clamp(max=T - 1)
        return torch.randint(T, (), generator=generator)

    def _draw_eps(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        eps = torch.randn(shape, generator=generator)
        if self.options.offset_noise > 0:  # per channel: Guttenberg 2023 (Diffusion with Offset Noise)
            eps += self.options.offset_noise * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
        return eps

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

    def configure_model(self) -> None:
        """Shard the model if `trainer.strategy` is fsdp2; Lightning calls this once the processes are connected."""
        if self.device_mesh is not None:
            fsdp.shard(self, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        tower = {p for module in self.towers for p in module.parameters()}
        trained = [p for p in self.parameters() if p.requires_grad]
        parts = [p for p in trained if p not in tower], [p for p in trained if p in tower]
        groups = [{"params": part, "lr": lr} for part, lr in zip(parts, self._lrs(), strict=True) if part]
        return self.with_lr_schedule(adamw(self.options.optimizer)(groups, weight_decay=self.options.weight_decay))

    def _lrs(self) -> tuple[float, float]:
        """Return the learning rates of all other parameters and of the towers."""
        return self.options.base_lr, self.options.tower_lr_scale * self.options.base_lr

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.timesteps is not None:
            checkpoint["timesteps"] = self.timesteps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.timesteps is not None and "timesteps" in checkpoint:
            self.timesteps.load_state_dict(checkpoint["timesteps"])
        override_optimizer_hparams(checkpoint, self._lrs(), weight_decay=self.options.weight_decay)


class LossAwareTimesteps:
    """Draws a timestep in proportion to the root mean square of its latest losses, once each has ten of them.

    Multiplied by `weight`, losses keep the mean of uniform draws, with less variance. Source: Nichol & Dhariwal 2021,
    section 3.3 (Eq. 18).
    """

    HISTORY = 10
    UNIFORM = 0.001  # share of the draws that stay uniform

    def __init__(self, num_timesteps: int) -> None:
        losses = torch.zeros(num_timesteps, self.HISTORY, dtype=torch.float64, device="cpu")
        self.load_state_dict({"losses": losses, "counts": torch.zeros(num_timesteps, dtype=torch.long, device="cpu")})

    def draw(self, generator: torch.Generator) -> Tensor:
        """Draw one timestep, () int64, by inverting the cumulative distribution."""
        u = torch.rand((), generator=generator, dtype=torch.float64)
        return torch.searchsorted(self._cumulated, u, right=True).clamp(max=len(self.counts) - 1)

    def weight(self, t: Tensor) -> Tensor:
        """Return 1 / (T p(t)), (B,) float32, for timesteps (B,)."""
        self._weights = self._weights.to(t.device)
        return self._weights[t]

    def record(self, t: Tensor, losses: Tensor) -> None:
        """Note the losses (B,) of timesteps (B,) on any device, from all processes in the same order."""
        self._pending.append(torch.stack((t.to(losses), losses)))

    def update(self, every: int) -> None:
        """Draw by the recorded losses, once there are `every` batches of them: reading waits for the device."""
        if len(self._pending) < max(1, every):
            return
        pending = torch.cat([batch.to(self._pending[-1].device) for batch in self._pending], 1)
        history, counts = self.losses.numpy(), self.counts.numpy()  # the same memory
        for k, loss in pending.T.tolist():
            history[int(k), counts[int(k)] % self.HISTORY] = loss
            counts[int(k)] += 1
        self._pending = []
        self._refresh()

    def _refresh(self) -> None:
        T = len(self.counts)
        p = torch.full((T,), 1.0 / T, dtype=torch.float64, device="cpu")
        if min(self.counts.tolist()) >= self.HISTORY:
            scale = self.losses.square().mean(1).sqrt()  # p(t) ~ sqrt(E[L_t^2])
            p = (1.0 - self.UNIFORM) * scale / scale.sum() + self.UNIFORM / T
        self._cumulated, self._weights = p.cumsum(0), (1.0 / (T * p)).float()

    def state_dict(self) -> dict[str, Tensor]:
        pending = torch.stack([batch.cpu() for batch in self._pending] or [torch.zeros(2, 0)])  # loaded ones are there
        return {"losses": self.losses, "counts": self.counts, "pending": pending}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.losses, self.counts = state["losses"].clone(), state["counts"].clone()
        self._pending = list(state.get("pending", torch.zeros(0, 2, 0)))  # of batches; older checkpoints have none
        self._refresh()
