"""Training of the first stage: the autoencoder's losses, its discriminator and perceptual distance.

Dimensions: B batch · H, W pixels.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call

from ldm.checkpoint.convert import autoencoder_keys
from ldm.checkpoint.io import CheckpointError
from ldm.checkpoint.keys import CONDITION_ENCODER, FIRST_STAGE
from ldm.config import Config, FirstStageTrainingConfig, LoggingConfig
from ldm.data.masks import irregular_hole
from ldm.diffusion import send
from ldm.images import mask_to_tensor
from ldm.models.autoencoder import AutoencoderKL
from ldm.models.efficientnet import efficientnet_stages, load_feature_network
from ldm.training.module import TrainingModule

Weights = dict[str, Tensor]


class FirstStageTraining(TrainingModule):
    """The autoencoder with its training step: L1 + perceptual + KL, and a patch discriminator if asked for.

    One optimizer serves both sides of the adversarial game; neither side's gradient reaches the other. The adversarial
    weight is fixed, not balanced by gradient norms. An asymmetric decoder, the decoder of a linear encoder, or with
    `trainable: decoder` any other is trained alone, with a frozen encoder and no KL: latents stay, and diffusion models
    of them. The asymmetric one reads either all pixels outside an irregular hole or none, so that it works with and
    without them.

    Source: Rombach et al. 2022, appendix G; Esser et al. 2021, Eq. 6 (hinge game); Zhu et al. 2023, section 3.
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.options: FirstStageTrainingConfig = config.first_stage_training
        model = AutoencoderKL(config.model.first_stage)
        self.first_stage_model = model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        self.asymmetric = config.model.first_stage.decoder == "asymmetric"
        self.linear_encoder = config.model.first_stage.encoder == "linear"
        self.frozen_encoder = self.asymmetric or self.linear_encoder or self.options.trainable == "decoder"
        if self.frozen_encoder:
            for part in (model.encoder, model.quant_conv, model.post_quant_conv):
                part.requires_grad_(False)
        else:  # a posterior that starts as wide as the prior drowns colour in noise for the first thousands of steps
            model.start_posterior(-6.0)
        self.discriminator = PatchDiscriminator() if self.options.adversarial_weight > 0 else None
        self.perceptual = PerceptualDistance() if self.options.perceptual_weight > 0 else None

    def starting_weights(self, state: Weights, source: str | None, from_scratch: bool) -> tuple[Weights, list[str]]:
        """Do as `DiffusionTraining.starting_weights`; without a checkpoint the autoencoder starts at random.

        A decoder that is trained alone needs its encoder, unless that is linear. An asymmetric one that is wider or
        deeper than the checkpoint's starts at random.
        """
        if source is None and self.frozen_encoder and not self.linear_encoder:
            raise CheckpointError("no checkpoint given: pass the model of the decoder as --pretrained-model")
        if source is None:
            return {}, [FIRST_STAGE]
        state = {FIRST_STAGE + name: tensor for name, tensor in autoencoder_keys(state).items()}
        if not self.asymmetric:
            return state, []
        decoder, branch = FIRST_STAGE + "decoder.", FIRST_STAGE + CONDITION_ENCODER
        plain = {n: x for n, x in self.state_dict().items() if n.startswith(decoder) and not n.startswith(branch)}
        if all(name in state and state[name].shape == x.shape for name, x in plain.items()):
            return state, [branch]
        return {name: tensor for name, tensor in state.items() if not name.startswith(decoder)}, [decoder]

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, terms = self.losses(batch)
        for name, value in terms.items():
            self.record(f"train/{name}", value)
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        _, terms = self.losses(batch, adversarial=False)
        values = {f"val/{name}": value for name, value in terms.items()}
        self.log_dict(values, prog_bar=True, sync_dist=True, batch_size=len(batch["image"]))

    def losses(self, batch: dict[str, Tensor], *, adversarial: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the loss that is minimised, and its detached terms by name; `loss` among them is without the game.

        A sample's key seeds its posterior noise and mask. `adversarial` lets the discriminator play from its step on.
        """
        image, options = batch["image"], self.options
        generators = [torch.Generator().manual_seed(key) for key in batch["key"].tolist()]
        posterior = self.first_stage_model.encode(image)  # pixels [-1, 1] => q(z | x)
        known = (image, self.keep_masks(batch)) if self.asymmetric else ()
        reconstruction = self.first_stage_model.decode(posterior.sample(generators), *known).float()  # => pixels
        terms = {"l1": F.l1_loss(reconstruction, image)}
        loss = terms["l1"]
        if not self.frozen_encoder:
            terms["kl"] = posterior.kl().mean()
            loss = loss + options.kl_weight * terms["kl"]
        if options.colour_weight > 0:
            # One value per latent cell and channel: detail cannot outvote colour. Squared: the many grey cells cannot
            # outvote the few saturated ones.
            cell = self.first_stage_model.downsampling
            terms["colour"] = F.mse_loss(F.avg_pool2d(reconstruction, cell), F.avg_pool2d(image, cell))
            loss = loss + options.colour_weight * terms["colour"]
        if self.perceptual is not None and self.global_step >= options.perceptual_start:
            terms["perceptual"] = self.perceptual(reconstruction, image).mean()
            loss = loss + options.perceptual_weight * terms["perceptual"]
        terms["psnr"] = -10.0 * torch.log10(F.mse_loss(reconstruction.clamp(-1, 1), image) / 4.0)
        terms["loss"] = loss
        D = self.discriminator
        if adversarial and D is not None and self.global_step >= options.adversarial_start:
            constant = {name: p.detach() for name, p in D.named_parameters()}
            terms["generator"] = -functional_call(D, constant, (reconstruction,)).mean()  # -E D(x_rec)
            real, fake = D(image), D(reconstruction.detach())
            # 1/2 (E max(0, 1 - D(x)) + E max(0, 1 + D(x_rec)))
            terms["discriminator"] = 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())
            loss = loss + options.adversarial_weight * terms["generator"] + terms["discriminator"]
        return loss, {name: value.detach() for name, value in terms.items()}

    def keep_masks(self, batch: dict[str, Tensor]) -> Tensor:
        """Draw from the samples' keys the masks (B, 1, H, W) of pixels that an asymmetric decoder reads, 1 = keep."""
        height, width = batch["image"].shape[2:]
        masks = torch.zeros(len(batch["key"]), 1, height, width)
        for mask, key in zip(masks, batch["key"].tolist(), strict=True):
            rng = np.random.default_rng(key)
            if rng.random() >= self.options.p_no_condition:
                mask.copy_(mask_to_tensor(irregular_hole((width, height), rng)))
        return send(masks, batch["image"].device).to(batch["image"].dtype)

    def preview(self, batch: dict[str, Tensor], options: LoggingConfig) -> list[Tensor]:
        """Return images and reconstructions, those of an asymmetric decoder without and with pixels; (B, 3, H, W)."""
        model, image = self.first_stage_model, batch["image"]
        z = model.encode(image).mean
        known = [batch["keep_mask"]] if self.asymmetric and "keep_mask" in batch else []  # plain images have none
        return [image, model.decode(z), *(model.decode(z, image, keep_mask) for keep_mask in known)]

    def configure_optimizers(self) -> OptimizerLRScheduler:
        # The published momenta are for the game; without it so short a memory of squares makes wide networks diverge.
        return self.with_lr_schedule(torch.optim.Adam, betas=(0.5, 0.9) if self.discriminator else (0.9, 0.99))


class PatchDiscriminator(nn.Sequential):
    """(B, 3, H, W) pixels in [-1, 1] to (B, 1, H / 8 - 2, W / 8 - 2) logits, one per patch; positive = real.

    Source: Isola et al. 2017 (pix2pix), section 3.2.2, with group norm instead of batch norm: the logits of an image do
    not depend on its batch.
    """

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 64, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for width, wider, stride in ((64, 128, 2), (128, 256, 2), (256, 512, 1)):
            layers += [nn.Conv2d(width, wider, 4, stride, padding=1), nn.GroupNorm(32, wider), nn.LeakyReLU(0.2)]
        super().__init__(*layers, nn.Conv2d(512, 1, 4, padding=1))


class PerceptualDistance:
    """Mean absolute difference of a frozen ImageNet classifier's features, over its resolutions.

    Deliberately not an `nn.Module`: its weights never enter a checkpoint. They are loaded at the first call.

    Source: Johnson et al. 2016, Eq. 2 (feature reconstruction), here with L1 and EfficientNet-Lite0.
    """

    network: Any = None

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the distances (B,) of pixels (B, 3, H, W) in [-1, 1], differentiable in both; 0 if equal."""
        self.network = self.network or load_feature_network(x.device)
        stages = (efficientnet_stages(self.network, pixels)[1:] for pixels in (x, y))
        return torch.stack([(a - b).abs().flatten(1).mean(1) for a, b in zip(*stages, strict=True)]).mean(0)
