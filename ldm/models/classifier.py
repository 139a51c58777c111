"""A classifier of noisy images: the encoder of ADM's UNet and a pool. Attribute names are those of published files.

Dimensions: B batch · C channels of the last map · H, W its grid · K classes.
Source: Dhariwal & Nichol 2021 (arXiv:2105.05233), section 4 and appendix H.
"""

from dataclasses import replace
from itertools import repeat

import torch
from torch import Tensor, nn

from ldm.config import ClassifierConfig, UNetConfig
from ldm.models.layers import attention, zero_init
from ldm.models.unet import UNetEncoder


class AttentionPool(nn.Module):
    """Attention over all positions and their mean, of which the mean's answer counts. Source: Radford et al. 2021."""

    def __init__(self, channels: int, grid: int, num_heads: int, num_classes: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.positional_embedding = nn.Parameter(torch.randn(channels, grid**2 + 1) / channels**0.5)
        self.qkv_proj = nn.Conv1d(channels, 3 * channels, 1)
        self.c_proj = nn.Conv1d(channels, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, K)."""
        x = x.flatten(2)
        x = torch.cat([x.mean(-1, keepdim=True), x], dim=-1) + self.positional_embedding.to(x)
        q, k, v = self.qkv_proj(x).transpose(1, 2).chunk(3, dim=-1)
        return self.c_proj(attention(q[:, :1], k, v, self.num_heads).transpose(1, 2))[:, :, 0]


class ClassifierModel(UNetEncoder):
    """Predicts the class of an image (B, in_channels, H, W) from its noisy version at timesteps (B,)."""

    def __init__(self, unet: UNetConfig, config: ClassifierConfig, image_size: int) -> None:
        super().__init__(replace(unet, num_classes=None))
        channels, self.pools_all = self.skip_channels[-1], config.pool.startswith("spatial")
        norm = nn.GroupNorm(unet.norm_groups, channels)
        if config.pool == "attention":
            heads = channels // unet.head_channels if unet.head_channels else unet.num_heads
            pool = AttentionPool(channels, image_size >> (len(unet.level_channels) - 1), heads, config.num_classes)
            self.out = nn.Sequential(norm, nn.SiLU(), pool)
        elif config.pool == "adaptive":
            head = zero_init(nn.Conv2d(channels, config.num_classes, 1))
            self.out = nn.Sequential(norm, nn.SiLU(), nn.AdaptiveAvgPool2d(1), head, nn.Flatten())
        else:
            total, width = sum(self.skip_channels) + channels, 2048
            middle = [nn.ReLU()] if config.pool == "spatial" else [nn.GroupNorm(32, width), nn.SiLU()]
            self.out = nn.Sequential(nn.Linear(total, width), *middle, nn.Linear(width, config.num_classes))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """(B, in_channels, H, W) and (B,) -> logits (B, K)."""
        condition = repeat(self.embed(t, x.dtype)), iter(())
        means = []
        for stage in (*self.input_blocks, self.middle_block):
            x = stage(x, *condition)
            means.append(x.mean((2, 3)))
        return self.out(torch.cat(means, dim=1) if self.pools_all else x)
