"""Patch discriminator for training the first stage.

Source: Isola et al. 2017 (pix2pix), section 3.2.2; group norm in place of batch norm, so that the verdict on
a picture does not depend on its batch.
"""

from __future__ import annotations

from torch import nn


class PatchDiscriminator(nn.Sequential):
    """(B, 3, H, W) pixels in [-1, 1] to (B, 1, H / 8 - 2, W / 8 - 2) logits, one per patch; positive = real."""

    def __init__(self, channels: int = 64, num_layers: int = 3) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        width = channels
        for layer in range(1, num_layers + 1):
            wider = channels * min(2**layer, 8)
            stride = 2 if layer < num_layers else 1
            layers += [nn.Conv2d(width, wider, 4, stride, padding=1), nn.GroupNorm(32, wider), nn.LeakyReLU(0.2)]
            width = wider
        super().__init__(*layers, nn.Conv2d(width, 1, 4, padding=1))
