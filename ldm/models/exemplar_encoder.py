"""The exemplar encoder: a picture to one token, or to all of the tower's.

Dimensions: B batch · S side of the exemplar in pixels · L tokens (1, or 1 + patches) · D tower width.
Source: Yang et al. 2023 (Paint by Example), section 3.2: the pooled CLIP token alone is passed on,
an information bottleneck that keeps the network from copying the exemplar. All tokens, class and patches (257 for
ViT-L/14), are what its ablation has without that bottleneck.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm.config import ExemplarEncoderConfig
from ldm.evaluation.features import clip_to_efficientnet, efficientnet_stages, load_feature_network
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


class MapperMLP(nn.Module):
    """Feed-forward, four times as wide inside, exact GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(nn.functional.gelu(self.c_fc(x)))


class MapperBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = MapperAttention(width)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = MapperMLP(width)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Mapper(nn.Module):
    """The blocks between the tower's token and the UNet's context."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(MapperBlock(width) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        for block in self.resblocks:
            x = block(x)
        return x


class EfficientNetTower(nn.Module):
    """EfficientNet-Lite0 pooled at every stage, for models too small to wait until a tower has learnt to see.

    The last stage knows what an object is; the first ones know its colours and textures, which a classifier
    discards. The picture itself and each stage give their channels' means over the four quarters and their standard
    deviations over the whole: one vector for all of the picture, and where all tokens are wanted one for each
    of `CELLS` x `CELLS` cells of it.

    Source: Tan & Le 2019 (EfficientNet).
    """

    SIDE = 128  # pixels, of what the network is shown
    SCALES = (0.5, 2.5, 2.5, 2.5, 2.5, 2.5)  # what picture and stages are divided by, for about unit variance
    NUM_FEATURES = 5 * (3 + 16 + 24 + 40 + 112 + 320)
    CELLS = 4  # a side: the last stage has as many positions

    def __init__(self, *, all_tokens: bool = False) -> None:
        super().__init__()
        self.all_tokens = all_tokens
        from efficientnet_lite_pytorch import EfficientNet

        self.network: Any = EfficientNet.from_name("efficientnet-lite0")
        for unused in ("_conv_head", "_bn1", "_fc"):
            delattr(self.network, unused)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S), normalised as for CLIP, to (B, L, NUM_FEATURES), the whole picture's first."""
        # in float32: a CPU cannot antialias in bfloat16
        x = F.interpolate(pixel_values.float(), (self.SIDE, self.SIDE), mode="bilinear", antialias=True)
        x = x.to(pixel_values.dtype)
        x = clip_to_efficientnet(x)
        maps = [x, *efficientnet_stages(self.network, x)]
        maps = [features / scale for features, scale in zip(maps, self.SCALES, strict=True)]
        whole = _pooled(maps)[:, None]
        if not self.all_tokens:
            return whole
        cells = [rearrange(x, "b c (i h) (j w) -> (b i j) c h w", i=self.CELLS, j=self.CELLS) for x in maps]
        return torch.cat([whole, _pooled(cells).unflatten(0, (len(x), -1))], dim=1)

    def imagenet_state(self) -> dict[str, Tensor]:
        """The ImageNet weights under this module's names.

        Raises:
            FeatureError: their package, of the extras `eval` and `train`, is not installed.
        """
        given = load_feature_network().state_dict()
        return {name: given[name.removeprefix("network.")] for name in self.state_dict()}


def _pooled(maps: list[Tensor]) -> Tensor:
    """Means over four quarters and deviations over the whole of maps (B, C, H, W), as (B, 5 C)."""
    means = [F.adaptive_avg_pool2d(x, 2).flatten(1) for x in maps]
    return torch.cat([*means, *(x.std((2, 3), correction=0) for x in maps)], dim=1)


def _clip_tower(config: ExemplarEncoderConfig) -> nn.Module:
    # A second of import that nobody should pay who builds no such tower.
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_heads,
            image_size=config.image_size,
            patch_size=config.patch_size,
            projection_dim=config.hidden_size,  # CLIP's own projection is not used
        )
    )


class ExemplarEncoder(nn.Module):
    """Image tower, mapper and final norm.

    Args:
        config: sizes; see `ldm.config.ExemplarEncoderConfig`.
    """

    def __init__(self, config: ExemplarEncoderConfig) -> None:
        super().__init__()
        self.config = config
        if config.tower == "clip":
            self.transformer: Any = _clip_tower(config)
        else:
            self.transformer = EfficientNetTower(all_tokens=config.tokens == "all")
            self.reduce = nn.Linear(EfficientNetTower.NUM_FEATURES, config.hidden_size)
        self.mapper = Mapper(config.hidden_size, config.mapper_layers)
        self.final_ln = nn.LayerNorm(config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, S, S), normalised as for CLIP, to (B, L, D)."""
        return self.tokens(self.features(pixel_values))

    def features(self, pixel_values: Tensor) -> Tensor:
        """What the tower makes of exemplars (B, 3, S, S), normalised as for CLIP: (B, L, F)."""
        if self.config.tower != "clip":
            return self.transformer(pixel_values)
        tower = self.transformer(pixel_values=pixel_values)
        if self.config.tokens == "pooled":
            return tower.pooler_output[:, None]
        # CLIP norms its class token alone; with the same norm the patches are on its scale, and it is first
        return self.transformer.post_layernorm(tower.last_hidden_state)

    def tokens(self, features: Tensor) -> Tensor:
        """The tower's features to (B, L, D), past mapper and norm.

        Args:
            features: (B, L, F). With one token to pass on, those of all tokens serve, too: the first is the pooled one.

        Raises:
            ValueError: all tokens are to be passed on, and there is one.
        """
        if self.config.tokens == "pooled":
            features = features[:, :1]
        elif features.shape[1] == 1:
            raise ValueError(
                "got features of one token, expected all tokens: they were cached for tokens: pooled; "
                "write them again with scripts/cache_latents.py"
            )
        if self.config.tower != "clip":
            features = self.reduce(features)
        return self.final_ln(self.mapper(features))

    def restore_position_ids(self, device: torch.device | str) -> None:
        """Recreate CLIP's index buffer, which no file holds, after a build on the meta device."""
        if self.config.tower != "clip":
            return
        embeddings = self.transformer.embeddings
        position_ids = torch.arange(embeddings.num_positions, device=device)[None]
        embeddings.register_buffer("position_ids", position_ids, persistent=False)
