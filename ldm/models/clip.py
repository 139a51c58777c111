"""CLIP's towers of images and of text, without its projections.

Dimensions: B batch · S side of an image in pixels · D width · L tokens (of an image: one for all of it, then patches).
Source: Radford et al. 2021. Names and order of the parameters, which checkpoints rely on, are those of transformers 5.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ldm.config import ConfigError, ExemplarEncoderConfig, TextEncoderConfig
from ldm.models.layers import attention


class Block(nn.Module):
    """Pre-norm transformer block; in a text each token sees itself and those before it."""

    def __init__(self, config: ExemplarEncoderConfig | TextEncoderConfig) -> None:
        super().__init__()
        width, inner, self.num_heads = config.hidden_size, config.intermediate_size, config.num_heads
        if width % self.num_heads:
            raise ConfigError(f"got num_heads {self.num_heads} for CLIP, expected a divisor of hidden_size, {width}")
        self.is_causal = isinstance(config, TextEncoderConfig)
        self.self_attn = nn.ModuleDict({f"{name}_proj": nn.Linear(width, width) for name in ("k", "v", "q", "out")})
        self.layer_norm1 = nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, inner), "fc2": nn.Linear(inner, width)})
        self.layer_norm2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.layer_norm1(x)
        q, k, v = (self.self_attn[f"{name}_proj"](normed) for name in "qkv")
        x = x + self.self_attn["out_proj"](attention(q, k, v, self.num_heads, is_causal=self.is_causal))
        hidden = self.mlp["fc1"](self.layer_norm2(x))
        return x + self.mlp["fc2"](hidden * torch.sigmoid(1.702 * hidden))  # GELU as in Hendrycks & Gimpel 2016


class ImageTower(nn.Module):
    """Images (B, 3, S, S), normalised as for CLIP, to (B, L, D). Raises ValueError for another S."""

    def __init__(self, config: ExemplarEncoderConfig) -> None:
        super().__init__()
        width, patch, self.image_size = config.hidden_size, config.patch_size, config.image_size
        self.embeddings: Any = nn.ModuleDict({"patch_embedding": nn.Conv2d(3, width, patch, stride=patch, bias=False)})
        self.embeddings.position_embedding = nn.Embedding((self.image_size // patch) ** 2 + 1, width)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.02)  # as CLIP: 1 would drown the patches
        self.embeddings.class_embedding = nn.Parameter(torch.randn(width) * width**-0.5)
        self.pre_layrnorm = nn.LayerNorm(width)  # spelt so in every checkpoint
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*(Block(config) for _ in range(config.num_layers)))})
        self.post_layernorm = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(f"got an image of {tuple(pixel_values.shape[2:])}, expected {self.image_size} px squared")
        patches = self.embeddings.patch_embedding(pixel_values.to(self.post_layernorm.weight.dtype))
        x = torch.cat([self.embeddings.class_embedding.expand(len(patches), 1, -1), patches.flatten(2).mT], dim=1)
        x = self.pre_layrnorm(x + self.embeddings.position_embedding.weight)
        return self.post_layernorm(self.encoder["layers"](x))  # of CLIP's first token; brings the patches to its scale


class TextTower(nn.Module):
    """Token ids (B, L) int64, L at most the config's `max_length`, to (B, L, D)."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        self.embeddings: Any = nn.ModuleDict()
        for name, num in (("token_embedding", config.vocab_size), ("position_embedding", config.max_length)):
            self.embeddings[name] = nn.Embedding(num, config.hidden_size)
            nn.init.normal_(self.embeddings[name].weight, std=0.02)
        self.encoder = nn.ModuleDict({"layers": nn.Sequential(*(Block(config) for _ in range(config.num_layers)))})
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)

    def forward(self, token_ids: Tensor) -> Tensor:
        positions = self.embeddings.position_embedding.weight[: token_ids.shape[1]]
        return self.final_layer_norm(self.encoder["layers"](self.embeddings.token_embedding(token_ids) + positions))
