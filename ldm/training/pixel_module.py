"""Training in pixel space: the diffusion model and the classifier that guides it.

Dimensions: B batch · C channels · S side of the images · T diffusion steps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ldm.config import Config, LoggingConfig
from ldm.diffusion import draw_noise, q_sample, send_together
from ldm.pixel_diffusion import Classifier, Guidance, PixelDiffusion
from ldm.training.denoising import DenoisingTraining


class PixelTraining(PixelDiffusion, DenoisingTraining):
    """The diffusion model of pixels with its training step; keys in checkpoints are those of the plain model."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.model)
        self.set_up(config)

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute each sample's objective (B,), with its timestep (B,); every draw comes from the sample's own key."""
        x_0, options = batch["image"], self.options
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        draws = [self._draw(x_0.shape[1:], generator) for generator in generators]
        t, eps, u = send_together([torch.stack(column) for column in zip(*draws, strict=True)], x_0.device)
        if options.immiscible and not x_0.is_meta:
            cost = torch.cdist(x_0.flatten(1), eps.flatten(1)).cpu()
            eps = eps[torch.from_numpy(linear_sum_assignment(cost)[1]).to(eps.device)]
        labels = torch.where(u[:, 0] < options.p_uncond, -1, batch["label"]) if self.config.unet.num_classes else None
        conditioned = u[:, 1] < options.self_condition_rate if "x_0_pred" in self.config.input_channels else None
        losses = self.loss(
            x_0,
            t,
            eps,
            labels,
            self._low_res(x_0),
            objective=options.objective,
            vlb_weight=options.vlb_weight,
            self_condition=conditioned,
        )
        return losses, t

    def _draw(self, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        t = self.draw_timestep(generator)
        if self.is_edm:  # EDM, Table 1
            t = (self.config.schedule.p_mean + self.config.schedule.p_std * torch.randn((), generator=generator)).exp()
        return t, self.draw_eps(shape, generator), torch.rand(2, generator=generator)

    def _low_res(self, image: Tensor) -> Tensor | None:
        """Reduce images (B, C, S, S) by averaging to an upsampler's input (B, C, s, s)."""
        size = self.config.small_size
        return F.interpolate(image, (size, size), mode="area") if size else None

    def preview(self, batch: dict[str, Any], options: LoggingConfig) -> list[Tensor]:
        """Return images and samples with their labels, (B, C, S, S) in [-1, 1]."""
        image = batch["image"]
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        noise = draw_noise(image.shape, generators, device=image.device)
        labels = batch["label"] if self.config.unet.num_classes else None
        guidance = Guidance(scale=options.guidance_scale if self.options.p_uncond > 0 else 1.0)
        settings: dict[str, Any] = {"sampler": "dpm_solver_pp", "steps": str(options.sampler_steps)}
        sample = self.sample(noise, labels, self._low_res(image), guidance=guidance, **settings)
        return [image.expand(-1, 3, -1, -1), sample.expand(-1, 3, -1, -1)]


class ClassifierTraining(Classifier, DenoisingTraining):
    """The classifier of noisy images with its training step. Source: ADM, section 4 and appendix H."""

    def __init__(self, config: Config) -> None:
        super().__init__(config.model)
        self.set_up(config)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        torch.manual_seed(batch["key"].tolist()[0])
        losses, correct = self.losses(batch)
        self.record("train/loss", losses)
        self.record("train/accuracy", correct)
        return losses.mean()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        losses, correct = self.losses(batch)
        values = {"val/loss": losses.mean(), "val/accuracy": correct.mean()}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(losses))

    def losses(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Compute cross-entropies (B,) on noisy images, and whether the likeliest class is right (B,)."""
        x_0 = batch["image"]
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        draws = [(self.draw_timestep(g), self.draw_eps(x_0.shape[1:], g)) for g in generators]
        t, eps = send_together([torch.stack(column) for column in zip(*draws, strict=True)], x_0.device)
        logits = self(q_sample(x_0, t, eps, self.ac), t)
        losses = F.cross_entropy(logits, batch["label"], reduction="none")
        return losses, (logits.argmax(1) == batch["label"]).float()

    def preview(self, batch: dict[str, Any], options: LoggingConfig) -> list[Tensor]:
        """Return the images, (B, C, S, S) in [-1, 1]."""
        return [batch["image"].expand(-1, 3, -1, -1)]
