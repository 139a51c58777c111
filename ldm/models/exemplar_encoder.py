"""The exemplar encoder: an image to one token, or to all of the tower's.

Dimensions: B batch · S side of the exemplar in pixels · L tokens (1, or 1 + patches) · D tower width.
Source: Yang et al. 2023 (Paint by Example), section 3.2. Only the pooled CLIP token reaches the UNet, a bottleneck that
keeps the network from copying the exemplar. The paper's ablation without it uses all tokens (257 for ViT-L/14).
"""

from collections import OrderedDict
from typing import Any

from torch import Tensor, nn

from ldm.config import ExemplarEncoderConfig
from ldm.models.clip import ImageTower
from ldm.models.efficientnet import EfficientNetTower
from ldm.models.layers import attention


class MapperAttention(nn.Module):
    """Single-head self-attention with one fused projection (rows: queries, keys, values)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_qkv = nn.Linear(width, 3 * width)
        self.c_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.c_qkv(x).chunk(3, dim=-1)
        return self.c_proj(attention(q, k, v, num_heads=1))


class MapperBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = MapperAttention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, 4 * width), gelu=nn.GELU(), c_proj=nn.Linear(4 * width, width))
        )
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class ExemplarEncoder(nn.Module):
    """Image tower, mapper and final norm."""

    def __init__(self, config: ExemplarEncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.tower == "clip":
            self.transformer: Any = ImageTower(config)
        else:
            self.transformer = EfficientNetTower(all_tokens=config.tokens == "all")
            self.reduce = nn.Linear(EfficientNetTower.NUM_FEATURES, config.hidden_size)
        blocks = nn.Sequential(*(MapperBlock(config.hidden_size) for _ in range(config.mapper_layers)))
        self.mapper = nn.Sequential(OrderedDict(resblocks=blocks))
        self.final_ln = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Encode exemplars (B, 3, S, S), normalised as for CLIP, as (B, L, D)."""
        return self.tokens(self.features(pixel_values))

    def features(self, pixel_values: Tensor) -> Tensor:
        """Compute the tower's features (B, L, F) of exemplars (B, 3, S, S), normalised as for CLIP."""
        tokens = self.transformer(pixel_values)
        return tokens[:, :1] if self.config.tokens == "pooled" else tokens

    def tokens(self, features: Tensor) -> Tensor:
        """Map the tower's features (B, L, F) to tokens (B, L, D): mapper, then norm; of the first one if `pooled`.

        Raises ValueError for features of one token, from a cache, where the config asks for all.
        """
        if self.config.tokens == "pooled":
            features = features[:, :1]
        elif features.shape[1] == 1:
            raise ValueError("got cached features of one token, expected all; run scripts/cache_latents.py again")
        if self.config.tower != "clip":
            features = self.reduce(features)
        return self.final_ln(self.mapper(features))
