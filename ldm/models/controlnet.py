"""ControlNet: a copy of the UNet's encoder that reads a picture (edges, depth, a pose …) and steers the UNet with it.

Dimensions: B batch · H, W pixels · h, w latent cells (H / 8, W / 8) · L context tokens · D token channels.
Source: Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from torch import Tensor, nn

from ldm.config import UNetConfig
from ldm.models.layers import zero_init
from ldm.models.unet import UNetEncoder

HINT_CHANNELS = (16, 32, 96, 256)  # of the picture on its way to the latent grid
HINT_DOWNSAMPLING = 2 ** (len(HINT_CHANNELS) - 1)


class ControlNet(UNetEncoder):
    """Residuals for the UNet's skip connections and middle, from a picture.

    Args:
        config: of the UNet that is steered. The copy sees x_t alone, also where that UNet sees more channels: control
            networks are trained beside Stable Diffusion.

    Raises:
        ConfigError: as for the UNet.
    """

    def __init__(self, config: UNetConfig) -> None:
        super().__init__(replace(config, in_channels=config.out_channels))
        hint: list[nn.Module] = [nn.Conv2d(3, HINT_CHANNELS[0], 3, padding=1), nn.SiLU()]
        for narrow, wide in pairwise(HINT_CHANNELS):
            hint += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.SiLU()]
            hint += [nn.Conv2d(narrow, wide, 3, padding=1, stride=2), nn.SiLU()]
        self.input_hint_block = nn.Sequential(
            *hint, zero_init(nn.Conv2d(HINT_CHANNELS[-1], config.model_channels, 3, padding=1))
        )
        self.zero_convs = nn.ModuleList(nn.Sequential(_zero_conv(width)) for width in self.skip_channels)
        self.middle_block_out = nn.Sequential(_zero_conv(self.skip_channels[-1]))

    def encode_hint(self, picture: Tensor) -> Tensor:
        """The picture, (B, 3, H, W) in [0, 1], on the latent grid: (B, C, h, w), the same at every step."""
        return self.input_hint_block(picture)

    def forward(self, x_t: Tensor, t: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """The residuals, from the finest to the middle, as `UNetModel.forward` takes them.

        Args:
            x_t: (B, 4, h, w), the noisy latent alone.
            t: (B,) timesteps. context: (B, L, D).
            hint: (B or 1, C, h, w) from `encode_hint`.
        """
        embedding = self.embed(t, context.dtype)
        x, residuals = x_t, []
        for i, (stage, zero_conv) in enumerate(zip(self.input_blocks, self.zero_convs, strict=True)):
            x = stage(x, embedding, context)
            if i == 0:
                x = x + hint
            residuals.append(zero_conv(x))
        return [*residuals, self.middle_block_out(self.middle_block(x, embedding, context))]


def _zero_conv(channels: int) -> nn.Module:
    return zero_init(nn.Conv2d(channels, channels, 1))
