"""What the training of diffusion models shares, in latents and in pixels: step, draws of time and noise, optimizer.

Dimensions: B batch · T diffusion steps.
"""

from typing import Any

import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor

from ldm.config import Config, ModelConfig, TrainingConfig
from ldm.diffusion import min_snr_weight
from ldm.training import fsdp
from ldm.training.module import TrainingModule, adamw


class DenoisingTraining(TrainingModule):
    """Base of the training modules: they are a model, with its `unet` and `ac`, too, and compute `losses`."""

    config: ModelConfig
    options: TrainingConfig
    unet: Any
    ac: Any

    def set_up(self, config: Config) -> None:
        """Prepare a model that was just built."""
        self.options = config.training
        loss_aware = self.options.timesteps == "loss_aware"
        self.timesteps = LossAwareTimesteps(config.model.schedule.num_timesteps) if loss_aware else None
        self.unet.to(memory_format=torch.channels_last)
        if self.options.compile:
            self.unet.compile()

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute each sample's loss (B,), with its timestep (B,)."""
        raise NotImplementedError

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

    def draw_timestep(self, generator: torch.Generator) -> Tensor:
        """Draw a timestep, () int64 in [last_level T, T), as the config says: sampling takes none below."""
        if self.timesteps is not None and self.training:
            return self.timesteps.draw(generator)
        T = self.config.schedule.num_timesteps
        last = int(self.config.last_level * T)
        if self.options.timesteps == "logit_normal":  # Esser et al. 2024, Eq. 19 with location 0 and scale 1
            return (last + (T - last) * torch.randn((), generator=generator).sigmoid()).long().clamp(max=T - 1)
        return torch.randint(last, T, (), generator=generator)

    def draw_eps(self, shape: torch.Size, generator: torch.Generator) -> Tensor:
        """Draw the noise of a sample, shape (C, ...)."""
        eps = torch.randn(shape, generator=generator)
        if self.options.offset_noise > 0:  # per channel: Guttenberg 2023 (Diffusion with Offset Noise)
            eps += self.options.offset_noise * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=generator)
        return eps

    def configure_model(self) -> None:
        """Shard the model if `trainer.strategy` is fsdp2; Lightning calls this once the processes are connected."""
        if self.device_mesh is not None:
            fsdp.shard(self, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return self.with_lr_schedule(adamw(self.options.optimizer), weight_decay=self.options.weight_decay)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.timesteps is not None:
            checkpoint["timesteps"] = self.timesteps.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if self.timesteps is not None and "timesteps" in checkpoint:
            self.timesteps.load_state_dict(checkpoint["timesteps"])


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
