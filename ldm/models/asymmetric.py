"""A first stage whose decoder also sees the pixels that an edit keeps.

The latent alone cannot bring a picture back; in an edit, though, most of the picture is known. A branch of the decoder
looks at the known pixels, and at every resolution its features take the place of the decoder's own where pixels are
known. The encoder is the plain autoencoder's, so that latents mean the same and a diffusion model need not be changed.

Dimensions: B batch · H, W pixels · h, w latent cells · Z latent channels.
Source: Zhu et al. 2023, "Designing a Better Asymmetric VQGAN for StableDiffusion", section 3.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm.config import AutoencoderConfig
from ldm.models.autoencoder import AutoencoderKL, Decoder


class ConditionEncoder(nn.Module):
    """Known pixels to features as wide as the decoder's, finest first: twice full resolution, then always half."""

    def __init__(self, in_channels: int, widths: list[int]) -> None:
        super().__init__()
        sizes = enumerate(pairwise([in_channels, *widths, widths[-1]]))
        self.layers = nn.Sequential(
            *(
                nn.Conv2d(a, b, 3, padding=1) if i < 2 else nn.Conv2d(a, b, 4, stride=2, padding=1)
                for i, (a, b) in sizes
            )
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for layer in self.layers:
            features.append(layer(x))  # what the decoder gets is not activated, its next block does that
            x = F.relu(features[-1])
        return features


class MaskConditionedDecoder(Decoder):
    """The plain decoder, wider and deeper if the config says so, with the branch for known pixels."""

    def __init__(self, config: AutoencoderConfig) -> None:
        blocks = config.num_res_blocks if config.decoder_res_blocks is None else config.decoder_res_blocks
        config = replace(config, ch=round(config.decoder_width * config.ch), num_res_blocks=blocks)
        super().__init__(config)
        widths = [config.ch * multiplier for multiplier in config.ch_mult]
        self.encoder = ConditionEncoder(config.in_channels * config.patch_size**2, widths)  # the published name

    def forward(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        if image is None or keep_mask is None:
            return super().forward(z)
        kept = (keep_mask > 0.5).to(z.dtype)
        features = self.encoder(F.pixel_unshuffle(image * kept, self.patch_size))
        kept = F.pixel_unshuffle(kept, self.patch_size).amin(1, keepdim=True)  # a square is known if all of it is
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(_known(x, features.pop(), kept))
        x = _known(x, features.pop(), kept)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(x))), self.patch_size)


def _known(x: Tensor, features: Tensor, kept: Tensor) -> Tensor:
    """`features` where pixels are kept, the decoder's x elsewhere."""
    return torch.where(F.interpolate(kept, size=x.shape[2:], mode="nearest") > 0.5, features, x)


class AsymmetricAutoencoderKL(AutoencoderKL):
    """The KL-regularised autoencoder with a decoder that is told what is known.

    The published decoders are as wide as Stable Diffusion's (`decoder_width` 1, `decoder_res_blocks` 2), 1.5 times (3
    blocks) and twice as wide (5 blocks).

    Masks in the authors' code and in `diffusers` are 1 in the hole and 0 where pixels are known; `keep_mask` here is,
    as everywhere in this project, 1 where pixels are known.

    Args:
        config: sizes; see `ldm.config.AutoencoderConfig`.
    """

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__(config, MaskConditionedDecoder(config))

    def decode(self, z: Tensor, image: Tensor | None = None, keep_mask: Tensor | None = None) -> Tensor:
        """Latents to pixels, given what is known of the picture.

        Args:
            z: (B, Z, h, w) unscaled latents.
            image: (B, 3, H, W) in [-1, 1]; what is in the hole is not looked at. None: nothing is known.
            keep_mask: (B, 1, H, W), above 0.5 where `image` is known; with 0 everywhere the result is that of None.

        Returns:
            (B, 3, H, W) pixels, about [-1, 1] and not clamped; known ones about, not exactly, as they were.
        """
        return self.decoder(self.post_quant_conv(z), image, keep_mask)


def build_autoencoder(config: AutoencoderConfig) -> AutoencoderKL:
    """The first stage that a config asks for, with random weights."""
    return (AsymmetricAutoencoderKL if config.decoder == "asymmetric" else AutoencoderKL)(config)
