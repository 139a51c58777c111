"""Layers shared by the networks. Attribute names are those of the published checkpoint.

Dimensions: B batch · C channels · H, W grid · N = H·W positions · L context tokens · D token channels.
"""

import math
from collections import OrderedDict
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ldm.config import UNetConfig


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Embed timesteps (B,), integer or fractional, by sinusoids, cosines first: (B, dim) float32 in [-1, 1].

    Source: Ho et al. 2020 (DDPM), section 4, after Vaswani et al. 2017.
    """
    half = dim // 2
    # frequency_i = 10000^(-i / half), in the published code's order of operations: one unit in the last place of a
    # frequency moves the angle at t = 999 by 6e-5
    exponents = -math.log(10_000.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * exponents.exp()[None]
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int, *, is_causal: bool = False) -> Tensor:
    """Multi-head scaled dot-product attention: (B, N, C), (B, L, C), (B, L, C) -> (B, N, C)."""
    q, k, v = (rearrange(x, "b n (h d) -> b h n d", h=num_heads) for x in (q, k, v))
    attend = partial(F.scaled_dot_product_attention, is_causal=is_causal)
    if q.dtype == torch.bfloat16 and q.device.type == "cpu" and q.requires_grad:
        with torch.autocast("cpu", enabled=False):  # the backward pass is many times slower in bfloat16
            mixed = attend(q.float(), k.float(), v.float()).to(q.dtype)
    else:
        mixed = attend(q, k, v)
    return rearrange(mixed, "b h n d -> b n (h d)")


class CrossAttention(nn.Module):
    """Attention from N positions to the keys and values of L context tokens, or else to the positions themselves."""

    def __init__(self, config: UNetConfig, dim: int, context_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, dim, bias=False) for d in (dim, context_dim, context_dim))
        self.to_out = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(config.dropout))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, L, C) twice."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x: Tensor, *keys_values: Tensor) -> Tensor:
        """(B, N, C), keys and values (B, L, C) -> (B, N, C)."""
        q = self.to_q(x)
        k, v = keys_values or self.keys_values(x)
        return self.to_out(attention(q, k, v, self.num_heads))


class GEGLU(nn.Module):
    """Gated GELU, value first, gate second. Source: Shazeer 2020 (GLU variants), Eq. 6."""

    def __init__(self, dim_in: int, dim_out: int) -> None:
        super().__init__()
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)  # (x V + c) GELU(x W + b)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, feed-forward, each pre-normed and residual."""

    def __init__(self, config: UNetConfig, dim: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(config, dim, dim)
        feed_forward = nn.Sequential(GEGLU(dim, 4 * dim), nn.Dropout(config.dropout), nn.Linear(4 * dim, dim))
        self.ff = nn.Sequential(OrderedDict(net=feed_forward))
        self.attn2 = CrossAttention(config, dim, config.context_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(dim) for _ in range(3))

    def project(self, context: Tensor) -> tuple[Tensor, ...]:
        """Compute what is read of the context (B, L, D): keys and values; of one token the attention's result."""
        if context.shape[1] == 1:  # a softmax over one key is 1: softmax(q k) v = v, equal at every position
            return (self.attn2.to_out(self.attn2.to_v(context)),)
        return self.attn2.keys_values(context)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C), (B, L, D) or the stack of what `project` made of it -> (B, N, C)."""
        x = x + self.attn1(self.norm1(x))
        first, *more = self.project(context) if context.ndim == 3 else context.unbind()
        x = x + (self.attn2(self.norm2(x), first, *more) if more else first)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with a residual around them."""

    def __init__(self, config: UNetConfig, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(config.norm_groups, channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        blocks = (TransformerBlock(config, channels) for _ in range(config.transformer_depth))
        self.transformer_blocks = nn.ModuleList(blocks)
        self.proj_out = zero_init(nn.Conv2d(channels, channels, 1))

    def project(self, context: Tensor) -> Tensor:
        """Compute what the blocks read of the context: (B, L, D) -> (blocks, 1 or 2, B, L, C)."""
        blocks: Any = self.transformer_blocks
        return torch.stack([torch.stack(block.project(context)) for block in blocks])

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, C, H, W), (B, L, D) or what `project` made of it -> (B, C, H, W)."""
        height = x.shape[2]
        tokens = rearrange(self.proj_in(self.norm(x)), "b c h w -> b (h w) c")
        for i, block in enumerate(self.transformer_blocks):
            tokens = block(tokens, context if context.ndim == 3 else context[i])
        return x + self.proj_out(rearrange(tokens, "b (h w) c -> b c h w", h=height))


class AttentionBlock(nn.Module):
    """Self-attention over the positions of a feature map, with a residual. Source: ADM, section 3."""

    def __init__(self, channels: int, num_heads: int, norm_groups: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)  # queries, keys, values of all heads, in this order
        self.proj_out = zero_init(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        q, k, v = self.qkv(self.norm(x).flatten(2)).transpose(1, 2).chunk(3, dim=-1)
        hidden = attention(q, k, v, self.num_heads).transpose(1, 2)
        return x + self.proj_out(hidden).unflatten(2, x.shape[2:])


class Upsample(nn.Module):
    """Double the grid: nearest neighbour, then a convolution of `channels`, if any."""

    def __init__(self, channels: int = 0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def zero_init(module: nn.Module) -> nn.Module:
    """Set every parameter to zero: a residual branch that starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class Uninitialised(TorchFunctionMode):
    """Within it modules get no initial values, and nothing is drawn: for weights that a file replaces.

    Memory that nobody wrote to takes no room; the meta device would do as well, but takes a second to import SymPy.
    """

    SKIPPED: ClassVar = {"fill_", "zero_"} | {name for name in vars(nn.init) if name.endswith("_")}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in self.SKIPPED:
            return args[0] if args else kwargs["tensor"]
        return (torch.empty if func is torch.randn else func)(*args, **kwargs or {})
